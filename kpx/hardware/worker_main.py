"""A worker's own side: a process that compiles with one vendor's compiler (`python -m kpx.hardware.worker_main`).

It is told what to do through a pipe, and answers each request with one message. Whatever the compiler prints goes to
stderr, which the parent keeps.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import pathlib
import resource
import sys
import time
import uuid
import zlib
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from kpx import jax_internals
from kpx.hardware import stubs
from kpx.ir import module as m

_KEPT = 4  # executables that can still be serialized
_TOLD = 64  # programs whose text can still be asked for
_NAMES_IN_JAX = {"xpu": "oneapi"}


class Compiler:
    """One vendor's compiler, the executables that it made last, and their programs as text."""

    def __init__(self, platform: str):
        self._platform = platform
        self._executables: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._texts: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._known_devices: dict[str, list[jax.Device]] = {}  # describing hundreds takes tens of milliseconds

    def compile(self, request: dict[str, Any]) -> dict[str, Any]:
        """Compiles a module; gives what is known of the executable, and a name to ask for it by."""
        started = time.perf_counter()
        _forget_peak()
        where = json.dumps([request[key] for key in ("topology", "topology_options", "mesh", "slices")])
        if where not in self._known_devices:
            self._known_devices[where] = self._devices(request)
        devices = self._known_devices[where]
        module = m.parse(request["module"])
        ready = time.perf_counter()
        executable = jax_internals.compile_module(module, devices, request["options"])
        compiled = time.perf_counter()
        stats = executable.get_compiled_memory_stats()
        names = ("argument", "output", "temp", "alias", "generated_code")
        names += tuple(f"host_{name}" for name in ("argument", "output", "temp", "alias"))
        memory = {name: getattr(stats, f"{name}_size_in_bytes") for name in names}
        memory["peak"] = getattr(stats, "peak_memory_in_bytes", 0)
        name = uuid.uuid4().hex  # another worker's names must not be taken for these
        self._executables[name] = executable
        return {
            "id": name,
            "memory": memory,
            "device_ids": [d.id for d in devices],
            "device_kind": devices[0].device_kind,
            "seconds": {
                "prepare": ready - started,
                "compile": compiled - ready,
                "describe": time.perf_counter() - compiled,
            },
            "peak_bytes": _peak_bytes(),
        }

    def tidy(self) -> None:
        """Prints the programs that have no text yet, which takes a tenth of a second for large ones and which nobody
        waits for once an answer is out; gives the oldest up."""
        for name in self._executables.keys() - self._texts.keys():
            parts = self._executables[name].hlo_modules()
            self._texts[name] = zlib.compress("\n\n".join(part.to_string() for part in parts).encode(), 1)
        for kept, most in ((self._executables, _KEPT), (self._texts, _TOLD)):
            while len(kept) > most:
                kept.popitem(last=False)

    def hlo(self, request: dict[str, Any]) -> dict[str, Any]:
        """An executable's program as text; nothing where it has been given up."""
        text = self._texts.get(request["id"])
        return {"hlo": None if text is None else zlib.decompress(text).decode()}

    def serialize(self, request: dict[str, Any]) -> dict[str, Any]:
        """The vendor's own executable; nothing where it has been given up."""
        executable = self._executables.get(request["id"])
        return {"serialize": None if executable is None else executable.serialize()}

    def _devices(self, request: dict[str, Any]) -> list[jax.Device]:
        """The devices that partitions go to, in order: those of a mesh as the vendor's network favours it."""
        if self._platform == "cpu":
            return jax.devices("cpu")[:1]
        name = _NAMES_IN_JAX.get(self._platform, self._platform)
        devices = jax_internals.absent_devices(name, request["topology"], request["topology_options"])
        shape, slices = request["mesh"], request["slices"]
        if not shape:
            return devices[:1]
        if self._platform != "tpu":
            return devices
        if slices > 1 and shape[0] % slices == 0:
            inside, between = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
            return list(np.asarray(_hybrid(inside, between, devices)).flat)
        if slices == 1 and math.prod(shape) == len(devices):
            return list(np.asarray(_physical(shape, devices)).flat)
        return devices


def _physical(shape: tuple[int, ...], devices: list[jax.Device]) -> Any:
    """Devices in the order of a mesh, each axis along whole dimensions of the torus where they allow it."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _hybrid(inside: tuple[int, ...], between: tuple[int, ...], devices: list[jax.Device]) -> Any:
    """The same of several slices, which the first axis goes over."""
    try:
        return mesh_utils.create_hybrid_device_mesh(inside, between, devices)
    except NotImplementedError:
        return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)


def _forget_peak() -> None:
    """Starts the process's peak memory anew, where the system lets it."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: list[str]) -> None:
    """Answers requests until the pipe closes."""
    settings = json.loads(arguments[0])
    connection = Connection(settings["pipe"])
    stubs.load(pathlib.Path(stub) for stub in settings["stubs"])
    if settings["platform"] == "rocm":
        jax_internals.register_rocm_without_a_gpu()
    compiler = Compiler(settings["platform"])
    connection.send({"ready": jax.__version__})
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(compiler, request.pop("do"))(request)
        except Exception as error:  # whatever a vendor's compiler raises is told to whoever asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        connection.send(answer)
        compiler.tidy()


if __name__ == "__main__":
    main(sys.argv[1:])
