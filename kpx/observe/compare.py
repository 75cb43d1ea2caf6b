"""Targets side by side for one program: time, memory, price."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kpx.config import Config
from kpx.errors import InputError
from kpx.hardware.target import Target
from kpx.observe.explain import ASSUMPTIONS, Report, explain
from kpx.observe.explain_table import as_text, duration, size

_SORTS = ("seconds", "dollars", "memory")


@dataclass(frozen=True)
class Row:
    """One target.

    Attributes:
        seconds: predicted for a call.
        peak_bytes, fits: the memory of a device.
        dollars_per_million: samples, at the price and date given; None without a price.
        dollars_per_hour: of all its devices; None where no price is known.
        price: whose price it is, and of when.
        error: why it could not be compiled for.
    """

    target: str
    devices: int
    seconds: float | None
    peak_bytes: int | None
    fits: bool | None
    dollars_per_million: float | None
    dollars_per_hour: float | None
    price: str
    error: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `kpx.compare` gives: a row a target, sorted. Printed, it is a table; `to_dict()` is for machines."""

    name: str
    samples: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        rows = [dataclasses.asdict(r) for r in self.rows]
        return {"name": self.name, "samples": self.samples, "assumptions": list(ASSUMPTIONS), "targets": rows}

    def __rich__(self) -> Group:
        table = Table(title=f"{self.name}, {self.samples} samples a call, predicted")
        for column in ("target", "devices", "time", "peak memory", "fits", "$ a million samples", "$ an hour"):
            left = column == "target"
            table.add_column(column, justify="left" if left else "right", no_wrap=left)
        for row in self.rows:
            fits = {True: "yes", False: "no", None: "-"}[row.fits]
            time = "-" if row.seconds is None else duration(row.seconds)
            dollars = "-" if row.dollars_per_million is None else f"{row.dollars_per_million:.4g}"
            memory = "-" if row.peak_bytes is None else size(row.peak_bytes)
            hourly = "-" if row.dollars_per_hour is None else f"{row.dollars_per_hour:.2f}"
            table.add_row(row.target, str(row.devices), time, memory, fits, dollars, hourly)
        prices = "; ".join(f"{row.target}: {row.price}" for row in self.rows if row.price)
        errors = [Text(f"{row.target}: {row.error}") for row in self.rows if row.error]
        listed = Text(f"List prices, yours differ (prices.toml): {prices}." if prices else "No prices are known.")
        return Group(table, listed, *errors, Text("A model, not a measurement: " + " ".join(ASSUMPTIONS), style="dim"))

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__


def compare(
    fun_or_model: Any,
    *specs,
    targets: Sequence[str | Target],
    samples: int | None = None,
    sort: str = "seconds",
    config: Config | None = None,
    progress: Callable[[Target], None] | None = None,
    **named_specs,
) -> Comparison:
    """What a function or model would take of targets, side by side: predicted time, memory, dollars.

    Args:
        fun_or_model, specs, targets, config, progress, named_specs: see `kpx.explain`.
        samples: how many samples a call handles; by default the first dimension of the first input.
        sort: `seconds`, `dollars` or `memory`; targets that failed, or have no price, come last.

    Raises:
        InputError: `sort` or `samples` is not one; see also `kpx.explain`.
    """
    if sort not in _SORTS:
        raise InputError(f"`sort={sort!r}` is not known. Use one of {', '.join(map(repr, _SORTS))}.")
    if samples is None:
        samples = _first_dimension((specs, named_specs))
    if not isinstance(samples, int) or samples < 1:
        raise InputError(f"`samples={samples!r}` is not a positive number. Give how many samples a call handles.")
    explanation = explain(fun_or_model, *specs, targets=targets, config=config, progress=progress, **named_specs)
    rows = [_row(report, samples) for report in explanation.reports]
    keys: dict[str, Callable[[Row], float | None]] = {
        "seconds": lambda r: r.seconds,
        "dollars": lambda r: r.dollars_per_million,
        "memory": lambda r: r.peak_bytes,
    }

    def order(row: Row) -> tuple[bool, float]:
        value = keys[sort](row)
        return value is None, value or 0.0

    return Comparison(explanation.name, samples, tuple(sorted(rows, key=order)))


def _first_dimension(inputs: Any) -> int:
    for leaf in jax.tree.leaves(inputs):
        if getattr(leaf, "shape", ()):
            return int(leaf.shape[0])
    return 1


def _row(report: Report, samples: int) -> Row:
    target = report.target
    chip = target.spec
    price = chip.price if chip else None
    hourly = target.dollars_per_hour
    words = f"{price.source}, {price.date}" if price else ""
    if report.error or report.memory is None:
        return Row(target.text, target.device_count, None, None, None, None, hourly, words, report.error)
    dollars = None if hourly is None else hourly / 3600 * report.seconds / samples * 1e6
    memory = report.memory
    peak, fits = memory.peak_bytes, memory.fits
    return Row(target.text, target.device_count, report.seconds, peak, fits, dollars, hourly, words)
