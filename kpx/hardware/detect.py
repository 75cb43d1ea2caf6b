"""What is here to run on, and what can be compiled for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

import jax

from kpx.hardware import chips, cpu, plugins
from kpx.hardware.target import Target, cores, platform_of
from kpx.kernels import mkl, onednn, registry

# What /proc/cpuinfo calls the instructions that compute with an element type.
_CPU_DTYPES = {
    "bf16": {"amx_bf16", "avx512_bf16"},
    "f16": {"avx512_fp16", "amx_fp16"},
    "i8": {"amx_int8", "avx512_vnni", "avx_vnni"},
}


@dataclass(frozen=True)
class Available:
    """A target, and whether it is here.

    Attributes:
        target: its name, for `target=`.
        can: `run`, or `compile` where there is only its compiler, or `install` where there is not even that.
        name: what its vendor calls the device.
        devices: how many are here.
        memory_bytes: a device's; None where nobody tells.
        dtypes: element types whose products its hardware computes.
        kernels: composites with an implementation for it; the others run as their decomposition.
        plugin: the compiler's package and version.
        install: the command that installs its compiler, where that is missing.
    """

    target: str
    can: str
    name: str
    devices: int
    memory_bytes: int | None
    dtypes: tuple[str, ...]
    kernels: tuple[str, ...]
    plugin: str | None
    install: str | None


def targets() -> list[Available]:
    """The targets that can be run on, the first ones, and those that can be compiled for.

    A GPU that NVML sees and JAX does not (its plugin is missing) is listed with the command that installs it.
    """
    here = _present()
    seen = {a.name for a in here}
    unseen = [a for a in _nvml() if a.name not in seen]
    listed = {a.target for a in (*here, *unseen)}
    return [*here, *unseen, *(a for a in _absent() if a.target not in listed)]


def _present() -> list[Available]:
    kinds: dict[tuple[str, str], list[jax.Device]] = {}
    for device in [*jax.devices(), *jax.devices("cpu")]:
        group = kinds.setdefault((platform_of(device), device.device_kind), [])
        if device not in group:
            group.append(device)
    return [_described(platform, kind, devices) for (platform, kind), devices in kinds.items()]


def _described(platform: str, kind: str, devices: list[jax.Device]) -> Available:
    kernels = _kernels(platform)
    if platform == "cpu":
        found = tuple(name for name, flags in _CPU_DTYPES.items() if flags & cpu.features())
        kernels += ("MKL's products",) if mkl.available() else ()
        kernels += ("oneDNN's products and convolutions",) if onednn.available() else ()
        version = importlib.metadata.version("jaxlib")
        name = f"{cpu.model()}, {cores()} cores"
        return Available("cpu", "run", name, len(devices), cpu.memory_bytes(), ("f64", "f32", *found), kernels,
                         f"jaxlib {version}", None)  # fmt: skip
    stats: dict[str, Any] = devices[0].memory_stats() or {}
    chip = next((c for c in chips.chips().values() if kind in c.device_kinds), None)
    dtypes = tuple(chip.peaks) if chip else ()
    memory = stats.get("bytes_limit") or (chip.memory if chip else None)
    return Available(platform, "run", kind, len(devices), memory, dtypes, kernels, _version(platform), None)


def _absent() -> list[Available]:
    found = []
    for chip in chips.chips().values():
        usable = plugins.find(chip.platform) is not None
        target = Target(f"tpu-{chip.key}" if chip.platform == "tpu" else f"{chip.platform}:{chip.key}")
        install = None if usable else plugins.install_command(chip.platform)
        version = _version(chip.platform) if usable else None
        can = "compile" if usable else "install"
        found.append(Available(target.text, can, chip.name, 0, chip.memory, tuple(chip.peaks), _kernels(chip.platform),
                               version, install))  # fmt: skip
    return found


def _kernels(platform: str) -> tuple[str, ...]:
    return tuple(k.name for k in registry.kernels() if any(i.target == platform for i in k.implementations))


def _version(platform: str) -> str | None:
    """The package of a platform's plugin and its version, wherever a worker would find it."""
    places = plugins.find(platform)
    name = plugins.plugin(platform).packages[0].partition("==")[0].partition("[")[0].rstrip("<>=!~.*0123456789")
    options: dict[str, Any] = {"name": name} | ({"path": places} if places else {})
    return next((f"{name} {package.version}" for package in importlib.metadata.distributions(**options)), None)


def _nvml() -> list[Available]:
    """NVIDIA's GPUs by their driver's account; none where nvidia-ml-py or the driver is missing."""
    if importlib.util.find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        counted: dict[str, tuple[int, int]] = {}
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            name = str(pynvml.nvmlDeviceGetName(handle))
            counted[name] = counted.get(name, (0, 0))[0] + 1, int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    finally:
        pynvml.nvmlShutdown()
    chip = {kind: c for c in chips.chips().values() for kind in c.device_kinds}
    return [
        Available("cuda", "install", name, count, memory, tuple(chip[name].peaks) if name in chip else (),
                  _kernels("cuda"), None, 'pip install "jax[cuda13]"')
        for name, (count, memory) in counted.items()
    ]  # fmt: skip
