"""The vendors' compilers: which packages hold them, where they are, and what installs them.

A plugin in the caller's own environment makes JAX look for its device in every process, with warnings where there
is none. So they are installed into a folder of kpx's, which only its workers see; where the caller's environment has
one (`kpx-xla[tpu]`, or on a machine with the device), that is used.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import jax

from kpx.errors import TargetError
from kpx.hardware import stubs, xpu


@dataclass(frozen=True)
class Plugin:
    """A vendor's compiler.

    Attributes:
        platform: the platform that it compiles for.
        packages: what pip installs it from, for the version of JAX that is here.
        module: a module of it, by which it is found.
        size: roughly what it takes on disk, in megabytes.
        jax: the version of JAX that it belongs to.
        apart: whether it needs a Python environment of its own.
    """

    platform: str
    packages: tuple[str, ...]
    module: str
    size: int
    jax: str = jax.__version__
    apart: bool = False


def plugin(platform: str) -> Plugin:
    """The plugin of a platform.

    Raises:
        TargetError: there is none: the CPU's compiler is in JAX itself.
    """
    version = jax.__version__
    known = {
        "tpu": Plugin("tpu", (_libtpu(),), "libtpu", 690),
        "cuda": Plugin(
            "cuda", (f"jax-cuda13-pjrt=={version}", f"jax-cuda13-plugin=={version}"), "jax_plugins.xla_cuda13", 400
        ),
        "rocm": Plugin(
            "rocm", (f"jax-rocm7-pjrt=={version}", f"jax-rocm7-plugin=={version}"), "jax_plugins.xla_rocm7", 490
        ),
        "xpu": Plugin(
            "xpu", (f"jax-oneapi-plugin[with-oneapi]=={xpu.JAX}",), "jax_plugins.xla_oneapi", 3300, xpu.JAX, apart=True
        ),
    }
    if platform not in known:
        raise TargetError(f"There is no plugin for `{platform}`. There are: {', '.join(known)}.")
    return known[platform]


def _libtpu() -> str:
    """The libtpu that JAX asks for: another one may compile and then fail to print what it compiled."""
    for requirement in importlib.metadata.requires("jax") or ():
        if (found := re.match(r"libtpu\s*([^;]+);.*extra\s*==\s*['\"]tpu['\"]", requirement)) is not None:
            return f"libtpu{found[1].strip()}"
    return "libtpu"


def folder(platform: str) -> pathlib.Path:
    """Where `install` puts a platform's plugin: under `KPX_PLUGINS`, or the user's data folder."""
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    root = os.environ.get("KPX_PLUGINS") or os.path.join(base, "kpx", "plugins")
    wanted = plugin(platform)
    python = "" if wanted.apart else f"-py{sys.version_info.major}{sys.version_info.minor}"
    return pathlib.Path(root) / f"{platform}-jax{wanted.jax}{python}"


def find(platform: str) -> list[str] | None:
    """The folders to put before a worker's path, so that it finds the plugin; None where there is no plugin."""
    wanted = plugin(platform)
    ours = xpu.site_packages(folder(platform)) if wanted.apart else folder(platform)
    if ours is not None and ours.is_dir() and _has(wanted.module, [str(ours)]):
        return [str(ours)]
    return [] if _has(wanted.module, sys.path) else None


def python(platform: str) -> str:
    """The Python that a platform's worker runs under."""
    apart = plugin(platform).apart and find(platform)
    return str(xpu.environment_python(folder(platform))) if apart else sys.executable


def _has(module: str, path: list[str]) -> bool:
    """Whether a path has a module, told without importing it or its parents."""
    *parents, name = module.split(".")
    for parent in parents:
        found = importlib.machinery.PathFinder.find_spec(parent, path)
        if found is None or found.submodule_search_locations is None:
            return False
        path = list(found.submodule_search_locations)
    return importlib.machinery.PathFinder.find_spec(name, path) is not None


def install_command(platform: str) -> str:
    """The command that installs a platform's plugin."""
    return f"python -m kpx doctor --install {platform}"


def pip_command(platform: str) -> list[str]:
    """What `install` has pip do."""
    wanted = plugin(platform)
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "--upgrade"]
    if wanted.apart:
        packages = [*wanted.packages, f"jax=={wanted.jax}", *xpu.requirements()]
        return [str(xpu.environment_python(folder(platform))), *pip, *packages]
    return [sys.executable, *pip, "--target", str(folder(platform)), "--no-deps", *wanted.packages]


def install(platform: str, progress: Callable[[str], None]) -> pathlib.Path:
    """Installs a platform's plugin into kpx's own folder.

    Raises:
        TargetError: pip failed, with its words; there is no Python that the plugin has wheels for; or the stub
            libraries that it needs could not be made.
    """
    wanted = plugin(platform)
    if wanted.apart and not xpu.environment_python(folder(platform)).exists():
        _run([xpu.python(), "-m", "venv", str(folder(platform))], "make an environment")
    progress(f"installing the compiler for {platform}, about {wanted.size} MB")
    _run(pip_command(platform), f"install {', '.join(wanted.packages)}")
    if platform in ("rocm", "xpu"):
        progress("making the stub libraries that it needs to load")
        drivers(platform)
    return folder(platform)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise TargetError(f"`{pathlib.Path(command[0]).name} {' '.join(command[1:4])}` could not {what}:\n{words}")


def drivers(platform: str) -> list[pathlib.Path]:
    """The stub libraries that a platform's plugin needs here, made where they are not; none where it needs none."""
    if platform == "rocm":
        places = [pathlib.Path(p) for p in (find("rocm") or sys.path)]
        patterns = ("jax_plugins/xla_rocm7/*.so", "jax_rocm7_plugin/*.so")
        libraries = [so for place in places for pattern in patterns for so in sorted(place.glob(pattern))]
    elif platform == "xpu" and find("xpu"):
        libraries = xpu.libraries(folder("xpu"))
    else:
        return []
    target = folder(platform) / "stubs"
    return stubs.built(target) or stubs.build(libraries, target)
