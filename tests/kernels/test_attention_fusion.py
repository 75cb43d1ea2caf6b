"""Attention written out: found in JAX and PyTorch, given to a TPU's kernel, and left alone where it is something else."""

import math

import jax
import jax.numpy as jnp
import pytest

import kpx
from kpx.ir.rewrite import Fuel
from kpx.kernels.attention import attention
from kpx.passes.composites import Device
from kpx.pipeline import Context, optimize_module
from tests.optional import torch

LENGTH = 1024
TRITON_CALL = "__gpu$xla.gpu.triton"


def _struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


HEADS_FIRST, HEADS_THIRD = _struct(2, 4, LENGTH, 80), _struct(2, LENGTH, 4, 80)


def _scaled_after(q, k, v):
    scores = q @ jnp.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    return jax.nn.softmax(scores, -1) @ v


def _scaled_before_and_hidden(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * (q.shape[-1] ** -0.5), k).astype(jnp.float32)
    scores = jnp.where(jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool)), scores, -1e9)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def _mask_added(q, k, v):
    position = jnp.arange(q.shape[-2])
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * 0.3
    scores = scores + jnp.where(position[:, None] < position[None], -jnp.inf, 0)
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, -1), v)


def _in_layers(q, k, v):
    def layer(q, _):
        return _scaled_after(q, k, v), None

    return jax.lax.scan(layer, q, None, length=3)[0]


class _Plain(torch.nn.Module):
    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        return torch.softmax(scores, -1) @ v


class _Filled(torch.nn.Module):
    def forward(self, q, k, v):
        length = q.shape[-2]
        seen = torch.tril(torch.ones(length, length, dtype=torch.bool))
        scores = torch.matmul(q * 0.1, k.transpose(-1, -2)).masked_fill(~seen, float("-inf"))
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


class _Whole(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


WRITTEN = {
    "scaled after": (_scaled_after, HEADS_FIRST),
    "scaled before, hidden by where, heads third": (_scaled_before_and_hidden, HEADS_THIRD),
    "a mask added": (_mask_added, HEADS_FIRST),
    "in a loop": (_in_layers, HEADS_FIRST),
    "in float32": (_scaled_after, _struct(2, 4, LENGTH, 64, dtype=jnp.float32)),
    "PyTorch": (_Plain().eval(), HEADS_FIRST),
    "PyTorch, filled": (_Filled().eval(), HEADS_FIRST),
    "PyTorch's own": (_Whole().eval(), HEADS_FIRST),
    "JAX's own": (lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), HEADS_THIRD),
    "JAX's own, grouped heads": (
        lambda q, k, v: jax.nn.dot_product_attention(q, k[:, :, :2], v[:, :, :2], is_causal=True),
        HEADS_THIRD,
    ),
}


def _windowed(q, k, v):
    position = jnp.arange(q.shape[-2])
    seen = (position[:, None] >= position) & (position[:, None] - position < 100)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * 0.1
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(jnp.where(seen, scores, -1e9), -1), v)


def _in_chunks(q, k, v):
    position = jnp.arange(q.shape[-2])
    seen = (position[:, None] >= position) & (position[:, None] // 128 == position // 128)
    scores = jnp.where(seen[None, None], jnp.einsum("bhqd,bhkd->bhqk", q, k) * 0.1, -jnp.inf)
    weights = jax.nn.softmax(scores.astype(jnp.float32), -1).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v)


def _chunks_added(q, k, v):
    chunk = jnp.arange(q.shape[-2]) // 128
    scores = q @ jnp.swapaxes(k, -1, -2) / 8 + jnp.where(chunk[:, None] == chunk, 0, -1e30)
    return jax.nn.softmax(scores, -1).astype(v.dtype) @ v


def _jax_nn_windowed(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, local_window_size=(63, 0))


def _jax_nn_in_chunks(q, k, v):
    chunk = jnp.arange(q.shape[1]) // 128
    return jax.nn.dot_product_attention(q, k, v, mask=(chunk[:, None] == chunk)[None, None])


KNOWN_MASKS = {
    "a window": (_windowed, HEADS_FIRST),
    "chunks": (_in_chunks, HEADS_FIRST),
    "chunks, added": (_chunks_added, HEADS_FIRST),
    "JAX's own, a window": (_jax_nn_windowed, HEADS_THIRD),
    "JAX's own, chunks": (_jax_nn_in_chunks, HEADS_THIRD),
}
WRITTEN |= KNOWN_MASKS

KERNELS = {
    "tpu-v5e": ("splash", "tpu_custom_call"),
    "cuda:h100": ("flash_cuda", TRITON_CALL),
    "rocm:mi300x": ("flash_rocm", TRITON_CALL),
}


def on_each_target(written):
    """Ways of writing attention, with targets; of masks that are known, one target is not slow."""
    return [
        pytest.param(w, t, marks=pytest.mark.slow if w in KNOWN_MASKS and t != "cuda:h100" else ())
        for w in written
        for t in KERNELS
    ]


@pytest.mark.parametrize(("written", "target"), on_each_target(WRITTEN))
def test_attention_becomes_a_kernel_and_never_holds_the_scores(written, target):
    function, spec = WRITTEN[written]
    kernel, custom_call = KERNELS[target]
    compiled = kpx.compile(function, spec, spec, spec, target=target)
    assert compiled.fusions == {"kpx.attention": 1}
    assert compiled.kernels["kpx.attention"].partition(";")[0] == kernel
    assert f'custom_call_target="{custom_call}"' in compiled.hlo
    assert f"{LENGTH},{LENGTH}" not in compiled.hlo


@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e", "tpu-v5p", "cuda:h100", "cuda:b200", "rocm:mi300x"])
def test_at_8192_a_device_holds_less_than_a_hundredth_of_the_scores(target):
    spec = _struct(1, 8, 8192, 128)
    plain, fused = (
        kpx.compile(_scaled_after, spec, spec, spec, target=target, config=kpx.Config(level=level))
        for level in ("conservative", "balanced")
    )
    scores = 2 * 8 * 8192 * 8192
    assert plain.memory.temp_bytes >= scores
    assert fused.memory.temp_bytes < scores / 100


def _padded(q, k, v, lengths):
    seen = jnp.arange(LENGTH) < lengths[:, None]
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * 0.1
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e9), -1)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v)


def _jax_nn_padded(q, k, v, lengths):
    return jax.nn.dot_product_attention(q, k, v, mask=(jnp.arange(LENGTH) < lengths[:, None])[:, None, None])


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize(("function", "spec"), [(_padded, HEADS_FIRST), (_jax_nn_padded, HEADS_THIRD)])
def test_a_mask_of_keys_that_an_input_decides_is_taken_as_it_is(function, spec, target):
    compiled = kpx.compile(function, spec, spec, spec, _struct(2, dtype=jnp.int32), target=target)
    assert compiled.kernels["kpx.attention"].partition(";")[0] == KERNELS[target][0]
    assert f"{LENGTH},{LENGTH}" not in compiled.hlo


LEFT_ALONE = {
    "hidden by little": lambda q, k, v: _with(q, k, v, lambda s: jnp.where(_seen(s), s, -1.0)),
    "hidden the other way": lambda q, k, v: _with(q, k, v, lambda s: jnp.where(_seen(s), -jnp.inf, s)),
    "a bias added": lambda q, k, v: _with(q, k, v, lambda s: s + jnp.arange(s.shape[-1])),
    "capped": lambda q, k, v: _with(q, k, v, jnp.tanh),
    "scores used elsewhere": lambda q, k, v: (_scaled_after(q, k, v), q @ jnp.swapaxes(k, -1, -2) / math.sqrt(80)),
    "over queries": lambda q, k, v: jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2), -2) @ v,
}


def _seen(scores):
    return jnp.tril(jnp.ones(scores.shape[-2:], bool))


def _with(q, k, v, change):
    return jax.nn.softmax(change(q @ jnp.swapaxes(k, -1, -2)), -1).astype(v.dtype) @ v


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_is_left_alone(what):
    compiled = kpx.compile(LEFT_ALONE[what], HEADS_FIRST, HEADS_FIRST, HEADS_FIRST, target="tpu-v5e")
    assert compiled.fusions == {}
    assert "splash" not in compiled.kernels.values()


@pytest.mark.parametrize("shape, says", [
    ((2, 4, 100, 64), "100 queries and 100 keys would become more than 1.25 times the work"), ((2, 4, 128, 512), "heads must be of 256 at most"),
])  # fmt: skip
def test_a_case_that_the_kernel_does_not_support_says_why_and_is_plain(shape, says):
    spec = _struct(*shape)
    compiled = kpx.compile(lambda q, k, v: attention(q, k, v), spec, spec, spec, target="tpu-v5e")
    assert says in compiled.kernels["kpx.attention"]
    assert "splash" not in compiled.kernels.values()


def test_a_device_that_the_table_of_chips_does_not_have_keeps_plain_attention():
    for kind, fusions in (("NVIDIA H100 80GB HBM3", {"kpx.attention": 1}), ("Tesla T4", {})):
        traced = jax.jit(lambda *a: _scaled_after(*a)).trace(HEADS_FIRST, HEADS_FIRST, HEADS_FIRST)
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
        context = Context(Device("cuda", kind, kind != "Tesla T4"), frozenset(), kpx.Config(), Fuel(None))
        optimize_module(module, context)
        assert context.fusions == fusions
