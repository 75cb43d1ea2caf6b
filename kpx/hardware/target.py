"""Targets: the machine a module is compiled for, which may be another than this one."""

from __future__ import annotations

import collections
import difflib
import math
import os
import re
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from kpx.errors import TargetError
from kpx.hardware import chips, cpu, tpu, xpu
from kpx.hardware.chips import Chip
from kpx.ir import module as m
from kpx.ir.module import stablehlo
from kpx.kernels import mkl, onednn

# JAX's names for the platforms that have a pipeline, and what installs each where its device is.
_INSTALL = {
    "cpu": "pip install jax",
    "cuda": 'pip install "jax[cuda13]"',
    "rocm": 'pip install "jax[rocm]"',
    "tpu": 'pip install "jax[tpu]"',
    "xpu": "pip install jax-oneapi-plugin",
}


@dataclass(frozen=True)
class Target:
    """A machine to compile for, from its name.

    | name | machine |
    |-|-|
    | `cpu`, `cuda`, `rocm`, `tpu`, `xpu` | that platform's devices on this machine |
    | `cpu:avx2` | a CPU with these instructions and no later ones (sse4_2, avx, avx2, avx512, amx) |
    | `cuda:h200`, `cuda:h100x8`, `cuda:b200:32x8`, `rocm:mi300x8` | a GPU; 8 in a host; 32 hosts of 8 |
    | `tpu-v5e:4x4`, `tpu-v5p:4x4x4`, `tpu-v5e:16x16*2` | a slice of a TPU pod, by its chips; two slices |
    | `xpu:pvc` | an Intel GPU |

    Attributes:
        text: its name, in the form above.
        platform: `cpu`, `cuda`, `rocm`, `tpu` or `xpu`.
        chip: the device's name in the spec table, or None for what is here.
        shape: of a TPU slice in chips; of GPUs, hosts and GPUs in each; () for what is here.
        slices: how many TPU slices.
        isa: the last CPU instructions to use, or None for all that this machine has.

    Raises:
        TargetError: the name is not known, or there is no such topology.
    """

    text: str
    platform: str = field(init=False)
    chip: str | None = field(init=False, default=None)
    shape: tuple[int, ...] = field(init=False, default=())
    slices: int = field(init=False, default=1)
    isa: str | None = field(init=False, default=None)

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise TargetError(
                f"`target={self.text!r}` is not a target. Use a name, as `cpu` or `tpu-v5e:2x2`, or None."
            )
        for name, value in _parse(self.text).items():
            object.__setattr__(self, name, value)

    def __str__(self):
        return self.text

    @classmethod
    def resolve(cls, given: str | Target | None, *, may_be_absent: bool = False) -> Target:
        """The target of a name, or of JAX's default device.

        Args:
            may_be_absent: whether a target that can be compiled for, but is not on this machine, will do.

        Raises:
            TargetError: the name is not known, or no such device is on this machine.
        """
        if given is None:
            return cls(platform_of(jax.devices()[0]))
        target = given if isinstance(given, Target) else cls(given)
        if target.is_present or (may_be_absent and (target.chip or target.isa)):
            return target
        found = ", ".join(sorted({platform_of(d) for d in jax.devices()}))
        if target.chip or target.isa:
            raise TargetError(
                f"`target={target.text!r}` is not on this machine, where JAX finds: {found}. It can be compiled for, and "
                f"not run: use `kpx.compile(model, *inputs, target={target.text!r})`."
            )
        examples = " or ".join(f"`{e}`" for e in _examples(target.platform)[:2])
        raise TargetError(
            f"`target={target.text!r}` is not on this machine, where JAX finds: {found}. "
            f"If the device is there, install its plugin: `{_INSTALL[target.platform]}`. To compile for one that is not, "
            f"name it: {examples}."
        )

    @property
    def spec(self) -> Chip | None:
        """The device's figures; None for `cpu`, and for a device here that the table does not have."""
        if self.chip is not None:
            return chips.chips()[self.chip]
        if self.platform == "cpu":
            return None
        kinds = {d.device_kind for d in _devices(self.platform)}
        return next((c for c in chips.chips().values() if kinds & set(c.device_kinds)), None)

    @property
    def device_count(self) -> int:
        """How many devices it has, as JAX counts them."""
        if not self.shape:
            return max(len(_devices(self.platform)), 1) if self.isa is None else 1
        per_chip = self.spec.devices_per_chip if self.spec else 1
        return math.prod(self.shape) * self.slices * per_chip

    @property
    def dollars_per_hour(self) -> float | None:
        """What all its chips cost together; None where no price is known."""
        chip = self.spec
        price = chip.price if chip else None
        return price.dollars_per_hour * self.device_count / chip.devices_per_chip if chip and price else None

    def mesh(self, **axes: int) -> jax.sharding.AbstractMesh:
        """A mesh over its devices, for `in_shardings`: `target.mesh(data=8, model=4)`.

        An axis of -1 takes what the others leave.

        Raises:
            TargetError: the axes' product is not the number of devices.
        """
        sizes, known = dict(axes), math.prod(n for n in axes.values() if n != -1)
        free = [name for name, n in axes.items() if n == -1]
        if len(free) == 1 and known and self.device_count % known == 0:
            sizes[free[0]] = self.device_count // known
        if not axes or min(sizes.values()) < 1 or math.prod(sizes.values()) != self.device_count:
            given = ", ".join(f"{name}={n}" for name, n in axes.items())
            raise TargetError(
                f"`mesh({given})` does not cover {self.text}, which has {self.device_count} devices. The axes' product "
                "must be that; -1 for one axis takes what the others leave."
            )
        kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
        return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)

    @property
    def is_present(self) -> bool:
        """Whether its devices are on this machine."""
        if self.isa is not None:
            return False  # XLA's limit on instructions is a whole process's
        here = _devices(self.platform)
        if self.chip is None:
            return bool(here)
        kinds = chips.chips()[self.chip].device_kinds
        return self.slices == 1 and sum(d.device_kind in kinds for d in here) >= self.device_count

    @property
    def device(self) -> jax.Device:
        """The first of its devices that is this process's; the CPU, where functions are traced, for a target that is not
        here."""
        there = _devices(self.platform) if self.is_present else jax.local_devices(backend="cpu")
        return next((d for d in there if d.process_index == jax.process_index()), there[0])

    @property
    def device_kind(self) -> str:
        """What JAX calls its devices."""
        return self.device.device_kind if self.is_present or self.spec is None else self.spec.device_kinds[0]

    @property
    def features(self) -> frozenset[str]:
        """What the pipeline may count on: `bf16_tiles` (bf16 products run several times faster than f32 ones: a
        CPU with AMX), `mkl` and `onednn` (their products can be called); of an accelerator its units for few bits (see
        `Chip.units`), `scatters` (its compiler keeps scattered sums where it is given them, and makes none itself) and `rings`
        (it runs an exchange of a loop's step beside what the step computes)."""
        if self.platform != "cpu":
            rings = self.platform in ("cuda", "rocm") and self.device_count > 1
            further = {"scatters": self._scatters, "rings": rings}
            return frozenset(self.spec.units if self.spec else ()) | {name for name, has in further.items() if has}
        if self.isa is not None:
            return frozenset({"bf16_tiles"} if self.isa == "amx" else ())
        found = {"bf16_tiles": cpu.has_bf16_tiles(), "mkl": mkl.available(), "onednn": onednn.available()}
        return frozenset(name for name, has in found.items() if has)

    @property
    def _scatters(self) -> bool:
        # Of one slice, and of a three-dimensional torus, libtpu (0.0.42) makes a sum of all and a slice of what is scattered.
        return self.platform == "tpu" and self.slices > 1 and self.spec is not None and self.spec.links.dimensions == 2

    def compiler_options(self, module: Any) -> dict[str, Any]:
        """XLA options for a module's executable on this target."""
        if self.platform == "xpu" and not self.is_present:
            return dict(xpu.COMPILER_OPTIONS)
        if self.platform != "cpu":
            return {}
        found = collections.Counter(type(op) for op in m.walk(module.operation))
        # A depthwise convolution is a padded array's shifted slices by now. One convolution, as vision
        # transformers begin with, does not make a convolutional network.
        convolutions = found[stablehlo.ConvolutionOp] + found[stablehlo.PadOp]
        products = found[stablehlo.DotGeneralOp] + found[stablehlo.CustomCallOp]
        arctangents = any(op.operation.name in ("chlo.atan", "stablehlo.atan2") for op in m.walk(module.operation))
        wide = cpu.has_wide_vectors() if self.isa is None else self.isa in ("avx512", "amx")
        return cpu.compiler_options(8 * convolutions > products, arctangents, wide)

    def peak(self) -> tuple[float, float]:
        """What the device reaches: FLOP/s of a large f32 product, and bytes/s of a large copy.

        Its vendor's figures where the table has it; measured once a process, in about a tenth of a second, on a
        device here that it does not have.
        """
        if (spec := self.spec) is not None:
            return spec.peak("f32"), spec.bandwidth
        if self.platform not in _PEAKS:
            _PEAKS[self.platform] = _measure(self.device)
        return _PEAKS[self.platform]


_PEAKS: dict[str, tuple[float, float]] = {}


# Names -----------------------------------------------------------------------------------------


def _parse(text: str) -> dict[str, Any]:
    """A name's parts, under the names of `Target`'s fields."""
    name = text.strip().lower()
    head, _, rest = name.partition(":")
    if name in _INSTALL:
        return {"text": name, "platform": name}
    if head == "cpu" and rest in cpu.ISAS:
        return {"text": name, "platform": "cpu", "isa": rest}
    if head in ("cuda", "rocm", "xpu") and (parsed := _parse_gpu(text, head, rest)):
        return parsed
    if head.startswith("tpu-") and (chip := chips.names("tpu").get(head.removeprefix("tpu-"))):
        shape, slices = tpu.parse_topology(text, chips.chips()[chip], rest)
        size = "x".join(map(str, shape)) + (f"*{slices}" if slices > 1 else "")
        return {"text": f"tpu-{chip}:{size}", "platform": "tpu", "chip": chip, "shape": shape, "slices": slices}
    known = [*_INSTALL, *(example for platform in _INSTALL for example in _examples(platform))]
    bare = {re.split("[:-]", example)[1]: example for example in known[len(_INSTALL) :]}
    near = [bare[name]] if name in bare else difflib.get_close_matches(name, known, 3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
    raise TargetError(f"`target={text!r}` is not known.{hint} Known are: {', '.join(known)}.")


def _examples(platform: str) -> list[str]:
    """Names of a platform's targets, a device each."""
    if platform == "cpu":
        return [f"cpu:{isa}" for isa in cpu.ISAS]
    smallest = {2: "2x2", 3: "2x2x1"}
    known = [c for c in chips.chips().values() if c.platform == platform]
    return [
        f"tpu-{c.key}:{smallest[c.links.dimensions]}" if platform == "tpu" else f"{platform}:{c.key}" for c in known
    ]


def _parse_gpu(text: str, platform: str, rest: str) -> dict[str, Any] | None:
    """`h200`, `h100x8` or `b200:32x8`; None where the device is unknown."""
    given, _, grid = rest.partition(":")
    known = chips.names(platform)
    hosts, each = 1, 1
    if given not in known and (count := re.fullmatch(r"(.+)x(\d+)", given)) and count[1] in known and not grid:
        given, each = count[1], int(count[2])
    if given not in known:
        return None
    if grid:
        if (sizes := re.fullmatch(r"(\d+)x(\d+)", grid)) is None:
            raise TargetError(
                f"`target={text!r}`: `{grid}` is not a number of hosts and of GPUs in each. Write `{platform}:{given}x8` "
                f"for one host of 8, or `{platform}:{given}:4x8` for four."
            )
        hosts, each = int(sizes[1]), int(sizes[2])
    chip = chips.chips()[known[given]]
    most = chip.links.devices
    if not (1 <= each <= most and hosts >= 1):
        raise TargetError(
            f"`target={text!r}` has {hosts} hosts of {each} devices, and a host has 1 to {most} of {chip.name}. For more, "
            f"write hosts and devices, as `{platform}:{given}:{max(math.ceil(hosts * each / most), 2)}x{most}`."
        )
    size = f":{hosts}x{each}" if hosts > 1 else f"x{each}" if each > 1 else ""
    return {"text": f"{platform}:{chip.key}{size}", "platform": platform, "chip": chip.key, "shape": (hosts, each)}


# Devices here ----------------------------------------------------------------------------------


def platform_of(device: jax.Device) -> str:
    if device.platform == "gpu":
        return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    return device.platform


def _devices(platform: str) -> list[jax.Device]:
    try:
        found = jax.devices("gpu" if platform in ("cuda", "rocm") else platform)
    except RuntimeError:
        return []
    return [d for d in found if platform_of(d) == platform]


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
