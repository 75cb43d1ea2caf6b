"""Config: what may be done to a model, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kpx.errors import ConfigError
from kpx.kernels import registry
from kpx.precision import Budget, Policy, known

LEVELS = ("none", "conservative", "balanced", "aggressive")
MATMUL_PRECISIONS = ("highest", "high")
LAYERS = ("auto", "loop", "unrolled")


@dataclass(frozen=True)
class Config:
    """How a model is optimized.

    Every field can be overridden by a variable: `KPX_LEVEL`, `KPX_MATMUL_PRECISION`, `KPX_PREPARE`,
    `KPX_PRECISION`, `KPX_LAYERS`, `KPX_VERIFY_EACH`, `KPX_DISABLE` (comma-separated), `KPX_KERNELS` (as `kpx.attention=flash_cuda,kpx.norm=xla`),
    `KPX_KERNEL_CACHE`, `KPX_MEASURE_SECONDS`, `KPX_CHOICES`, `KPX_CACHE_DIR` and `KPX_COMPILE_SECONDS`.

    Attributes:
        level: `"none"`: no rewrites at all. `"conservative"`: only those that keep every bit.
            `"balanced"`: also those that reorder additions or change layouts, within their bounds. At a module's first
            call, they are measured by groups, and what makes it slower is taken back; the choice is remembered.
            `"aggressive"`: measures for up to a minute, the compiler's options too.
        matmul_precision: how f32 matrix products are computed, in PyTorch's and JAX's sense of the
            words. `"highest"`: in f32. `"high"`: each f32 factor as a sum of two bf16, which keeps
            about 16 of 24 bits and is faster where the CPU has bf16 units.
        precision: in which precision products, convolutions and attention are computed: a name (`"bf16"`, `"f16"`, `"int8"`; see
            `kpx.precision.PRECISIONS`), a `kpx.precision.Policy`, or, for what `kpx.optimize` takes, a `kpx.precision.Budget`
            of the error that may be made. None: in that of the model. What is around them, and the
            model's parameters, stay as they are. `Compiled.precisions` counts.
        prepare: compute what depends on weights alone once, at load.
        layers: of a model whose layers are alike. `"auto"`: from 16 on they run as a loop over their stacked weights where
            that does not slow the run, so that the time to compile does not grow with their number. `"loop"`: from 4 on, and
            also where XLA copies the weights of each layer, as on a target whose kernels do not read them from a stack.
            `"unrolled"`: never.
        verify_each: verify the module after every single rewrite (slow; finds a faulty one at once).
        disable: names of rewrites to leave out.
        kernels: by fused op, the implementation to use: `{"kpx.attention": "flash_cuda"}`, or `"xla"` for none.
        kernel_cache: a file of measurements that `kpx.tune` made, or None: kernels are chosen by those, else by rules.
        measure_seconds: how long a first call may measure, and no longer than three times as long as the module took to
            compile. 0: nothing is measured.
        choices: a file of what was measured elsewhere on such a machine, or None: this machine's own are used.
        cache_dir: where compiled executables persist (JAX's compilation cache), or None.
        compile_seconds: how long the compiler of a target that is not on this machine may take.

    Raises:
        ConfigError: a field, or a variable, has a value that is not allowed.
    """

    level: str = "balanced"
    matmul_precision: str = "highest"
    precision: str | Policy | Budget | None = None
    prepare: bool = True
    layers: str = "auto"
    verify_each: bool = False
    disable: tuple[str, ...] = ()
    kernels: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    kernel_cache: str | None = None
    measure_seconds: float = 3.0
    choices: str | None = None
    cache_dir: str | None = None
    compile_seconds: float = 1800.0

    def __post_init__(self):
        _one_of("level", self.level, LEVELS)
        _one_of("matmul_precision", self.matmul_precision, MATMUL_PRECISIONS)
        _one_of("layers", self.layers, LAYERS)
        if self.precision is not None and not isinstance(self.precision, (Policy, Budget)):
            known(self.precision)
        for name in ("prepare", "verify_each"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"`{name}={getattr(self, name)!r}` is not a bool. Use True or False.")
        if isinstance(self.disable, str) or not all(isinstance(n, str) for n in self.disable):
            raise ConfigError(f"`disable={self.disable!r}` is not a tuple of rewrite names.")
        object.__setattr__(self, "disable", tuple(self.disable))
        object.__setattr__(self, "kernels", _names_of_kernels(self.kernels))
        for name, what in (("cache_dir", "folder"), ("kernel_cache", "file"), ("choices", "file")):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise ConfigError(f"`{name}={value!r}` is not a path. Use a {what}'s path, or None.")
        for name in ("compile_seconds", "measure_seconds"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), (int, float)):
                raise ConfigError(f"`{name}={getattr(self, name)!r}` is not a number of seconds.")
        if not self.measure_seconds >= 0:
            raise ConfigError(
                f"`measure_seconds={self.measure_seconds!r}` is negative. Give seconds, or 0 to measure nothing."
            )
        if not self.compile_seconds > 0:
            raise ConfigError(f"`compile_seconds={self.compile_seconds!r}` is not positive. Give seconds, as 600.")

    @property
    def may_be_inexact(self) -> bool:
        """Whether rewrites and kernels may be used that do not keep every bit."""
        return self.level in ("balanced", "aggressive")

    @classmethod
    def inference(cls, **changes) -> Config:
        """The default: balanced, with weights prepared at load."""
        return cls(**changes)

    @classmethod
    def training(cls, **changes) -> Config:
        """For functions whose weights change at every call: nothing is prepared at load."""
        return cls(**{"prepare": False, **changes})

    @classmethod
    def development(cls, **changes) -> Config:
        """For finding faults: only rewrites that keep every bit, each verified as it is made."""
        return cls(**{"level": "conservative", "verify_each": True, **changes})

    @classmethod
    def production(cls, **changes) -> Config:
        """Balanced, and executables persist across processes, in the user's cache folder by default."""
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return cls(**{"cache_dir": os.path.join(base, "kpx"), **changes})

    def with_environment(self, environment: Mapping[str, str] | None = None) -> Config:
        """This config with the `KPX_*` variables of an environment (the process's) put over it."""
        environment = os.environ if environment is None else environment
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            variable = f"KPX_{field.name.upper()}"
            if given := environment.get(variable):
                changes[field.name] = _parsed(variable, given, field.name)
        return dataclasses.replace(self, **changes) if changes else self


def resolve(config: Config | None) -> Config:
    """The config to use: the given one or the default, with the environment over it.

    Raises:
        ConfigError: what was given is not a `Config`.
    """
    if config is not None and not isinstance(config, Config):
        raise ConfigError(
            f"`config={config!r}` is not a kpx.Config. Use kpx.Config(...) or a preset: "
            "kpx.Config.inference(), .training(), .development(), .production()."
        )
    return (config or Config()).with_environment()


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"`{name}={value!r}` is not known. Use one of {', '.join(map(repr, allowed))}.")


def _names_of_kernels(given: Any) -> tuple[tuple[str, str], ...]:
    """Names of fused ops with their implementations', sorted."""
    pairs = tuple(given.items()) if isinstance(given, Mapping) else given
    is_pairs = isinstance(pairs, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in pairs)
    if not is_pairs or not all(isinstance(n, str) for pair in pairs for n in pair):
        raise ConfigError(
            f"`kernels={given!r}` does not name implementations. Use a dict, as {{'kpx.attention': 'flash_cuda'}}."
        )
    known = sorted(kernel.name for kernel in registry.kernels())
    if unknown := [name for name, _ in pairs if name not in known]:
        raise ConfigError(f"`kernels` names `{unknown[0]}`, which is no fused op. There are {', '.join(known)}.")
    return tuple(sorted(pairs))


def _parsed(variable: str, given: str, name: str) -> Any:
    if name == "disable":
        return tuple(n.strip() for n in given.split(",") if n.strip())
    if name == "kernels":
        return tuple(tuple(part.strip() for part in pair.split("=", 1)) for pair in given.split(",") if pair.strip())
    if name in ("compile_seconds", "measure_seconds"):
        try:
            return float(given)
        except ValueError:
            raise ConfigError(f"{variable}={given!r} is not a number of seconds. Give one, as 600.") from None
    if name in ("prepare", "verify_each"):
        words = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
        if given.lower() not in words:
            raise ConfigError(f"{variable}={given!r} is not a switch. Use 1 or 0.")
        return words[given.lower()]
    return given
