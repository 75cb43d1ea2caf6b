"""Gradients between slices (or hosts), compressed: each group of devices has its own, and sends its parts in fewer bytes.

Inside a group gradients are summed and split as the plan has them; between groups, along the axis `data`, each device exchanges
its part alone. What rounding leaves out is added to the next step's gradient (error feedback, arXiv 1901.09847), so that nothing
is lost for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kpx.errors import ConfigError

AXIS = "data"
KINDS = ("bf16", "int8", "powersgd", "topk")
SCOPE = "kpx_exchange"
"""The name that an exchange's operations are made under: a plan leaves them as they are."""

_BLOCK = 512  # numbers of one scale, or of which the largest are kept


@dataclass(frozen=True)
class Exchange:
    """How gradients go between groups of devices.

    Each group's loss is a mean over its own rows, and all count the same, as microbatches' do: a loss whose rows do not count alike
    (a mean over tokens, some of them hidden) is another's.

    Attributes:
        kind: `bf16`: rounded. `int8`: in blocks of 512 with a scale each, with error feedback. `powersgd`: matrices as products of
            two of low rank (arXiv 1905.13727), with error feedback; vectors whole. `topk`: of each block of 512 the largest alone,
            with error feedback (arXiv 1809.07599). These two are for SGD with momentum: Adam's norms tell apart what comes late.
        groups: along the axis `data`; None: a `Trainer` takes the target's slices, else its hosts, else the processes.
        rank: of `powersgd`.
        kept: of `topk`, how many of each block.

    Raises:
        ConfigError: `kind` is not one, or a number is not positive.
    """

    kind: str
    groups: int | None = None
    rank: int = 4
    kept: int = 8

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(
                f"`exchange={self.kind!r}` is not known. Gradients go as {', '.join(map(repr, KINDS))}, or None."
            )
        if min(self.rank, self.kept, self.groups or 1) < 1 or self.kept > _BLOCK:
            raise ConfigError(
                f"An exchange has {self.groups} groups, rank {self.rank} and keeps {self.kept} of {_BLOCK}. Groups and rank are 1 or "
                f"more, and 1 to {_BLOCK} are kept."
            )

    def start(self, params: Any) -> Any:
        """What is carried from step to step, before the first: of each array what was left out, `[groups, ...]`, f32; of
        `powersgd` also the right factors, `[..., columns, rank]`, f32."""
        if self.kind == "bf16":
            return {}
        left = jax.tree.map(lambda p: jnp.zeros((self.count, *p.shape), jnp.float32), params)
        if self.kind != "powersgd":
            return {"left": left}
        leaves, tree = jax.tree.flatten(params)
        factors = [self._factor(p, n) for n, p in enumerate(leaves)]
        return {"left": left, "right": jax.tree.unflatten(tree, factors)}

    def mean(self, gradients: Any, state: Any, mesh: Any, specs: Any) -> tuple[Any, Any]:
        """The mean of the groups' gradients, and what is carried on.

        Args:
            gradients: of each group, `[groups, ...]`, split along `data` by the first dimension.
            specs: how each gradient lies inside a group.
        """
        leaves, tree = jax.tree.flatten(gradients)
        along = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        with jax.named_scope(SCOPE):
            if self.kind == "powersgd":
                return self._by_rank(leaves, tree, state, mesh, along)
            return self._in_parts(leaves, tree, state, mesh, along)

    def standing(self, gradient: Any, state: Any) -> Any:
        """What stands for the carried state where a step is read for planning: it lies as gradients do."""
        if self.kind == "bf16":
            return state
        return {**state, "left": jax.tree.map(lambda kept, g: kept + g[None], state["left"], gradient)}

    def sent(self, parts: Sequence[tuple[int, ...]]) -> list[tuple[str, float]]:
        """What a device is foreseen to exchange of its parts of all gradients, by kind: bytes of the whole of each exchanged array.

        Args:
            parts: shapes.
        """
        groups = self.count
        padded = _padded(sum(_padded(math.prod(shape)) for shape in parts), groups)
        if self.kind == "bf16":
            return [("all-to-all", 2 * padded), ("all-gather", 2 * padded)]
        if self.kind == "int8":
            size = padded * (1 + 4 / _BLOCK)
            return [("all-to-all", size), ("all-gather", size)]
        if self.kind == "topk":
            return [("all-gather", groups * padded / _BLOCK * self.kept * 6)]
        total = 0
        for shape in parts:
            view = matrices(shape, self.rank)
            total += 4 * (math.prod(view[:-2]) * (view[-2] + view[-1]) * self.rank if view else math.prod(shape))
        return [("all-reduce", total)]

    @property
    def count(self) -> int:
        """The groups.

        Raises:
            ConfigError: they were left open.
        """
        if self.groups is None:
            raise ConfigError(
                f"An exchange in {self.kind} was given to a step without its number of groups. Say how many slices or hosts there "
                f"are: `Exchange({self.kind!r}, groups=2)`."
            )
        return self.groups

    # In parts of a flat array ---------------------------------------------------------------------

    def _in_parts(self, leaves, tree, state, mesh, along) -> tuple[Any, Any]:
        """All gradients of a device as one flat array, exchanged under manual computation."""
        kept = jax.tree.leaves(state.get("left", {}))
        specs = [PartitionSpec(AXIS, *spec) for spec in along]

        def exchanged(given, kept):
            shapes = [a.shape[1:] for a in given]
            flat = [a.astype(jnp.float32).reshape(-1) for a in given]
            if kept:
                flat = [a + k.reshape(-1) for a, k in zip(flat, kept, strict=True)]
            mean, left = self._flat(flat)
            whole = [a.reshape(shape).astype(g.dtype) for a, shape, g in zip(mean, shapes, given, strict=True)]
            return whole, [a.reshape(1, *shape) for a, shape in zip(left, shapes, strict=True)] if kept else []

        own = specs if kept else []
        run = jax.shard_map(
            exchanged, mesh=mesh, in_specs=(specs, own), out_specs=([*along], own), check_vma=False
        )  # fmt: skip
        mean, left = run(leaves, kept)
        return jax.tree.unflatten(tree, mean), {"left": jax.tree.unflatten(tree, left)} if kept else {}

    def _flat(self, arrays: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """All arrays in one, each from a block of its own on: a scale is not of two."""
        sizes = [a.size for a in arrays]
        padded = jnp.concatenate([jnp.pad(a, (0, _padded(a.size) - a.size)) for a in arrays])
        more = _padded(padded.size, self.count) - padded.size
        mean, left = _KINDS[self.kind](self, jnp.pad(padded, (0, more)).reshape(self.count, -1, _BLOCK))
        return _apart(mean, sizes), _apart(left, sizes)

    def _bf16(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # As integers, since compilers without sums in bf16 would send them in f32.
        halves = _to_owners(jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16))
        mean = jnp.mean(jax.lax.bitcast_convert_type(halves, jnp.bfloat16).astype(jnp.float32), 0)
        whole = _to_all(jax.lax.bitcast_convert_type(mean.astype(jnp.bfloat16), jnp.uint16))
        return jax.lax.bitcast_convert_type(whole, jnp.bfloat16).astype(jnp.float32), x

    def _int8(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = x.shape[0]
        rounded, scale = _rounded(x)
        left = x - rounded.astype(jnp.float32) * scale
        mean = jnp.mean(_to_owners(rounded).astype(jnp.float32) * _to_owners(scale), 0)
        again, scale = _rounded(mean)
        # What the second rounding leaves out is its owner's to add.
        mine = jax.lax.axis_index(AXIS)
        left = left.at[mine].add(count * (mean - again.astype(jnp.float32) * scale))
        return _to_all(again).astype(jnp.float32) * _to_all(scale), left

    def _topk(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        count, blocks = x.shape[0], x.reshape(-1, _BLOCK)
        _, places = jax.lax.top_k(jnp.abs(blocks), self.kept)
        values = jnp.take_along_axis(blocks, places, 1)
        others = _to_all(values), _to_all(places.astype(jnp.uint16)).astype(jnp.int32)

        def added(total, given):
            return total.at[jnp.arange(total.shape[0])[:, None], given[1]].add(given[0] / count), None

        mean, _ = jax.lax.scan(added, jnp.zeros_like(blocks), others)
        left = blocks.at[jnp.arange(blocks.shape[0])[:, None], places].set(0.0)
        return mean.reshape(x.shape), left.reshape(x.shape)

    # By low rank ----------------------------------------------------------------------------------

    def _by_rank(self, leaves, tree, state, mesh, along) -> tuple[Any, Any]:
        found = []
        rights = jax.tree.leaves(state["right"])
        for given, left, right, spec in zip(leaves, jax.tree.leaves(state["left"]), rights, along, strict=True):
            at = NamedSharding(mesh, PartitionSpec(AXIS, *spec))
            kept = jax.lax.with_sharding_constraint(given.astype(jnp.float32) + left, at)
            view = matrices(given.shape[1:], self.rank)
            mean, right = (jnp.mean(kept, 0), right) if view is None else _factored(kept, right, view)
            left = kept - mean if view is not None else jnp.zeros_like(kept)
            found.append((mean.astype(given.dtype), jax.lax.with_sharding_constraint(left, at), right))
        mean, left, right = (jax.tree.unflatten(tree, list(part)) for part in zip(*found, strict=True))
        return mean, {"left": left, "right": right}

    def _factor(self, param: Any, number: int) -> jax.Array:
        view = matrices(param.shape, self.rank)
        if view is None:
            return jnp.zeros((0,), jnp.float32)
        return jax.random.normal(jax.random.key(number), (*view[:-2], view[-1], self.rank), jnp.float32)


_KINDS: dict[str, Callable] = {"bf16": Exchange._bf16, "int8": Exchange._int8, "topk": Exchange._topk}


@dataclass(frozen=True)
class Groups:
    """Where a step's groups of devices are: along a mesh's axis `data`.

    Attributes:
        mesh: None where the step is read for planning alone.
        specs: how each parameter lies inside a group.
    """

    mesh: Any = None
    specs: Any = None


@dataclass(frozen=True)
class Between:
    """An exchange of gradients between groups along `data` that is not the partitioner's.

    Attributes:
        sent: of the shapes of a device's gradients: what it exchanges, by kind, and the bytes of each.
        weights: places of the arguments that gradients are of.
    """

    sent: Callable[[list[tuple[int, ...]]], list[tuple[str, float]]]
    weights: tuple[int, ...]

    axis = AXIS


def matrices(shape: Sequence[int], rank: int) -> tuple[int, ...] | None:
    """An array as matrices, `(..., rows, columns)`: of its last two dimensions, or where those are short (a convolution's window)
    of all; None where factors of such a rank would not be half as large."""
    if len(shape) < 2:
        return None
    views = [tuple(shape)] if min(shape[-2:]) >= 4 * rank else []
    views += [(math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in range(1, len(shape))] if not views else []
    best = min(views, key=lambda v: math.prod(v[:-2]) * (v[-2] + v[-1]))
    return best if 2 * math.prod(best[:-2]) * (best[-2] + best[-1]) * rank < math.prod(shape) else None


def _factored(kept: jax.Array, right: jax.Array, view: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The mean of the groups' matrices by one step of the power method, from the last step's right factors."""
    each = kept.reshape(kept.shape[0], *view)
    left = _orthonormal(jnp.mean(jnp.matmul(each, right), 0))
    right = jnp.mean(jnp.matmul(jnp.swapaxes(each, -1, -2), left), 0)
    return jnp.matmul(left, jnp.swapaxes(right, -1, -2)).reshape(kept.shape[1:]), right


def _orthonormal(columns: jax.Array) -> jax.Array:
    """The columns of each matrix, made orthonormal one after another (Gram and Schmidt)."""
    done: list[jax.Array] = []
    for n in range(columns.shape[-1]):
        column = columns[..., n]
        for other in done:
            column = column - jnp.sum(column * other, -1, keepdims=True) * other
        done.append(column * jax.lax.rsqrt(jnp.sum(column * column, -1, keepdims=True) + 1e-30))
    return jnp.stack(done, -1)


def _rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks in int8, and their scales, `[..., 1]`."""
    scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    # What is no number makes its block none: compilers' maxima may pass over it.
    scale = jnp.where(jnp.all(jnp.isfinite(x), -1, keepdims=True), scale, jnp.nan)
    return jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale


def _to_owners(x: jax.Array) -> jax.Array:
    """Each group's `[groups, ...]`: to each its own part of all."""
    return jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True)


def _to_all(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, AXIS)


def _padded(size: int, groups: int = 1) -> int:
    """A number of whole blocks for each group."""
    return math.ceil(size / (_BLOCK * groups)) * _BLOCK * groups


def _apart(flat: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    flat, found, at = flat.reshape(-1), [], 0
    for size in sizes:
        found.append(flat[at : at + size])
        at += _padded(size)
    return found
