"""kpx: any model, any framework, any chip, one optimizer."""

from pathlib import Path as _Path

# A wheel holds bridges/ and kernels/ inside this package; a checkout keeps them beside it.
if not (_Path(__file__).parent / "bridges").is_dir():
    __path__.append(str(_Path(__file__).resolve().parents[1]))

from kpx import fusion, ops, track
from kpx._version import __version__  # noqa: F401
from kpx.api import compile, jit, optimize
from kpx.buckets import Buckets
from kpx.config import Config
from kpx.errors import (
    CaptureError,
    CompileError,
    ConfigError,
    GraphBreakWarning,
    InputError,
    KernelCacheWarning,
    KernelError,
    KpxError,
    OutOfMemoryError,
    PlanError,
    RecompileWarning,
    RewriteError,
    RewriteWarning,
    TargetError,
    UnsupportedError,
)
from kpx.hardware.detect import targets
from kpx.hardware.target import Target
from kpx.observe.compare import compare
from kpx.observe.explain import explain
from kpx.observe.validate import bisect, validate
from kpx.runtime.compiled import Compiled
from kpx.sharding.plan import Plan, plan
from kpx.tuning import tune
from kpx.unmodified import everywhere

__all__ = [
    "Buckets",
    "CaptureError",
    "CompileError",
    "Compiled",
    "Config",
    "ConfigError",
    "GraphBreakWarning",
    "InputError",
    "KernelCacheWarning",
    "KernelError",
    "KpxError",
    "OutOfMemoryError",
    "Plan",
    "PlanError",
    "RecompileWarning",
    "RewriteError",
    "RewriteWarning",
    "Target",
    "TargetError",
    "UnsupportedError",
    "bisect",
    "compare",
    "compile",
    "everywhere",
    "explain",
    "fusion",
    "jit",
    "ops",
    "optimize",
    "plan",
    "targets",
    "track",
    "tune",
    "validate",
]
