"""ATen's gathers, and embeddings.

A compiled program cannot raise as it runs: it gives, besides its results, whether an index was out of range, and the
caller raises PyTorch's error. Under a JAX transformation nobody looks: there such an index reads NaN (or the
smallest integer), so that it cannot look right.
"""

from __future__ import annotations

import jax.numpy as jnp

from kpx.bridges.torch import checks
from kpx.bridges.torch.aten.common import axis, sum_dtype
from kpx.bridges.torch.aten.scatter import accumulated
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers
from kpx.errors import UnsupportedError


@lowers(aten.embedding.default)
def embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    checks.in_range(indices, 0, weight.shape[0], 0)
    return weight.at[indices].get(mode="fill", wrap_negative_indices=False)


def _key(x, indices):
    """A NumPy key for a list of index tensors with holes, checked."""
    key = []
    for i in indices:
        if i is None:
            key.append(slice(None))
            continue
        if i.dtype in (jnp.bool_, jnp.uint8):
            raise UnsupportedError(
                "A tensor is indexed by a mask, so that its shape depends on values, and a compiled program's shapes are "
                "fixed. Use `torch.where(mask, x, other)`, or multiply by the mask."
            )
        dim = len(key)
        checks.in_range(i, -x.shape[dim], x.shape[dim], dim)
        key.append(i)
    return tuple(key)


@lowers(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(x, indices):
    return x.at[_key(x, indices)].get(mode="fill")


@lowers(aten.index_select.default)
def index_select(x, dim, indices):
    if not x.ndim:
        return x
    dim = axis(x, dim)
    checks.in_range(indices, 0, x.shape[dim], dim)
    return jnp.take(x, indices.reshape(-1), dim, mode="fill")


@lowers(aten.gather.default)
def gather(x, dim, indices, *, sparse_grad=False):
    if not x.ndim:
        return jnp.broadcast_to(x, indices.shape)
    if not indices.size:
        return jnp.zeros(indices.shape, x.dtype)
    if not indices.ndim:
        return gather(x, dim, indices[None])[0]
    dim = axis(x, dim)
    checks.in_range(indices, 0, x.shape[dim], dim)
    kept = tuple(slice(n) if d != dim else slice(None) for d, n in enumerate(indices.shape))
    return jnp.take_along_axis(x[kept], indices, dim, mode="fill")


@lowers(aten.index_put.default, aten._unsafe_index_put.default, aten._index_put_impl.default)
def index_put(x, indices, values, accumulate=False, unsafe=False):
    values = values.astype(x.dtype)
    if any(i is not None and i.dtype in (jnp.bool_, jnp.uint8) for i in indices):
        return _put_where(x, indices, values, accumulate)
    at = x.at[_key(x, indices)]
    return accumulated(at, "add" if accumulate else "set", values, x.dtype)


def _put_where(x, indices, values, accumulate):
    """Writes where masks hold, among other indices too.

    A mask stands for the positions where it holds, in order: a last dimension of the index, whose length is a value. It is
    the length of another index or of `values` where they have one, which is checked as the program runs, and else as
    many positions as a mask has elements, of which the surplus is dropped.
    """
    masks = [i.astype(bool) for i in indices if i is not None and i.dtype in (jnp.bool_, jnp.uint8)]
    others = [i for i in indices if i is not None and i.dtype not in (jnp.bool_, jnp.uint8)]
    if len(masks) == 1 and not others and (written := _selected(x, indices, masks[0], values, accumulate)) is not None:
        return written
    if not all(mask.ndim for mask in masks):
        raise NotImplementedError("a mask without dimensions beside other indices")
    count = _common_count(masks)
    length = next((i.shape[-1] for i in others if i.ndim and i.shape[-1] != 1), None)
    if length is not None:
        message = f"a mask does not select 1 or {length} elements, as the index beside it has"
        checks.holds((count == length) | (count == 1), message, "IndexError")
    elif (length := _listed_values(x, indices, values)) is not None:
        checks.holds(count == length, f"a mask does not select the {length} elements that are written", "RuntimeError")
    bound = max(mask.size for mask in masks) if length is None else length
    key: list = []
    for i in indices:
        if i is None:
            key.append(slice(None))
        elif i.dtype in (jnp.bool_, jnp.uint8):
            key += _positions(i.astype(bool), bound, count if length is None else bound)
        else:
            checks.in_range(i, -x.shape[len(key)], x.shape[len(key)], len(key))
            key.append(i)
    at = x.at[tuple(key)]
    return accumulated(at, "add" if accumulate else "set", values, x.dtype, mode="drop")


def _common_count(masks):
    """How many elements masks select side by side: the same number each, or one."""
    count = jnp.sum(masks[0])
    for mask in masks[1:]:
        other = jnp.sum(mask)
        message = "masks select different numbers of elements"
        checks.holds((count == other) | (count == 1) | (other == 1), message, "IndexError")
        count = jnp.where(count == 1, other, count)
    return count


def _positions(mask, bound, count):
    """`bound` positions where a mask holds, by dimension, those from `count` on out of range.

    A mask that holds once stands for that position throughout.
    """
    places = jnp.nonzero(mask, size=bound, fill_value=0)
    once, surplus = jnp.sum(mask) == 1, jnp.arange(bound) >= count
    return [jnp.where(surplus, n, jnp.where(once, p[:1], p)) for p, n in zip(places, mask.shape, strict=True)]


def _listed_values(x, indices, values):
    """How many values are given along the index's last dimension; None where there is one for all."""
    dims, indexed = 0, []
    for i in indices:
        width = i.ndim if i is not None and i.dtype in (jnp.bool_, jnp.uint8) else 1
        indexed += [] if i is None else range(dims, dims + width)
        dims += width
    # Indexed dimensions that are not side by side are the first ones of the result.
    in_front = indexed != list(range(indexed[0], indexed[-1] + 1))
    behind = x.ndim - len(indexed) - (0 if in_front else indexed[0])
    position = values.ndim - behind - 1
    return None if position < 0 or values.shape[position] == 1 else values.shape[position]


def _selected(x, indices, mask, values, accumulate):
    """Indexing by one mask, as a selection; None where its values are a list in an order of their own."""
    lead = next(d for d, i in enumerate(indices) if i is not None)
    rest = x.ndim - lead - mask.ndim
    shaped = mask.reshape(*[1] * lead, *mask.shape, *[1] * rest)
    if values.ndim > rest and values.shape[values.ndim - rest - 1] != 1:
        if lead:
            return None
        length = values.shape[values.ndim - rest - 1]
        message = f"a mask selects another number of elements than the {length} that are written there"
        checks.holds(jnp.sum(mask) == length, message, "RuntimeError")
        order = jnp.clip(jnp.cumsum(mask.reshape(-1)) - 1, 0, length - 1)
        values = values.reshape(values.shape[values.ndim - rest - 1 :])[order].reshape(
            *mask.shape, *values.shape[values.ndim - rest :]
        )
    elif values.ndim > rest:
        values = values.reshape(
            *values.shape[: values.ndim - rest - 1], *[1] * mask.ndim, *values.shape[values.ndim - rest :]
        )
    added = (x | values if x.dtype == jnp.bool_ else x + values) if accumulate else values
    return jnp.where(shaped, added, x)


@lowers(aten.slice_scatter.default)
def slice_scatter(x, src, dim=0, start=None, end=None, step=1):
    key = [slice(None)] * x.ndim
    key[dim] = slice(start, end, step)
    return x.at[tuple(key)].set(src)


@lowers(aten.select_scatter.default)
def select_scatter(x, src, dim, index):
    key: list = [slice(None)] * x.ndim
    key[dim] = index
    return x.at[tuple(key)].set(src)


@lowers(aten.nonzero_static.default)
def nonzero_static(x, *, size, fill_value=-1):
    if not x.ndim:
        return jnp.zeros((size, 0), jnp.int64)
    if not x.size:  # JAX's own gives zeros there
        return jnp.full((size, x.ndim), fill_value, jnp.int64)
    return jnp.stack(jnp.nonzero(x, size=size, fill_value=fill_value), -1).astype(jnp.int64)


@lowers(aten.repeat_interleave.Tensor)
def repeat_interleave(repeats, *, output_size=None):
    if output_size is None:
        raise NotImplementedError("the size of the result depends on values; pass `output_size=`")
    return jnp.repeat(jnp.arange(repeats.shape[0], dtype=repeats.dtype), repeats, total_repeat_length=output_size)


# Bags of embeddings ----------------------------------------------------------------------------

BAG_SUM, BAG_MEAN, BAG_MAX = 0, 1, 2


@lowers(aten._embedding_bag.default)
def embedding_bag(
    weight, indices, offsets, scale_grad_by_freq=False, mode=0, sparse=False, per_sample_weights=None,
    include_last_offset=False, padding_idx=-1,
):  # fmt: skip
    """Sums, means or maxima of rows from each offset to the next; rows of `padding_idx` count for nothing.

    The other results are what the backward op takes: the bag of each row (empty where PyTorch's kernel for sums
    skips it), the bags' sizes, and which row each maximum came from.
    """
    checks.in_range(indices, 0, weight.shape[0], 0)
    bags = offsets.shape[0] - include_last_offset
    owner = jnp.searchsorted(offsets[:bags], jnp.arange(indices.shape[0], dtype=offsets.dtype), side="right") - 1
    owner = owner.astype(offsets.dtype)
    counted = indices != padding_idx if padding_idx >= 0 else jnp.ones(indices.shape, bool)
    target = jnp.where(counted, owner, bags)
    size = jnp.zeros(bags, offsets.dtype).at[target].add(1, mode="drop")
    rows = weight[indices].astype(sum_dtype(weight.dtype))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    if mode == BAG_MAX:
        result, places = _bag_maximum(rows, indices, target, owner, size)
    else:
        result, places = jnp.zeros((bags, rows.shape[1]), rows.dtype).at[target].add(rows, mode="drop"), size
        if mode == BAG_MEAN:
            result = result / jnp.maximum(size, 1)[:, None].astype(result.dtype)
    if mode == BAG_SUM and padding_idx < 0 and weight.dtype in (jnp.float32, jnp.float16):
        owner = owner[:0]
    if mode == BAG_SUM:  # sizes of bags are counted where a gradient needs them, which that of a sum does not
        size, places = jnp.zeros_like(size), jnp.zeros_like(places)
    return result.astype(weight.dtype), owner, size, places.astype(offsets.dtype)


def _bag_maximum(rows, indices, target, owner, size):
    shape = (size.shape[0], rows.shape[1])
    best = jnp.full(shape, jnp.asarray(-jnp.inf, rows.dtype)).at[target].max(rows, mode="drop")
    first = jnp.where(rows == best[owner], jnp.arange(rows.shape[0])[:, None], rows.shape[0])
    first = jnp.full(shape, rows.shape[0]).at[target].min(first, mode="drop")
    filled = size[:, None] > 0
    places = jnp.where(filled, indices.at[first].get(mode="fill", fill_value=0), 0)
    return jnp.where(filled, best, 0), places


@lowers(aten._embedding_bag_forward_only.default)
def embedding_bag_forward_only(weight, indices, offsets, *args, **kwargs):
    result, owner, size, places = embedding_bag(weight, indices, offsets, *args, **kwargs)
    return result, owner, jnp.resize(size, offsets.shape) if size.size else jnp.zeros_like(offsets), places


@lowers(aten.embedding_renorm.default)
def embedding_renorm(weight, indices, max_norm, norm_type):
    """Rows that are looked up are scaled down to a norm of at most `max_norm`."""
    norm = jnp.linalg.norm(weight, norm_type, axis=-1, keepdims=True)
    scaled = jnp.where(norm > max_norm, weight * (max_norm / (norm + 1e-7)), weight).astype(weight.dtype)
    used = jnp.zeros(weight.shape[0], bool).at[indices.reshape(-1)].set(True)
    return jnp.where(used[:, None], scaled, weight)
