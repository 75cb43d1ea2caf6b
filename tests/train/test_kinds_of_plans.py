"""Each kind of plan, in four processes of two devices, trains to the losses of one device."""

import json

import numpy as np
import pytest

from tests.train.launched import STEPS, launched


@pytest.fixture(scope="module")
def alone():
    """The losses of one device."""
    return launched("auto", "", processes=1)[0]


KINDS = ({"data": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2}, {"context": 8}, {"pipeline": 4, "data": 2})


@pytest.mark.slow
@pytest.mark.parametrize("plan", KINDS, ids=lambda plan: "-".join(plan))
def test_four_processes_of_two_devices_train_each_kind_of_plan_to_the_samelosses_of(alone, plan):
    found, _ = launched(json.dumps(plan), "", processes=4, devices=2)
    np.testing.assert_allclose([found[n] for n in sorted(alone)], [alone[n] for n in sorted(alone)], atol=1e-4)
    assert len(found) == STEPS


@pytest.mark.slow
def test_four_processes_of_two_devices_train_a_mixture_of_experts_to_the_samelosses_of():
    alone, _ = launched('{"expert": 1}', "", processes=1)
    found, _ = launched('{"data": 2, "expert": 4}', "", processes=4, devices=2)
    np.testing.assert_allclose([found[n] for n in sorted(alone)], [alone[n] for n in sorted(alone)], atol=1e-4)
    assert len(found) == STEPS
