"""Which tests are slow, and which slow tests CI runs: `--record-slow`, `--changed-since COMMIT`, `--share K/N`.

A test is slow if it is marked so, or listed in tests/data/slow.txt, which a full run records: cases that take over a second,
but for the cheapest case of each test. `make test` leaves slow tests out and `make test-slow` runs them. CI runs those of what
changed since the last commit that passed them all, and one Nth of the others, another one at each commit.
"""

from __future__ import annotations

import pathlib
import subprocess
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SLOW = ROOT / "tests" / "data" / "slow.txt"

_SECONDS = 1.0  # a case that takes longer is slow
_SECONDS_OF_CHEAPEST = 5.0  # so is the cheapest case of a test that takes longer than this

# What a folder of tests checks directly. A folder that is not listed checks the package of its name.
_SOURCES = {
    "tests/bridges": ("bridges",),
    "tests/kernels": ("kernels",),
    "tests": ("bench", "pyproject.toml"),
}
# A change here may alter what any test computes: all slow tests run.
_EVERYTHING = ("tests/conftest.py", "tests/selection.py")


def changed_files(commit: str) -> set[str] | None:
    """Return the files that differ from a commit, relative to the checkout; None where the commit is not known here."""
    run = subprocess.run(["git", "diff", "--name-only", commit], cwd=ROOT, capture_output=True, text=True, check=False)
    return set(run.stdout.split("\n")) - {""} if run.returncode == 0 else None


def is_affected(test_file: str, changed: Iterable[str]) -> bool:
    """Return whether a test file, relative to the checkout, checks one of the changed files directly."""
    folder = str(pathlib.PurePosixPath(test_file).parent)
    sources = _SOURCES.get(folder, (folder.replace("tests/", "kpx/", 1),))
    for path in changed:
        if path in _EVERYTHING or path == test_file or any(path == s or path.startswith(s + "/") for s in sources):
            return True
        is_helper = path.endswith(".py") and not pathlib.PurePosixPath(path).name.startswith("test_")
        if is_helper and str(pathlib.PurePosixPath(path).parent) == folder:
            return True
    return False


def in_share(node: str, index: int, count: int) -> bool:
    """Return whether a test belongs to one of `count` shares; every test belongs to exactly one."""
    return zlib.crc32(node.encode()) % count == index % count


def slow_cases(seconds: Mapping[str, float]) -> list[str]:
    """Return the node ids of the cases that are slow, given the seconds that each took."""
    cases: dict[str, list[str]] = defaultdict(list)
    for node in seconds:
        cases[node.partition("[")[0]].append(node)
    slow = []
    for nodes in cases.values():
        cheapest = min(nodes, key=lambda node: seconds[node])
        slow += [n for n in nodes if seconds[n] > (_SECONDS_OF_CHEAPEST if n == cheapest else _SECONDS)]
    return sorted(slow)


class _Recorder:
    """Writes tests/data/slow.txt at the end of a run of all tests."""

    def __init__(self):
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        SLOW.write_text("".join(f"{node}\n" for node in slow_cases(self._seconds)))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-slow") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder())


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("selection")
    group.addoption("--record-slow", action="store_true", help=f"write {SLOW.name}: the tests that take long")
    group.addoption("--changed-since", metavar="COMMIT", help="run the tests of what changed since this commit")
    group.addoption("--share", metavar="K/N", help="beside them, run share K of N of the other tests")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    listed = frozenset(SLOW.read_text().splitlines()) if SLOW.exists() else frozenset()
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    commit, share = config.getoption("--changed-since"), config.getoption("--share")
    if commit is None and share is None:
        return
    changed = changed_files(commit) if commit else set()
    if changed is None:
        return  # the commit is not in this clone: everything may have changed
    index, count = (int(n) for n in (share or "0/1").split("/"))
    selected, left = [], []
    for item in items:
        is_chosen = is_affected(item.location[0], changed) or (share and in_share(item.nodeid, index, count))
        (selected if is_chosen else left).append(item)
    items[:] = selected
    config.hook.pytest_deselected(items=left)
