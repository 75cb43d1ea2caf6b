"""A report of `kpx.track` for people, for CI, and as a picture."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from typing import Any

from rich.table import Table

from kpx.errors import InputError
from kpx.track import LEVELS, Change, History, Report


def as_markdown(report: Report) -> str:
    """A table in Markdown, the worst first."""
    lines = [
        f"### Run {report.run}, {report.at}",
        "",
        f"{report.machine}. {verdict(report)}",
        "",
        "| | metric | before | now | ratio | 95% | |",
        "|-|-|-|-|-|-|-|",
    ]
    lines += ["| " + " | ".join(_cells(c)) + " |" for c in _sorted(report)]
    lines += [""] + [f"- {name}: {old} before, {new} now" for name, (old, new) in report.versions.items()]
    return "\n".join(lines).rstrip() + "\n"


def as_table(report: Report) -> Table:
    """The same as a table for a terminal."""
    table = Table("", "metric", "before", "now", "ratio", "95%", "", title=f"{report.machine}: {verdict(report)}")
    for change in _sorted(report):
        table.add_row(*_cells(change))
    return table


def as_junit(report: Report, fails_at: str = "moderate") -> str:
    """JUnit's XML: a case for each metric, failed where it has become worse by a level at least."""
    failing = [level.name for level in LEVELS][[level.name for level in LEVELS].index(fails_at) :]
    suite = ElementTree.Element("testsuite", name="kpx.track", tests=str(len(report.changes)),
        failures=str(sum(c.level in failing for c in report.changes)),
        skipped=str(sum(bool(c.why) for c in report.changes)), timestamp=report.at)  # fmt: skip
    for change in report.changes:
        case = ElementTree.SubElement(suite, "testcase", classname=change.name, name=change.metric)
        if change.why:
            ElementTree.SubElement(case, "skipped", message=change.why)
        elif change.level in failing:
            ElementTree.SubElement(case, "failure", type=change.level, message=" ".join(_cells(change)[2:]))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def plot(history: History, name: str, metric: str, machine: str, path: str | os.PathLike) -> None:
    """Draws a metric over runs: medians, and what all samples lie between; the file's ending says its format.

    Raises:
        InputError: there is no such series, or matplotlib, which draws it, is not installed.
    """
    series = history.series(name, metric, machine)
    if not series:
        raise InputError(f"`{history.path}` holds no `{metric}` of `{name}` on {machine}.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("A plot needs matplotlib: `pip install matplotlib`.") from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(series))
    medians = [sorted(s)[len(s) // 2] for _, s in series]
    axes.fill_between(places, [min(s) for _, s in series], [max(s) for _, s in series], alpha=0.2)
    axes.plot(places, medians, marker="o")
    axes.set_xticks(list(places), [at[:16].replace("T", "\n") for at, _ in series], fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(metric)
    axes.set_title(f"{name} on {machine}", fontsize=9)
    figure.savefig(path)


def verdict(report: Report) -> str:
    """What a report says, in a sentence."""
    worse = [c for c in report.changes if c.level]
    if not worse:
        return "Nothing has become worse."
    counts = {level.name: sum(c.level == level.name for c in worse) for level in LEVELS}
    told = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    return f"{len(worse)} of {len(report.changes)} have become worse: {told}."


def to_dict(report: Report) -> dict[str, Any]:
    """A report as plain data."""
    return {
        "run": report.run, "at": report.at, "machine": report.machine, "worst": report.worst,
        "versions": {k: list(v) for k, v in report.versions.items()}, "changes": [vars(c) for c in report.changes],
    }  # fmt: skip


def _sorted(report: Report) -> list[Change]:
    names = ["", *(level.name for level in LEVELS)]
    return sorted(report.changes, key=lambda c: (-names.index(c.level), -(c.ratio or 0.0)))


def _cells(change: Change) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    between = f"{change.interval[0]:.2f} to {change.interval[1]:.2f}" if change.interval else ""
    told = change.why or (f"{change.level} ({change.confidence:.0%} sure)" if change.level else "")
    ratio = "" if change.ratio is None else f"{change.ratio:.2f}"
    return [change.name, change.metric, number(change.before), number(change.now), ratio, between, told]
