"""kpx.track: what has become slower is told, and how surely; what merely scatters is not."""

import concurrent.futures
import datetime
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import kpx
from kpx.cli import main
from kpx.track import History


def _add(history, medians, *, noise=0.01, between=0.0, count=10, metric="latency_seconds", seed=0, **options):
    """Runs, an hour apart, whose samples scatter around medians by some noise, and together by `between`."""
    rng = np.random.default_rng(seed)
    start = len(history.runs())
    for i, median in enumerate(medians):
        at = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(hours=start + i)
        with history.run(at=at, **options) as run:
            level = median * np.exp(rng.normal(0, between))
            run.add("model", metric, level * np.exp(rng.normal(0, noise, count)))


@pytest.fixture
def history(tmp_path):
    return History(tmp_path / "history.sqlite")


@pytest.mark.parametrize(
    ("factor", "level"), [(1.0, ""), (1.06, "minor"), (1.15, "moderate"), (1.5, "severe"), (0.7, "")]
)
def test_a_change_has_its_level(history, factor, level):
    _add(history, [0.1] * 6)
    _add(history, [0.1 * factor], seed=1)
    (change,) = history.compare().changes
    assert change.level == level
    assert change.ratio == pytest.approx(factor, rel=0.03)
    assert change.interval[0] < factor * 1.02
    assert change.interval[1] > factor * 0.98


@pytest.mark.parametrize("seed", range(12))
def test_runs_that_scatter_without_a_change_raise_no_alarm(history, seed):
    _add(history, [0.1] * 9, noise=0.05, between=0.04, seed=seed)
    assert not history.compare().fails("moderate")


def test_the_same_shift_is_less_sure_where_runs_scatter_more(history, tmp_path):
    other = History(tmp_path / "other.sqlite")
    for each, between in ((history, 0.0), (other, 0.08)):
        _add(each, [0.1] * 8, between=between)
        _add(each, [0.112], seed=5)
    assert history.compare().worst == "moderate"
    assert other.compare().worst in ("", "minor")


def test_more_throughput_is_better(history):
    _add(history, [100.0] * 4, metric="throughput")
    _add(history, [60.0], metric="throughput")
    assert history.compare().worst == "severe"
    _add(history, [140.0], metric="throughput")
    assert history.compare().worst == ""


def test_another_machine_is_not_compared_with(history):
    _add(history, [0.1] * 4, machine="one")
    _add(history, [0.9], machine="two")
    (change,) = history.compare().changes
    assert change.level == ""
    assert change.why == "it is new"


def test_few_samples_are_told_and_not_judged(history):
    _add(history, [0.1], count=1)
    _add(history, [0.9], count=1)
    (change,) = history.compare().changes
    assert "3 are needed" in change.why
    assert not history.compare().fails("minor")


def test_a_function_is_timed_and_its_versions_kept(history):
    with history.run(commit="abc") as run:
        run.time("sum", lambda: sum(range(1000)), rounds=4, items=1000)
    (found,) = history.runs()
    assert found[3]["jax"]
    samples = history.samples(found[0])
    assert set(samples) == {("sum", m) for m in ("first_call_seconds", "latency_seconds", "throughput", "memory_bytes")}
    assert len(samples["sum", "latency_seconds"]) == 4


def test_a_run_that_raises_is_not_kept(history):
    def fail():
        with history.run() as run:
            run.add("x", "latency_seconds", [1.0])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not history.runs()


def test_runs_are_named_and_compared_with_one(history):
    _add(history, [0.1, 0.2, 0.1])
    ids = [i for i, *_ in history.runs()]
    assert history.compare(ids[2], against=ids[1]).worst == ""
    assert history.compare(ids[1]).worst == "severe"
    with pytest.raises(kpx.InputError, match="There is no run `nothing`"):
        history.compare("nothing")


def test_threads_and_reopened_files_write_to_one_history(history):
    def add(i):
        with History(history.path).run() as run:
            run.add(f"model {i}", "latency_seconds", [0.1, 0.1, 0.1])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert len(history.runs()) == 24


@pytest.mark.parametrize("samples", [[], [0.0], [-1.0], [float("nan")]], ids=str)
def test_samples_that_are_no_measurements_are_refused(history, samples):
    with pytest.raises(kpx.InputError, match="positive numbers"), history.run() as run:
        run.add("x", "latency_seconds", samples)


def test_a_file_that_is_no_history_is_refused_and_an_empty_one_told(tmp_path, history):
    (tmp_path / "text").write_text("not a database, and long enough to be looked at as one" * 40)
    with pytest.raises(kpx.ConfigError, match="cannot be used as a history"):
        History(tmp_path / "text")
    with pytest.raises(kpx.InputError, match="holds no run"):
        history.compare()


def test_reports_say_the_same_in_every_form(history):
    _add(history, [0.1] * 5)
    _add(history, [0.2])
    report = history.compare()
    assert "| model | latency_seconds | 0." in report.to_markdown()
    assert "severe (100% sure)" in report.to_markdown()
    suite = ElementTree.fromstring(report.to_junit())
    assert suite.attrib["failures"] == "1"
    assert suite.find("testcase/failure").attrib["type"] == "severe"
    assert report.to_dict()["worst"] == "severe"


def test_the_command_writes_reports_and_exits_by_the_level(history, tmp_path, capsys):
    _add(history, [0.1] * 5)
    _add(history, [0.115])
    command = ["track", "compare", "--history", str(history.path)]
    files = {name: str(tmp_path / name) for name in ("junit.xml", "table.md", "plot.png")}
    given = ["--junit", files["junit.xml"], "--markdown", files["table.md"], "--plot", files["plot.png"]]
    assert main([*command, *given]) == 1
    assert "moderate" in capsys.readouterr().out
    assert main([*command, "--fail-on", "severe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worst"] == "moderate"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "failure" in (tmp_path / "junit.xml").read_text()
