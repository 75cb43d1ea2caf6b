"""A model's products on data: what they read, what rounding costs each, and what the model gives when some are rounded."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx.bridges import registry
from kpx.errors import InputError
from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.ir.module import func, ir, stablehlo
from kpx.ir.rewrite import Fuel, Report, apply_rewrites
from kpx.ir.split import mark_weights
from kpx.kernels.selection import RULES
from kpx.passes import canonicalize, composites
from kpx.passes.composites import Device
from kpx.passes.lowered_precision import Site, sites
from kpx.precision.products import Emulated

_DEVICE = Device("cpu", "cpu", True, RULES)


@dataclass(frozen=True)
class Place:
    """A product, or what is computed at a place beside products by weights (attention).

    Attributes:
        path: where in the model, by names.
        nth: of the products by weights there; None: all that is not one.
        sizes: rows, columns, inner size; of the largest batch.
        flops: of a batch, a multiplication and an addition counted as two.
    """

    path: str
    nth: int | None
    sizes: tuple[int, int, int]
    flops: int

    @property
    def key(self) -> tuple[str, int | None]:
        """What tells it from others."""
        return self.path, self.nth

    @property
    def by_weight(self) -> bool:
        """Whether it is a product by a weight."""
        return self.nth is not None

    def __str__(self):
        return f"{self.path or '(no name)'}{'' if not self.nth else f' #{self.nth}'}"


class Study:
    """A model with batches of inputs, as modules whose products can be looked into.

    Attributes:
        batches: the inputs.
        places: the model's products, in order.
        outputs: what the model gives for each batch: a list of NumPy arrays.
    """

    def __init__(self, model: Any, batches: Iterable[Any]):
        """Traces the model for each batch's shapes.

        Raises:
            InputError: this is not a model, there is no batch, or one does not fit the model.
        """
        self._weights, self._function = functional(model)
        self.batches = [_Batch.of(batch) for batch in batches]
        if not self.batches:
            raise InputError("There is no batch. Pass a list of inputs: tensors or arrays, tuples or dicts of them.")
        self._modules: dict[Any, tuple[Any, Any]] = {}
        found: dict[Any, Place] = {}
        for batch in self.batches:
            for place, _ in _grouped(sites(self._module(batch))):
                known = found.setdefault(place.key, place)
                if place.flops > known.flops:
                    found[place.key] = place
        self.places = list(found.values())

    def _module(self, batch: _Batch) -> Any:
        """The model's module for a batch's shapes, without fused ops, canonical."""
        if batch.signature not in self._modules:
            leaves, tree = jax.tree.flatten(self._weights)

            def flat(weights, arrays):
                args, kwargs = batch.unflattened(arrays)
                return jax.tree.leaves(self._function(jax.tree.unflatten(tree, weights), *args, **kwargs))

            try:
                lowered = jax.jit(flat, keep_unused=True).lower(leaves, batch.arrays)
            except (TypeError, ValueError) as error:
                raise InputError(f"A batch of {batch.described} does not fit the model: {error}") from error
            module = lowered.compiler_ir("stablehlo")
            mark_weights(module, set(range(len(leaves))))
            _prepare(module)
            self._modules[batch.signature] = module, lowered  # whose context it is of
        return self._modules[batch.signature][0]

    def observe(
        self, look: Callable[[Place], Callable | None], say: Callable[[str], None] = lambda _: None
    ) -> list[dict]:
        """What functions of a product's factors give, for each batch by place.

        Args:
            look: for a place, `(lhs, rhs) -> array`, of the first factor and the weight `[columns, inner]`, or None.
            say: is told how far it is.
        """

        def changed(module: Any) -> list[Any]:
            keys, values = [], []
            for place, group in _grouped(sites(module)):
                if place.by_weight and (function := look(place)) is not None:
                    keys.append(place.key)
                    values.append(_call(module, group[0].op, _with_columns_first(group[0].op, function), []))
            m.add_results(module, values)
            return keys

        given = self._runner(changed)
        results = []
        for i, batch in enumerate(self.batches):
            keys, run, count = given(batch)
            found = run(*jax.tree.leaves(self._weights), *batch.arrays)
            results.append({k: np.asarray(v) for k, v in zip(keys, found[count:], strict=True)})
            say(f"batch {i + 1} of {len(self.batches)}")
        return results

    def chooser(self, choices: Mapping[Any, Sequence[Emulated]]) -> Callable[[Mapping[Any, int]], list[Any]]:
        """A function that runs the model with each product as one of some choices, and gives its outputs.

        Args:
            choices: by place's key, how it may be computed.
        """

        def changed(module: Any) -> list[Any]:
            numbers = m.add_argument(module, m.tensor([len(choices)], "i32"))
            for place, group in _grouped(sites(module)):
                if place.key not in choices:
                    continue
                index = list(choices).index(place.key)
                for site in group:
                    function = _switched(site.op, index, choices[place.key])
                    value = _call(module, site.op, function, [numbers])
                    site.op.results[0].replace_all_uses_with(value)
                    site.op.operation.erase()
            return []

        given = self._runner(changed)

        def run(chosen: Mapping[Any, int]) -> list[Any]:
            numbers = np.array([chosen.get(key, 0) for key in choices], np.int32)
            outputs = []
            for batch in self.batches:
                _, call, _ = given(batch)
                found = call(*jax.tree.leaves(self._weights), *batch.arrays, numbers)
                outputs.append(list(map(np.asarray, found)))
            return outputs

        return run

    @functools.cached_property
    def outputs(self) -> list[Any]:
        return self.chooser({})({})

    def functions(self) -> list[tuple[Callable, list[jax.Array], int]]:
        """For each batch, the model as a function of arrays, weights first, these arrays, and how many of them are weights."""
        leaves, tree = jax.tree.flatten(self._weights)

        def of(batch: _Batch) -> tuple[Callable, list[jax.Array], int]:
            def flat(*arrays):
                args, kwargs = batch.unflattened(arrays[len(leaves) :])
                return jax.tree.leaves(self._function(jax.tree.unflatten(tree, arrays[: len(leaves)]), *args, **kwargs))

            return flat, [*leaves, *batch.arrays], len(leaves)

        return [of(batch) for batch in self.batches]

    def run(self, call: Callable) -> list[list[np.ndarray]]:
        """What a model, or something made of it, gives for each batch."""
        return [leaves(call(*batch.args, **batch.kwargs)) for batch in self.batches]

    def _runner(self, change: Callable[[Any], list[Any]]) -> Callable:
        """For a batch, what `change` gave for its module, the changed module as a function, and its own results' count."""
        made: dict[Any, Any] = {}

        def of(batch: _Batch) -> Any:
            if batch.signature not in made:
                module = m.copy(self._module(batch))
                count = len(m.main(module).type.results)
                with module.context, ir.Location.unknown():
                    told = change(module)
                    m.inline_calls(module)
                made[batch.signature] = told, jax.jit(call_module(module)), count
            return made[batch.signature]

        return of


class _Batch:
    """Inputs of one call."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self.args, self.kwargs = args, kwargs
        leaves, self._tree = jax.tree.flatten((args, kwargs), is_leaf=_is_array)
        self._constants = [None if _is_array(leaf) else leaf for leaf in leaves]
        self.arrays = [_array(leaf) for leaf in leaves if _is_array(leaf)]
        kinds = tuple((a.shape, str(a.dtype)) for a in self.arrays)
        self.signature = kinds, self._tree, tuple(map(repr, self._constants))
        self.described = ", ".join(f"{a.dtype}{list(a.shape)}" for a in self.arrays)

    @classmethod
    def of(cls, batch: Any) -> _Batch:
        """A tuple or list is positional inputs, a mapping named ones, anything else one input."""
        if isinstance(batch, Mapping):
            return cls((), dict(batch))
        return cls(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})

    def unflattened(self, arrays: Sequence[Any]) -> tuple[tuple, dict]:
        """The inputs with other arrays."""
        left, leaves = iter(arrays), self._constants
        given = [next(left) if c is None else c for c in leaves] if None in leaves else list(leaves)
        return jax.tree.unflatten(self._tree, given)


def leaves(outputs: Any) -> list[np.ndarray]:
    """A model's outputs as a list of arrays, bf16 as f32."""
    if "torch" in sys.modules:
        import torch
        from torch.utils import _pytree

        tensors = [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        if tensors:
            return [(t.float() if t.dtype == torch.bfloat16 else t).detach().numpy() for t in tensors]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(outputs)]


def functional(model: Any) -> tuple[Any, Callable]:
    """A model's weights, and it as a function of them and of its inputs.

    Raises:
        InputError: this is not a model.
    """
    bridge = registry.find(model)
    if bridge is not None and hasattr(bridge, "weights_and_function"):
        return bridge.weights_and_function(model)
    if bridge is not None or not callable(model):
        raise InputError(
            f"`{type(model).__qualname__}` cannot be looked into. Pass a torch.nn.Module, a flax module that holds its weights, "
            "or a function that holds its weights."
        )
    return [], lambda _, *args, **kwargs: model(*args, **kwargs)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _array(leaf: Any) -> jax.Array:
    if type(leaf).__module__.startswith("torch"):
        leaf = leaf.detach().cpu()
        return jnp.from_dlpack(leaf) if leaf.element_size() < 8 else jnp.asarray(leaf.numpy())
    return jnp.asarray(leaf)


def _prepare(module: Any) -> None:
    m.inline_calls(module)
    while composites.decompose_unsupported(module, None):
        pass
    m.run_passes(module, "cse,symbol-dce")
    apply_rewrites(module, canonicalize.RULES, Fuel(None), Report())


def _grouped(found: Sequence[Site]) -> list[tuple[Place, list[Site]]]:
    """Sites by place; those that are no products by weights together, for what is fused is one op elsewhere. Not those in loops,
    whose numbers are others at each turn: they stay exact.
    """
    groups: dict[tuple[str, int | None], list[Site]] = {}
    for site in found:
        inside = isinstance(site.op.operation.parent.opview, func.FuncOp)
        if site.kind == "product" and inside:
            groups.setdefault((site.path, site.nth if site.by_weight else None), []).append(site)
    return [(Place(*key, group[0].sizes, sum(s.flops for s in group)), group) for key, group in groups.items()]


def _call(module: Any, op: Any, function: Callable, more: Sequence[Any]) -> Any:
    """The result of a function of a product's factors, and of more arrays, computed beside it."""
    operands = [op.lhs, op.rhs, *more]
    symbol = composites.spliced(module, "kpx_study", function, tuple(map(composites.struct, operands)), _DEVICE, 0.0)
    (result,) = m.functions(module)[symbol].type.results
    with ir.InsertionPoint(op), op.location:
        return func.CallOp([result], ir.FlatSymbolRefAttr.get(symbol), operands).results[0]


def _dimensions(op: Any) -> tuple[tuple, tuple]:
    numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    return (
        (tuple(numbers.lhs_contracting_dimensions), tuple(numbers.rhs_contracting_dimensions)),
        (tuple(numbers.lhs_batching_dimensions), tuple(numbers.rhs_batching_dimensions)),
    )


def _with_columns_first(op: Any, function: Callable) -> Callable:
    ((_, (inner,)), _) = _dimensions(op)
    return lambda lhs, rhs: function(lhs.astype(jnp.float32), (rhs if inner == 1 else rhs.T).astype(jnp.float32))


def _switched(op: Any, index: int, ways: Sequence[Emulated]) -> Callable:
    dimensions, dtype = _dimensions(op), m.element_dtype(m.tensor_type(op.result))

    def switched(lhs, rhs, numbers):
        branches = [functools.partial(way, dimensions=dimensions) for way in ways]
        return jax.lax.switch(numbers[index], branches, lhs, rhs).astype(dtype)

    return switched
