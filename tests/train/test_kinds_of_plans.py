"""Each kind of plan, in four processes of two devices, trains to the losses of one device."""

import numpy as np
import pytest

from tests.train.launched import STEPS, losses_of_each

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KINDS = (
    {"data": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2}, {"context": 8}, {"pipeline": 4, "data": 2}, {"expert": 4, "data": 2},
)  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    """The losses of one device, of a Llama and of a mixture of experts."""
    return [losses for _, losses in losses_of_each(["auto", {"expert": 1}], processes=1)]


@pytest.fixture(scope="module")
def several():
    return losses_of_each(KINDS, processes=4, devices=2)


@pytest.mark.parametrize("number", range(len(KINDS)), ids=["-".join(plan) for plan in KINDS])
def test_four_processes_of_two_devices_train_each_kind_of_plan_to_the_same_losses(alone, several, number):
    mesh, found = several[number]
    wanted = alone["expert" in KINDS[number]]
    assert {axis: n for axis, n in mesh.items() if n > 1} == KINDS[number]
    assert [*found] == [*wanted] == [*range(1, STEPS + 1)]
    np.testing.assert_allclose([*found.values()], [*wanted.values()], atol=1e-4)
