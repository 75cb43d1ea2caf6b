"""Targets: the machine a module is compiled for."""

from __future__ import annotations

import collections
import difflib
import os
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kpx.errors import TargetError
from kpx.hardware import cpu
from kpx.ir import module as m
from kpx.ir.module import stablehlo
from kpx.kernels import mkl

# JAX's names for the platforms that have a pipeline, and what installs each.
_INSTALL = {
    "cpu": "pip install jax",
    "cuda": 'pip install "jax[cuda13]"',
    "rocm": 'pip install "jax[rocm]"',
    "tpu": 'pip install "jax[tpu]"',
    "xpu": "pip install jax-oneapi-plugin",
}


@dataclass(frozen=True)
class Target:
    """A platform of this machine.

    Attributes:
        platform: `cpu`, `cuda`, `rocm`, `tpu` or `xpu`.
    """

    platform: str

    @classmethod
    def resolve(cls, given: str | Target | None) -> Target:
        """The target of a name, or of JAX's default device.

        Raises:
            TargetError: the name is not known, or no such device is on this machine.
        """
        if isinstance(given, Target):
            return given
        if given is None:
            return cls(_platform(jax.devices()[0]))
        if not isinstance(given, str):
            raise TargetError(f"`target={given!r}` is not a target. Use a name: {', '.join(_INSTALL)}, or None.")
        name = given.strip().lower()
        if name not in _INSTALL:
            near = difflib.get_close_matches(name, _INSTALL, 1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise TargetError(f"`target={given!r}` is not known.{hint} Use one of {', '.join(_INSTALL)}.")
        if not _devices(name):
            present = ", ".join(sorted({_platform(d) for d in jax.devices()}))
            raise TargetError(
                f"`target={given!r}` is not on this machine, where JAX finds: {present}. "
                f"If the device is there, install its plugin: `{_INSTALL[name]}`."
            )
        return cls(name)

    @property
    def device(self) -> jax.Device:
        """The first device of the platform."""
        return _devices(self.platform)[0]

    @property
    def features(self) -> frozenset[str]:
        """What the pipeline may count on: `bf16_tiles` (bf16 products run several times faster than f32 ones: a
        CPU with AMX), `mkl` (MKL's products can be called)."""
        if self.platform != "cpu":
            return frozenset()
        found = {"bf16_tiles": cpu.has_bf16_tiles(), "mkl": mkl.available()}
        return frozenset(name for name, has in found.items() if has)

    def compiler_options(self, module: Any) -> dict[str, str]:
        """XLA options for a module's executable on this target."""
        if self.platform != "cpu":
            return {}
        found = collections.Counter(type(op) for op in m.walk(module.operation))
        # A depthwise convolution is a padded array's shifted slices by now. One convolution, as vision
        # transformers begin with, does not make a convolutional network.
        convolutions = found[stablehlo.ConvolutionOp] + found[stablehlo.PadOp]
        products = found[stablehlo.DotGeneralOp] + found[stablehlo.CustomCallOp]
        arctangents = any(op.operation.name in ("chlo.atan", "stablehlo.atan2") for op in m.walk(module.operation))
        return cpu.compiler_options(8 * convolutions > products, arctangents)

    def peak(self) -> tuple[float, float]:
        """What the device reaches: FLOP/s of a large f32 product, and bytes/s of a large copy.

        Measured once a process, in about a tenth of a second.
        """
        if self.platform not in _PEAKS:
            _PEAKS[self.platform] = _measure(self.device)
        return _PEAKS[self.platform]


_PEAKS: dict[str, tuple[float, float]] = {}


def _platform(device: jax.Device) -> str:
    if device.platform == "gpu":
        return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    return device.platform


def _devices(platform: str) -> list[jax.Device]:
    try:
        found = jax.devices("gpu" if platform in ("cuda", "rocm") else platform)
    except RuntimeError:
        return []
    return [d for d in found if _platform(d) == platform]


def _measure(device: jax.Device) -> tuple[float, float]:
    n, elements = 1024, 1 << 24
    with jax.default_device(device):
        a = jax.device_put(np.ones((n, n), np.float32))
        x = jax.device_put(np.ones(elements, np.float32))
        product = jax.jit(lambda a: a @ a).lower(a).compile()
        copy = jax.jit(lambda x: x + 1).lower(x).compile()
    return 2 * n**3 / _best(product, a), 8 * elements / _best(copy, x)


def _best(compiled, argument, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        compiled(argument).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
