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
from kpx.hardware import rocm_stubs


@dataclass(frozen=True)
class Plugin:
    """A vendor's compiler.

    Attributes:
        platform: the platform that it compiles for.
        packages: what pip installs it from, for the version of JAX that is here.
        module: a module of it, by which it is found.
        size: roughly what it takes on disk, in megabytes.
        python: the first version of Python that it has wheels for.
        dependencies: whether what its packages need is installed, too.
    """

    platform: str
    packages: tuple[str, ...]
    module: str
    size: int
    python: tuple[int, int] = (3, 11)
    dependencies: bool = False


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
            "xpu", (f"jax-oneapi-plugin[with-oneapi]=={version}",), "jax_plugins.xla_oneapi", 3300, (3, 12), True
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
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return pathlib.Path(root) / f"{platform}-jax{jax.__version__}-{python}"


def find(platform: str) -> list[str] | None:
    """The folders to put before a worker's path, so that it finds the plugin; None where there is no plugin."""
    module = plugin(platform).module
    ours = folder(platform)
    if ours.is_dir() and _has(module, [str(ours)]):
        return [str(ours)]
    return [] if _has(module, sys.path) else None


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
    """What `install` has pip do.

    Raises:
        TargetError: this Python is too old for the plugin.
    """
    wanted = plugin(platform)
    if sys.version_info < wanted.python:
        needs = ".".join(map(str, wanted.python))
        raise TargetError(
            f"The plugin for `{platform}` has wheels for Python {needs} and later, and this is Python "
            f"{sys.version.split()[0]}. Make an environment with Python {needs}, install kpx-xla there, and run "
            f"`{install_command(platform)}` in it."
        )
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--upgrade", "--target"]
    return [*command, str(folder(platform)), *([] if wanted.dependencies else ["--no-deps"]), *wanted.packages]


def install(platform: str, progress: Callable[[str], None]) -> pathlib.Path:
    """Installs a platform's plugin into kpx's own folder.

    Raises:
        TargetError: pip failed, with its words; or the stubs that ROCm needs could not be made.
    """
    progress(f"installing the compiler for {platform}, about {plugin(platform).size} MB")
    done = subprocess.run(pip_command(platform), capture_output=True, text=True)
    if done.returncode:
        words = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise TargetError(f"pip could not install {', '.join(plugin(platform).packages)}:\n{words}")
    if platform == "rocm":
        progress("making the stub libraries that ROCm's compiler needs to load")
        stubs()
    return folder(platform)


def stubs() -> list[pathlib.Path]:
    """The stub libraries that ROCm's plugin needs here, made where they are not; none where ROCm is installed."""
    places = [pathlib.Path(p) for p in (find("rocm") or sys.path)]
    patterns = ("jax_plugins/xla_rocm7/*.so", "jax_rocm7_plugin/*.so")
    libraries = [so for place in places for pattern in patterns for so in sorted(place.glob(pattern))]
    target = folder("rocm") / "stubs"
    return rocm_stubs.built(target) or rocm_stubs.build(libraries, target)
