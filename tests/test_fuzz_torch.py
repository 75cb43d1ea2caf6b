"""Random PyTorch modules give what eager PyTorch gives."""

import jax.numpy as jnp
import numpy as np
import pytest

from kpx.bridges.torch.registry import RULES
from tests.optional import torch
from tests.torch_fuzzing import SUMMED_ZERO, Case, Outcome, case_of, check, run, shrink
from tests.torch_programs import Program

# Of what PyTorch refuses itself (an in-place op before a gradient), nothing can be said.
GOOD = ("right", "invalid", "explained")


@pytest.mark.parametrize("block", [*range(4), *(pytest.param(block, marks=pytest.mark.slow) for block in range(4, 12))])
def test_random_modules_give_what_eager_gives(block):
    outcomes = {seed: check(seed) for seed in range(5 * block, 5 * block + 5)}
    assert {seed: o.what for seed, o in outcomes.items() if o.kind not in GOOD} == {}


def test_a_seed_gives_the_same_program_each_time():
    one, other = Program(3), Program(3)
    assert one.source == other.source
    for a, b in zip(one.make_inputs(), other.make_inputs(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _case(lines, returned, door="optimize"):
    """A program of given lines over two f32 vectors that hold NaN and -0.0."""
    program = Program(0)
    program.bases, program.inputs = [], []
    for tensor in (torch.tensor([-0.0, 1.0, float("nan"), -2.0]), torch.tensor([0.0, 3.0, 0.5, -1.0])):
        program.add_input(tensor)
    program._errors, program._unsigned = dict.fromkeys([*returned, "a0", "a1"], 0.0), set()
    return Case(program, door, list(lines), list(returned))


def test_a_rule_that_moves_the_wrong_way_is_found_and_reduced(monkeypatch):
    monkeypatch.setitem(RULES, torch.ops.aten.roll.default, lambda x, shifts, dims=(): x)
    lines = ["v0 = a0 * 2", "v1 = v0[1:]", "v2 = v1.roll(1, 0)", "v3 = v2 + 1", "v4 = a1.neg()", "a1.add_(1)"]
    start = _case(lines, ["v3", "v4"])
    case, outcome = shrink(start, run(start))
    assert outcome.kind == "wrong"
    assert case.lines == ["v0 = a0 * 2", "v1 = v0[1:]", "v2 = v1.roll(1, 0)", "v3 = v2 + 1"]
    assert case.returned == ["v3"]


@pytest.mark.parametrize(
    "rule, what",
    [
        (lambda x: jnp.where(x == 0, jnp.float32(0.0), -x), "0.0 where eager gives -0.0"),
        (lambda x: -jnp.where(jnp.isnan(x), jnp.float32(0.0), x), "where eager gives nan"),
        (lambda x: -(x * np.float32(1.0000002)), "float32 differ"),
    ],
)
def test_signs_of_zero_nans_and_last_bits_are_compared(monkeypatch, rule, what):
    monkeypatch.setitem(RULES, torch.ops.aten.neg.default, rule)
    outcome = run(_case(["v0 = torch.cat([a0, a1]).neg()"], ["v0"]))
    assert outcome.kind == "wrong"
    assert what in outcome.what[0]


def test_an_input_that_is_not_written_back_is_found(monkeypatch):
    monkeypatch.setitem(RULES, torch.ops.aten.copy.default, lambda x, src, non_blocking=False: x)
    outcome = run(_case(["a0.copy_(a1)", "v0 = a1 * 1"], ["v0"]))
    assert outcome.kind == "wrong"
    assert "input a0 afterwards" in outcome.what[0]


def test_what_pytorch_cannot_capture_itself_counts_for_nothing():
    case = case_of(0, door="compile")
    case.lines, case.returned = ["v0 = a0 @ a0 @ a0 @ 'x'"], ["v0"]
    assert run(case).kind == "invalid"


def test_a_zero_whose_sign_nothing_defines_is_explained_by_a_row_of_the_table():
    case = _case(["v0 = a0 + 0.0"], ["v0"])
    assert run(case).kind == "wrong"
    case.program._errors["v0"], case.program._unsigned = torch.finfo(torch.float32).eps, {"v0"}
    assert run(case) == Outcome("explained", [SUMMED_ZERO])


def test_an_outcome_that_another_run_does_not_have_is_unstable(monkeypatch):
    runs = iter([lambda x: -x + 1, *[lambda x: -x] * 9])
    monkeypatch.setitem(RULES, torch.ops.aten.neg.default, lambda x: next(runs)(x))
    assert run(_case(["v0 = a0.neg()"], ["v0"])).kind == "unstable"
