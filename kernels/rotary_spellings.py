"""What rotary position embedding is recognised by: transformers', with a half turned, and by halves."""

from __future__ import annotations

import jax.numpy as jnp

from kpx.kernels.patterns import builtin
from kpx.kernels.rotary import rotary_kernel, rotated_half


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sliced_half(x):
    half = x.shape[-1] // 2
    return jnp.concatenate([-x[..., half:], x[..., :half]], -1)


def _forms(half):
    """In the array's dtype, and in f32 until the end."""

    def turned(x, cos, sin):
        return x * cos + half(x) * sin

    def turned_wide(x, cos, sin):
        return turned(*map(_wide, (x, cos, sin))).astype(x.dtype)

    return turned, turned_wide


def _of_batches(form):
    return lambda x, cos, sin: form(x, cos[:, None], sin[:, None])


def _supports(x, cos, sin) -> str | None:
    if x.shape[-1] % 2 or cos.shape != sin.shape or cos.shape[-2:] != x.shape[-2:] or cos.shape[-3:] == x.shape[-3:]:
        return f"angles of {cos.shape} and {sin.shape} for {x.shape}"
    return None


# By what angles are of: all batches and heads, or each batch. Heads come before positions.
for _name, _angles, _placed in (
    ("shared", (6, 8), lambda form: form),
    ("kept", (1, 1, 6, 8), lambda form: form),
    ("by_batch", (2, 6, 8), _of_batches),
):
    builtin(
        f"rotary.{_name}",
        [tuple(map(_placed, _forms(rotated_half)))],
        _placed(rotary_kernel),
        [((2, 3, 6, 8), jnp.bfloat16), (_angles, jnp.bfloat16), (_angles, jnp.bfloat16)],
        _supports,
        differentiated=[tuple(map(_placed, _forms(_sliced_half)))],
        constant=(1, 2),
        fixed_ranks=True,
        alike="rotary",
        platforms=("tpu", "cpu"),
        inference_alone=True,  # in a training step XLA moves as little
        among=("negate",),
    )
