"""ATen's ops that move, make or join data without computing on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch

from kpx.bridges.torch import checks
from kpx.bridges.torch.aten.special import cast
from kpx.bridges.torch.dtypes import promote, to_jax, to_torch
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers, memory_layout

# Views -----------------------------------------------------------------------------------------


@lowers(aten.view.default, aten.view_copy.default, aten.reshape.default, aten._unsafe_view.default)
def view(x, size):
    return jnp.reshape(x, size)


@lowers(aten.flatten.using_ints)
def flatten(x, start_dim=0, end_dim=-1):
    if not x.ndim:
        return x.reshape(1)
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


@lowers(aten.permute.default)
def permute(x, dims):
    return jnp.transpose(x, [d % x.ndim for d in dims])


@lowers(aten.transpose.int)
def transpose(x, dim0, dim1):
    return jnp.swapaxes(x, dim0, dim1) if x.ndim else x


@lowers(aten.t.default)
def t(x):
    return x.T


@lowers(aten.unsqueeze.default)
def unsqueeze(x, dim):
    return jnp.expand_dims(x, dim % (x.ndim + 1))


@lowers(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(x, dim):
    dims = [d % max(x.ndim, 1) for d in ([dim] if isinstance(dim, int) else dim)]
    return jnp.squeeze(x, [d for d in dims if x.ndim and x.shape[d] == 1])


@lowers(aten.squeeze.default)
def squeeze_all(x):
    return jnp.squeeze(x)


@lowers(aten.expand.default)
def expand(x, size, *, implicit=False):
    size = list(size)
    offset = len(size) - x.ndim
    shape = [x.shape[i - offset] if s == -1 else s for i, s in enumerate(size)]
    return jnp.broadcast_to(x, shape)


@lowers(aten.select.int)
def select(x, dim, index):
    """`index` may be a value that is known only as the program runs: `x[:, i.item()]`."""
    dim %= x.ndim
    if isinstance(index, jax.Array):
        checks.in_range(index, -x.shape[dim], x.shape[dim], dim)
        return jnp.take(x, index, dim, mode="fill")
    return jax.lax.index_in_dim(x, index % x.shape[dim], dim, keepdims=False)


@lowers(aten.slice.Tensor)
def slice_(x, dim=0, start=None, end=None, step=1):
    dim %= x.ndim
    start, end, _ = slice(start, end).indices(x.shape[dim])
    return jax.lax.slice_in_dim(x, start, max(start, end), step, dim)


@lowers(aten.split.Tensor)
def split(x, split_size, dim=0):
    dim %= x.ndim
    length = x.shape[dim]
    starts = range(0, max(length, 1), split_size or 1)
    return tuple(jax.lax.slice_in_dim(x, s, min(s + split_size, length), 1, dim) for s in starts)


@lowers(aten.split_with_sizes.default)
def split_with_sizes(x, split_sizes, dim=0):
    dim %= x.ndim
    parts, start = [], 0
    for size in split_sizes:
        parts.append(jax.lax.slice_in_dim(x, start, start + size, 1, dim))
        start += size
    return tuple(parts)


@lowers(aten.chunk.default)
def chunk(x, chunks, dim=0):
    return split(x, -(-x.shape[dim] // chunks), dim)


@lowers(aten.unbind.int)
def unbind(x, dim=0):
    return tuple(select(x, dim, i) for i in range(x.shape[dim]))


# Joining and repeating -------------------------------------------------------------------------


@lowers(aten.cat.default)
def cat(tensors, dim=0):
    # PyTorch ignores empty 1-d tensors here, whatever the rank of the others.
    kept = [a for a in tensors if a.shape != (0,)] or tensors[:1]
    dtypes = promote(*(jnp.zeros((1,) * bool(a.ndim), a.dtype) for a in tensors))
    return jnp.concatenate([a.astype(dtypes[0].dtype) for a in kept], dim % kept[0].ndim)


@lowers(aten.stack.default)
def stack(tensors, dim=0):
    return jnp.stack(promote(*tensors), dim)


@lowers(aten.repeat.default)
def repeat(x, repeats):
    return jnp.tile(x, repeats)


@lowers(aten.flip.default)
def flip(x, dims):
    return jnp.flip(x, dims) if x.ndim else x


@lowers(aten.roll.default)
def roll(x, shifts, dims=()):
    return jnp.roll(x, shifts, dims or None) if x.ndim else x


@lowers(aten.constant_pad_nd.default)
def constant_pad_nd(x, pad, value=0):
    pairs = [(pad[i], pad[i + 1], 0) for i in range(0, len(pad), 2)]
    config = [(0, 0, 0)] * (x.ndim - len(pairs)) + pairs[::-1]
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), config)


@lowers(aten.tril.default)
def tril(x, diagonal=0):
    return jnp.tril(x, diagonal)


@lowers(aten.triu.default)
def triu(x, diagonal=0):
    return jnp.triu(x, diagonal)


# Making ----------------------------------------------------------------------------------------


def _factory_dtype(dtype, *values):
    if dtype is not None:
        return to_jax(dtype)
    if all(isinstance(v, bool) for v in values):
        return jnp.bool_
    return jnp.int64 if all(isinstance(v, int) for v in values) else jnp.float32


@lowers(aten.full.default)
def full(size, fill_value, *, dtype=None, layout=None, device=None, pin_memory=None):
    return jnp.full(size, fill_value, _factory_dtype(dtype, fill_value))


@lowers(aten.full_like.default)
def full_like(x, fill_value, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return jnp.full(x.shape, fill_value, x.dtype if dtype is None else to_jax(dtype))


@lowers(aten.zeros.default)
def zeros(size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return jnp.zeros(size, _factory_dtype(dtype, 0.0))


@lowers(aten.ones.default)
def ones(size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return jnp.ones(size, _factory_dtype(dtype, 1.0))


@lowers(aten.zeros_like.default)
def zeros_like(x, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return full_like(x, 0, dtype=dtype)


@lowers(aten.ones_like.default)
def ones_like(x, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return full_like(x, 1, dtype=dtype)


@lowers(aten.scalar_tensor.default)
def scalar_tensor(value, *, dtype=None, layout=None, device=None, pin_memory=None):
    return jnp.asarray(value, jnp.float32 if dtype is None else to_jax(dtype))


@lowers(aten.arange.start_step)
def arange(start, end, step=1, *, dtype=None, layout=None, device=None, pin_memory=None):
    dtype = jnp.dtype(_factory_dtype(dtype, start, end, step))
    if not jnp.issubdtype(dtype, jnp.integer):
        return jnp.arange(start, end, step, dtype)
    # PyTorch drops the fractions of what it steps by; whether before it counts int64's steps depends on its version.
    count = torch.arange(start, end, step, dtype=to_torch(dtype), device="meta").numel()
    return int(start) + int(step) * jnp.arange(count, dtype=dtype)


@lowers(aten.arange.default)
def arange_end(end, **options):
    return arange(0, end, **options)


@lowers(aten.arange.start)
def arange_start(start, end, **options):
    return arange(start, end, **options)


@lowers(aten.linspace.default, aten.linspace.Tensor_Tensor, aten.linspace.Tensor_Scalar, aten.linspace.Scalar_Tensor)
def linspace(start, end, steps, *, dtype=None, layout=None, device=None, pin_memory=None):
    """From either end, whichever is nearer."""
    if dtype is None:
        is_complex = any(jnp.issubdtype(jnp.asarray(v).dtype, jnp.complexfloating) for v in (start, end))
        dtype = torch.complex64 if is_complex else torch.float32
    dtype = jnp.dtype(to_jax(dtype))
    integral = jnp.issubdtype(dtype, jnp.integer)
    if steps <= 1:
        return jnp.full((steps,), cast(jnp.asarray(start), dtype))
    # Integers are stepped through in double precision.
    start, end = (cast(cast(jnp.asarray(v), dtype), jnp.float64 if integral else dtype) for v in (start, end))
    i, distance = jnp.arange(steps), end - start
    # By a constant, XLA would multiply by its reciprocal, which rounds twice.
    step = distance / jnp.where(jnp.isnan(distance), 1, steps - 1).astype(start.dtype)
    up, down = (n.astype(start.dtype) for n in (i, steps - 1 - i))
    if integral:
        # PyTorch multiplies and adds in one rounding: here by halves of the step, whose products are exact.
        spread = step * (2.0**27 + 1)
        high = spread - (spread - step)
        upward = (start + high * up) + (step - high) * up
        downward = (end - high * down) - (step - high) * down
    else:
        upward, downward = start + step * up, end - step * down
    return cast(jnp.where(i < steps // 2, upward, downward), dtype)


# Memory that nobody wrote yet is zeros here.


@lowers(aten.empty.memory_format)
def empty(size, *, dtype=None, memory_format=None):
    return jnp.zeros(size, _factory_dtype(dtype, 0.0))


@lowers(aten.empty_permuted.default)
def empty_permuted(size, physical_layout, *, dtype=None):
    return jnp.zeros(size, _factory_dtype(dtype, 0.0))


@lowers(aten.copy.default)
def copy(x, src, non_blocking=False):
    return jnp.broadcast_to(cast(src, x.dtype), x.shape)


# Sizes -----------------------------------------------------------------------------------------


@lowers(aten.sym_size.int)
def sym_size(x, dim):
    return x.shape[dim]


@lowers(aten.sym_numel.default)
def sym_numel(x):
    return x.size


@lowers(aten.sym_stride.int)
def sym_stride(x, dim):
    return memory_layout(0, x.shape)[1][dim % x.ndim]


@lowers(aten.sym_storage_offset.default)
def sym_storage_offset(x):
    return memory_layout(0, x.shape)[0]


# Values in Python ------------------------------------------------------------------------------


@lowers(aten._local_scalar_dense.default)
def item(x):
    """A value that the graph computes with. Where it decides a shape, the op that needs it says so."""
    return x.reshape(())


@lowers(aten._assert_scalar.default, aten._assert_async.msg)
def assert_holds(condition, message):
    """PyTorch's own run-time assertions, `torch._check` say."""
    if isinstance(condition, bool):
        if not condition:
            raise ValueError(message)
        return
    checks.holds(jnp.all(condition != 0), message, "RuntimeError")


@lowers(aten._functional_assert_async.msg)
def functional_assert(condition, message, token):
    assert_holds(condition, message)
    return token
