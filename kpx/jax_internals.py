"""Everything of kpx that reaches behind JAX's public interface.

Written for jax 0.10.2 to 0.11, and tested against what it replaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compiler as _compiler
from jax._src import core as _core
from jax._src import hardware_utils as _hardware_utils
from jax._src import source_info_util as _source_info
from jax._src import tree_util as _tree_util
from jax._src import xla_bridge as _xla_bridge
from jax._src.cudnn import fused_attention_stablehlo as _cudnn
from jax._src.interpreters import pxla as _pxla
from jax._src.lib import _jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from kpx.errors import UnsupportedError


def is_tracing() -> bool:
    """Whether a JAX transformation is under way, so that calls are recorded and not run."""
    return not _core.trace_state_clean()


def has_backend() -> bool:
    """Return whether JAX has started a client in this process, and with it threads."""
    return _xla_bridge.backends_are_initialized()


def keep_threads() -> None:
    """Keep JAX's clients, executables and MLIR's threads alive beyond the end of this process.

    Their destructors wait for threads, which a forked process does not have: it would never exit.
    """
    from jax._src.interpreters import mlir

    owners = [pool for pool in (getattr(mlir, "global_thread_pool", None),) if pool is not None]
    for client in _xla_bridge._backends.values():
        owners += [client, *client.live_executables()]
    for owner in owners:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def compute_in_callers_thread() -> None:
    """Turns JAX's asynchronous dispatch on the CPU off, where no client has been made yet; later it has no effect."""
    if not _xla_bridge.backends_are_initialized():
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def array_from_capsule(capsule: Any, device: jax.Device) -> jax.Array:
    """A JAX array over a DLPack capsule's memory, without a copy, keeping 64-bit dtypes.

    A tenth of the time of `jnp.from_dlpack`, which canonicalizes dtypes and checks devices.
    """
    return _jax.dlpack_managed_tensor_to_buffer(capsule, device, None)


def capsule_from_array(array: jax.Array) -> Any:
    """A DLPack capsule over a JAX array's memory; waits until the array is computed."""
    return _jax.buffer_to_dlpack_managed_tensor(array)


def flat_call(compiled: Any) -> Callable[[list], list]:
    """Return a function from a list of arrays to a list of arrays that runs a compiled function of flat arguments.

    Where the function runs on one device, has no effects and reads every argument, the executable is called directly, in
    half the time: arguments must be arrays of its shapes, dtypes and layouts on its device, and are not checked.
    """
    try:
        executable = compiled._executable
        inner = executable.unsafe_call
        count = len(executable.in_avals)
        is_direct = (
            len(inner._local_devices) == 1
            and set(inner.kept_var_idx) == set(range(count))
            and not (inner.has_unordered_effects or inner.ordered_effects or inner.has_host_callbacks or inner.mut)
            and not compiled._params.const_args
        )
        execute = inner.xla_executable.execute
    except AttributeError:
        is_direct = False
    return execute if is_direct else lambda arrays: compiled(*arrays)


def static_arguments(jitted: Callable) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions and names of a jitted function's static arguments, each derived from the other."""
    info = jitted._jit_info  # type: ignore[attr-defined]
    return tuple(info.static_argnums), tuple(info.static_argnames)


def donated_arguments(jitted: Callable) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions and names of a jitted function's donated arguments."""
    info = jitted._jit_info  # type: ignore[attr-defined]
    return tuple(info.donate_argnums or ()), tuple(info.donate_argnames or ())


def dispatcher(name: str, function: Callable, miss: Callable, jitted: Callable) -> Callable:
    """A callable that dispatches in C++ as `jax.jit` does, and calls `miss` for a new signature.

    Args:
        miss: `(*args, **kwargs) -> (outputs, jax Compiled or None)`; with a Compiled, later calls of
            the signature (shapes, dtypes, weak types, shardings, statics, JAX's configuration) go
            straight to its executable.
    """

    def cache_miss(*args, **kwargs):
        outputs, compiled = miss(*args, **kwargs)
        return outputs, _fast_path(compiled, outputs), False

    static_argnums, static_argnames = static_arguments(jitted)
    donate_argnums, donate_argnames = donated_arguments(jitted)
    keys = _pxla.JitGlobalCppCacheKeys(donate_argnums=donate_argnums, donate_argnames=donate_argnames)
    return _jax.pjit(
        name,
        function,
        cache_miss,
        list(static_argnums),
        list(static_argnames),
        keys,
        _tree_util.dispatch_registry,
        _pxla.cc_shard_arg,
    )


def _fast_path(compiled: Any, outputs: Any) -> Any:
    """What JAX's dispatcher needs to run an executable by itself, or None where it must not."""
    executable: Any = getattr(compiled, "_executable", None)
    run: Any = getattr(executable, "unsafe_call", None)
    if not isinstance(run, _pxla.ExecuteReplicated) or executable._mut:
        return None
    if run.ordered_effects or run.has_unordered_effects or run.has_host_callbacks:
        return None
    flat, tree = _tree_util.dispatch_registry.flatten(outputs, None)
    if not all(isinstance(leaf, jax.Array) for leaf in flat):
        return None
    if any(jnp.issubdtype(a.dtype, jax.dtypes.extended) for a in executable.in_avals):
        return None
    constants = compiled._params.const_args
    count = len(constants) + len(jax.tree.leaves(compiled.args_info))
    return _pxla.MeshExecutableFastpathData(
        executable.xla_executable,
        tree,
        executable._in_shardings,
        executable._out_shardings,
        [leaf.aval for leaf in flat],
        [leaf._committed for leaf in flat],
        [i in executable._kept_var_idx for i in range(count)],
        executable._dispatch_in_layouts,
        constants,
    )


def absent_devices(platform: str, name: str, options: Mapping[str, Any]) -> list[jax.Device]:
    """Devices that are not here, to compile for: a topology's, as the platform's plugin describes it."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(topology_name=name, platform=platform, **options).devices)


def lower_alone(
    function: Callable,
    structs: Sequence[jax.ShapeDtypeStruct],
    platform: str,
    device_kind: str,
    mesh: Mapping[str, int] | None = None,
) -> Any:
    """The StableHLO module of a function lowered for a device that may be absent; Pallas asks for its kind.

    Args:
        mesh: the axes that `jax.shard_map` finds around it.
    """
    device = AbstractDevice(device_kind=device_kind, num_cores=1, platform=platform)
    axes = dict(mesh or {"device": 1})
    kinds = (AxisType.Auto,) * len(axes)
    around = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds, abstract_device=device)
    with use_abstract_mesh(around):
        lowered = jax.jit(function, keep_unused=True).trace(*structs).lower(lowering_platforms=(platform,))
    return lowered.compiler_ir("stablehlo")


def name_stack(equation: Any) -> str:
    """The names that an equation of a jaxpr was made under."""
    return str(equation.source_info.name_stack)


def called_jaxpr(equation: Any) -> Any:
    """The closed jaxpr of an equation that calls one once, with its own inputs; None for any other."""
    if equation.primitive.name not in (
        "jit",
        "pjit",
        "closed_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "composite",
        "checkpoint",
    ):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found = equation.params.get(name)
        if found is not None:
            return found if hasattr(found, "consts") else _core.ClosedJaxpr(found, ())
    return None


def register_rocm_without_a_gpu() -> None:
    """Lets the ROCm plugin register, to compile alone, where it finds no GPU."""
    _hardware_utils.num_available_amd_gpus = lambda *args, **kwargs: 1


def compile_module(module: Any, devices: Sequence[jax.Device], options: Mapping[str, str]) -> Any:
    """A StableHLO module compiled for devices that may be absent, one partition on each, in the order given.

    Returns:
        jaxlib's Executable: `hlo_modules()`, `get_compiled_memory_stats()`, `cost_analysis()`, `serialize()`.
    """
    count = len(devices)
    assignment = np.array([[d.id for d in devices]])
    settings = _compiler.get_compile_options(1, count, assignment, env_options_overrides=dict(options))
    client: Any = devices[0].client
    build = client.compile if isinstance(client, _jax.CompileOnlyPyClient) else client.compile_and_load
    return build(module, _jax.DeviceList(tuple(devices)), settings)


def serialized(compiled: jax.stages.Compiled) -> bytes:
    """A compiled function's executable, as its own runtime loads it."""
    executable: Any = compiled.runtime_executable()
    return executable.client.serialize_executable(executable)


def cudnn_attention(
    query: Any, key: Any, value: Any, scale: float, causal: bool, window: int | None
) -> tuple[Any, Any]:
    """Attention of `[batch, heads, length, size]` by cuDNN, and what its gradient needs: the logarithms of the softmax's sums.

    Lowered for a machine that is not here too: JAX's own function asks the present device and library first.
    """
    nothing = jnp.zeros(0, query.dtype)
    return _cudnn._dot_product_attention_fwd_p.bind(
        query, key, value, *[nothing] * 7, is_training=True, **_cudnn_options(scale, causal, window)
    )


def cudnn_attention_gradient(
    query: Any,
    key: Any,
    value: Any,
    saved: Any,
    out: Any,
    cotangent: Any,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Any, Any, Any]:
    """The gradients by queries, keys and values of `cudnn_attention`, of which `saved` and `out` are."""
    nothing = jnp.zeros(0, query.dtype)
    return tuple(
        _cudnn._dot_product_attention_bwd_p.bind(
            query, key, value, *[nothing] * 7, saved, out, cotangent, **_cudnn_options(scale, causal, window)
        )
    )


def _cudnn_options(scale: float, causal: bool, window: int | None) -> dict[str, Any]:
    return {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": _cudnn.MaskType.CAUSAL if causal else _cudnn.MaskType.NO_MASK,
        "layout": _cudnn.AttentionLayout.BNTH.value,
        "sliding_window_length": window,
    }


def is_tracer(leaf: Any) -> bool:
    """Whether a value stands for another inside a JAX transformation."""
    return isinstance(leaf, jax.core.Tracer)


def evaluated(
    jaxpr: Any,
    constants: Sequence[Any],
    arguments: Sequence[Any],
    instead: Callable,
    parts: Sequence[tuple[int, int]] = (),
    wrapped: Callable[[Callable], Callable] | None = None,
) -> list[Any]:
    """A jaxpr computed on values, which may be tracers; functions that it calls are computed in place.

    Args:
        instead: `(equation, values) -> results`, or None to compute the equation as it is.
        parts: ranges of its equations that are computed together, by a function of what they read.
        wrapped: what becomes of that function.
    """
    if parts:
        assert wrapped is not None
        return _by_parts(jaxpr, constants, arguments, instead, parts, wrapped)
    held: dict[Any, Any] = {}

    def value(atom):
        return atom.val if isinstance(atom, _core.Literal) else held[atom]

    held.update(zip(jaxpr.constvars, constants, strict=True))
    held.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        given = [value(atom) for atom in equation.invars]
        results = instead(equation, given)
        if results is None and equation.primitive.name in ("jit", "pjit", "closed_call"):
            inner = called_jaxpr(equation)
            results = evaluated(inner.jaxpr, inner.consts, given, instead)
        if results is None:
            found: Any = equation.primitive.get_bind_params(equation.params)
            functions, parameters = found if isinstance(found, tuple) else ((), found)  # by JAX's version
            stack = _source_info.current_name_stack() + equation.source_info.name_stack
            with _source_info.user_context(equation.source_info.traceback, name_stack=stack), equation.ctx.manager:
                made = equation.primitive.bind(*functions, *given, **parameters)
            results = made if equation.primitive.multiple_results else [made]
        held.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _by_parts(jaxpr, constants, arguments, instead, parts, wrapped) -> list[Any]:
    held: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))
    at = 0
    for first, end in [*parts, (len(jaxpr.eqns), len(jaxpr.eqns))]:
        for start, stop, wrap in ((at, first, lambda f: f), (first, end, wrapped)):
            here = _part(jaxpr, start, stop)
            if here.eqns:

                def computed(*given, here=here):
                    return evaluated(here, (), given, instead)

                held.update(zip(here.outvars, wrap(computed)(*(held[v] for v in here.invars)), strict=True))
        at = end
    return [atom.val if isinstance(atom, _core.Literal) else held[atom] for atom in jaxpr.outvars]


def _part(jaxpr: Any, first: int, end: int) -> Any:
    """Some of a jaxpr's equations, as one of what they read and what others read of them."""
    equations = jaxpr.eqns[first:end]
    made = {v for e in equations for v in e.outvars}
    reads = dict.fromkeys(v for e in equations for v in e.invars if not isinstance(v, _core.Literal) and v not in made)
    later = {v for e in jaxpr.eqns[end:] for v in e.invars if not isinstance(v, _core.Literal)}
    later.update(v for v in jaxpr.outvars if not isinstance(v, _core.Literal))
    given = [v for e in equations for v in e.outvars if v in later]
    return jaxpr.replace(
        constvars=[], invars=[*reads], outvars=given, eqns=equations, debug_info=_debug(jaxpr, reads, given)
    )


def _debug(jaxpr: Any, reads: Any, given: Any) -> Any:
    info = jaxpr.debug_info
    return info._replace(arg_names=("",) * len(reads), result_paths=("",) * len(given))


def is_scan(equation: Any) -> bool:
    """Whether an equation is a scan with no checkpoint inside."""
    if equation.primitive.name != "scan":
        return False
    return all(e.primitive.name not in ("checkpoint", "remat", "remat2") for e in equation.params["jaxpr"].jaxpr.eqns)


def scan_of(equation: Any, values: Sequence[Any], wrapped: Callable[[Callable], Callable]) -> list[Any]:
    """The results of a scan's equation on values, its body wrapped."""
    p = equation.params
    constants, carried = p["num_consts"], p["num_carry"]
    body = _core.jaxpr_as_fun(p["jaxpr"])
    fixed, start, sequences = values[:constants], values[constants : constants + carried], values[constants + carried :]

    @wrapped
    def layer(fixed, carry, given):
        results = body(*fixed, *carry, *given)
        return results[:carried], results[carried:]

    options = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
    last, stacked = jax.lax.scan(lambda c, x: layer(fixed, c, x), list(start), list(sequences), **options)
    return [*last, *stacked]


class Lazy:
    """A jaxpr's values, each computed when it is asked for, of those that are known.

    Args:
        known: by variable, values that are not to be computed: inputs, and whatever takes the place of an equation's results.
    """

    def __init__(self, closed: Any, known: Mapping[Any, Any]):
        self._held = {**dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)), **known}
        self._makers = {v: equation for equation in closed.jaxpr.eqns for v in equation.outvars}

    def learn(self, variable: Any, value: Any) -> None:
        """A variable that was not known, and is now."""
        self._held[variable] = value

    def value(self, atom: Any) -> Any:
        """A variable's value.

        Raises:
            KeyError: it depends on an input that is not known.
        """
        if isinstance(atom, _core.Literal):
            return atom.val
        waiting = [atom]
        while waiting:
            here = waiting[-1]
            if here in self._held:
                waiting.pop()
                continue
            equation = self._makers[here]
            missing = [v for v in equation.invars if not isinstance(v, _core.Literal) and v not in self._held]
            if missing:
                waiting += missing
                continue
            given = [v.val if isinstance(v, _core.Literal) else self._held[v] for v in equation.invars]
            found: Any = equation.primitive.get_bind_params(equation.params)
            functions, parameters = found if isinstance(found, tuple) else ((), found)
            made = equation.primitive.bind(*functions, *given, **parameters)
            self._held.update(
                zip(equation.outvars, made if equation.primitive.multiple_results else [made], strict=True)
            )
        return self._held[atom]


def inputs_of(closed: Any, atoms: Sequence[Any], known: Collection[Any] = ()) -> set[Any]:
    """The inputs of a jaxpr that variables depend on, those behind known ones left out."""
    makers = {v: equation for equation in closed.jaxpr.eqns for v in equation.outvars}
    inputs, seen, waiting = set(closed.jaxpr.invars), set(known), list(atoms)
    found = set()
    while waiting:
        atom = waiting.pop()
        if isinstance(atom, _core.Literal) or atom in seen:
            continue
        seen.add(atom)
        if atom in inputs:
            found.add(atom)
        elif atom in makers:
            waiting += makers[atom].invars
    return found


def scans_of(jaxpr: Any) -> list[Any]:
    """The scans of a jaxpr, not those inside other equations."""
    return [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]


def body_of(scan: Any) -> Callable:
    """A scan's body, `(*constants, *carry, *slices) -> [*carry, *slices]`."""
    return _core.jaxpr_as_fun(scan.params["jaxpr"])


_COMPILES = ("backend", "computation", "devices", "compile_options", "host_callbacks", "executable_devices")


@contextlib.contextmanager
def before_compiling(change: Callable[[Any, Any], dict[str, Any]]) -> Iterator[None]:
    """Has a function change every module that JAX compiles in this process, in place, while this is open.

    Args:
        change: `(module, device) -> options`, options for XLA beside JAX's own.

    Raises:
        UnsupportedError: this JAX compiles in a way that is not known.
    """
    original = _compiler.compile_or_get_cached
    names = tuple(inspect.signature(original).parameters)
    if names[: len(_COMPILES)] != _COMPILES:
        raise UnsupportedError(
            f"JAX {jax.__version__} compiles in a way that kpx does not know: `compile_or_get_cached` takes {', '.join(names)}. Use "
            "`kpx.jit` in the program, or a JAX from 0.10.2 on and below 0.12."
        )

    def compiled(backend, computation, devices, compile_options, *rest, **named):
        options = change(computation, devices.flat[0])
        if options:
            held = compile_options.env_option_overrides
            compile_options.env_option_overrides = [*held, *((k, v) for k, v in options.items() if k not in dict(held))]
        return original(backend, computation, devices, compile_options, *rest, **named)

    _compiler.compile_or_get_cached = compiled
    try:
        yield
    finally:
        _compiler.compile_or_get_cached = original
