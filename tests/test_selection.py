"""The selection of slow tests in CI."""

import subprocess
import sys

import pytest

from tests import selection


@pytest.mark.parametrize(
    ("test", "changed", "affected"),
    [
        ("tests/bridges/test_torch_ops.py", "bridges/torch/ops.py", True),
        ("tests/bridges/test_torch_ops.py", "kernels/rotary.py", False),
        ("tests/passes/test_layers.py", "kpx/passes/layers.py", True),
        ("tests/passes/test_layers.py", "kpx/passes_of_others.py", False),
        ("tests/passes/test_layers.py", "tests/passes/test_layers.py", True),
        ("tests/passes/test_layers.py", "tests/passes/test_repeated.py", False),
        ("tests/train/test_launch.py", "tests/train/script.py", True),  # a helper beside it
        ("tests/train/test_launch.py", "tests/conftest.py", True),
        ("tests/test_fuzz_torch.py", "bench/fuzz.py", True),
    ],
)
def test_a_test_is_affected_by_what_it_checks(test, changed, affected):
    assert selection.is_affected(test, [changed]) is affected


def test_every_test_is_in_exactly_one_share():
    nodes = [f"tests/test_a.py::test_b[{i}]" for i in range(1000)]
    shares = [[n for n in nodes if selection.in_share(n, k, 5)] for k in range(5)]
    assert sorted(n for s in shares for n in s) == sorted(nodes)
    assert all(100 < len(s) < 300 for s in shares)


def test_a_commit_that_is_not_here_changes_everything():
    assert selection.changed_files("0" * 40) is None


def _collected(*options):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/ir/test_cost.py",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run([*command, *options], cwd=selection.ROOT, capture_output=True, text=True, check=False)
    return {line for line in run.stdout.splitlines() if "::" in line}


def test_shares_of_a_run_partition_its_tests():
    everything = _collected()
    shares = [_collected("--share", f"{k}/2") for k in range(2)]
    assert len(everything) > 3
    assert shares[0] | shares[1] == everything
    assert not shares[0] & shares[1]


def test_the_cheapest_case_of_a_test_stays_quick():
    seconds = {
        "a.py::x[1]": 3.0,
        "a.py::x[2]": 2.0,
        "a.py::x[3]": 0.5,
        "a.py::y": 4.0,
        "a.py::z[1]": 9.0,
        "a.py::z[2]": 6.0,
    }
    assert selection.slow_cases(seconds) == ["a.py::x[1]", "a.py::x[2]", "a.py::z[1]", "a.py::z[2]"]
