"""The errors kpx raises. Each says what was given, what is allowed and what to do next."""

from __future__ import annotations


class KpxError(Exception):
    """Base class of every error that kpx raises."""


class ConfigError(KpxError, ValueError):
    """A `Config` field, a preset or a `KPX_*` variable has a value that is not allowed."""


class InputError(KpxError, TypeError):
    """A call's arguments are not what the compiled model takes."""


class TargetError(KpxError, ValueError):
    """A target is unknown, or is not on this machine."""


class UnsupportedError(KpxError, NotImplementedError):
    """The model uses something kpx has no lowering for yet.

    Attributes:
        nodes: (PyTorch) the nodes of the captured graph that cannot be lowered, innermost first.
    """

    def __init__(self, message: str, nodes: tuple = ()):
        super().__init__(message)
        self.nodes = nodes


class CaptureError(KpxError, RuntimeError):
    """The model could not be captured as a graph (data-dependent control flow, for one)."""


class ForkError(KpxError, RuntimeError):
    """This process was forked from one in which compiled programs had run."""


class CompileError(KpxError, RuntimeError):
    """A compiler refused the module. Carries the compiler's own words."""


class OutOfMemoryError(CompileError):
    """A program does not fit the device that it was compiled for.

    Attributes:
        used_bytes: what it needs of one device, by the vendor's compiler.
        available_bytes: what a device has.
        buffers: the largest buffers, with `bytes`, `shape`, `operation` and `source`.
    """

    def __init__(self, message: str, used_bytes: int, available_bytes: int, buffers: tuple = ()):
        super().__init__(message)
        self.used_bytes = used_bytes
        self.available_bytes = available_bytes
        self.buffers = buffers


class KernelError(KpxError, ValueError):
    """A kernel that was asked for by name is not known, or does not support the case."""


class BudgetError(KpxError, ValueError):
    """A budget of error cannot be kept; the message says what was reached."""


class PlanError(KpxError, RuntimeError):
    """No plan of a step fits the machine; the message says what would."""


class TrainingError(KpxError, RuntimeError):
    """Training cannot go on.

    Attributes:
        step: at which it was found.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class CheckpointError(KpxError, RuntimeError):
    """A folder of checkpoints cannot be used: it is another job's, another model's, or nothing in it can be read."""


class RewriteError(KpxError, RuntimeError):
    """A rewrite produced a module that does not verify."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be read, and the one before it is used."""


class RewriteWarning(UserWarning):
    """A rewrite was reverted; the model runs without it."""


class KernelCacheWarning(UserWarning):
    """Measurements of kernels were not used: they are of another environment, or cannot be read."""


class RecompileWarning(UserWarning):
    """A model is compiled again and again, because a dimension of its inputs keeps changing."""


class GraphBreakWarning(UserWarning):
    """A model's Python could not be captured whole: it runs in parts, which is slower."""
