"""Stand-ins for the libraries of a vendor's driver, so that its compiler loads where there is none.

XLA's plugin for AMD's GPUs carries its own compiler, and is linked against the libraries that run what it compiles;
Intel's wants its driver's. Each of those that this machine lacks gets a library with the symbols, and their versions,
that the plugin wants; calling one gives an error code. They are for a worker that only compiles, and never for a
machine that has the driver.
"""

from __future__ import annotations

import collections
import ctypes
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence

from kpx.errors import TargetError

_LIST = "libraries.txt"
_FAILED = 100  # hipErrorNoDevice; of no meaning to Intel's driver, but not its success


def build(libraries: Sequence[pathlib.Path], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the stubs that shared libraries need to load, in the order in which to load them.

    Raises:
        TargetError: there is no C compiler, ldd or readelf here, or the compiler failed.
    """
    lacking = [tool for tool in ("gcc", "ldd", "readelf") if shutil.which(tool) is None]
    if lacking:
        raise TargetError(
            f"This compiler needs small stub libraries to load here, and {' and '.join(lacking)} to make them with "
            "cannot be found. Install them: `apt-get install gcc binutils`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    wanted: dict[tuple[str, str | None], tuple[str, str]] = {}  # (symbol, version) -> (library, kind)
    for library in libraries:
        needed = [n for n in _needed(library) if n in _missing(library)]
        names += [n for n in needed if n not in names]
        if needed:
            for symbol, (where, kind) in _undefined(library, needed).items():
                wanted.setdefault(symbol, (where, kind))
    for name in names:
        symbols = {symbol: kind for symbol, (where, kind) in wanted.items() if where == name}
        _compile(folder / name, symbols)
    (folder / _LIST).write_text("\n".join(names))
    return built(folder)


def built(folder: pathlib.Path) -> list[pathlib.Path]:
    """The stubs in a folder, in the order in which to load them; none where they were not made."""
    listed = folder / _LIST
    return [folder / name for name in listed.read_text().split()] if listed.is_file() else []


def load(stubs: Iterable[pathlib.Path]) -> None:
    """Loads stubs into this process, each for itself: shared symbols crash the plugin."""
    for stub in stubs:
        ctypes.CDLL(str(stub))


def _read(library: pathlib.Path, *options: str) -> list[str]:
    command = ["readelf", "--wide", *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _needed(library: pathlib.Path) -> list[str]:
    return [found[1] for line in _read(library, "--dynamic") if (found := re.search(r"NEEDED.*\[(.*?)\]", line))]


def _missing(library: pathlib.Path) -> set[str]:
    """The libraries that this machine's linker would not find, for this one and for what it needs."""
    listed = subprocess.run(["ldd", str(library)], capture_output=True, text=True).stdout
    return set(re.findall(r"^\s*(\S+) => not found", listed, re.MULTILINE))


def _undefined(library: pathlib.Path, needed: Sequence[str]) -> dict[tuple[str, str | None], tuple[str, str]]:
    """What a library lacks: symbols and versions, with who is to have each, and its kind."""
    providers = collections.defaultdict(set)
    current = None
    for line in _read(library, "--version-info"):
        if found := re.search(r"File: (\S+)", line):
            current = found[1]
        if current and (found := re.search(r"Name: (\S+)", line)):
            providers[found[1]].add(current)
    system = [ctypes.CDLL(name) for name in ("libm.so.6", "libc.so.6", "libstdc++.so.6", "libgcc_s.so.1")]
    symbols: dict[tuple[str, str | None], tuple[str, str]] = {}
    for line in _read(library, "--dyn-syms"):
        columns = line.split()  # number, value, size, kind, binding, visibility, section, name
        if len(columns) < 8 or columns[6] != "UND" or columns[4] != "GLOBAL":
            continue
        name, _, version = columns[7].replace("@@", "@").partition("@")
        if version:
            for provider in providers[version] & set(needed):
                symbols[name, version] = provider, columns[3]
        elif not any(hasattr(base, name) for base in system):
            symbols[name, None] = needed[0], columns[3]
    return symbols


def _compile(path: pathlib.Path, symbols: dict[tuple[str, str | None], str]) -> None:
    versions = collections.defaultdict(list)
    for name, version in symbols:
        if version:
            versions[version].append(name)
    source, script = path.with_suffix(".c"), path.with_suffix(".map")
    source.write_text("\n".join(_definition(name, kind) for (name, _), kind in symbols.items()) + "\n")
    command = [
        "gcc",
        "-w",
        "-shared",
        "-fPIC",
        "-fno-builtin",
        "-o",
        str(path),
        str(source),
        f"-Wl,-soname,{path.name}",
    ]
    if versions:
        script.write_text("\n".join(f"{v} {{ global: {'; '.join(names)}; }};" for v, names in versions.items()))
        command.append(f"-Wl,--version-script={script}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise TargetError(f"The stub library {path.name} could not be made: {done.stderr[-500:]}")
    source.unlink()
    script.unlink(missing_ok=True)


def _definition(name: str, kind: str) -> str:
    if kind == "OBJECT" or name.startswith(("_ZTI", "_ZTV", "_ZTS")):
        return f"long {name}[512];"
    if "GetErrorString" in name or "GetErrorName" in name or "status_to_string" in name:
        return f'const char* {name}(void) {{ return "there is no driver here"; }}'
    if name.startswith("__hipRegisterFat"):
        return f"static void* module_{name}; void* {name}(void) {{ return &module_{name}; }}"
    if name.startswith(("__", "_Z")):
        return f"long {name}(void) {{ return 0; }}"
    return f"int {name}(void) {{ return {_FAILED}; }}"
