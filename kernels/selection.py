"""Which of a kernel's implementations is used, beside what its rules prefer: those asked for by name, and those measured.

Measurements are kept in a file that can be shipped, with the environment that they were made in; elsewhere they are not
read, and rules decide.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from kpx.errors import ConfigError, KernelCacheWarning

PLAIN = "xla"
"""The name of no implementation: the decomposition, as XLA compiles it."""

_FORMAT = 1


@dataclass(frozen=True)
class Case:
    """What an implementation is chosen for: a kernel at types, with attributes, alone or with its gradient."""

    kernel: str
    version: int
    structs: tuple[jax.ShapeDtypeStruct, ...]
    attributes: tuple[tuple[str, Any], ...]
    differentiated: bool

    @functools.cached_property
    def text(self) -> str:
        """The case in words, by which measurements are kept."""
        arrays = ", ".join(f"{s.dtype}{list(s.shape)}" for s in self.structs)
        given = ", ".join(f"{name}={_plain(value)}" for name, value in self.attributes)
        return f"{self.kernel} v{self.version} ({arrays}; {given}){' with gradient' if self.differentiated else ''}"


def _plain(value: Any) -> str:
    """An attribute as it is in a module too: where bools are numbers, and f32 constants have six digits."""
    if isinstance(value, str):
        return repr(value)
    return f"{float(value):.6g}"


@dataclass(frozen=True)
class Measurements:
    """What was fastest, by case; `environment` is where it was measured."""

    environment: tuple[tuple[str, str], ...] = ()
    fastest: Mapping[str, str] = field(default_factory=dict, hash=False)
    key: int = 0  # a hash of `fastest`


@dataclass(frozen=True)
class Selection:
    """What is asked of the registry when it chooses.

    Attributes:
        named: by kernel (`kpx.attention`), the implementation to use, or `xla` for none.
        measured: what `kpx.tune` found on this machine.
    """

    named: tuple[tuple[str, str], ...] = ()
    measured: Measurements = field(default_factory=Measurements)

    @functools.cached_property
    def by_name(self) -> dict[str, str]:
        return dict(self.named)

    def fastest(self, case: Case) -> str | None:
        """The implementation that was measured as the fastest, or None where the case was not measured."""
        return self.measured.fastest.get(case.text) if self.measured.fastest else None

    @functools.cached_property
    def kernels(self) -> frozenset[str]:
        """The kernels of which more is known than rules."""
        return frozenset([*self.by_name, *(text.partition(" ")[0] for text in self.measured.fastest)])


RULES = Selection()
"""Rules alone."""

_RECORDED: contextvars.ContextVar[dict[Case, None] | None] = contextvars.ContextVar("kpx_cases", default=None)


@contextlib.contextmanager
def recording() -> Iterator[dict[Case, None]]:
    """The cases that implementations are chosen for inside, in order."""
    cases: dict[Case, None] = {}
    token = _RECORDED.set(cases)
    try:
        yield cases
    finally:
        _RECORDED.reset(token)


def is_recording() -> bool:
    """Whether every case is of interest, those that rules leave alone too."""
    return _RECORDED.get() is not None


def note(case: Case) -> None:
    """Says that an implementation was chosen for a case."""
    if (cases := _RECORDED.get()) is not None:
        cases[case] = None


# The file -----------------------------------------------------------------------------------------


def read(path: str | os.PathLike, environment: Mapping[str, str]) -> Measurements:
    """The measurements in a file, made in this environment; none, with a warning, where it is another's or cannot be read.

    Raises:
        ConfigError: there is no such file.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"There are no measurements at `{path}`. `kpx.tune(..., cache={str(path)!r})` makes them.")
    stamp = file.stat()
    return _read(str(file), stamp.st_mtime_ns, stamp.st_size, tuple(sorted(environment.items())))


@functools.lru_cache(maxsize=16)
def _read(path: str, _changed: int, _size: int, environment: tuple[tuple[str, str], ...]) -> Measurements:
    kept = entries(path)
    if isinstance(kept, str):
        warnings.warn(f"The measurements at `{path}` were ignored: {kept}.", KernelCacheWarning, stacklevel=4)
        return Measurements()
    if reason := differs(kept["environment"], dict(environment)):
        warnings.warn(
            f"The measurements at `{path}` were ignored: {reason}. Rules choose kernels; `kpx.tune` measures anew.",
            KernelCacheWarning,
            stacklevel=4,
        )
        return Measurements()
    fastest = {case: entry["fastest"] for case, entry in sorted(kept["cases"].items())}
    return Measurements(environment, fastest, hash(tuple(fastest.items())))


def differs(kept: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """How the environment of measurements differs from this one, in words; "" where it does not."""
    names = [name for name in {**kept, **environment} if kept.get(name) != environment.get(name)]
    return "; ".join(f"they are of {name} {kept.get(name)}, and here is {environment.get(name)}" for name in names)


def entries(path: str | os.PathLike) -> dict[str, Any] | str:
    """What a file of measurements holds, or why it cannot be used."""
    try:
        found = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        return "it is of another version of kpx, or is no file of measurements"
    cases, environment = found.get("cases"), found.get("environment")
    if not isinstance(cases, dict) or not isinstance(environment, dict):
        return "it is not whole"
    if not all(isinstance(entry, dict) and isinstance(entry.get("fastest"), str) for entry in cases.values()):
        return "it is not whole"
    return found


def write(path: str | os.PathLike, environment: Mapping[str, str], cases: Mapping[str, Any], date: str) -> None:
    """Puts cases into a file, beside those of the same environment that it has; at once, so that readers see it whole.

    Raises:
        ConfigError: it cannot be written there.
    """
    file = pathlib.Path(path)
    kept = entries(file) if file.exists() else "new"
    before = {} if isinstance(kept, str) or differs(kept["environment"], environment) else kept["cases"]
    whole = {"format": _FORMAT, "date": date, "environment": dict(environment), "cases": {**before, **cases}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(handle, "w") as stream:
            json.dump(whole, stream, indent=1, sort_keys=True)
            stream.write("\n")
        os.replace(name, file)
    except OSError as error:
        raise ConfigError(f"Measurements cannot be written to `{path}`: {error.strerror}. Name another file.") from None


def known(implementations: Sequence[str]) -> str:
    """Names to choose from, in words."""
    return ", ".join(f"`{name}`" for name in (*implementations, PLAIN))
