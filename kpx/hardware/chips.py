"""The spec table: what each device is made of (chips.toml), and what it costs (prices.toml)."""

from __future__ import annotations

import datetime
import functools
import os
import pathlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kpx.errors import TargetError

_HERE = pathlib.Path(__file__).parent

# Which peak an element type's products reach: the first that the device has. f32 is computed by the units for TF32
# or bf16 only where a product's precision says so, and otherwise in f32; a TPU makes f32 of bf16 passes.
_UNITS = {
    "f64": ("f64",),
    "f32": ("f32",),
    "tf32": ("tf32", "f32"),
    "bf16": ("bf16", "f32"),
    "f16": ("f16", "bf16", "f32"),
    "f8": ("f8", "bf16", "f32"),
    "f4": ("f4", "f8", "bf16", "f32"),
    "i8": ("i8", "bf16", "f32"),
    "i4": ("i8", "bf16", "f32"),
}
_F32_PASSES = 6  # bf16 products that make an f32 one at the highest precision (a TPU's own way)


@dataclass(frozen=True)
class Links:
    """How devices are joined directly.

    Attributes:
        kind: `switch` (every device reaches every other at full bandwidth) or `torus`.
        bandwidth: bytes/s in one direction: of a device behind a switch, of one link in a torus.
        devices: (switch) how many devices it joins.
        dimensions: (torus) how many.
        wraps_at: (torus) a dimension is a ring where its length is a multiple of this.
    """

    kind: str
    bandwidth: float
    devices: int = 0
    dimensions: int = 0
    wraps_at: int = 0


@dataclass(frozen=True)
class Price:
    """Dollars for a chip's hour, whose price it is, and when it was looked up."""

    dollars_per_hour: float
    source: str
    date: str


@dataclass(frozen=True)
class Chip:
    """A device's figures, as its vendor gives them.

    Attributes:
        key: its name in a target, as `h200`.
        platform: `cuda`, `rocm`, `tpu` or `xpu`.
        name: its full name.
        peaks: operations a second of dense products, by element type.
        memory: bytes.
        bandwidth: of its memory, bytes/s.
        cores: SMs, compute units or tensor cores.
        clock: Hz.
        links: how it is joined to others of its host, rack or slice.
        network: bytes/s of its share of the network between hosts or slices.
        device_kinds: what JAX calls it.
        devices_per_chip: how many devices JAX sees in one chip.
        units: of products in few bits, those that XLA's compiler for it reaches: `fp8`, or `fp8_fnuz` (with other
            formats, as MI300 has), `mxfp8`, `nvfp4`.
        sources: where the figures stand.
        compiler: what its vendor's compiler must be told.
    """

    key: str
    platform: str
    name: str
    peaks: Mapping[str, float]
    memory: int
    bandwidth: float
    cores: int
    clock: float
    links: Links
    network: float
    sources: tuple[str, ...]
    units: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    device_kinds: tuple[str, ...] = ()
    devices_per_chip: int = 1
    compiler: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def peak(self, element: str) -> float:
        """Operations a second of products of an element type (`f32`, `bf16`, `f8`, ...)."""
        for unit in _UNITS.get(element, ("f32",)):
            if unit in self.peaks:
                return self.peaks[unit]
        if element == "f64":
            return self.peak("f32") / 16  # emulated
        return self.peaks["bf16"] / _F32_PASSES

    @property
    def price(self) -> Price | None:
        """What an hour of it costs, by the user's prices.toml or ours; None where neither says."""
        return prices().get(self.key)


@functools.cache
def chips() -> dict[str, Chip]:
    """The devices of chips.toml by name."""
    table = tomllib.loads((_HERE / "chips.toml").read_text())
    return {key: _chip(key, dict(entry)) for key, entry in table.items()}


def _chip(key: str, entry: dict[str, Any]) -> Chip:
    for name in ("aliases", "device_kinds", "sources", "units"):
        entry[name] = tuple(entry.get(name, ()))
    return Chip(key=key, links=Links(**entry.pop("links")), **entry)


def names(platform: str) -> dict[str, str]:
    """Each name that a platform's devices go by, with the name in the table."""
    found = {}
    for key, chip in chips().items():
        if chip.platform == platform:
            found |= dict.fromkeys((key, *chip.aliases), key)
    return found


def price_files() -> list[pathlib.Path]:
    """Where prices are read from, the first one first: `KPX_PRICES`, the user's own, ours."""
    named = os.environ.get("KPX_PRICES")
    config = pathlib.Path(os.environ.get("XDG_CONFIG_HOME") or pathlib.Path.home() / ".config")
    return [*([pathlib.Path(named)] if named else []), config / "kpx" / "prices.toml", _HERE / "prices.toml"]


def prices() -> dict[str, Price]:
    """Prices by device.

    Raises:
        TargetError: a file of prices cannot be read, names an unknown device, or lacks its date.
    """
    found: dict[str, Price] = {}
    for path in reversed(price_files()):
        if path.is_file():
            found |= _read_prices(path)
        elif str(path) == os.environ.get("KPX_PRICES"):
            raise TargetError(f"KPX_PRICES names `{path}`, and there is no such file. Correct it, or unset KPX_PRICES.")
    return found


def _read_prices(path: pathlib.Path) -> dict[str, Price]:
    form = 'Write `date = "2026-01-31"` and, under `[devices]`, `h100 = { price = 6.88, source = "..." }`.'
    try:
        table = tomllib.loads(path.read_text())
        date = datetime.date.fromisoformat(str(table["date"])).isoformat()
        given = {k: Price(float(v["price"]), str(v["source"]), date) for k, v in table.get("devices", {}).items()}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TargetError(f"The prices in `{path}` cannot be read ({type(error).__name__}: {error}). {form}") from None
    if unknown := sorted(set(given) - set(chips())):
        raise TargetError(
            f"`{path}` has prices for {', '.join(unknown)}, which are not devices that kpx knows: {', '.join(chips())}."
        )
    return given
