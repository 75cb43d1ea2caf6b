"""flax models: nnx modules, which hold their weights, and linen modules, bound or not."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as linen
import jax
from flax import nnx

from kpx.config import Config
from kpx.errors import InputError, UnsupportedError
from kpx.hardware.target import Target
from kpx.runtime.build import ModelProgram
from kpx.runtime.compiled import Compiled
from kpx.runtime.memory import give_back_freed


def accepts(model: Any) -> bool:
    """Whether this bridge takes a model."""
    return isinstance(model, (nnx.Module, linen.Module))


def resolve_target(given: str | Target | None, *, may_be_absent: bool = False) -> Target:
    """The target of a name; JAX's default device for None."""
    return Target.resolve(given, may_be_absent=may_be_absent)


def optimize(
    model: Any,
    example_inputs: Sequence | None,
    example_kwargs: Mapping[str, Any] | None,
    target: Target,
    config: Config,
) -> Callable:
    """See `kpx.optimize`. An unbound linen module gives `kpx.jit(model.apply)`."""
    if isinstance(model, linen.Module) and model.scope is None:
        from kpx.api import jit

        return jit(functools.wraps(model.apply)(lambda *args, **kwargs: model.apply(*args, **kwargs)),
                   target=target, config=config)  # fmt: skip
    optimized = OptimizedModel(model, target, config)
    if example_inputs is not None or example_kwargs is not None:
        inputs = () if example_inputs is None else example_inputs
        optimized.compile_for(inputs, example_kwargs or {})
    return optimized


def compile(model: Any, args: Sequence, kwargs: Mapping[str, Any], target: Target, config: Config) -> Compiled:
    """See `kpx.compile`."""
    if isinstance(model, linen.Module) and model.scope is None:
        from kpx.api import compile as compile_function

        return compile_function(model.apply, *args, target=target, config=config, **kwargs)
    return OptimizedModel(model, target, config).compile_for(args, kwargs)


def weights_and_function(model: Any) -> tuple[Any, Callable]:
    """A model's weights, and it as a function of them and of its inputs.

    Raises:
        InputError: a linen module is not bound to its weights.
    """
    if isinstance(model, linen.Module) and model.scope is None:
        raise InputError("A linen module without its weights was given. Bind it: `model.bind(variables)`.")
    split = OptimizedModel(model, Target.resolve("cpu"), Config())
    definition, weights = split._split()
    leaves, tree = jax.tree.flatten(weights)

    def call(raw_weights, *args, **kwargs):
        held = [_like(raw, w) for raw, w in zip(raw_weights, leaves, strict=True)]
        return split._merge(definition, jax.tree.unflatten(tree, held))(*args, **kwargs)[0]

    return [_raw(w) for w in leaves], call


def functional(model: Any) -> tuple[Any, Any, Callable]:
    """`(params, carried, fn)` of a model, for training: see `kpx.bridges.torch.functional`, which has the same form.

    `fn(params, carried, *inputs, key=None, **named) -> (outputs, carried)`. Of an nnx module, `nnx.Param`s are parameters and
    everything else is carried, its streams of random numbers too; a linen module draws dropout from `key`.

    Raises:
        InputError: a linen module is not bound to its weights.
    """
    if isinstance(model, nnx.Module):
        definition, held, rest = nnx.split(model, nnx.Param, ...)

        def of_nnx(params, carried, *inputs, key=None, **named):
            merged = nnx.merge(definition, params, carried)
            outputs = merged(*inputs, **named)
            return outputs, nnx.split(merged, nnx.Param, ...)[2]

        return held, rest, of_nnx
    if model.scope is None:
        raise InputError("A linen module without its weights was given. Bind it: `model.bind(variables)`.")
    module, variables = model.unbind()
    others = {name: held for name, held in variables.items() if name != "params"}

    def of_linen(params, carried, *inputs, key=None, **named):
        streams = {} if key is None else {"dropout": key}
        outputs, written = module.apply(
            {"params": params, **carried}, *inputs, rngs=streams, mutable=list(carried), **named
        )
        return outputs, {**carried, **written}

    return variables["params"], others, of_linen


class OptimizedModel:
    """A flax model whose call runs as a compiled program over the model's own weights.

    Inputs are pytrees of arrays. Weights that the model is given later are seen: JAX arrays never change, so
    a weight has changed where another array stands in its place.
    """

    def __init__(self, model: Any, target: Target, config: Config):
        self._model, self._target, self._config = model, target, config
        self._programs: dict[Any, tuple[ModelProgram, Any]] = {}
        self._loaded: dict[Any, list[Any]] = {}
        functools.update_wrapper(self, type(model).__call__, updated=())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def __call__(self, *args, **kwargs):
        leaves, tree = _flatten(args, kwargs)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._model(*args, **kwargs)
        key = self._key(leaves, tree)
        if key not in self._programs:
            self.compile_for(args, kwargs)
        program, out_tree = self._programs[key]
        weights = jax.tree.leaves(self._split()[1])
        loaded = self._loaded.get(key)
        if (
            loaded is None
            or len(loaded) != len(weights)
            or any(a is not b for a, b in zip(loaded, weights, strict=True))
        ):
            program.load([_raw(w) for w in weights])
            self._loaded[key] = weights
        return jax.tree.unflatten(out_tree, program.run(*(_raw(_array(leaf)) for leaf in leaves)))

    def compile_for(self, args: Sequence, kwargs: Mapping[str, Any]) -> Compiled:
        """Compiles for inputs (arrays or structs) now."""
        leaves, tree = _flatten(tuple(args), dict(kwargs))
        avals = [jax.typeof(_array(leaf)) for leaf in leaves]
        definition, weights = self._split()
        flat_weights, weights_tree = jax.tree.flatten(weights)
        out_trees = []

        def function(raw_weights, raw_inputs):
            weight_leaves = [_like(raw, w) for raw, w in zip(raw_weights, flat_weights, strict=True)]
            merged = self._merge(definition, jax.tree.unflatten(weights_tree, weight_leaves))
            input_leaves = [_like(raw, a) for raw, a in zip(raw_inputs, avals, strict=True)]
            given_args, given_kwargs = jax.tree.unflatten(tree, input_leaves)
            outputs, changed = merged(*given_args, **given_kwargs)
            _refuse_changes(weights_tree, weight_leaves, changed)
            flat, out_tree = jax.tree.flatten(outputs)
            out_trees.append(out_tree)
            return flat

        raw_weights = [_raw(w) for w in flat_weights]
        program = ModelProgram(function, raw_weights, [_raw_struct(a) for a in avals], self._target, self._config)
        key = self._key(leaves, tree)
        self._programs[key] = program, out_trees[0]
        program.load(raw_weights)
        give_back_freed()
        self._loaded[key] = flat_weights
        compiled = program.compiled
        compiled._call = functools.partial(self._call_exactly, key)
        return compiled

    def _call_exactly(self, key: Any, *args, **kwargs):
        if self._key(*_flatten(args, kwargs)) != key:
            raise InputError(
                "The arguments' shapes or dtypes are not those this was compiled for. Call it with the same, or use "
                "`kpx.optimize(model)`, which compiles anew."
            )
        return self(*args, **kwargs)

    def _key(self, leaves: Sequence[Any], tree: Any) -> Any:
        kinds = tuple((a.shape, a.dtype) for a in map(jax.typeof, map(_array, leaves)))
        mode = nnx.graphdef(self._model) if isinstance(self._model, nnx.Module) else None
        return kinds, tree, mode

    def _split(self) -> tuple[Any, Any]:
        if isinstance(self._model, nnx.Module):
            return nnx.split(self._model)
        return self._model.unbind()

    def _merge(self, definition: Any, weights: Any) -> Callable:
        """The model over other weights: `(*args) -> (outputs, the weights after the call)`."""
        if isinstance(self._model, nnx.Module):

            def call(*args, **kwargs):
                model = nnx.merge(definition, weights)
                with _named(model):
                    outputs = model(*args, **kwargs)
                return outputs, jax.tree.leaves(nnx.split(model)[1])

            return call
        return lambda *args, **kwargs: (definition.apply(weights, *args, **kwargs), jax.tree.leaves(weights))


# Names -----------------------------------------------------------------------------------------

_Path = tuple[str, ...]
_PATHS: contextvars.ContextVar[Mapping[int, _Path]] = contextvars.ContextVar("kpx_nnx_paths")
_INSIDE: contextvars.ContextVar[_Path] = contextvars.ContextVar("kpx_nnx_inside", default=())


@contextlib.contextmanager
def _named(model: nnx.Module) -> Iterator[None]:
    """What a model of ours computes is named by its modules' paths, as linen does by itself and nnx does not.

    The model's modules change class, to one that names what its `__call__` computes: never those of a caller.
    """
    paths: dict[int, _Path] = {}
    for path, module in nnx.iter_modules(model):
        if path and id(module) not in paths and callable(module):
            paths[id(module)] = tuple(map(str, path))
            module.__class__ = _naming(type(module))
    token = _PATHS.set(paths)
    try:
        yield
    finally:
        _PATHS.reset(token)


@functools.lru_cache(maxsize=1024)
def _naming(cls: type) -> type:
    def named_call(self, *args, **kwargs):
        path, around = _PATHS.get({}).get(id(self), ()), _INSIDE.get()
        inner = path[len(around) :] if path[: len(around)] == around else path
        token = _INSIDE.set(path or around)
        try:
            with jax.named_scope("/".join(inner)) if inner else contextlib.nullcontext():
                return cls.__call__(self, *args, **kwargs)  # type: ignore[operator]
        finally:
            _INSIDE.reset(token)

    return type(cls.__name__, (cls,), {"__call__": named_call, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _flatten(args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    leaves, tree = jax.tree.flatten((args, kwargs))
    for leaf in leaves:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise InputError(
                f"An argument of type `{type(leaf).__qualname__}` was given. Pass arrays, numbers, and pytrees of them."
            )
    return leaves, tree


def _array(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else jax.numpy.asarray(leaf)


def _is_key(array: Any) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _raw(array: Any) -> Any:
    """An array that an executable takes: a random key as the integers it is made of."""
    return jax.random.key_data(array) if _is_key(array) else array


def _raw_struct(aval: Any) -> jax.ShapeDtypeStruct:
    struct = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return jax.eval_shape(_raw, struct) if _is_key(aval) else struct


def _like(raw: Any, original: Any) -> Any:
    """`_raw` undone, for what stood where `original` did."""
    return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(original)) if _is_key(original) else raw


def _refuse_changes(tree: Any, before: Sequence[Any], after: Sequence[Any]) -> None:
    """Raises where the model wrote to its state, which would be lost."""
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(tree, before))]
    changed = [path for path, a, b in zip(paths, before, after, strict=True) if a is not b]
    if changed:
        raise UnsupportedError(
            f"The model changes its state as it runs ({', '.join(changed[:5])}), which kpx.optimize does not support "
            "yet. Call `model.eval()` first, or use `kpx.jit` over a function of the state."
        )
