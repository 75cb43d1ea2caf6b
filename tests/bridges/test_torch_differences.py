"""Each row of docs/differences.md: what differs from eager PyTorch, how, and that it still does."""

import pathlib

import pytest
import torch

import kpx

F = torch.nn.functional
CONFIG = kpx.Config(measure_seconds=0)
NAN, INF = float("nan"), float("inf")
TABLE = pathlib.Path(__file__).parents[2] / "docs" / "differences.md"


class _Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def _both(function, *tensors, config=CONFIG):
    model = _Model(function)
    with torch.no_grad():
        return kpx.optimize(model, config=config)(*tensors), model(*tensors)


def test_subnormal_numbers_are_flushed_in_arithmetic():
    ours, eager = _both(lambda x: x * 0.5, torch.tensor([1e-40, -1e-40, 1.0]))
    assert (eager != 0).all()
    assert ours.tolist() == [0, 0, 0.5]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_undefined_casts_are_clamped_and_nan_is_zero(dtype):
    limits = torch.iinfo(dtype)
    ours, _ = _both(lambda x: x.to(dtype), torch.tensor([NAN, INF, -INF, 1e20, -1e20]))
    assert ours.tolist() == [0, limits.max, limits.min, limits.max, limits.min]


def test_product_by_a_mask_selects():
    x, mask = torch.tensor([1.0, NAN, INF, -INF]), torch.tensor([True, False, False, True])
    for function in (lambda x, mask: x * mask, lambda x, mask: x * mask.float()):
        ours, eager = _both(function, x, mask)
        assert eager[:3].isnan().tolist() == [False, True, True]
        assert ours.tolist() == [1, 0, 0, -INF]


def test_where_selects_alike():
    x, mask = torch.tensor([1.0, NAN, INF, -INF]), torch.tensor([True, False, False, True])
    ours, eager = _both(lambda x, mask: torch.where(mask, x, 0.0), x, mask)
    assert torch.equal(ours, eager)


def test_sign_of_a_zero_of_a_maximum():
    ours, eager = _both(torch.relu, torch.tensor([-0.0, 1.0]))
    assert eager.signbit().tolist() == [True, False]
    assert ours.signbit().tolist() == [False, False]


def test_sum_of_constant_negative_zeros():
    ours, eager = _both(lambda x: x.sign() + torch.full((3,), -0.0).sum(), torch.tensor([-0.0]))
    assert (ours == eager).all()
    ours, eager = _both(lambda x: (torch.full((3,), -0.0).sum()).reciprocal() * x, torch.tensor([1.0]))
    assert (ours.item(), eager.item()) == (-INF, INF)


def test_remainder_of_a_quotient_that_overflows():
    ours, eager = _both(torch.fmod, torch.full((16,), 3e38), torch.full((16,), 0.5))
    assert eager.isnan().all()
    assert (ours == 0).all()


def test_equal_values_keep_their_order():
    x = torch.zeros(40)
    ours, _ = _both(lambda x: x.sort().indices, x)
    assert torch.equal(ours, torch.arange(40))


def test_statistics_at_a_large_mean_are_within_a_rounding_of_the_mean():
    x = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)) + 1e6
    ours, eager = _both(lambda x: F.layer_norm(x, (1000,)), x)
    reference = F.layer_norm(x.double(), (1000,))
    assert (eager - reference).abs().max() < 0.25  # four roundings of numbers of 1e6
    assert (ours - reference).abs().max() < 0.25


def test_layer_norm_whose_squares_overflow():
    ours, eager = _both(lambda x: F.layer_norm(x, (8,)), torch.randn(2, 8) * 1e25)
    assert eager.isnan().all()
    assert (ours == 0).all()


def test_one_element_of_a_prepared_weight_written_through_data_may_not_be_seen():
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 16, 1, bias=False), torch.nn.BatchNorm2d(16)).eval()
    x, optimized, seen = torch.ones(1, 64, 2, 2), kpx.optimize(model, config=CONFIG), []
    with torch.no_grad():
        optimized(x)
        for i in range(2):  # neighbours, of which at most one is compared
            model[0].weight.data.view(-1)[i] += 1
            seen.append(torch.allclose(optimized(x), model(x)))
            model[0].weight.add_(0)  # raises the version counter
            assert torch.allclose(optimized(x), model(x), atol=1e-5)
    assert not all(seen)


def test_strides_are_planned_with_fake_tensors():
    ours, eager = _both(lambda x, i: x.unfold(1, 5, 1)[1, None, i], torch.ones(2, 5), torch.tensor([0, 0]))
    assert torch.equal(ours, eager)
    assert (ours.stride(), eager.stride()) == ((1, 1, 2), (10, 5, 1))


@pytest.mark.parametrize("name", ["median", "nanmedian"])
def test_median_along_an_expanded_dimension_is_the_median(name):
    x = torch.tensor([[-8.0, -1.0, -4.0, -2.0, -7.0]]).expand(5, 5)
    ours, eager = _both(lambda x: getattr(x, name)(0).values, x)
    assert torch.equal(ours, x[0])
    assert not torch.equal(eager, x[0])


def test_bytes_are_interpolated_within_one():
    x = torch.randint(0, 256, (1, 2, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, eager = _both(lambda x: F.interpolate(x, size=(18, 14), mode="bilinear"), x)
    assert ours.dtype == torch.uint8
    assert (ours.int() - eager.int()).abs().max() <= 1


def test_an_infinity_makes_its_row_of_a_quantized_product_nan():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(512, 256), torch.randn(64, 512)
    x[3, 5] = INF
    ours, eager = _both(linear, x, config=kpx.Config(precision="int8"))
    assert eager[3].isinf().all()
    assert ours[3].isnan().all()
    assert ours.isnan().sum() == 256


def test_torch_compile_does_not_see_a_method_that_is_replaced(monkeypatch):
    class Doubles(torch.nn.Module):
        def forward(self, x):
            return self.scaled(x)

        def scaled(self, x):
            return x * 2

    model = Doubles()
    compiled, optimized = torch.compile(model, backend="kpx"), kpx.optimize(model)
    assert compiled(torch.ones(1)).item() == optimized(torch.ones(1)).item() == 2
    monkeypatch.setattr(Doubles, "scaled", lambda self, x: x * 3)
    assert (compiled(torch.ones(1)).item(), optimized(torch.ones(1)).item()) == (2, 3)


def test_the_table_has_a_row_for_each_test():
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    names = [name for name in globals() if name.startswith("test_")]
    assert len(rows) == len(names) - 2  # this one, and the advice to use `torch.where`
