"""Delayed scaling for FP8: scales of the steps before, so that no product waits for the largest of its own numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kpx.config import Config, resolve
from kpx.errors import ConfigError, InputError
from kpx.hardware.target import Target
from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.ir.module import func, ir, stablehlo
from kpx.passes import composites
from kpx.passes.composites import Device
from kpx.passes.lowered_precision import sites, tell_apart
from kpx.precision.products import How, delayed_product


def delayed(
    fun: Callable, *, history: int = 16, target: str | Target | None = None, config: Config | None = None
) -> Delayed:
    """A function whose products are in FP8 with delayed scaling; the largest numbers seen are a state that goes through it.

    `step = delayed(train_step)`, `state = step.init(*args)`, then `outputs, state = step(state, *args)`. A factor's scale is
    made of the largest number that it had in the last calls (its own, where there was none but zeros); numbers beyond it become
    the largest that FP8 has. Forward factors are e4m3, gradients e5m2. Products of stacks are bf16.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433, and NVIDIA's Transformer Engine.

    Args:
        fun: a function of pytrees of arrays that computes gradients itself, as a training step does.
        history: of how many calls.
        target: as for `kpx.jit`.
        config: as for `kpx.jit`; its `precision` is of what is not FP8, bf16 by default.

    Raises:
        ConfigError: `history` is less than one.
    """
    if isinstance(history, bool) or not isinstance(history, int) or history < 1:
        raise ConfigError(f"`history={history!r}` is not a number of calls. Use 1 or more; 16 is usual.")
    return Delayed(fun, history, target, resolve(config))


class Delayed:
    """See `delayed`."""

    def __init__(self, fun: Callable, history: int, target: str | Target | None, config: Config):
        functools.update_wrapper(self, fun)
        self._fun, self._history = fun, history
        self._target = Target.resolve(target, may_be_absent=True)
        self._config = config
        self._made: dict[Any, tuple[Callable, Any, int]] = {}

    def init(self, *args, **kwargs) -> jax.Array:
        """The state before the first call with such arguments: zeros, f32 `[products, 2, history]`."""
        return jnp.zeros((self._of(args, kwargs)[2], 2, self._history), jnp.float32)

    def __call__(self, state: jax.Array, *args, **kwargs) -> tuple[Any, jax.Array]:
        """The outputs, and the state after this call.

        Raises:
            InputError: the state is another function's.
        """
        run, tree, count = self._of(args, kwargs)
        if getattr(state, "shape", None) != (count, 2, self._history):
            raise InputError(
                f"The state has shape {getattr(state, 'shape', None)}, and this function's is {(count, 2, self._history)}. "
                "Begin with `.init(*args)`."
            )
        *outputs, state = run(*jax.tree.leaves((args, kwargs)), state)
        return jax.tree.unflatten(tree, outputs), state

    def compile(self, *args, **kwargs) -> Any:
        """A `kpx.Compiled` of the function of the flat arguments and the state, for a look at it."""
        from kpx.api import compile as compile_function

        run, _, count = self._of(args, kwargs)
        state = jax.ShapeDtypeStruct((count, 2, self._history), jnp.float32)
        return compile_function(run, *jax.tree.leaves((args, kwargs)), state)

    def _of(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Callable, Any, int]:
        leaves, tree = jax.tree.flatten((args, kwargs))
        key = tree, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        if key not in self._made:
            self._made[key] = self._make(leaves, tree)
        return self._made[key]

    def _make(self, leaves: Sequence[Any], tree: Any) -> tuple[Callable, Any, int]:
        from kpx.api import jit
        from kpx.runtime.build import lower_for

        trees = []

        def flat(*arrays):
            args, kwargs = jax.tree.unflatten(tree, arrays)
            outputs, out_tree = jax.tree.flatten(self._fun(*args, **kwargs))
            trees.append(out_tree)
            return outputs

        lowered = lower_for(self._target, jax.jit(flat, keep_unused=True), *leaves)
        module = m.copy(lowered.compiler_ir("stablehlo"))
        m.inline_calls(module)
        target = self._target
        count = _rewrite(module, self._history, Device(target.platform, target.device_kind), target.features)
        config = dataclasses.replace(self._config, precision=self._config.precision or "bf16")
        return jit(call_module(module), target=self._target, config=config), trees[0], count


def _rewrite(module: ir.Module, history: int, device: Device, units: frozenset[str]) -> int:
    """Puts FP8 products with delayed scaling in the place of products, in place; gives how many."""
    found = sites(module)
    tell_apart(module, found)
    found = [
        s for s in found if s.kind == "product" and isinstance(s.op, stablehlo.DotGeneralOp) and not _is_stack(s.op)
    ]
    largest = []
    with module.context, ir.Location.unknown():
        state = m.add_argument(module, m.tensor([len(found), 2, history], "f32"))
        for i, site in enumerate(found):
            y, seen = _call(module, site.op, state, _function(site.op, i, _how(site.gradient, units)), device)
            site.op.results[0].replace_all_uses_with(y)
            site.op.operation.erase()
            largest.append(seen)
        m.add_results(module, [_advanced(module, state, largest)])
        m.inline_calls(module)
    return len(found)


def _how(gradient: int | None, units: frozenset[str]) -> How:
    kind = "fnuz" if "fp8_fnuz" in units else ""
    first, second = (("e5m2" if factor == gradient else "e4m3") + kind for factor in (0, 1))
    return How("fp8", (first, second), native=bool({"fp8", "fp8_fnuz"} & units))


def _is_stack(op: Any) -> bool:
    return bool(list(stablehlo.DotDimensionNumbers(op.dot_dimension_numbers).lhs_batching_dimensions))


def _function(op: Any, index: int, how: How) -> Callable:
    numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    contracting = tuple(numbers.lhs_contracting_dimensions), tuple(numbers.rhs_contracting_dimensions)
    dtype = m.element_dtype(m.tensor_type(op.result))

    def computed(lhs, rhs, state):
        y, largest = delayed_product(lhs, rhs, state[index], contracting=contracting, how=how)
        return y.astype(dtype), largest

    return computed


def _call(module: ir.Module, op: Any, state: Any, function: Callable, device: Device) -> tuple[Any, Any]:
    operands = [op.lhs, op.rhs, state]
    symbol = composites.spliced(
        module, "kpx_delayed_product", function, tuple(map(composites.struct, operands)), device, 0.0
    )
    with ir.InsertionPoint(op), op.location:
        call = func.CallOp(list(m.functions(module)[symbol].type.results), ir.FlatSymbolRefAttr.get(symbol), operands)
    return call.results[0], call.results[1]


def _advanced(module: ir.Module, state: Any, largest: Sequence[Any]) -> Any:
    """The state with the largest numbers of this call first, the oldest gone."""
    block = m.entry_block(m.main(module))
    count, two, history = m.shape(state)
    with ir.InsertionPoint(block.operations[len(block.operations) - 1]):
        if not largest:
            return state
        rows = [m.reshape(v, [1, two, 1]) for v in largest]
        newest = rows[0] if len(rows) == 1 else stablehlo.concatenate(rows, 0)
        kept = m.slice_(state, [0, 0, 0], [count, two, history - 1], [1, 1, 1])
        return newest if history == 1 else stablehlo.concatenate([newest, kept], 2)
