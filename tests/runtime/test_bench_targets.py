"""Every case of the benchmark, small, and a training step, compiled for every vendor's machines."""

import pytest

from bench import llama
from bench.cases import CASES
from bench.targets import EXPERIMENTAL, TARGETS, model_case, training_case
from tests import intel

ALL = [*TARGETS, *(pytest.param(name, marks=intel.needed) for name in EXPERIMENTAL)]

SIZES = llama.Sizes(width=256, hidden=512, layers=4, heads=8, kv_heads=2, vocabulary=1024)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.models
def test_a_case_compiles_for(name, case):
    row = model_case(name, case, small=True)
    assert "error" not in row, row
    assert row["fits"]
    assert row["predicted seconds"] > 0


@pytest.mark.parametrize("name", ALL)
def test_a_training_step_compiles_with_the_products_counted_by_hand(name):
    row = training_case(name, SIZES, 16, 128, 2)
    assert "error" not in row, row
    assert row["fits"]
    assert row["product flops"] == pytest.approx(row["flops by hand"], rel=0.02)
