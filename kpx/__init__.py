"""kpx: any model, any framework, any chip, one optimizer."""

from pathlib import Path as _Path

# A wheel holds bridges/ and kernels/ inside this package; a checkout keeps them beside it.
if not (_Path(__file__).parent / "bridges").is_dir():
    __path__.append(str(_Path(__file__).resolve().parents[1]))

from kpx._version import __version__  # noqa: E402, F401
from kpx.api import compile, jit, optimize  # noqa: E402
from kpx.config import Config  # noqa: E402
from kpx.errors import (  # noqa: E402
    CaptureError,
    CompileError,
    ConfigError,
    InputError,
    KpxError,
    RewriteError,
    RewriteWarning,
    TargetError,
    UnsupportedError,
)
from kpx.runtime.compiled import Compiled  # noqa: E402
from kpx.targets.target import Target  # noqa: E402

__all__ = [
    "CaptureError",
    "CompileError",
    "Compiled",
    "Config",
    "ConfigError",
    "InputError",
    "KpxError",
    "RewriteError",
    "RewriteWarning",
    "Target",
    "TargetError",
    "UnsupportedError",
    "compile",
    "jit",
    "optimize",
]
