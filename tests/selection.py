"""Selection of slow tests by what changed: `--changed-since COMMIT --share K/N`.

CI runs every quick test, the slow tests of what changed since the last commit that passed, and one Nth of the other slow
tests, another one at each commit. `make test-slow` runs all.
"""

from __future__ import annotations

import pathlib
import subprocess
import zlib
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parents[1]

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


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("selection")
    group.addoption("--changed-since", metavar="COMMIT", help="run the tests of what changed since this commit")
    group.addoption("--share", metavar="K/N", help="beside them, run share K of N of the other tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
