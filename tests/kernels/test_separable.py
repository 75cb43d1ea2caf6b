"""The depthwise-separable block: its kernel interpreted against f64, found in Flax and PyTorch, used by name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels import separable, separable_gpu
from tests.optional import torch
from tests.reference import assert_closer

pytest.importorskip("triton")

BF16 = jnp.bfloat16
NAMED = kpx.Config(kernels={"kpx.separable_conv": "separable_cuda"})


@pytest.mark.parametrize(
    ("stride", "activation", "window"), [(1, "relu6", 3), (2, "silu", 3), (2, "relu", 5), (1, "none", 1)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_kernel_interpreted_is_the_block_and_its_gradient(stride, activation, window, dtype):
    rng = np.random.default_rng(0)
    shapes = (2, 9, 7, 20), (window, window, 20), (20,), (20,), (20, 24)
    arrays = [(rng.standard_normal(s) / (3 if len(s) == 2 else 1)).astype(dtype) for s in shapes]
    pads = {"top": window // 2, "bottom": window // 2, "left": window // 2, "right": 0}
    attributes = {"stride": stride, "activation": activation, **pads}
    plain = functools.partial(separable.separable_kernel.decomposition, **attributes)

    def both(function, given):
        out, pull = jax.vjp(function, *given)
        return out, *pull(jnp.ones_like(out))

    found = both(functools.partial(separable_gpu.separable, platform="cuda", **attributes), arrays)
    other = both(plain, arrays)
    with jax.enable_x64(True):
        exact = both(plain, [a.astype(np.float64) for a in arrays])
    for made, theirs, wanted in zip(found, other, exact, strict=True):
        assert made.dtype == dtype
        assert_closer(made, theirs, wanted, relative=5e-6 if dtype == np.float32 else 2e-3)


class _Flax(nn.Module):
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        strides = (self.stride,) * 2
        x = nn.Conv(64, (3, 3), strides, feature_group_count=64, use_bias=False, dtype=BF16, param_dtype=BF16)(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=True, dtype=BF16)(x))
        return nn.Conv(128, (1, 1), use_bias=False, dtype=BF16, param_dtype=BF16)(x)


def _torch(stride: int):
    first = torch.nn.Conv2d(64, 64, 3, stride=stride, padding=1, groups=64, bias=False)
    layers = first, torch.nn.BatchNorm2d(64), torch.nn.ReLU6(), torch.nn.Conv2d(64, 128, 1, bias=False)
    return torch.nn.Sequential(*layers).eval().to(torch.bfloat16)


@pytest.mark.parametrize("stride", [1, 2])
def test_flaxs_and_pytorchs_blocks_are_one_kernel_by_name(stride):
    image = jax.ShapeDtypeStruct((4, 32, 32, 64), BF16)
    model = _Flax(stride)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    forms = {
        "flax": (lambda v, x: model.apply(v, x), (variables, image)),
        "torch": (_torch(stride), (torch.zeros(4, 64, 32, 32, dtype=torch.bfloat16),)),
    }
    for function, arrays in forms.values():
        plain = kpx.compile(function, *arrays, target="cuda:h100")
        fused = kpx.compile(function, *arrays, target="cuda:h100", config=NAMED)
        assert plain.fusions == {}
        assert fused.fusions == {"kpx.separable_conv": 1}
        assert fused.cost.bytes < 0.6 * plain.cost.bytes


def test_a_whole_convolution_is_not_taken_for_a_depthwise_one():
    def whole(x, w, p):
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_general_dilated(
            jnp.maximum(y, 0), p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = (2, 16, 16, 32), (3, 3, 32, 32), (1, 1, 32, 64)
    specs = [jax.ShapeDtypeStruct(s, BF16) for s in shapes]
    assert kpx.compile(whole, *specs, target="cuda:h100", config=NAMED).fusions == {}


REFUSED = {
    "They are `\\[batch, height": lambda x: kpx.ops.separable_conv(x, jnp.ones((3, 3, 4)), jnp.ones((8, 2))),
    "All are one floating dtype": lambda x: kpx.ops.separable_conv(x, jnp.ones((3, 3, 8)), jnp.ones((8, 2), BF16)),
    "given a shift": lambda x: kpx.ops.separable_conv(x, jnp.ones((3, 3, 8)), jnp.ones((8, 2)), shift=jnp.ones(3)),
    "stride is 1 or more": lambda x: kpx.ops.separable_conv(x, jnp.ones((3, 3, 8)), jnp.ones((8, 2)), stride=0),
    "padding='FULL'": lambda x: kpx.ops.separable_conv(x, jnp.ones((3, 3, 8)), jnp.ones((8, 2)), padding="FULL"),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_go_together_is_refused(says):
    with pytest.raises(kpx.InputError, match=says):
        REFUSED[says](jnp.ones((1, 5, 5, 8)))
