"""Unmodified JAX programs: every `jax.jit` of a process, or of a `with` block, is optimized where JAX compiles."""

from __future__ import annotations

import contextlib
import pathlib
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kpx.config import Config, resolve
from kpx.errors import ConfigError, KpxError, RewriteWarning
from kpx.hardware.target import Target, platform_of
from kpx.ir import module as m
from kpx.jax_internals import before_compiling
from kpx.pipeline import optimize_module
from kpx.precision import Budget
from kpx.runtime.build import context_for

_LEAST_OPS = 8  # a module of fewer is one of JAX's own helpers, say: not worth a pipeline


@dataclass
class Optimized:
    """What was done to a program's modules.

    Attributes:
        modules: how many were rewritten.
        rewrites: how often each rewrite was applied, in all of them.
        kernels: what computes which fused op.
        left: how many were left as they are, because they are small, or something went wrong.
    """

    modules: int = 0
    rewrites: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    left: int = 0


@contextlib.contextmanager
def everywhere(config: Config | None = None) -> Iterator[Optimized]:
    """Optimizes every function that JAX compiles inside, of programs that never heard of kpx.

    What was compiled before stays as it is. Nothing is measured; weights are arguments, so that nothing is prepared. A
    module that cannot be rewritten is compiled as JAX made it, with a warning.

    Args:
        config: what may be done; `Config()` by default.

    Raises:
        ConfigError: the config has a budget, which needs a model.
        UnsupportedError: this version of JAX compiles in a way that kpx does not know.
    """
    given = resolve(config)
    if isinstance(given.precision, Budget):
        raise ConfigError("`kpx.everywhere` takes no budget, which is of one model. Use `kpx.optimize` of that model.")
    told = Optimized()

    def change(module, device):
        if m.count_ops(module) < _LEAST_OPS:
            told.left += 1
            return {}
        target = Target(platform_of(device))
        context = context_for(target, given)
        before = m.bytecode(module)
        try:
            optimize_module(module, context)
        except (KpxError, RuntimeError, ValueError) as error:  # MLIR's errors among them
            told.left += 1
            m.replace_body(module, m.parse(before, module.context))
            warnings.warn(
                f"A module was left as JAX made it: {type(error).__name__}: {str(error)[:200]}. Please report this.",
                RewriteWarning,
                stacklevel=2,
            )
            return {}
        told.modules += 1
        told.kernels |= context.kernels
        for name, count in context.report.counts.items():
            told.rewrites[name] = told.rewrites.get(name, 0) + count
        return target.compiler_options(module)

    with before_compiling(change):
        yield told


def run(arguments: Sequence[str], config: Config | None = None) -> Optimized:
    """Runs a Python program (`script.py ...`, or `-m module ...`) with every function optimized, as `__main__`."""
    name, *rest = arguments[1:] if arguments[0] == "-m" else arguments
    before = sys.argv
    sys.argv = [name, *rest]
    try:
        with everywhere(config) as told:
            if arguments[0] == "-m":
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, str(pathlib.Path(name).resolve().parent))
                runpy.run_path(name, run_name="__main__")
        return told
    finally:
        sys.argv = before
