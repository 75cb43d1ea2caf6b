"""An explanation or a comparison as tables on a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from kpx.observe.explain import Explanation, Report

_ROWS = 12  # modules in a table


def size(n: float | None) -> str:
    """Bytes in the unit that suits them."""
    if n is None:
        return "?"
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= unit:
            return f"{n / unit:.4g} {name}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def count(n: float) -> str:
    """A large number, with a letter for thousands of thousands."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= unit:
            return f"{n / unit:.4g} {name}"
    return f"{n:.0f}"


def render(explanation: Explanation) -> Group:
    """Tables, one a target, and what was assumed."""
    from kpx.observe.explain import ASSUMPTIONS

    parts: list[Any] = []
    for report in explanation.reports:
        parts += _report(explanation.name, report)
    parts.append(Text("A model, not a measurement: " + " ".join(ASSUMPTIONS), style="dim"))
    return Group(*parts)


def as_text(renderable: Any) -> str:
    """What a terminal of 120 columns would show."""
    text = io.StringIO()
    Console(file=text, width=120).print(renderable)
    return text.getvalue()


def _report(name: str, report: Report) -> list[Any]:
    if report.error:
        return [Text(f"{report.target}: {report.error}", style="red"), Text()]
    table = Table(title=f"{escape(name)} on {report.target}" + _shared(report.target.device_count))
    for column in ("module", "time", "", "bound by", "FLOPs", "moved", "longest operations"):
        table.add_column(column, justify="right" if column in ("time", "", "FLOPs", "moved") else "left")
    for group in report.groups[:_ROWS]:
        table.add_row(*_group(group, report.seconds))
    rest = report.groups[_ROWS:]
    if rest:
        seconds = sum(g.seconds for g in rest)
        share = f"{seconds / report.seconds:.0%}" if report.seconds else ""
        flops, moved = sum(g.flops for g in rest), sum(g.bytes for g in rest)
        table.add_row(f"{len(rest)} others", duration(seconds), share, "", count(flops), size(moved), "")
    return [table, _summary(report), *_advice(report), Text()]


def _shared(devices: int) -> str:
    return f": each of {devices} devices" if devices > 1 else ""


def _group(group: Any, total: float) -> list[str]:
    longest = sorted(group.operations, key=lambda op: -group.operations[op])[:3]
    share = f"{group.seconds / total:.0%}" if total else ""
    return [
        escape(group.path), duration(group.seconds), share, group.bound, count(group.flops), size(group.bytes),
        ", ".join(longest),
    ]  # fmt: skip


def _summary(report: Report) -> Text:
    memory = report.memory
    fits = {True: "fits", False: "does not fit", None: "unknown"}[memory.fits] if memory else ""
    parts = [
        f"{duration(report.seconds)} a call: {duration(report.compute_seconds)} bound by computing, "
        f"{duration(report.memory_seconds)} by memory, {duration(report.exchange_seconds)} by exchanges.",
        f"Memory: {size(memory.peak_bytes)} of {size(memory.device_bytes)}, {fits}." if memory else "",
        f"{sum(report.rewrites.values())} rewrites."
        + (f" Taken back: {', '.join(report.reverted)}." if report.reverted else ""),
        *report.remarks,
        "Kernels: " + ", ".join(f"{k} as {v}" for k, v in report.kernels.items()) + "." if report.kernels else "",
    ]
    return Text(" ".join(filter(None, parts)))


def _advice(report: Report) -> list[Text]:
    return [
        Text(f"  {i}. {a.change}" + (f" Saves at most {duration(a.saves_seconds)}." if a.saves_seconds else ""))
        for i, a in enumerate(report.advice, 1)
    ]
