"""Pipeline parallelism: layers of a scan in stages on different devices, which microbatches go through.

One forward and one backward pass a tick (1F1B: PipeDream-Flush, arXiv 2006.09503), with several parts of the layers on each device
where that is asked for (interleaved: Megatron-LM, arXiv 2104.04473). Every device runs the same program: in a tick it computes one
part forward for one microbatch and one backward for another, and hands results to its neighbours. A part's layers are computed
again in its backward pass, so that a device keeps the inputs of the microbatches under way alone, whose number does not grow
with that of microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from kpx.errors import ConfigError
from kpx.jax_internals import Lazy, body_of, inputs_of, scans_of

AXIS = "pipeline"


@dataclass(frozen=True)
class Schedule:
    """Who computes what, and when.

    Attributes:
        stages: devices along the axis.
        parts: of the layers, on each device.
        microbatches: how many; where there are several parts, a multiple of the stages.
    """

    stages: int
    parts: int
    microbatches: int

    @property
    def ticks(self) -> int:
        """From the first forward pass to the last backward pass."""
        return (self.microbatches + self.stages) * self.parts + self.stages - 1

    @property
    def slots(self) -> int:
        """For how many microbatches a device keeps inputs, of each part."""
        return min(self.microbatches, (2 if self.parts == 1 else 3) * self.stages)

    def forward(self, tick, stage) -> tuple[Any, Any, Any]:
        """Whether a stage computes forward in a tick, which of its parts, and for which microbatch."""
        return self._unit(tick - stage, lambda part: part)

    def backward(self, tick, stage) -> tuple[Any, Any, Any]:
        """The same of the backward pass: it begins a tick after the last part's forward pass, and goes the other way."""
        first = tick - self.parts * self.stages - (self.stages - 1 - stage)
        return self._unit(first, lambda part: self.parts - 1 - part)

    def _unit(self, number, of_part: Callable) -> tuple[Any, Any, Any]:
        together = self.stages * self.parts
        group, within = number // together, number % together
        if self.parts == 1:
            part, microbatch = number * 0, number
        else:
            part, microbatch = of_part(within // self.stages), group * self.stages + within % self.stages
        return (number >= 0) & (number < self.microbatches * self.parts), part, microbatch


class Pipelined:
    """The gradient of a loss whose layers are in a scan, in stages along a mesh's axis `pipeline`.

    Args:
        loss: `(params, batch) -> (loss, metrics)`, means over the batch's rows.
        parts: of the layers on each device; more than one is interleaved.
        microbatches: in how many a batch goes through.
    """

    def __init__(self, loss: Callable, mesh: Mesh, microbatches: int, parts: int = 1):
        self._loss, self._mesh = loss, mesh
        self.schedule = Schedule(mesh.shape[AXIS], parts, microbatches)
        if others := [a for a, n in mesh.shape.items() if a not in (AXIS, "data") and n > 1]:
            raise ConfigError(
                f"A pipeline's mesh has the axes {AXIS!r} and 'data', and this one has {', '.join(map(repr, others))} too. Give those "
                "devices to the two."
            )
        if parts > 1 and microbatches % self.schedule.stages:
            raise ConfigError(
                f"{microbatches} microbatches cannot go through {self.schedule.stages} stages of {parts} parts each: interleaved, their "
                "number is a multiple of the stages."
            )

    def __call__(self, params: Any, batch: Any) -> tuple[tuple[jax.Array, Any], Any]:
        """`((loss, metrics), gradient)`, as of `jax.value_and_grad(..., has_aux=True)`.

        Raises:
            ConfigError: the loss has no scan that can be cut, or its layers cannot be divided by the stages.
        """
        leaves, tree = jax.tree.flatten(params)
        microbatches = jax.tree.map(self._by_microbatch, batch)
        cut = _Cut(self._loss, params, jax.tree.map(self._local, microbatches), self.schedule)
        stacked, pull = jax.vjp(lambda *weights: cut.stacked(weights), *leaves)
        shared = [leaves[n] for n in cut.shared]
        spec = PartitionSpec(None, AXIS)  # parts, stages, layers of each
        rows = jax.tree.map(lambda a: PartitionSpec(None, "data" if "data" in self._mesh.shape else None), microbatches)
        run = jax.shard_map(
            lambda *given: self._run(cut, *given),
            mesh=self._mesh,
            in_specs=([spec] * len(stacked), [PartitionSpec()] * len(shared), rows),
            out_specs=(PartitionSpec(), PartitionSpec(), [spec] * len(stacked), [PartitionSpec()] * len(shared)),
            check_vma=False,
        )
        value, metrics, by_stacked, by_shared = run(stacked, shared, microbatches)
        gradient = list(pull(by_stacked))
        for place, found in zip(cut.shared, by_shared, strict=True):
            gradient[place] = gradient[place] + found
        return (value, metrics), jax.tree.unflatten(tree, gradient)

    def _by_microbatch(self, array: jax.Array) -> jax.Array:
        from kpx.train.step import split_rows

        return split_rows(array, self.schedule.microbatches)

    def _local(self, array: jax.Array) -> jax.ShapeDtypeStruct:
        """One microbatch's rows on one device."""
        devices = self._mesh.shape.get("data", 1)
        if array.shape[1] % devices:
            raise ConfigError(
                f"A microbatch of {array.shape[1]} rows cannot be split over {devices} devices along 'data'. Take a larger batch, or "
                "fewer microbatches."
            )
        return jax.ShapeDtypeStruct((array.shape[1] // devices, *array.shape[2:]), array.dtype)

    def _run(self, cut: _Cut, stacked: Sequence, shared: Sequence, microbatches: Any) -> tuple:
        """What one device does: all ticks, and then the sums."""
        schedule, stage = self.schedule, jax.lax.axis_index(AXIS)
        stacked = [a[:, 0] for a in stacked]  # parts, layers of each
        zeros = jax.tree.map(jnp.zeros_like, (stacked, list(shared)))
        held = [jnp.zeros((schedule.parts, schedule.slots, *s.shape), s.dtype) for s in cut.carry]
        passed = [jnp.zeros(s.shape, s.dtype) for s in cut.carry]
        told = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), cut.told)
        device = _Device(self.schedule, cut, stage, stacked, list(shared), microbatches)
        start = (passed, passed, held, zeros, told)
        *_, (by_stacked, by_shared), told = jax.lax.fori_loop(0, schedule.ticks, device.tick, start)
        count = schedule.microbatches
        by_shared = jax.lax.psum(by_shared, AXIS)
        told = jax.lax.psum(told, AXIS)
        if "data" in self._mesh.shape:
            by_stacked, by_shared, told = jax.lax.pmean((by_stacked, by_shared, told), "data")
        by_stacked, by_shared, (value, metrics) = jax.tree.map(lambda a: a / count, (by_stacked, by_shared, told))
        return value, metrics, [a[:, None] for a in by_stacked], by_shared


class _Device:
    """A device's part in the schedule."""

    def __init__(self, schedule: Schedule, cut: _Cut, stage, stacked, shared, microbatches):
        self._s, self._cut, self._stage = schedule, cut, stage
        self._stacked, self._shared, self._microbatches = stacked, shared, microbatches

    def tick(self, tick, state):
        arrived, returned, held, sums, told = state
        leaves, held = self._forward(tick, arrived, held)
        back, sums, told = self._backward(tick, returned, held, sums, told)
        stages = self._s.stages
        on = [jax.lax.ppermute(a, AXIS, [(n, (n + 1) % stages) for n in range(stages)]) for a in leaves]
        back = [jax.lax.ppermute(a, AXIS, [(n, (n - 1) % stages) for n in range(stages)]) for a in back]
        return on, back, held, sums, told

    def _forward(self, tick, arrived, held):
        valid, part, microbatch = self._s.forward(tick, self._stage)
        is_first = (self._stage == 0) & (part == 0)

        def computed():
            batch = self._batch(microbatch)
            given = jax.lax.cond(is_first, lambda: self._cut.before(self._shared, batch), lambda: arrived)
            slot = microbatch % self._s.slots
            kept = [h.at[part, slot].set(g) for h, g in zip(held, given, strict=True)]
            # The last part's layers are computed with the loss, in the backward pass.
            is_last = (self._stage == self._s.stages - 1) & (part == self._s.parts - 1)
            layers = [a[part] for a in self._stacked]
            return jax.lax.cond(
                is_last, lambda: given, lambda: self._cut.layers(layers, self._shared, batch, given)
            ), kept

        return jax.lax.cond(valid, computed, lambda: (arrived, held))

    def _backward(self, tick, returned, held, sums, told):
        valid, part, microbatch = self._s.backward(tick, self._stage)
        is_first = (self._stage == 0) & (part == 0)
        is_last = (self._stage == self._s.stages - 1) & (part == self._s.parts - 1)

        def computed():
            batch, slot = self._batch(microbatch), microbatch % self._s.slots
            given = [h[part, slot] for h in held]
            layers = [a[part] for a in self._stacked]
            by_layers, by_shared, back, found = jax.lax.cond(
                is_last,
                lambda: self._of_loss(layers, given, batch),
                lambda: self._of_layers(layers, given, batch, returned, told),
            )
            by_shared = jax.lax.cond(is_first, lambda: self._of_before(by_shared, back, batch), lambda: by_shared)
            stacked = [s.at[part].add(g) for s, g in zip(sums[0], by_layers, strict=True)]
            return back, (stacked, jax.tree.map(jnp.add, sums[1], by_shared)), jax.tree.map(jnp.add, told, found)

        return jax.lax.cond(valid, computed, lambda: (returned, sums, told))

    def _of_loss(self, layers, given, batch):
        def last(layers, shared, given):
            value, metrics = self._cut.after(shared, batch, self._cut.layers(layers, shared, batch, given))
            return value, (value, metrics)

        gradient, told = jax.grad(last, (0, 1, 2), has_aux=True)(layers, self._shared, given)
        return *gradient, told

    def _of_layers(self, layers, given, batch, returned, told):
        _, pull = jax.vjp(lambda w, s, x: self._cut.layers(w, s, batch, x), layers, self._shared, given)
        return *pull(returned), jax.tree.map(jnp.zeros_like, told)

    def _of_before(self, by_shared, back, batch):
        _, pull = jax.vjp(lambda shared: self._cut.before(shared, batch), self._shared)
        return jax.tree.map(jnp.add, by_shared, pull(back)[0])

    def _batch(self, microbatch):
        return jax.tree.map(lambda a: a[microbatch], self._microbatches)


class _Cut:
    """A loss, cut at the scan over its layers: what comes before, a layer, and what comes after.

    Attributes:
        shared: places of the parameters that are not stacked layers' alone.
        carry: structs of what goes from layer to layer.
        told: structs of the loss and its metrics.
    """

    def __init__(self, loss: Callable, params: Any, batch: Any, schedule: Schedule):
        self._schedule = schedule
        leaves, self._tree = jax.tree.flatten((params, batch))
        count = len(jax.tree.leaves(params))
        structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves]
        self._closed, self.told = jax.make_jaxpr(
            lambda *flat: loss(*jax.tree.unflatten(self._tree, flat)), return_shape=True
        )(*structs)
        jaxpr = self._closed.jaxpr
        self._params, self._batch = jaxpr.invars[:count], jaxpr.invars[count:]
        self._scan = self._found()
        self._constants, self._start, self._sequences = scan_inputs(self._scan)
        self.carry = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self._start]
        if not all(jnp.issubdtype(s.dtype, jnp.floating) for s in self.carry):
            raise ConfigError(
                "The layers' scan carries arrays that are not floating, and a pipeline passes no others on. Compute them inside."
            )
        needed = inputs_of(self._closed, [*self._start, *self._constants]) | inputs_of(
            self._closed, jaxpr.outvars, self._scan.outvars
        )
        self.shared = [n for n, v in enumerate(self._params) if v in needed]

    def _found(self) -> Any:
        """The longest scan of layers that parameters give, whose number the stages divide."""
        scans = [
            s for s in scans_of(self._closed.jaxpr) if not inputs_of(self._closed, scan_inputs(s)[2]) & set(self._batch)
        ]
        scans = [
            s
            for s in scans
            if scan_inputs(s)[2] and not s.params["reverse"] and len(s.outvars) == s.params["num_carry"]
        ]
        if not scans:
            raise ConfigError(
                "The loss has no scan over layers that a pipeline could cut: one whose stacked weights are parameters, and which gives "
                "its carry alone. Write the layers with `jax.lax.scan`."
            )
        scan = max(scans, key=lambda s: s.params["length"])
        length, parts = scan.params["length"], self._schedule.stages * self._schedule.parts
        if length % parts:
            raise ConfigError(
                f"{length} layers cannot be divided into {self._schedule.stages} stages of {self._schedule.parts} parts each."
            )
        return scan

    def stacked(self, weights: Sequence) -> list[jax.Array]:
        """Layers' weights as `[parts, stages, layers of each, ...]`."""
        lazy = Lazy(self._closed, dict(zip(self._params, weights, strict=True)))
        parts, stages = self._schedule.parts, self._schedule.stages
        found = [lazy.value(v) for v in self._sequences]
        return [a.reshape(parts, stages, a.shape[0] // (parts * stages), *a.shape[1:]) for a in found]

    def before(self, shared: Sequence, batch: Any) -> list[jax.Array]:
        """What goes into the first layer."""
        lazy = self._lazy(shared, batch)
        return [lazy.value(v) for v in self._start]

    def layers(self, stacked: Sequence, shared: Sequence, batch: Any, carry: Sequence) -> list[jax.Array]:
        """A part's layers."""
        lazy, body = self._lazy(shared, batch), body_of(self._scan)
        constants = [lazy.value(v) for v in self._constants]
        step = jax.checkpoint(lambda x, w: (body(*constants, *x, *w), None), prevent_cse=False)
        return jax.lax.scan(step, list(carry), list(stacked))[0]

    def after(self, shared: Sequence, batch: Any, carry: Sequence) -> tuple[jax.Array, Any]:
        """The loss and its metrics, of what comes out of the last layer."""
        lazy = self._lazy(shared, batch, dict(zip(self._scan.outvars, carry, strict=True)))
        return jax.tree.unflatten(jax.tree.structure(self.told), [lazy.value(v) for v in self._closed.jaxpr.outvars])

    def _lazy(self, shared: Sequence, batch: Any, further: dict | None = None) -> Lazy:
        known = dict(zip((self._params[n] for n in self.shared), shared, strict=True))
        return Lazy(
            self._closed, {**known, **dict(zip(self._batch, jax.tree.leaves(batch), strict=True)), **(further or {})}
        )


def scan_inputs(scan: Any) -> tuple[list, list, list]:
    """A scan's constants, what it starts with, and what it goes through."""
    constants, carried = scan.params["num_consts"], scan.params["num_carry"]
    atoms = list(scan.invars)
    return atoms[:constants], atoms[constants : constants + carried], atoms[constants + carried :]
