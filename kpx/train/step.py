"""A training step: the loss's gradient, in microbatches where asked, clipped, and an optimizer's update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from kpx.errors import ConfigError, InputError
from kpx.sharding import exchange as exchanges
from kpx.sharding.exchange import Exchange, Groups
from kpx.train import offload
from kpx.train.pipeline import Pipelined
from kpx.train.remat import POLICIES, rematerialized


@jax.tree_util.register_dataclass
@dataclass
class State:
    """What a step takes and gives back anew.

    Attributes:
        step: how many were made, `[]`, int32.
        params: what is trained.
        carried: what the forward pass writes (BatchNorm's statistics).
        optimizer: its state.
        exchange: what a compressed exchange of gradients carries on (see `kpx.sharding.exchange`); else nothing.
    """

    step: jax.Array
    params: Any
    carried: Any
    optimizer: Any
    exchange: Any = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """`(state, batch) -> (state, metrics)`, of a loss and an optimizer.

    Metrics are f32 numbers: `loss`, `gradient_norm` (before it is clipped), and what the loss gives beside itself.

    Attributes:
        loss: `(params, carried, batch, key) -> (loss, (carried, metrics))`.
        optimizer: an optax transformation.
        clip: the norm that gradients are clipped to, all together; None for none.
        microbatches: in how many parts, one after another, a batch goes through; gradients and losses are their means. None
            leaves that to a plan.
        remat: what of the forward pass is computed again in the backward pass, of each layer (see `rematerialized`): `none`; `dots` (all but
            products by weights); `offload` (as `dots`, with those products in the host's memory meanwhile); `full`. None leaves
            that to a plan. A layer with a `jax.checkpoint` of its own is left alone.
        offload: whether the optimizer's state is held in the host's memory, and streamed through the device while weights are
            updated. None leaves that to a plan.
        seed: of the key that the loss is given, folded with the step.
        interleave: how many parts of the layers each stage of a pipeline has (see `kpx.train.pipeline`).
        exchange: how gradients go between slices or hosts, where that is to be compressed.
        mesh: where the layers are in stages along its axis `pipeline`; a plan gives it.
        grouped: where groups exchange gradients; a plan gives it.

    Raises:
        ConfigError: `microbatches` or `remat` is not one that there is.
    """

    loss: Callable
    optimizer: optax.GradientTransformation
    clip: float | None = None
    microbatches: int | None = 1
    remat: str | None = "none"
    offload: bool | None = False
    seed: int = 0
    interleave: int = 1
    exchange: Exchange | None = None
    mesh: Any = dataclasses.field(default=None, compare=False)
    grouped: Groups | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        if self.remat is not None and self.remat not in POLICIES:
            raise ConfigError(
                f"`remat={self.remat!r}` is not known. There are {', '.join(map(repr, POLICIES))}, and None."
            )
        if self.microbatches is not None and self.microbatches < 1:
            raise ConfigError(f"`microbatches={self.microbatches}` is not a number of parts. It is 1 or more, or None.")

    def start(self, params: Any, carried: Any = None) -> State:
        """The state before the first step."""
        carried = {} if carried is None else carried
        exchanged = self.exchange.start(params) if self.exchange is not None else {}
        return State(jnp.zeros((), jnp.int32), params, carried, self.optimizer.init(params), exchanged)

    def variants(self, batch: int) -> Iterator[list[dict[str, Any]]]:
        """What a plan may choose between: groups, of which later ones take less memory and more time; in a group, later ones less
        memory."""
        counts = [self.microbatches] if self.microbatches is not None else [1, 2, 4, 8, 16]
        policies = [self.remat] if self.remat is not None else list(POLICIES)
        for away in [self.offload] if self.offload is not None else [False, True]:
            for count in (n for n in counts if batch % n == 0):
                yield [{"remat": remat, "microbatches": count, "offload": away} for remat in policies]

    def varied(self, **chosen: Any) -> Step:
        """The same step, with what a plan chose."""
        return dataclasses.replace(self, **chosen)

    def __call__(self, state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        exchanged = state.exchange
        if self.exchange is None:
            value, gradient, carried, metrics = self._gradient(state.params, state.carried, batch, key)
        else:
            value, gradient, carried, metrics, exchanged = self._exchanged(self.exchange, state, batch, key)
        norm = optax.tree.norm(gradient)
        if self.clip is not None:
            scale = jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-12))
            gradient = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradient)
        if self.offload:
            params, optimizer = offload.updated(self.optimizer, gradient, state.optimizer, state.params)
        else:
            updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        told = {"loss": value, "gradient_norm": norm, **metrics}
        told = {name: jnp.asarray(number, jnp.float32) for name, number in told.items()}
        return State(state.step + 1, params, carried, optimizer, exchanged), told

    def along(self, mesh: Any) -> Step:
        """The same step, its layers in stages along a mesh's axis `pipeline`."""
        return dataclasses.replace(self, mesh=mesh)

    def among(self, groups: Groups) -> Step:
        """The same step, whose groups along a mesh's axis `data` exchange gradients as `exchange` says."""
        return dataclasses.replace(self, grouped=groups)

    def _exchanged(self, exchange: Exchange, state: State, batch: Any, key: jax.Array) -> tuple:
        """The gradient of each group's rows, and their mean by an exchange."""
        if jax.tree.leaves(state.carried):
            raise ConfigError(
                "A compressed exchange of gradients cannot carry what the forward pass writes (BatchNorm's statistics, streams of random "
                "numbers): each group would write its own. Train it with `exchange=None`."
            )
        if self.grouped is None:
            raise ConfigError(
                "A step with an exchange of gradients runs by its plan, which knows the groups: `kpx.plan(step, ...).apply(step)`, or a "
                "`kpx.train.Trainer`."
            )
        alone = dataclasses.replace(self, exchange=None)
        if self.grouped.mesh is None:
            value, gradient, carried, metrics = alone._gradient(state.params, state.carried, batch, key)
            return value, gradient, carried, metrics, exchange.standing(gradient, state.exchange)

        def of_group(params, rows, number):
            value, gradient, _, metrics = alone._gradient(params, {}, rows, jax.random.fold_in(key, number[0]))
            told = jax.tree.map(lambda a: jax.lax.pmean(a, exchanges.AXIS), (value, metrics))
            return told, jax.tree.map(lambda g: g[None], gradient)

        mesh, whole, split = self.grouped.mesh, PartitionSpec(), PartitionSpec(exchanges.AXIS)
        rows = jax.tree.map(lambda a: split if jnp.ndim(a) else whole, batch)
        run = jax.shard_map(
            of_group, mesh=mesh, in_specs=(whole, rows, split), out_specs=(whole, split),
            axis_names={exchanges.AXIS}, check_vma=False,
        )  # fmt: skip
        numbers = jnp.arange(mesh.shape[exchanges.AXIS])
        (value, metrics), gradients = run(state.params, batch, numbers)
        gradient, exchanged = exchange.mean(gradients, state.exchange, mesh, self.grouped.specs)
        return value, gradient, state.carried, metrics, exchanged

    def _pipelined(self, params: Any, carried: Any, batch: Any, key: jax.Array) -> tuple:
        if jax.tree.leaves(carried):
            raise ConfigError(
                "A pipeline cannot carry what the forward pass writes (BatchNorm's statistics, streams of random numbers), since "
                "microbatches are under way at once. Train it with another plan."
            )

        def loss(params, batch):
            value, (_, metrics) = self.loss(params, carried, batch, key)
            return value, metrics

        found = Pipelined(loss, self.mesh, self.microbatches or 1, self.interleave)
        (value, metrics), gradient = found(params, batch)
        return value, gradient, carried, metrics

    def _gradient(self, params: Any, carried: Any, batch: Any, key: jax.Array) -> tuple:
        if self.mesh is not None:
            return self._pipelined(params, carried, batch, key)
        loss = rematerialized(self.loss, self.remat or "none")
        gradient = jax.value_and_grad(loss, has_aux=True)
        count = self.microbatches or 1
        if count == 1:
            (value, (carried, metrics)), found = gradient(params, carried, batch, key)
            return value, found, carried, metrics

        def part(sums, given):
            carried, total = sums
            microbatch, number = given
            (value, (carried, metrics)), found = gradient(params, carried, microbatch, jax.random.fold_in(key, number))
            total = jax.tree.map(jnp.add, total, found)
            return (carried, total), (value, metrics)

        parts = jax.tree.map(lambda a: split_rows(a, count), batch)
        zeros = jax.tree.map(jnp.zeros_like, params)
        (carried, total), (values, metrics) = jax.lax.scan(part, (carried, zeros), (parts, jnp.arange(count)))
        mean = jax.tree.map(lambda g: g / count, total)
        return jnp.mean(values), mean, carried, jax.tree.map(jnp.mean, metrics)


def split_rows(array: jax.Array, count: int) -> jax.Array:
    """`[rows, ...]` as `[count, rows / count, ...]`; each part has rows of every device that rows are split over.

    Raises:
        InputError: `count` does not divide the rows.
    """
    if not array.ndim or array.shape[0] % count:
        raise InputError(
            f"A batch with the shape {tuple(array.shape)} cannot be split into {count} microbatches by rows."
        )
    return jnp.swapaxes(array.reshape(array.shape[0] // count, count, *array.shape[1:]), 0, 1)
