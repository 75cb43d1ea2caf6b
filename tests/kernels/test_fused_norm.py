"""Norms with what comes before and after, and group norms: kernels interpreted against f64, found however written."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels import group_norm, group_norm_gpu, norm, norm_gpu
from tests.optional import torch
from tests.reference import assert_closer

pytest.importorskip("triton")

BF16 = jnp.bfloat16


def _struct(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


ARRAYS = {
    "residual weight": [(9, 96), (96,)],
    "index weight bias": [np.array([[3, 1, -1, 8], [0, 6, 2, 12]], np.int32), (96,), (96,)],
    "weight": [(96,)],
    "residual weight bias scale": [(9, 96), (96,), (96,), np.float32(0.04)],
}


def _given(rng, given, dtype):
    arrays = [rng.standard_normal(a).astype(dtype) if isinstance(a, tuple) else a for a in ARRAYS[given]]
    return [rng.standard_normal((9, 96)).astype(dtype), *arrays]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("given", "options"), [
    ("residual weight", {"total": True}), ("index weight bias", {}), ("index weight bias", {"total": True, "fill": True}),
    ("weight", {"out": "int8"}), ("residual weight", {"out": "int8", "total": True}),
    ("residual weight bias scale", {"out": "int8"}),
], ids=str)  # fmt: skip
def test_the_kernel_interpreted_is_the_norm(given, options, dtype, centred):
    arrays = _given(np.random.default_rng(0), given, dtype)
    arrays[0][2] = 0  # a row that has no scale of its own
    attributes = {"eps": 1e-3, "centred": centred, "given": given, **options}
    plain = functools.partial(norm.fused_norm_kernel.decomposition, **attributes)
    found = norm_gpu.fused_norm(*arrays, platform="cuda", **attributes)
    other = jax.jit(plain)(*arrays)
    with jax.enable_x64(True):
        exact = jax.jit(plain)(*(a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays))
    for made, theirs, wanted in zip(found, other, exact, strict=True):
        assert made.dtype == theirs.dtype
        assert_closer(made, theirs, wanted, relative=4e-6 if dtype == np.float32 else 1e-3)


def test_rounding_is_to_even_and_numbers_are_bounded():
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0, 126.5]], np.float32)
    root = np.sqrt(np.mean(x * x))
    attributes = {"eps": 0.0, "centred": False, "given": "weight scale", "out": "int8"}
    weight = np.full(8, root, np.float32)
    for form in (norm.fused_norm_kernel.decomposition, functools.partial(norm_gpu.fused_norm, platform="cuda")):
        (found,) = form(x, weight, np.float32(1), **attributes)
        assert np.asarray(found).tolist() == [[0, 2, 2, 0, -2, 127, -127, 126]]


def test_f8_is_rounded_as_ml_dtypes_rounds_it():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 64)).astype(np.float32), rng.standard_normal(64).astype(np.float32)
    found, scale = kpx.ops.rms_norm(x, w, dtype=jnp.float8_e4m3fn)
    y = np.asarray(kpx.ops.rms_norm(x, w))
    np.testing.assert_allclose(scale, np.abs(y).max(-1, keepdims=True) / 448, rtol=1e-6)
    wanted = np.clip(y / np.asarray(scale), -448, 448).astype(jnp.float8_e4m3fn).astype(np.float32)
    assert np.mean(np.asarray(found).astype(np.float32) != wanted) < 0.01  # where a quotient's last bit decides


def test_gradients_of_a_norm_with_a_sum_and_an_index_are_those_of_plain_jax():
    rng = np.random.default_rng(0)
    x, r, w = (rng.standard_normal(s) for s in ((4, 16), (4, 16), (16,)))
    index = np.array([3, 0, 3])

    def ours(x, r, w):
        y, total = kpx.ops.rms_norm(x, w, residual=r)
        return jnp.sum(jnp.sin(y) * total) + jnp.sum(jnp.sin(kpx.ops.layer_norm(x, w, index=index)))

    def plain(x, r, w):
        return jnp.sum(jnp.sin(kpx.ops.rms_norm(x + r, w)) * (x + r)) + jnp.sum(
            jnp.sin(kpx.ops.layer_norm(x[index], w))
        )

    with jax.enable_x64(True):
        for found, wanted in zip(*(jax.grad(f, (0, 1, 2))(x, r, w) for f in (ours, plain)), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


REFUSED = {
    "given a residual": {"residual": np.ones((2, 4), np.float32)},
    "given an index of float32": {"index": np.ones(3, np.float32)},
    "may be quantized to int8": {"dtype": jnp.int32},
    "a scale that is not one number": {"scale": 0.5},
    "of the last one alone": {"axes": 2, "dtype": jnp.int8},
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_go_with_a_norm_is_refused(says):
    with pytest.raises(kpx.InputError, match=says):
        kpx.ops.rms_norm(jnp.ones((3, 4)), **REFUSED[says])


# Found --------------------------------------------------------------------------------------------


def _rms(x, w):
    wide = x.astype(jnp.float32)
    return w * (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def _layer_in_f32(x, w):
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) * w.astype(jnp.float32)


def _by_row(normalized, dtype, largest):
    def function(x, r, w):
        y = normalized(x + r, w).astype(jnp.float32)
        scale = jnp.max(jnp.abs(y), -1, keepdims=True) / largest
        y = y / scale
        return (jnp.round(y) if dtype == jnp.int8 else y).astype(dtype), scale, x + r

    return function


def _by_one(x, s, w):
    return jnp.clip(_layer_in_f32(x, w) / s, -448, 448).astype(jnp.float8_e4m3fn)


X, W, S, IDS = _struct(4, 512, 1024), _struct(1024), _struct(dtype=jnp.float32), _struct(4, 512, dtype=jnp.int32)
WRITTEN = {
    "int8 by row": (_by_row(_rms, jnp.int8, 127), (X, X, W), {"kpx.add_norm_i8_by_row": 1}),
    "f8 by row": (_by_row(_layer_in_f32, jnp.float8_e4m3fn, 448), (X, X, W), {"kpx.add_norm_f8E4M3FN_by_row": 1}),
    "f8 by one": (_by_one, (X, S, W), {"kpx.norm_f8E4M3FN": 1}),
    "rows of a table": (lambda t, i, w: (_rms(t[i], w), t[i]), (_struct(999, 1024), IDS, W), {"kpx.embed_norm": 1}),
    "kpx's": (lambda x, r, w: kpx.ops.rms_norm(x, w, residual=r, dtype=jnp.int8), (X, X, W), {"kpx.fused_norm": 1}),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_a_norm_with_what_is_around_it_is_one_kernel(written):
    function, specs, fusions = WRITTEN[written]
    compiled = kpx.compile(function, *specs, target="cuda:h100")
    assert compiled.fusions == fusions
    assert compiled.kernels["kpx.fused_norm"] == "fused_norm_cuda"
    assert compiled.hlo.count('custom_call_target="__gpu$xla.gpu.triton"') == 1


def test_on_amds_gpus_a_sum_and_a_norm_are_one_kernel_that_moves_less():
    def add(x, r, w):
        return _rms(x + r, w), x + r

    plain = kpx.compile(add, X, X, W, target="rocm:mi300x", config=kpx.Config(level="conservative"))
    fused = kpx.compile(add, X, X, W, target="rocm:mi300x")
    assert fused.fusions == {"kpx.add_norm": 1}
    assert fused.cost.bytes < 0.7 * plain.cost.bytes
    assert kpx.compile(add, X, X, W, target="cuda:h100").fusions == {}


def test_pytorchs_embedding_and_norm_are_found():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = torch.nn.Embedding(999, 1024), torch.nn.RMSNorm(1024, eps=1e-6)

        def forward(self, ids):
            x = self.table(ids)
            return x + torch.tanh(self.norm(x))

    model = Model().eval().to(torch.bfloat16)
    compiled = kpx.compile(model, torch.zeros((4, 512), dtype=torch.int64), target="cuda:h100")
    assert compiled.fusions["kpx.embed_norm"] == 1


def test_a_case_that_the_kernel_does_not_take_says_why():
    def f8(x, w):
        return kpx.ops.rms_norm(x, w, dtype=jnp.float8_e4m3fn)

    for target, says in (("rocm:mi300x", "it quantizes to int8 on rocm"), ("cuda:a100", "an A100 converts to no f8")):
        assert says in kpx.compile(f8, X, W, target=target).kernels["kpx.fused_norm"]


# Group norms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 7, 24), -1), ((2, 24, 5, 7), 1), ((1, 300, 24), -1)])
def test_the_group_norm_kernel_interpreted_is_the_norm_and_its_gradient(shape, axis, silu):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) * 3 + at for s, at in ((shape, 20), ((24,), 1), ((24,), 0))]
    attributes = {"groups": 8, "eps": 1e-5, "axis": axis, "silu": silu}

    def both(function, given):
        out, pull = jax.vjp(functools.partial(function, **attributes), *given)
        return out, *pull(jnp.cos(out))

    narrow = [a.astype(np.float32) for a in arrays]
    plain = group_norm.group_norm_kernel.decomposition
    found, other = both(group_norm_gpu.group_norm, narrow), both(plain, narrow)
    with jax.enable_x64(True):
        exact = both(plain, [a.astype(np.float64) for a in narrow])
    for made, theirs, wanted in zip(found, other, exact, strict=True):
        assert_closer(made, theirs, wanted, relative=5e-6)


class _Flax(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.silu(nn.GroupNorm(32, dtype=BF16, param_dtype=BF16)(x))


def test_flaxs_and_pytorchs_group_norms_are_found_with_their_silu():
    image = _struct(4, 64, 64, 320)
    variables = jax.eval_shape(_Flax().init, jax.random.key(0), image)
    compiled = kpx.compile(lambda v, x: _Flax().apply(v, x), variables, image, target="cuda:h100")
    assert compiled.fusions == {"kpx.group_norm": 1}
    assert compiled.kernels == {"kpx.group_norm": "group_norm_cuda"}
    model = torch.nn.Sequential(torch.nn.GroupNorm(32, 64), torch.nn.SiLU()).eval().to(torch.bfloat16)
    assert kpx.compile(model, torch.zeros(2, 64, 64, 64, dtype=torch.bfloat16), target="cuda:b200").fusions == {
        "kpx.group_norm": 1
    }


def test_a_group_norm_moves_a_quarter_of_the_bytes():
    def written(x, w, b):
        return jax.nn.silu(group_norm.by_groups(x, 32, 1e-5, -1) * w + b).astype(x.dtype)

    specs = _struct(4, 64, 64, 320), _struct(320), _struct(320)
    plain = kpx.compile(written, *specs, target="cuda:h100", config=kpx.Config(level="conservative"))
    fused = kpx.compile(lambda x, w, b: kpx.ops.group_norm(x, 32, w, b, activation="silu"), *specs, target="cuda:h100")
    assert fused.cost.bytes < 0.3 * plain.cost.bytes


GROUPS_REFUSED = {
    "Groups divide the channels": lambda x: kpx.ops.group_norm(x, 5),
    "given a weight": lambda x: kpx.ops.group_norm(x, 4, jnp.ones(3)),
    "axis=2": lambda x: kpx.ops.group_norm(x, 4, axis=2),
    "There are none, silu": lambda x: kpx.ops.group_norm(x, 4, activation="gelu"),
}


@pytest.mark.parametrize("says", GROUPS_REFUSED)
def test_what_does_not_go_with_a_group_norm_is_refused(says):
    with pytest.raises(kpx.InputError, match=says):
        GROUPS_REFUSED[says](jnp.ones((2, 3, 8)))
