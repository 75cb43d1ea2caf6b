"""Writes and reads by indices and masks are those of eager PyTorch, errors included."""

import jax
import pytest
import torch

import kpx
from kpx.bridges.torch import checks
from kpx.bridges.torch.registry import RULES
from kpx.bridges.torch.tensors import to_array, to_tensor

aten = torch.ops.aten
CONFIG = kpx.Config(measure_seconds=0)


def _mask(*shape, seed=0, holds=None):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    if holds is not None:
        mask.flatten()[:] = False
        mask.view(-1)[torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(seed))[:holds]] = True
    return mask


def _written(x, indices, values, accumulate):
    """What the rule gives, or the error that a program would raise."""
    device = jax.local_devices(backend="cpu")[0]
    found = checks.Checks()

    def run():
        arrays = [None if i is None else to_array(i, device) for i in indices]
        with checks.collecting(found):
            result = RULES[aten.index_put.default](to_array(x, device), arrays, to_array(values, device), accumulate)
        return result, found.failed

    with jax.enable_x64(True):
        result, failed = run()
    if any(bool(f) for f in failed):
        return next(message[0] for f, message in zip(failed, found.messages, strict=True) if bool(f))
    return to_tensor(result)


ROWS, COLUMN = torch.tensor([2, 0, 1]), torch.tensor([[1], [0]])
# Indices, and the shape of the values.
CASES = {
    "index and mask of equal length": ([ROWS, _mask(5, holds=3)], (3,)),
    "index and mask, one value": ([ROWS, _mask(5, holds=3)], ()),
    "index and a mask that holds once": ([ROWS, _mask(5, holds=1)], (3,)),
    "mask and index": ([_mask(4, holds=3), ROWS], (3,)),
    "0-d index and mask": ([torch.tensor(1), _mask(5, holds=2)], (2, 1)),
    "0-d index and mask, one value": ([torch.tensor(1), _mask(5, holds=2)], ()),
    "0-d index and an empty mask": ([torch.tensor(1), _mask(5, holds=0)], ()),
    "column and mask": ([COLUMN, _mask(5, holds=2)], (2, 2, 1)),
    "column and mask, values of the rest": ([COLUMN, _mask(5, holds=2)], (2, 2, 3)),
    "mask of two dimensions and index": ([_mask(4, 5, holds=3), ROWS], (3,)),
    "index and mask of two dimensions": ([ROWS, _mask(5, 3, holds=3)], (3,)),
    "two masks": ([_mask(4, holds=2), _mask(5, holds=2, seed=1)], (2, 3)),
    "two masks, one value": ([_mask(4, holds=2), _mask(5, holds=2, seed=1)], ()),
    "two masks, one holds once": ([_mask(4, holds=1), _mask(5, holds=3, seed=1)], (3, 1)),
    "later mask with a list": ([None, _mask(5, holds=2)], (4, 2, 3)),
    "later mask with one list for all": ([None, _mask(5, holds=2)], (2, 3)),
    "last mask with a list": ([None, None, _mask(3, holds=2)], (4, 5, 2)),
    "masks apart": ([_mask(4, holds=2), None, _mask(3, holds=2)], (2, 5)),
    "index, whole dimension, mask": ([torch.tensor([1, 0]), None, _mask(3, holds=2)], (2, 1)),
    "mask of two later dimensions": ([None, _mask(5, 3, holds=4)], (4, 4)),
    "first mask with a list": ([_mask(4, holds=2)], (2, 5, 3)),
    "first mask with a value": ([_mask(4, holds=2)], (1, 5, 3)),
}
REFUSED = {
    "wrong length beside an index": ([ROWS, _mask(5, holds=2)], ()),
    "wrong number of values": ([torch.tensor(1), _mask(5, holds=2)], (3, 1)),
    "wrong number of values by one mask": ([_mask(4, holds=2)], (3, 5, 3)),
    "masks of different lengths": ([_mask(4, holds=2), _mask(5, holds=3)], ()),
}  # fmt: skip


@pytest.mark.parametrize("accumulate", [False, True], ids=["set", "add"])
@pytest.mark.parametrize("name", CASES)
def test_masks_write_beside_indices_as_in_eager(name, accumulate):
    indices, shape = CASES[name]
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_written(x, indices, values, accumulate), aten.index_put(x, indices, values, accumulate))


@pytest.mark.parametrize("name", REFUSED)
def test_masks_of_another_length_raise_as_in_eager(name):
    indices, shape = REFUSED[name]
    x, values = torch.zeros(4, 5, 3), torch.ones(shape)
    with pytest.raises((IndexError, RuntimeError)) as caught:
        aten.index_put(x, indices, values)
    assert _written(x, indices, values, False) == caught.type.__name__


def _module(function):
    class Model(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    return Model()


def test_a_program_raises_where_a_mask_selects_another_number():
    def write(x, i, m, v):
        x = x.clone()
        x[i, m] = v
        return x

    model, x, i, v = _module(write), torch.zeros(4, 5), torch.tensor([0, 1, 2]), torch.ones(3)
    optimized = kpx.optimize(model, config=CONFIG)
    with torch.no_grad():
        for holds in (3, 1):
            mask = _mask(5, holds=holds)
            torch.testing.assert_close(optimized(x, i, mask, v), model(x, i, mask, v))
        with pytest.raises(IndexError, match="does not select 1 or 3 elements"):
            optimized(x, i, _mask(5, holds=2), v)


@pytest.mark.parametrize("i", [0, 2, -1])
def test_a_tensor_without_dimensions_indexes_a_later_dimension(i):
    model = _module(lambda x, i: (x[:, i], x[i], x[..., i, None]))
    x, i = torch.randn(4, 3), torch.tensor(i)
    torch.testing.assert_close(kpx.optimize(model, config=CONFIG)(x, i), model(x, i))


def test_a_counting_of_small_integers_has_a_fixed_length():
    optimized = kpx.optimize(_module(lambda x, w: torch.bincount(x, w, minlength=6) * 2), config=CONFIG)
    x, w = torch.tensor([1, 2, 2, 5]), torch.tensor([0.5, 1.0, 2.0, 3.0])
    assert torch.equal(optimized(x, w), torch.bincount(x, w, minlength=6) * 2)
