"""Interpolation reads what PyTorch reads: the same positions at any scale, and nothing of a NaN that it does not read."""

import pytest
import torch

import kpx

F = torch.nn.functional
CONFIG = kpx.Config(measure_seconds=0)
SCALES = [
    {"scale_factor": 2.0},
    {"scale_factor": 1.1},
    {"scale_factor": 2.05},
    {"scale_factor": 0.5},
    {"scale_factor": 3.1},
    {"size": 20},
    {"scale_factor": 1.3, "recompute_scale_factor": True},
]
SHAPES = {1: (2, 3, 9), 2: (2, 3, 9, 7), 3: (1, 2, 5, 4, 3)}
MODES = [
    *(({"mode": mode}, n) for mode in ("nearest", "nearest-exact") for n in (1, 2, 3)),
    *(({"mode": mode}, n) for n, mode in ((1, "linear"), (2, "bilinear"), (2, "bicubic"), (3, "trilinear"))),
    *(({"mode": mode, "align_corners": True}, n) for n, mode in ((1, "linear"), (2, "bilinear"), (2, "bicubic"))),
    *(({"mode": mode, "antialias": True}, 2) for mode in ("bilinear", "bicubic")),
]


class _Resized(torch.nn.Module):
    """One tensor at several scales."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return tuple(F.interpolate(x, **self.options, **scale) for scale in SCALES)


@pytest.mark.parametrize(("options", "dimensions"), MODES, ids=str)
def test_values_are_those_of_eager_at_every_scale(options, dimensions):
    torch.manual_seed(0)
    model, x = _Resized(options), torch.randn(SHAPES[dimensions])
    with torch.no_grad():
        for ours, eager in zip(kpx.optimize(model, config=CONFIG)(x), model(x), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("options", "dimensions"), MODES, ids=str)
def test_gradients_are_those_of_eager(options, dimensions):
    torch.manual_seed(0)
    model, x = _Resized(options), torch.randn(SHAPES[dimensions])

    def run(function):
        leaf = x.clone().requires_grad_()
        outputs = function(leaf)
        weights = [torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape) for y in outputs]
        sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
        return [*outputs, leaf.grad]

    for ours, eager in zip(run(kpx.optimize(model, config=CONFIG)), run(model), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [o for o, n in MODES if n == 2 and not o.get("antialias")], ids=str)
def test_nan_stays_where_it_is_read(options):
    torch.manual_seed(0)
    model, x = _Resized(options), torch.randn(SHAPES[2])
    x[0, 0, 3, 3] = float("nan")
    x[1, 2, 8, 6] = float("inf")
    with torch.no_grad():
        for ours, eager in zip(kpx.optimize(model, config=CONFIG)(x), model(x), strict=True):
            assert torch.equal(ours.isnan(), eager.isnan())


@pytest.mark.parametrize("channels", [1, 3, 32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nearest_at_a_fractional_scale_is_eagers_to_the_bit(channels, memory_format):
    x = torch.randn(2, channels, 8, 8).contiguous(memory_format=memory_format)
    model = _Resized({"mode": "nearest"})
    for ours, eager in zip(kpx.optimize(model, config=CONFIG)(x), model(x), strict=True):
        assert torch.equal(ours, eager)


def test_bytes_are_interpolated_in_wide_numbers_and_rounded():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (1, 2, 9, 7), dtype=torch.uint8)
    model = _Resized({"mode": "bilinear"})
    for ours, eager in zip(kpx.optimize(model, config=CONFIG)(x), model(x), strict=True):
        assert ours.dtype == torch.uint8
        assert (ours.int() - eager.int()).abs().max() <= 1
