"""What was measured as the fastest way to run a module, remembered per machine, and shipped where that is wanted.

A file holds choices of one environment: the device, its cores, and the versions of all that compiles. Another's is not
used. Files are replaced whole, under a lock, so that processes that measure at once do not lose or damage anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kpx.errors import KernelCacheWarning
from kpx.kernels.selection import differs

try:
    import fcntl
except ImportError:  # Windows: the last writer wins, and the file is whole all the same
    fcntl = None

_FORMAT = "kpx choices 1"


@dataclass(frozen=True)
class Choice:
    """How a module is compiled.

    Attributes:
        dropped: groups of rewrites that are left out, or `kernels`, each with the reason.
        options: the compiler's options that are not the usual ones.
        notes: what was measured, in words, by group.
    """

    dropped: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def folder() -> pathlib.Path:
    """Where choices are remembered: in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "kpx" / "choices"


def default_file(environment: Mapping[str, str]) -> pathlib.Path:
    """This environment's own file."""
    return folder() / f"{hashlib.sha256(json.dumps(dict(environment), sort_keys=True).encode()).hexdigest()[:16]}.json"


def find(
    key: str, environment: Mapping[str, str], shipped: str | os.PathLike | None, allowed_options: Mapping[str, Any]
) -> Choice | None:
    """The choice for a module, from a file that was shipped, else from this machine's own; None where there is none.

    Args:
        key: the module's, with everything that decides what is made of it.
        allowed_options: the options that a choice may set, each with its values. A choice of others is not used.
    """
    files = [default_file(environment)] if shipped is None else [pathlib.Path(shipped), default_file(environment)]
    for file in files:
        if not file.exists():
            if shipped is not None and file == pathlib.Path(shipped):
                _warn(file, "there is no such file")
            continue
        found = _read(file, environment)
        if isinstance(found, str):
            _warn(file, found)
        elif key in found:
            choice = _parsed(found[key], allowed_options)
            if isinstance(choice, Choice):
                return choice
            _warn(file, f"a choice in it cannot be used: {choice}")
    return None


def remember(key: str, choice: Choice, environment: Mapping[str, str], date: str) -> None:
    """Keeps a choice in this machine's own file. Where that cannot be written, a warning says so."""
    file = default_file(environment)
    entry = {
        "dropped": dict(choice.dropped),
        "options": dict(choice.options),
        "notes": dict(choice.notes),
        "date": date,
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            before = _read(file, environment) if file.exists() else {}
            kept = {} if isinstance(before, str) else before
            whole = {"format": _FORMAT, "environment": dict(environment), "choices": {**kept, key: entry}}
            handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
            try:
                with os.fdopen(handle, "w") as stream:
                    json.dump(whole, stream, indent=1, sort_keys=True)
                os.replace(name, file)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
    except OSError as error:
        _warn(file, f"it cannot be written ({error.strerror}): the next process measures again")


@contextlib.contextmanager
def _locked(file: pathlib.Path) -> Iterator[None]:
    with open(f"{file}.lock", "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(file: pathlib.Path, environment: Mapping[str, str]) -> dict[str, Any] | str:
    """The choices in a file, or why they cannot be used."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        return "it is of another version of kpx, or holds no choices"
    made, choices = found.get("environment"), found.get("choices")
    if not isinstance(made, dict) or not isinstance(choices, dict):
        return "it is not whole"
    return differs(made, environment) or choices


def _parsed(entry: Any, allowed: Mapping[str, Any]) -> Choice | str:
    parts: list[dict[str, str]] = []
    for name in ("dropped", "options", "notes"):
        part = entry.get(name, {}) if isinstance(entry, dict) else None
        if not isinstance(part, dict) or not all(isinstance(v, str) for v in part.values()):
            return "it is not whole"
        parts.append(part)
    dropped, options, notes = parts
    if unknown := [name for name, value in options.items() if value not in allowed.get(name, ())]:
        return f"the compiler's option {unknown[0]}={options[unknown[0]]!r} is not one of those that are tried"
    return Choice(dropped, options, notes)


def _warn(file: pathlib.Path, why: str) -> None:
    warnings.warn(f"Choices at `{file}` were not used: {why}.", KernelCacheWarning, stacklevel=4)
