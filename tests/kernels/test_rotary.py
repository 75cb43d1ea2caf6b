"""Rotary embedding: the TPU's kernel interpreted against f64, and found however written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels import rotary, rotary_tpu
from tests.reference import assert_closer


@pytest.mark.parametrize("angles", [(48, 128), (2, 1, 48, 128), (1, 1, 48, 128)], ids=str)
def test_the_kernel_interpreted_is_the_embedding_and_its_gradient(angles):
    rng = np.random.default_rng(0)
    x, angle = rng.standard_normal((2, 3, 48, 128)), rng.standard_normal(angles)
    arrays = [x, np.cos(angle), np.sin(angle)]

    def both(function, given):
        out, pull = jax.vjp(function, *given)
        return out, *pull(jnp.cos(out))

    narrow = [a.astype(np.float32) for a in arrays]
    plain = rotary.rotary_kernel.decomposition
    found = both(lambda *a: rotary_tpu.rotary_pallas(*a, interpret=True), narrow)
    other = both(plain, narrow)
    with jax.enable_x64(True):
        exact = both(plain, [a.astype(np.float64) for a in narrow])
    for made, theirs, wanted in zip(found, other, exact, strict=True):
        assert_closer(made, theirs, wanted, relative=2e-6)


def _sliced(x, cos, sin):
    return x * cos + jnp.concatenate([-x[..., 64:], x[..., :64]], -1) * sin


def _in_f32(x, cos, sin):
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([-second, first], -1)
    return (turned * sin + x.astype(jnp.float32) * cos).astype(x.dtype)


def _struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


X, SHARED, OF_BATCHES = _struct(4, 8, 1024, 128), _struct(1024, 128), _struct(4, 1024, 128)
WRITTEN = {
    "by slices": (_sliced, SHARED),
    "in f32": (_in_f32, SHARED),
    "angles of each batch": (lambda x, c, s: _sliced(x, c[:, None], s[:, None]), OF_BATCHES),
    "kpx's": (kpx.ops.rotary, SHARED),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_it_is_found_however_written_and_moves_less(written):
    function, angles = WRITTEN[written]
    plain = kpx.compile(function, X, angles, angles, target="tpu-v5e", config=kpx.Config(kernels={"kpx.rotary": "xla"}))
    fused = kpx.compile(function, X, angles, angles, target="tpu-v5e")
    assert fused.kernels["kpx.rotary"] == "rotary_pallas"
    assert fused.fusions == {"kpx.rotary": 1}
    assert fused.cost.bytes < 0.75 * plain.cost.bytes


def test_where_xla_moves_as_little_it_is_left_alone():
    def step(x, cos, sin, w):
        return jax.grad(lambda x, w: jnp.sum((_sliced(x, cos, sin) @ w).astype(jnp.float32) ** 2), (0, 1))(x, w)

    assert "kpx.rotary" not in kpx.compile(_sliced, X, SHARED, SHARED, target="cuda:h100").fusions
    assert kpx.compile(step, X, SHARED, SHARED, _struct(128, 128), target="tpu-v5e").fusions == {}


def test_a_case_that_the_kernel_does_not_take_says_why():
    x, angles = _struct(4, 8, 1024, 64), _struct(1024, 64)
    compiled = kpx.compile(kpx.ops.rotary, x, angles, angles, target="tpu-v5e")
    assert "sizes must be 128" in compiled.kernels["kpx.rotary"]


REFUSED = {
    "the size even": ((4, 5), (4, 5)),
    "broadcast to the array": ((4, 6), (3, 6)),
    "cosines and sines alike": ((4, 6), (2, 4, 6)),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_go_together_is_refused(says):
    x, angles = (jnp.ones(shape) for shape in REFUSED[says])
    with pytest.raises(kpx.InputError, match=says):
        kpx.ops.rotary(x, angles, angles)
