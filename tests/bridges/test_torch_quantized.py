"""Fake quantization, `quantized_decomposed` and scaled fp8 products have the values of PyTorch's own kernels."""

import jax
import pytest
import torch
import torch.ao.quantization.fx._decomposed

import kpx
from kpx.bridges.torch.registry import rule_of
from kpx.bridges.torch.tensors import to_array, to_tensor

aten, ops = torch.ops.aten, torch.ops.quantized_decomposed
INF, NAN = float("inf"), float("nan")


def _t(*shape, seed=0, scale=5.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _results(op, *args, **kwargs):
    """A rule's results, as a list of tensors."""
    device = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True):
        rule = rule_of(op)
        assert rule is not None
        arrays = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: to_array(t, device), args)
        results = jax.jit(lambda: rule(*arrays, **kwargs))()
    return [to_tensor(r) for r in (results if isinstance(results, tuple) else (results,))]


def _assert_equal(op, *args, **kwargs):
    expected = op(*args, **kwargs)
    for a, b in zip(_results(op, *args, **kwargs), torch.utils._pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


X = torch.cat([_t(4, 50), torch.tensor([[NAN, INF, -INF, 1e30, -1e30, 0.05, -0.05, 0.15, 12.75, 0.0]] * 4)], 1)
SCALES, ZEROS = torch.tensor([0.1, 0.037, 1.5, 0.004]), torch.tensor([3, 0, -7, 100], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "zero"), [(0.0371, 3), (0.1, 0)])
def test_fake_quantization_rounds_as_pytorchs_kernel(dtype, scale, zero):
    x = X.clamp(-6e4, 6e4).to(dtype)
    _assert_equal(aten.fake_quantize_per_tensor_affine_cachemask.default, x, scale, zero, -128, 127)


@pytest.mark.parametrize("enabled", [0, 1])
def test_fake_quantization_by_tensors_can_be_disabled(enabled):
    op = aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default
    _assert_equal(op, X, SCALES[:1], ZEROS[:1], torch.tensor([enabled]), -128, 127)


@pytest.mark.parametrize("zeros", [ZEROS, torch.tensor([0.0, 1.5, 2.3, -3.7])], ids=["whole", "fractional"])
@pytest.mark.parametrize("axis", [0, 1])
def test_fake_quantization_of_channels_rounds_as_pytorchs_kernel(zeros, axis):
    x = X if axis == 0 else X.T.contiguous()
    _assert_equal(aten.fake_quantize_per_channel_affine_cachemask.default, x, SCALES, zeros, axis, -128, 127)


def test_learnable_fake_quantization_has_pytorchs_values_and_gradients():
    x, grad, scale, zero = _t(4, 30), _t(4, 30, seed=1, scale=1.0), torch.tensor([0.0371]), torch.tensor([3.4])
    _assert_equal(aten._fake_quantize_learnable_per_tensor_affine.default, x, scale, zero, -20, 20)
    _assert_equal(aten._fake_quantize_learnable_per_channel_affine.default, x, SCALES, ZEROS.float() / 9, 0, -20, 20)
    for op, args in (
        (aten._fake_quantize_learnable_per_tensor_affine_backward.default, (grad, x, scale, zero, -20, 20, 0.5)),
        (aten._fake_quantize_learnable_per_channel_affine_backward.default, (grad, x, SCALES, ZEROS.float() / 9, 0, -20, 20, 0.5)),
    ):  # fmt: skip
        for a, b in zip(_results(op, *args), op(*args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("scale", [5.0, 1e-6])
def test_observed_fake_quantization_updates_its_statistics(symmetric, per_row, first, scale):
    x = _t(4, 50, scale=scale)
    size = (4,) if per_row else (1,)
    low, high = (
        (torch.full(size, INF), torch.full(size, -INF)) if first else (torch.full(size, -1.0), torch.full(size, 2.0))
    )
    low, high = (low[0], high[0]) if not per_row else (low, high)
    one = torch.ones(1, dtype=torch.int64)
    state = [low, high, torch.ones(size), torch.zeros(size, dtype=torch.int32)]
    args = (0.01, -128, 127, 0, per_row, symmetric)
    results = _results(aten._fused_moving_avg_obs_fq_helper_functional.default, x, one, one, *state, *args)
    expected = aten._fused_moving_avg_obs_fq_helper_functional(x, one, one, *[s.clone() for s in state], *args)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-6, atol=0)


TENSORS = (torch.tensor([0.0371], dtype=torch.float64), torch.tensor([3]))
BOUNDS = (torch.tensor(-128), torch.tensor(127))
LEVELS = torch.randint(-128, 128, (4, 60), generator=torch.Generator().manual_seed(0)).to(torch.int8)
FINITE = torch.cat([_t(4, 58), torch.tensor([[1e9, -1e9]] * 4)], 1)
DECOMPOSED = {
    "quantize": (ops.quantize_per_tensor.default, (FINITE, 0.0371, 3, -128, 127, torch.int8), {}),
    "quantize bf16": (ops.quantize_per_tensor.default, (FINITE.bfloat16(), 0.0371, 3, 0, 255, torch.uint8), {}),
    "quantize, tensors": (ops.quantize_per_tensor.tensor, (FINITE, *TENSORS, -128, 127, torch.int8), {}),
    "quantize, all tensors": (ops.quantize_per_tensor.tensor2, (FINITE, *TENSORS, *BOUNDS, torch.int8), {}),
    "dequantize": (ops.dequantize_per_tensor.default, (LEVELS, 0.0371, 3, -128, 127, torch.int8), {}),
    "dequantize to bf16": (ops.dequantize_per_tensor.default, (LEVELS, 0.0371, 3, -128, 127, torch.int8), {"out_dtype": torch.bfloat16}),
    "dequantize, tensors": (ops.dequantize_per_tensor.tensor, (LEVELS, *TENSORS, -128, 127, torch.int8), {}),
    "dequantize, all tensors": (ops.dequantize_per_tensor.tensor2, (LEVELS, *TENSORS, *BOUNDS, torch.int8), {}),
    "choose": (ops.choose_qparams.tensor, (FINITE, -128, 127, 1e-5, torch.int8), {}),
    "choose, all positive": (ops.choose_qparams.tensor, (FINITE.abs(), 0, 255, 1e-5, torch.uint8), {}),
    "choose, symmetric": (ops.choose_qparams_symmetric.tensor, (FINITE, -127, 127, 1e-5, torch.int8), {}),
    "quantize channels": (ops.quantize_per_channel.default, (FINITE, SCALES, ZEROS, 0, -128, 127, torch.int8), {}),
    "quantize channels, f64": (ops.quantize_per_channel.default, (FINITE.T.contiguous(), SCALES.double(), ZEROS.long(), 1, -128, 127, torch.int8), {}),
    "dequantize channels": (ops.dequantize_per_channel.default, (LEVELS, SCALES, ZEROS, 0, -128, 127, torch.int8), {}),
    "dequantize channels, no zero": (ops.dequantize_per_channel.default, (LEVELS, SCALES, None, 0, -128, 127, torch.int8), {"out_dtype": torch.bfloat16}),
    "choose per token": (ops.choose_qparams_per_token.default, (FINITE, torch.int8), {}),
    "choose per token, asymmetric": (ops.choose_qparams_per_token_asymmetric.default, (FINITE, torch.int8), {}),
    "quantize tokens": (ops.quantize_per_token.default, (FINITE, SCALES[:, None].double(), ZEROS[:, None].long(), -128, 127, torch.int8), {}),
    "dequantize tokens": (ops.dequantize_per_token.default, (LEVELS, SCALES[:, None], ZEROS[:, None], -128, 127, torch.int8, torch.float32), {}),
    "quantize groups": (ops.quantize_per_channel_group.default, (FINITE, SCALES.repeat(2).reshape(4, 2), ZEROS.repeat(2).reshape(4, 2), -8, 7, torch.int8, 30), {}),
    "dequantize groups": (ops.dequantize_per_channel_group.default, (LEVELS, SCALES.repeat(2).reshape(4, 2), None, -8, 7, torch.int8, 30, torch.float32), {}),
    "fake quantize channels": (ops.fake_quant_per_channel.default, (FINITE, SCALES, ZEROS, 0, -128, 127), {}),
    "convert": (ops.convert_element_type.no_fuse, (FINITE, torch.bfloat16), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", DECOMPOSED)
def test_quantized_decomposed_ops_have_pytorchs_values(name):
    op, args, kwargs = DECOMPOSED[name]
    _assert_equal(op, *args, **kwargs)


@pytest.mark.parametrize("case", ["f32", "bias", "rows", "fp8", "fp8, scaled"])
def test_scaled_products_have_pytorchs_values(case):
    f8 = torch.float8_e4m3fn
    a, b, two = _t(16, 32).to(f8), _t(8, 32, seed=1).to(f8).t(), torch.tensor(2.0)
    options = {
        "f32": (two, two, None, None, torch.float32), "bias": (two, two, _t(8).bfloat16(), None, torch.bfloat16),
        "rows": (_t(16, 1).abs(), _t(1, 8).abs(), None, None, torch.bfloat16), "fp8": (two, two * 30),
        "fp8, scaled": (two, two, None, two * 30, f8),
    }[case]  # fmt: skip
    expected = torch._scaled_mm(a, b, *options).float()
    (result,) = _results(aten._scaled_mm.default, a, b, *options)
    eps = torch.finfo(result.dtype).eps
    torch.testing.assert_close(result.float(), expected, rtol=max(eps, 1e-5), atol=1e-4)


def test_quantization_aware_training_follows_eager():
    from torch.ao.quantization import get_default_qat_qconfig
    from torch.ao.quantization.fake_quantize import FusedMovingAvgObsFakeQuantize

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 5)
            config = get_default_qat_qconfig("x86")
            self.activation, self.weight = config.activation(), config.weight()
            assert isinstance(self.activation, FusedMovingAvgObsFakeQuantize)

        def forward(self, x):
            weight = self.weight(self.linear.weight)
            return torch.nn.functional.linear(self.activation(x), weight, self.linear.bias)

    def trained(compiled):
        torch.manual_seed(0)
        model = Model()
        run = torch.compile(model, backend="kpx") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            run(_t(4, 6, seed=step)).square().mean().backward()
            optimizer.step()
        return {k: v for k, v in model.state_dict().items() if not k.endswith("enabled")}

    expected, found = trained(False), trained(True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, rtol=1e-4, atol=1e-5)


def test_a_pt2e_style_module_runs_in_int8():
    class Model(torch.nn.Module):
        def forward(self, x, w):
            x = ops.dequantize_per_tensor(
                ops.quantize_per_tensor(x, 0.05, 3, -128, 127, torch.int8), 0.05, 3, -128, 127, torch.int8
            )
            return torch.nn.functional.relu(x @ w)

    x, w = _t(4, 6), _t(6, 3)
    torch.testing.assert_close(kpx.optimize(Model(), config=kpx.Config(measure_seconds=0))(x, w), Model()(x, w))
