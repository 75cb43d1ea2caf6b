"""The front doors: `optimize`, `jit` and `compile`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kpx import jax_internals
from kpx.bridges import registry
from kpx.config import Config, resolve
from kpx.errors import ConfigError, InputError, KpxError
from kpx.hardware.target import Target
from kpx.pipeline import Context
from kpx.precision import budget
from kpx.runtime import gate
from kpx.runtime.build import compile_lowered, environment, lower_for, optimize_lowered
from kpx.runtime.compiled import Compiled


def optimize(
    model: Any,
    *,
    example_inputs: Sequence | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    target: str | Target | None = None,
    config: Config | None = None,
    training: bool | None = None,
    dynamic_shapes: Any = None,
    fullgraph: bool = False,
    inplace: bool = False,
) -> Any:
    """A faster version of a model or function, with the same interface.

    Args:
        model: a `torch.nn.Module`, a flax nnx module, a flax linen module, or a JAX function.
        example_inputs: positional inputs to compile for now; without, each signature is compiled at its
            first call.
        example_kwargs: named inputs to compile for now.
        target: the platform to run on; by default JAX's default device (the CPU for PyTorch models).
        config: what may be done; `Config()` by default.
        training: (PyTorch) deprecated, without effect: where grad mode is on and an input or parameter requires grad, outputs
            carry gradients and the backward pass is compiled.
        dynamic_shapes: (PyTorch) that sizes vary, as in `torch.export.export`: the model is captured once for all of them; or
            a `kpx.Buckets`, which pads to few sizes. By default a size that changes is a symbol from its second value on.
            Each set of sizes has a program of its own.
        fullgraph: (PyTorch) raise where the model cannot be captured whole, or an operator has no lowering rule. By default
            eager PyTorch runs what lies between the compiled parts, with a `GraphBreakWarning`.
        inplace: (PyTorch) change the model itself, so that its own calls run compiled, and return it.

    Returns:
        For a `torch.nn.Module` (or an ExportedProgram) a module of a subclass of its class that shares its state; for a flax
        module a callable that does; for a JAX function, `kpx.jit` of it.

    Raises:
        InputError: this is none of those, or an example input is not one.
        ConfigError, TargetError: `config` or `target` is not one.
        CaptureError, UnsupportedError: (with example inputs) the model could not be brought over.
    """
    config = budget.resolved(resolve(config), model, bool(training))
    options = {"training": training, "dynamic_shapes": dynamic_shapes, "fullgraph": fullgraph, "inplace": inplace}
    asked = {name: value for name, value in options.items() if value is not None and value is not False}
    if (bridge := registry.find(model)) is not None:
        chosen = bridge.resolve_target(target)
        return bridge.optimize(model, example_inputs, example_kwargs, chosen, config, **asked)
    if asked:
        raise InputError(
            f"{', '.join(f'`{name}=`' for name in asked)} is for PyTorch models. A JAX function is differentiated by "
            "`jax.grad`, inside or outside `kpx.jit`, and compiled anew for each shape."
        )
    if not callable(model):
        raise InputError(_not_a_model(model))
    jitted = jit(model, target=Target.resolve(target) if target is not None else None, config=config)
    if example_inputs is not None or example_kwargs is not None:
        jitted.compile_for(tuple(example_inputs or ()), dict(example_kwargs or {}))
    return jitted


def _not_a_model(given: Any) -> str:
    return (
        f"`{type(given).__module__}.{type(given).__qualname__}` is not a model. Pass a torch.nn.Module, a flax nnx or "
        "linen module, or a function of JAX arrays."
    )


def jit(
    fun: Callable | None = None,
    *,
    target: str | Target | None = None,
    config: Config | None = None,
    before: Callable[[Any], None] | None = None,
    **options,
):
    """`jax.jit` whose module kpx rewrites before it is compiled.

    Under a JAX transformation (grad, vmap, jvp, scan, remat, shard_map, another jit) it is `jax.jit(fun)`:
    the outermost `kpx.jit` optimizes everything inside it, backward pass included.

    Args:
        fun: a function of pytrees of arrays. Without it, gives a decorator.
        target: the platform to run on; by default where JAX puts the arguments. One that is not on this machine can
            be lowered for, and passed to `kpx.compile`.
        config: what may be done; `Config()` by default.
        before: is given each module before it is rewritten, to change it in place (a plan puts its shardings in).
        **options: what `jax.jit` takes: static_argnums, static_argnames, donate_argnums, donate_argnames,
            in_shardings, out_shardings, keep_unused, inline.

    Returns:
        A callable like `jax.jit`'s, with `.lower(...)`, whose result's `.compile()` compiles the rewritten
        module.

    Raises:
        InputError: `fun` is not callable. From the callable: an argument is not an array or a number.
        TargetError: `target` is not one. From the callable: it is not on this machine.
    """
    if fun is None:
        return functools.partial(jit, target=target, config=config, before=before, **options)
    if not callable(fun):
        raise InputError(f"`kpx.jit` takes a function, and was given `{fun!r}`.")
    config = resolve(config)
    if isinstance(config.precision, budget.Budget):
        raise ConfigError(
            "`kpx.jit` takes no budget: weights that are arguments cannot be quantized at load. Use `kpx.optimize` of a model, or of "
            "a function that holds its weights; or `kpx.precision.assign(fun, budget).policy`."
        )
    return _Jit(fun, target, config, options, before)


class _Jit:
    """See `jit`."""

    def __init__(
        self,
        fun: Callable,
        target: str | Target | None,
        config: Config,
        options: dict[str, Any],
        before: Callable[[Any], None] | None = None,
    ):
        functools.update_wrapper(self, fun)
        self._explicit = target is not None
        self._target = Target.resolve(target, may_be_absent=True)
        self._config = config
        self._options = options
        self._before = before
        self._jitted = jax.jit(fun, **options)
        self._ready: dict[Any, jax.stages.Compiled] = {}
        name = getattr(fun, "__name__", type(fun).__name__)
        self._dispatch = jax_internals.dispatcher(name, fun, self._miss, self._jitted)

    def __call__(self, *args, **kwargs):
        return self._dispatch(*args, **kwargs)

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self, instance)

    def lower(self, *args, **kwargs) -> jax.stages.Lowered:
        """JAX's `Lowered` for these arguments (arrays or structs), its module rewritten."""
        return self._lower(args, kwargs)[0]

    def trace(self, *args, **kwargs):
        """JAX's `Traced` for these arguments, before any rewrite."""
        return self._jitted.trace(*args, **kwargs)

    def eval_shape(self, *args, **kwargs):
        """The shapes and dtypes of the outputs for these arguments."""
        return self._jitted.eval_shape(*args, **kwargs)

    def clear_cache(self) -> None:
        """Forgets every compiled signature."""
        self._ready.clear()
        self._jitted.clear_cache()
        self._dispatch = jax_internals.dispatcher(self.__name__, self.__wrapped__, self._miss, self._jitted)

    def compile_for(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Compiles for arguments (arrays or structs) now, so that their first call does not."""
        self._ready[_signature(args, kwargs)] = self._compile(args, kwargs)[0]

    def _compile(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any, Context]:
        """The executable for arguments, its module, and what was done to that."""
        lowered, decision = self._decided(args, kwargs)
        executable, context = self._finish(lowered, decision.config, decision.options)
        decision.tell(context)
        return executable, lowered.compiler_ir("stablehlo"), context

    def _finish(self, lowered, config: Config, options: Mapping[str, str]) -> tuple[Any, Context]:
        context = optimize_lowered(lowered, self._target, config)
        return compile_lowered(lowered, self._target, config, options), context

    def _measured(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The executable for the arguments of a call, which is run on them in several ways where none is known yet."""
        lowered, decision = self._decided(args, kwargs)
        if not decision.is_open:
            return self._finish(lowered, decision.config, decision.options)[0]
        dynamic, named = _dynamic(self._jitted, args, kwargs)

        def way(lowered, config: Config, options: Mapping[str, str]) -> gate.Way:
            start = time.perf_counter()
            executable, context = self._finish(lowered, config, options)
            taken = time.perf_counter() - start

            def run():
                given = jax.tree.map(_copied, (dynamic, named)) if self._donates else (dynamic, named)
                return jax.tree.leaves(jax.block_until_ready(executable(*given[0], **given[1])))

            return gate.Way(config, options, context, run, taken, executable)

        def make(config: Config, options: Mapping[str, str]) -> gate.Way:
            return way(self._plain(args, kwargs), config, options)

        return decision.measured(way(lowered, self._config, {}), make)

    def _decided(self, args: tuple, kwargs: dict[str, Any]) -> tuple[jax.stages.Lowered, gate.Decision]:
        """The function lowered, not rewritten, and what is known of how it is run fastest."""
        lowered = self._plain(args, kwargs)
        module, target = lowered.compiler_ir("stablehlo"), self._target
        return lowered, gate.Decision(module, target, self._config, environment(target))

    def retargeted(self, target: str | Target) -> _Jit:
        """The same function and options for another target."""
        return _Jit(self.__wrapped__, target, self._config, self._options, self._before)

    @property
    def _donates(self) -> bool:
        return any(self._options.get(name) for name in ("donate_argnums", "donate_argnames"))

    def _lower(self, args, kwargs):
        lowered, decision = self._decided(args, kwargs)
        context = optimize_lowered(lowered, self._target, decision.config)
        decision.tell(context)
        return lowered, context

    def _plain(self, args, kwargs) -> jax.stages.Lowered:
        """The function lowered, as a module of its own."""
        _check_arguments(self._jitted, args, kwargs)
        # JAX keeps the module of a function that it lowered, and would hand the rewritten one to others:
        # a function of our own each time gets a module of our own.
        own = jax.jit(_renamed(self.__wrapped__), **self._options)
        with jax.default_device(self._target.device if self._explicit else None):
            lowered = lower_for(self._target, own, *args, **kwargs)
        if self._before is not None:
            self._before(lowered.compiler_ir("stablehlo"))
        return lowered

    def _miss(self, *args, **kwargs):
        leaves = jax.tree.leaves((args, kwargs))
        if jax_internals.is_tracing() or any(map(jax_internals.is_tracer, leaves)):
            return self._jitted(*args, **kwargs), None
        Target.resolve(self._target)
        if (compiled := self._ready.get(_signature(args, kwargs))) is None:
            compiled = self._measured(args, kwargs)
        dynamic, named = _dynamic(self._jitted, args, kwargs)
        outputs = compiled(*dynamic, **named)
        return outputs, compiled


def _signature(args: tuple, kwargs: dict[str, Any]) -> Any:
    """A key that arrays and the structs that describe them share; numbers stand for themselves."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    kinds = tuple(
        (tuple(leaf.shape), np.dtype(leaf.dtype).name, getattr(leaf, "weak_type", False))
        if hasattr(leaf, "shape")
        and hasattr(leaf, "dtype")
        and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        else (type(leaf), repr(leaf))
        for leaf in leaves
    )
    return tree, kinds, jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision


def _copied(leaf: Any) -> Any:
    return jax.numpy.copy(leaf) if isinstance(leaf, jax.Array) else leaf


def _renamed(fun: Callable) -> Callable:
    @functools.wraps(fun)
    def same(*args, **kwargs):
        return fun(*args, **kwargs)

    return same


def _dynamic(jitted: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments that a compiled function takes: those that are not static."""
    positions, names = jax_internals.static_arguments(jitted)
    statics = {p % len(args) for p in positions if -len(args) <= p < len(args)}
    return [a for i, a in enumerate(args) if i not in statics], {k: v for k, v in kwargs.items() if k not in names}


def _check_arguments(jitted: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises `InputError` for an argument that is neither an array nor a number, and names it."""
    positions, _ = jax_internals.static_arguments(jitted)
    statics = {p % len(args) for p in positions if -len(args) <= p < len(args)}
    dynamic = [None if i in statics else a for i, a in enumerate(args)]  # None keeps the others' positions
    named = _dynamic(jitted, args, kwargs)[1]
    for path, leaf in jax.tree_util.tree_leaves_with_path((dynamic, named)):
        if _is_array_or_number(leaf):
            continue
        where = jax.tree_util.keystr(path[1:])
        what = (
            f"{leaf.dtype} array"
            if isinstance(leaf, np.ndarray)
            else f"`{type(leaf).__module__}.{type(leaf).__qualname__}`"
        )
        raise InputError(
            f"Argument {where} is a {what}. A compiled function takes arrays and numbers, and pytrees of them; "
            "convert it with `jax.numpy.asarray(x)`, or name it in `static_argnames`."
        )


def _is_array_or_number(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OSUMm"
    if isinstance(leaf, (jax.Array, np.generic, bool, int, float, complex, jax.core.Tracer)):
        return True
    foreign = type(leaf).__module__.partition(".")[0] == "torch"
    return hasattr(leaf, "__jax_array__") or (hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not foreign)


def compile(
    fun_or_model: Any, *specs, target: str | Target | None = None, config: Config | None = None, **named_specs
) -> Compiled:
    """Compiles a function or model for inputs now.

    Args:
        fun_or_model: what `kpx.optimize` or `kpx.jit` takes.
        *specs: positional inputs: arrays, tensors, or `jax.ShapeDtypeStruct`s, with shardings over
            `target.mesh(...)` where the target has several devices; without, one device does everything.
        target: the machine to compile for, as `tpu-v5e:4x4`: this one, or one that is not here.
        config: what may be done; `Config()` by default.
        **named_specs: named inputs.

    Returns:
        A `Compiled`: callable where the target is here, and knows its `stablehlo`, `hlo`, `memory`, `cost`,
        `rewrites`, `kernels`.

    Raises:
        InputError: this is not a model, or an input is not one.
        CaptureError, UnsupportedError: the model could not be brought over.
        TargetError: `target` is not one, or its compiler is not installed.
        CompileError: the target's compiler refused it; an OutOfMemoryError where it does not fit the device.
    """
    config = budget.resolved(resolve(config), fun_or_model)
    if (bridge := registry.find(fun_or_model)) is not None:
        chosen = bridge.resolve_target(target, may_be_absent=True)
        return bridge.compile(fun_or_model, specs, named_specs, chosen, config)
    if not callable(fun_or_model):
        raise InputError(_not_a_model(fun_or_model))
    if isinstance(fun_or_model, _Jit):
        jitted = fun_or_model if target is None else fun_or_model.retargeted(target)
    else:
        jitted = jit(fun_or_model, target=target, config=config)
    specs, named_specs = jax.tree.map(_struct, (specs, named_specs))
    executable, module, context = jitted._compile(specs, named_specs)
    return Compiled(_checked(executable), executable, module, context, jitted._target)


def optimized(fun_or_model: Any, *specs, target: str | Target) -> Any:
    """The module that `compile` would hand to a target's compiler, which is not asked where it is a JAX function's."""
    if registry.find(fun_or_model) is not None:
        return compile(fun_or_model, *specs, target=target)._module
    lowered, _ = jit(fun_or_model, target=target)._lower(jax.tree.map(_struct, specs), {})
    return lowered.compiler_ir("stablehlo")


def _struct(spec: Any) -> Any:
    """A tensor's shape and dtype; anything else as it is."""
    if type(spec).__module__.startswith("torch") and hasattr(spec, "shape"):
        from kpx.bridges.torch.dtypes import to_jax

        return jax.ShapeDtypeStruct(tuple(spec.shape), to_jax(spec.dtype))
    return spec


def _checked(executable: jax.stages.Compiled) -> Callable:
    def call(*args, **kwargs):
        try:
            return executable(*args, **kwargs)
        except KpxError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(
                f"The arguments are not those this was compiled for: {error}\n"
                "Call it with the same shapes and dtypes, or use `kpx.jit`, which compiles anew."
            ) from None

    return call
