"""`kpx.track`: a history of measurements, and what has become slower since.

    history = kpx.track.History("history.sqlite")
    with history.run(commit="abc") as run:
        run.time("bert", lambda: model(x))
        run.add("bert", "compile_seconds", [2.1])
    report = history.compare()
    report.worst, report.to_markdown(), report.to_junit()

A measurement is a list of samples of one metric of one thing, in one run, on one machine. The last run is compared with
those before it on the same machine: how far medians have moved, and how surely, by resampling samples and runs, with what
runs differ by when nothing has changed.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import pathlib
import platform
import resource
import sqlite3
import statistics
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpx.errors import ConfigError, InputError
from kpx.hardware import cpu
from kpx.hardware.target import cores
from kpx.observe.timing import once

# Metrics of which more is better; of all others, less.
MORE_IS_BETTER = {"throughput"}


@dataclass(frozen=True)
class Level:
    """A regression's: by how much a median has moved for the worse at least, and how surely."""

    name: str
    threshold: float
    confidence: float


LEVELS = (Level("minor", 0.03, 0.95), Level("moderate", 0.10, 0.95), Level("severe", 0.25, 0.99))
_RESAMPLES = 2000
_LEAST = 3  # samples on either side
_RUNS = 10  # before the last, that it is compared with

_SCHEMA = """
create table if not exists runs (id text primary key, at text not null, machine text not null, versions text not null,
                                 notes text not null);
create table if not exists measurements (run text not null references runs(id), name text not null, metric text not null,
                                         samples text not null, primary key (run, name, metric));
create index if not exists by_name on measurements(name, metric);
"""


@dataclass(frozen=True)
class Change:
    """How one metric of one thing has moved.

    Attributes:
        ratio: of the last run's median over the median before, above 1 where it is worse; None where it is not known.
        interval: where 95% of the resampled ratios lie.
        level: `minor`, `moderate`, `severe`, or "" where it has not become worse; of `confidence`, by resampling.
        why: where it could not be compared, the reason.
    """

    name: str
    metric: str
    before: float | None
    now: float | None
    ratio: float | None
    interval: tuple[float, float] | None
    level: str
    confidence: float
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What `History.compare` found."""

    run: str
    at: str
    machine: str
    changes: tuple[Change, ...]
    versions: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The worst level among the changes, or ""."""
        names = ["", *(level.name for level in LEVELS)]
        return max((c.level for c in self.changes), key=names.index, default="")

    def fails(self, at: str = "moderate") -> bool:
        """Whether something has become worse by a level at least."""
        names = ["", *(level.name for level in LEVELS)]
        return bool(self.worst) and names.index(self.worst) >= names.index(at)

    def to_markdown(self) -> str:
        """A table in Markdown, the worst first."""
        return _writer().as_markdown(self)

    def to_junit(self, fails_at: str = "moderate") -> str:
        """JUnit's XML: a case for each metric, failed where it has become worse by a level at least."""
        return _writer().as_junit(self, fails_at)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return _writer().to_dict(self)

    def __rich__(self) -> Any:
        return _writer().as_table(self)


def _writer() -> Any:
    """The module that writes reports, which imports this one."""
    from kpx.observe import track_report

    return track_report


class History:
    """A file of measurements (SQLite). Several processes may write to it."""

    def __init__(self, path: str | os.PathLike):
        """Opens a history, and makes it where there is none.

        Raises:
            ConfigError: the file cannot be opened, or is no history.
        """
        self.path = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as connection:
                connection.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"`{path}` cannot be used as a history: {error}. Name another file.") from None

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=60)
        try:
            with connection:
                yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def run(self, *, at: datetime.datetime | None = None, machine: str | None = None, **notes: Any) -> Iterator[Run]:
        """A run, to which measurements are added; it is written when the block ends without an error.

        Args:
            at: when it is (UTC); now by default.
            machine: what it runs on; this machine by default.
            **notes: what else to keep, as `commit="abc"`.
        """
        when = at or datetime.datetime.now(datetime.UTC)
        run = Run()
        yield run
        found = run.id, when.isoformat(timespec="microseconds"), machine or this_machine()
        with self._open() as connection:
            connection.execute(
                "insert into runs values (?, ?, ?, ?, ?)", (*found, json.dumps(versions()), json.dumps(notes))
            )
            rows = [(run.id, name, metric, json.dumps(list(s))) for (name, metric), s in run.samples.items()]
            connection.executemany("insert into measurements values (?, ?, ?, ?)", rows)

    def runs(self, machine: str | None = None) -> list[tuple[str, str, str, dict[str, str]]]:
        """Every run, oldest first: id, time, machine, versions."""
        with self._open() as connection:
            rows = connection.execute("select id, at, machine, versions from runs order by at, rowid").fetchall()
        return [(i, at, m, json.loads(v)) for i, at, m, v in rows if machine in (None, m)]

    def samples(self, run: str) -> dict[tuple[str, str], list[float]]:
        """A run's measurements: by name and metric."""
        with self._open() as connection:
            query = "select name, metric, samples from measurements where run = ? order by rowid"
            rows = connection.execute(query, (run,)).fetchall()
        return {(name, metric): json.loads(samples) for name, metric, samples in rows}

    def series(self, name: str, metric: str, machine: str) -> list[tuple[str, list[float]]]:
        """A metric over time on a machine: the runs' times, and samples."""
        runs = {i: at for i, at, _, _ in self.runs(machine)}
        return [(at, s) for i, at in runs.items() if (s := self.samples(i).get((name, metric)))]

    def plot(self, name: str, metric: str, path: str | os.PathLike, machine: str | None = None) -> None:
        """Draws a metric over runs on a machine (this one by default) into a file, whose ending says its format.

        Raises:
            InputError: there is no such series, or matplotlib, which draws it, is not installed.
        """
        _writer().plot(self, name, metric, machine or this_machine(), path)

    def compare(self, run: str | None = None, against: str | None = None) -> Report:
        """The last run, or another, with the ten before it on the same machine, or with one.

        Raises:
            InputError: there is no such run, or none at all.
        """
        runs = self.runs()
        if not runs:
            raise InputError(f"`{self.path}` holds no run. Add one: `with history.run() as run: run.time(...)`.")
        known = [i for i, *_ in runs]
        for given in (run, against):
            if given is not None and given not in known:
                raise InputError(f"There is no run `{given}` in `{self.path}`. The last are {', '.join(known[-5:])}.")
        this = runs[known.index(run)] if run else runs[-1]
        here = [r for r in runs[: known.index(this[0])] if r[2] == this[2]]
        before = [r for r in runs if r[0] == against] if against else here[-_RUNS:]
        held = [self.samples(r[0]) for r in before]
        changes = []
        for (name, metric), now in self.samples(this[0]).items():
            earlier = [s[name, metric] for s in held if s.get((name, metric))]
            changes.append(_change(name, metric, earlier, now))
        moved = {}
        if before:
            moved = {k: (before[-1][3].get(k, "none"), v) for k, v in this[3].items() if before[-1][3].get(k) != v}
        return Report(this[0], this[1], this[2], tuple(changes), moved)


class Run:
    """Measurements of one run (see `History.run`)."""

    def __init__(self):
        self.id = uuid.uuid4().hex[:12]
        self.samples: dict[tuple[str, str], list[float]] = {}

    def add(self, name: str, metric: str, samples: Sequence[float]) -> None:
        """Adds samples of a metric, as `latency_seconds`, `throughput`, `memory_bytes`, `compile_seconds`.

        Raises:
            InputError: there are none, or one is not a positive number.
        """
        given = [float(s) for s in samples]
        if not given or not all(math.isfinite(s) and s > 0 for s in given):
            raise InputError(f"Samples of `{metric}` of `{name}` are {given[:5]}. Give positive numbers, one or more.")
        self.samples.setdefault((name, metric), []).extend(given)

    def time(self, name: str, function: Callable[[], Any], *, rounds: int = 10, items: int | None = None) -> None:
        """Adds what a function's calls take: the first apart (`first_call_seconds`), then `rounds` more
        (`latency_seconds`; with `items` a call, `throughput` too), and the process's largest memory (`memory_bytes`)."""
        self.add(name, "first_call_seconds", [max(once(function), 1e-9)])
        taken = [max(once(function), 1e-9) for _ in range(rounds)]
        self.add(name, "latency_seconds", taken)
        if items is not None:
            self.add(name, "throughput", [items / seconds for seconds in taken])
        self.add(name, "memory_bytes", [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])


def this_machine() -> str:
    """This machine's name in histories: the processor and how many cores may be used."""
    return f"{cpu.model()}, {cores()} cores, {platform.system()}"


def versions() -> dict[str, str]:
    """The versions that a run is noted with."""
    from kpx.observe.demo import versions as known

    return known()


def _change(name: str, metric: str, earlier: list[list[float]], now: list[float]) -> Change:
    flat = [s for run in earlier for s in run]
    if len(flat) < _LEAST or (len(now) < _LEAST and len(earlier) < _LEAST):
        why = f"{len(flat)} samples before and {len(now)} now: {_LEAST} are needed" if flat else "it is new"
        return Change(
            name, metric, statistics.median(flat) if flat else None, statistics.median(now), None, None, "", 0.0, why
        )
    sign = -1 if metric in MORE_IS_BETTER else 1
    before, after = statistics.median(map(statistics.median, earlier)), statistics.median(now)
    logs = sign * _resampled(earlier, now)
    ratio, (low, high) = (after / before) ** sign, np.exp(np.quantile(logs, [0.025, 0.975]))
    level, confidence = "", float(np.mean(logs > 0))
    for each in LEVELS:
        surely = float(np.mean(logs > math.log1p(each.threshold)))
        if surely >= each.confidence:
            level, confidence = each.name, surely
    return Change(name, metric, before, after, ratio, (float(low), float(high)), level, confidence)


def _resampled(earlier: list[list[float]], now: list[float]) -> np.ndarray:
    """Logarithms of the ratio of medians, of samples and runs drawn anew.

    What runs differ by when nothing has changed is taken from those before; it moves the last one's samples together.
    """
    rng = np.random.default_rng(0)
    medians = np.log([statistics.median(run) for run in earlier])
    between = 1.4826 * float(np.median(np.abs(medians - np.median(medians)))) if len(medians) > 1 else 0.0
    found = np.empty(_RESAMPLES)
    current = np.log(np.asarray(now))
    runs = [np.log(np.asarray(run)) for run in earlier]
    for i in range(_RESAMPLES):
        drawn = [runs[j] for j in rng.integers(0, len(runs), len(runs))]
        base = np.median([np.median(rng.choice(run, len(run))) for run in drawn])
        found[i] = np.median(rng.choice(current, len(current))) + rng.normal(0, between) - base
    return found
