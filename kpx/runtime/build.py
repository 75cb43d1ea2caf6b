"""From a JAX function to an executable: lower, rewrite, split, compile."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from kpx._version import __version__
from kpx.config import Config
from kpx.errors import CompileError
from kpx.hardware import cpu
from kpx.hardware.target import Target, cores
from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.ir.rewrite import Fuel
from kpx.ir.split import COTANGENT, Split, mark_arguments, mark_weights, split
from kpx.jax_internals import flat_call
from kpx.kernels import weights_only
from kpx.kernels.selection import RULES, Selection, read
from kpx.passes.composites import Device
from kpx.pipeline import Context, no_collections, optimize_module
from kpx.runtime import gate
from kpx.runtime.absent import AbsentExecutable, compile_absent
from kpx.runtime.compiled import Compiled


def optimize_lowered(lowered: jax.stages.Lowered, target: Target, config: Config) -> Context:
    """Rewrites a lowered function's module in place: its `compile()` then compiles the new one."""
    module = lowered.compiler_ir("stablehlo")
    context = context_for(target, config)
    optimize_module(module, context)
    return context


def context_for(target: Target, config: Config) -> Context:
    """What stages know of a target under a config."""
    is_known = target.platform == "cpu" or target.spec is not None
    kind = target.device_kind if target.isa is None else f"{target.device_kind}:{target.isa}"
    device = Device(target.platform, kind, is_known, _selection(target, config))
    return Context(device, target.features, config, Fuel.from_environment())


def _selection(target: Target, config: Config) -> Selection:
    if config.kernel_cache is None:
        return Selection(tuple(config.kernels)) if config.kernels else RULES
    return Selection(tuple(config.kernels), read(config.kernel_cache, environment(target)))


def environment(target: Target) -> dict[str, str]:
    """What decides how fast kernels are on a target, as measurements of them are kept with it."""
    found = {"device": target.device_kind, "jax": jax.__version__, "kpx": __version__}
    if target.platform == "cpu":
        return found | {"device": cpu.model(), "cores": str(cores())}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return found


def lower_for(target: Target, jitted: Any, *args, **kwargs) -> jax.stages.Lowered:
    """A jitted function lowered for a target: for a machine that is not here, as its platform would have it."""
    if target.is_present:
        return jitted.lower(*args, **kwargs)
    return jitted.trace(*args, **kwargs).lower(lowering_platforms=(target.platform,))


def compile_lowered(
    lowered: jax.stages.Lowered, target: Target, config: Config, options: Mapping[str, str] | None = None
) -> jax.stages.Compiled | AbsentExecutable:
    """Compiles a lowered function for a target, with the compiler's usual options and those given.

    Raises:
        CompileError: the target's compiler refused it; its words are in the error.
        TargetError: (a target that is not here) its compiler is not installed.
    """
    if not target.is_present:
        return compile_absent(lowered.compiler_ir("stablehlo"), target, config)
    _persist(config)
    try:
        usual = target.compiler_options(lowered.compiler_ir("stablehlo"))
        return lowered.compile(compiler_options={**usual, **(options or {})})
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise CompileError(
            f"XLA could not compile the module for {target.platform}: {error}\n"
            "Try `Config(level='none')`; if that compiles, please report the module (KPX_FUEL=n finds the "
            "rewrite)."
        ) from error


def _persist(config: Config) -> None:
    """Turns JAX's persistent compilation cache on where the config names a folder for it."""
    if config.cache_dir is None:
        return
    folder = os.fspath(config.cache_dir)
    if jax.config.jax_compilation_cache_dir != folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@dataclass
class _Built:
    """A module, rewritten, cut in two and compiled."""

    halves: Split
    context: Context
    prepare: Any
    executable: Any
    kept_weights: list[int]
    options: dict[str, str]

    def held(self, weights: Sequence[jax.Array]) -> list[jax.Array]:
        """The arrays that a call reads beside its inputs: prepared ones, then weights as they are."""
        prepared = [] if self.prepare is None else self.prepare(*(weights[i] for i in self.halves.prepare_weights))
        return [*prepared, *(weights[i] for i in self.kept_weights)]


_TOLD = (
    "kernels",
    "fusions",
    "measured",
    "layers",
    "precisions",
    "emulated",
)  # of a context, what is kept with a program


class ModelProgram:
    """A function of weights and inputs, compiled: weights are prepared once, inputs given at each call.

    Attributes:
        compiled: what is known about it; calling that runs the program on inputs.
        held: the arrays that a call reads beside its inputs: prepared ones, then weights as they are.
    """

    def __init__(
        self,
        function: Callable,
        weights: Sequence[Any],
        inputs: Sequence[Any],
        target: Target,
        config: Config,
        *,
        x64: bool = False,
        example: Callable[[], Sequence[jax.Array]] | None = None,
        saved: Mapping[str, Any] | None = None,
        gradients: Collection[int] = (),
    ):
        """Compiles `function(weights, inputs) -> list` for arrays, or structs, like those given.

        Args:
            x64: trace with 64-bit dtypes on, whatever the process's setting.
            example: gives inputs to measure with, when weights are loaded for the first time; without, nothing is measured.
            gradients: which inputs are gradients of a result.
            saved: what `saved` gave, for the same function: it is not traced or rewritten again.

        Raises:
            CompileError: the target's compiler refused the module.
        """
        self._target, self._config = target, config
        self._structs = [[_struct(a) for a in group] for group in (weights, inputs)]
        self._x64 = x64 or jax.config.jax_enable_x64
        self._original, self._example = None, None
        self._measuring = threading.Lock()
        self.held: list[jax.Array] = []
        if saved is not None:
            with self._tracing():
                self._use(self._restored(saved))
            return
        with self._tracing():
            start = time.perf_counter()
            lowered = lower_for(target, jax.jit(function, keep_unused=True), *self._structs)
            module = lowered.compiler_ir("stablehlo")
            traced = time.perf_counter() - start
            mark_arguments(module, {len(weights) + i for i in gradients}, COTANGENT)
            if config.prepare:
                mark_weights(module, set(range(len(weights))))
            decision = gate.Decision(module, target, config, environment(target))
            # What is measured, is made of the module as it was.
            self._original = m.copy(module) if decision.is_open and example is not None else None
            start = time.perf_counter()
            built = self._build(module, decision.config, decision.options)
            self._seconds = time.perf_counter() - start
        decision.tell(built.context)
        built.context.seconds["trace"] = traced
        self._decision, self._example = decision, example
        self._use(built)

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        with jax.default_device(self._target.device), jax.enable_x64(self._x64):
            yield

    def _build(self, module: Any, config: Config, options: Mapping[str, str]) -> _Built:
        """Rewrites a module in place, cuts it in two and compiles it."""
        target = self._target
        context = context_for(target, config)
        optimize_module(module, context)
        start = time.perf_counter()
        with no_collections():
            halves = split(module)
        context.seconds["prepare and run"] = time.perf_counter() - start
        # With nothing marked as a weight, everything is an input, in the order it came.
        kept = halves.kept_weights if config.prepare else list(range(len(self._structs[0])))
        return self._compiled(halves, context, kept, options)

    def _compiled(self, halves: Split, context: Context, kept: list[int], options: Mapping[str, str]) -> _Built:
        """The halves of a module, compiled."""
        target, config = self._target, self._config
        executable, prepared, start = None, [], time.perf_counter()
        if halves.prepare is not None:
            given = [self._structs[0][i] for i in halves.prepare_weights]
            prepare = jax.jit(call_module(halves.prepare)).lower(*given)
            if target.is_present:
                executable = compile_lowered(prepare, target, config)
            prepared = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in jax.tree.leaves(prepare.out_info)]
        weights = (self._structs[0][i] for i in kept)
        run = lower_for(
            target, jax.jit(call_module(halves.run), keep_unused=True), *prepared, *weights, *self._structs[1]
        )
        compiled = compile_lowered(run, target, config, options)
        context.seconds["compile"] = time.perf_counter() - start
        return _Built(halves, context, executable, compiled, kept, dict(options))

    def saved(self) -> dict[str, Any]:
        """What another process needs to go on without tracing and rewriting the function: plain data."""
        built, context = self._built, self._built.context
        halves = {name: None if half is None else m.bytecode(half)
                  for name, half in (("prepare", built.halves.prepare), ("run", built.halves.run))}  # fmt: skip
        split_at = (built.halves.prepare_weights, built.halves.kept_weights, built.halves.inputs)
        told = {name: dict(getattr(context, name)) for name in _TOLD}
        report = {"counts": dict(context.report.counts), "reverted": dict(context.report.reverted)}
        return {**halves, "at": split_at, "kept": built.kept_weights, "options": built.options, **told, **report}

    def _restored(self, saved: Mapping[str, Any]) -> _Built:
        context = context_for(self._target, self._config)
        context.report.counts.update(saved["counts"])
        context.report.reverted.update(saved["reverted"])
        for name in _TOLD:
            getattr(context, name).update(saved[name])
        prepare = None if saved["prepare"] is None else m.load(saved["prepare"])
        run = m.load(saved["run"])
        if any(weights_only.is_call(op) for op in m.walk(run.operation)) and (lack := weights_only.missing()):
            raise CompileError(f"The program calls `{weights_only.TARGET}`, which cannot be made here: {lack}.")
        return self._compiled(Split(prepare, run, *saved["at"]), context, saved["kept"], saved["options"])

    def _use(self, built: _Built) -> None:
        self._built = built
        self.prepare_weights, self.executable = built.halves.prepare_weights, built.executable
        self.call = flat_call(built.executable)
        self.compiled = Compiled(
            self.run, built.executable, built.halves.run, built.context, self._target,
            prepare_module=built.halves.prepare,
        )  # fmt: skip

    def prepared(self, weights: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the arrays that a call reads beside its inputs: prepared ones, then weights as they are.

        The first call measures candidates where an example of the inputs is at hand, and keeps the fastest.
        """
        with self._measuring:
            if self._original is not None and self._example is not None:
                self._measure(weights, self._example())
            self._original, self._example = None, None
        return self._built.held(weights)

    def load(self, weights: Sequence[jax.Array]) -> None:
        """Prepare weights for later calls of `run`; do nothing for a target that is not on this machine."""
        if self._target.is_present:
            self.held = self.prepared(weights)

    def _measure(self, weights: Sequence[jax.Array], inputs: Sequence[jax.Array]) -> None:
        """Compiles and runs the module in other ways, and goes on with the one that is fastest."""
        original, self._original = self._original, None

        def way(built: _Built, config: Config, options: Mapping[str, str], seconds: float) -> gate.Way:
            held = built.held(weights)

            def run():
                return jax.block_until_ready(built.executable(*held, *inputs))

            return gate.Way(config, options, built.context, run, seconds, built)

        def make(config: Config, options: Mapping[str, str]) -> gate.Way:
            start = time.perf_counter()
            with self._tracing():
                built = self._build(m.copy(original), config, options)
            return way(built, config, options, time.perf_counter() - start)

        self._use(self._decision.measured(way(self._built, self._config, {}, self._seconds), make))

    def run(self, *inputs: jax.Array) -> list[jax.Array]:
        """The outputs for inputs, with the weights loaded last.

        Raises:
            TargetError: the program is for a machine that is not here.
        """
        return self.executable(*self.held, *inputs)

    def run_with(self, held: Sequence[jax.Array], *inputs: jax.Array) -> list[jax.Array]:
        """Return the outputs for inputs, with weights that `prepared` returned.

        Inputs must be arrays of the shapes and dtypes that this was compiled for, on its device: they are not checked.
        """
        return self.call([*held, *inputs])


def _struct(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
