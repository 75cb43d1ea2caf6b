"""The trainer: a model, an optimizer and data; planned, run, logged, saved, and gone on with after whatever happened."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from kpx.buckets import Buckets
from kpx.config import Config, resolve
from kpx.errors import CheckpointError, ConfigError, InputError
from kpx.hardware.target import Target
from kpx.sharding.exchange import Exchange
from kpx.sharding.plan import Plan, plan
from kpx.train import health
from kpx.train.checkpoint import Checkpoints
from kpx.train.distributed import ATTEMPT, Preemption, initialize
from kpx.train.lengths import Lengths
from kpx.train.model import adapted
from kpx.train.step import State, Step


@dataclass(frozen=True)
class Ended:
    """How a training ended.

    Attributes:
        step: how many steps were made in all, before a restart too.
        losses: of the steps of this run, by their number.
        preempted: whether it was told to stop (SIGTERM), saved, and did.
    """

    step: int
    losses: dict[int, float]
    preempted: bool


class Trainer:
    """Trains a model on the devices of all processes, as planned.

    `python -m kpx launch` starts the processes; without it, this one is alone. Every process runs the same script.

    Args:
        model: a `torch.nn.Module`, a flax module, or a loss in JAX with `params` (see `kpx.train.model.adapted`).
        optimizer: an optax transformation.
        loss: of a module, `(call, batch) -> loss`; see `adapted` for what it is by default.
        params: of a loss in JAX, its parameters.
        target: the machine; by default JAX's devices here. One that is not here can be planned for (`planned`), and not trained on.
        plan: `auto`; sizes of axes to keep, as `{"fsdp": 8}`; or a `kpx.Plan` of such a step.
        clip, microbatches, remat, offload, interleave, seed: see `Step`; microbatches, remat and offload are left to the plan by
            default.
        exchange: how gradients go between slices, hosts or processes where that is to be compressed: `bf16`, `int8`,
            `powersgd`, `topk`, or an `Exchange`. By default they go as they are.
        buckets: lengths that sequences (dimension 1 of a batch's entries) are padded to, `kpx.Buckets(sequence=[512, 1024])`: each is
            compiled once, and the plan is made for the longest.
        padding: by the name of a batch's entry, what it is padded with, as `{"labels": -100}`; else zeros.
        config: what kpx may do, precision included: weights stay as they are given, products are lowered.
        checkpoints: a folder; without, nothing is saved. A trainer goes on from the last whole one in it.
        save_every: how many steps lie between checkpoints.
        keep: how many checkpoints are kept.
        log_every: how many steps lie between what is told.
        hang_seconds: how long a step may take before the process ends itself; None for ever.

    Raises:
        InputError, ConfigError: something is not what it must be. CheckpointError: another job has the folder.
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        *,
        loss: Callable | None = None,
        params: Any = None,
        target: str | Target | None = None,
        plan: str | Mapping[str, int] | Plan = "auto",
        clip: float | None = None,
        microbatches: int | None = None,
        remat: str | None = None,
        offload: bool | None = None,
        interleave: int = 1,
        exchange: str | Exchange | None = None,
        seed: int = 0,
        buckets: Buckets | None = None,
        padding: Mapping[str, float] | None = None,
        config: Config | None = None,
        checkpoints: str | os.PathLike | None = None,
        save_every: int = 100,
        keep: int = 3,
        log_every: int = 10,
        hang_seconds: float | None = None,
    ):
        initialize()
        self.config = resolve(config)
        self._model = adapted(model, loss, params)
        self._target = Target.resolve(target, may_be_absent=True)
        self._checkpoints = None if checkpoints is None else Checkpoints(checkpoints, keep=keep)
        exchange = self._grouped(exchange)
        self.step = Step(
            self._model.loss, optimizer, clip=clip, microbatches=microbatches, remat=remat, offload=offload, seed=seed,
            interleave=interleave, exchange=exchange,
        )  # fmt: skip
        if isinstance(plan, str) and plan != "auto":
            raise ConfigError(
                f"`plan={plan!r}` is not known. It is 'auto', sizes of axes as {{'fsdp': 8}}, or a kpx.Plan."
            )
        self._asked = plan
        self._lengths = None if buckets is None else Lengths(buckets, padding)
        self._save_every, self._log_every, self._hang_seconds = save_every, log_every, hang_seconds
        self.plan: Plan | None = None
        self.state: State | None = None
        self._run: Callable | None = None

    def fit(self, data: Iterable[Any], steps: int, *, progress: Callable[[dict], None] | None = None) -> Ended:
        """Trains until so many steps were made in all; goes on from the last checkpoint where there is one.

        Args:
            data: batches, pytrees of arrays whose first dimension is the whole batch of all processes, alike on each process
                (a seeded generator, say). After a restart, as many as were trained on are passed over; an iterator that has
                `get_state` and `set_state` (grain's) is set instead.
            progress: is given each line that is logged, too.

        Raises:
            TrainingError: a loss is no number, or the data ended before the first step.
        """
        batches = iter(data)
        first = next(batches, None)
        if first is None:
            raise InputError("The data has no batch. Give an iterable of at least one.")
        self._prepare(first)
        assert self.state is not None
        assert self.plan is not None
        start = int(self.state.step)
        stream = _resumed(data, batches, first, start, self._told)
        watch, stop, log = health.Watchdog(self._hang_seconds), Preemption(), _Log(self.plan, progress)
        try:
            return self._loop(stream, start, steps, watch, stop, log)
        finally:
            watch.close()
            stop.close()
            if self._checkpoints is not None:
                self._checkpoints.wait()

    def planned(self, batch: Any) -> Plan:
        """The plan for batches like this one. `kpx.compile(plan.apply(trainer.step), *plan.specs, target=plan.target)` asks its
        target's compiler, wherever that is.

        Raises:
            PlanError: nothing fits the target.
        """
        if isinstance(self._asked, Plan):
            return self._asked
        if self._lengths is not None:
            batch = self._lengths.padded(batch, largest=True)
        spec = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(np.shape(a), jax.dtypes.canonicalize_dtype(np.asarray(a).dtype)), batch
        )
        like = jax.eval_shape(self.step.start, self._model.params, self._model.carried)
        fixed = {} if isinstance(self._asked, str) else dict(self._asked)
        return plan(self.step, like, spec, target=self._target, fixed=fixed, config=self.config, confirm=0)

    def close(self) -> None:
        """Waits for what is being saved, and gives the folder of checkpoints up."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _grouped(self, exchange: str | Exchange | None) -> Exchange | None:
        """The exchange, with its groups: the target's slices, or its hosts, or the processes; none between one group, but where
        several left something over."""
        if isinstance(exchange, str):
            exchange = Exchange(exchange)
        if exchange is None:
            return None
        target, groups = self._target, exchange.groups
        if groups is None and target.platform == "tpu":
            groups = len({d.slice_index for d in jax.devices("tpu")}) if target.is_present else target.slices
        elif groups is None:
            groups = target.shape[0] if len(target.shape) > 1 else jax.process_count()
        carries = self._checkpoints is not None and any(
            n.startswith("exchange/") for n in self._checkpoints.saved_shapes()
        )
        return dataclasses.replace(exchange, groups=groups) if groups > 1 or carries else None

    def _loop(self, stream: _Stream, start: int, steps: int, watch, stop, log: _Log) -> Ended:
        losses: dict[int, float] = {}
        run, last = self._run, None
        assert run is not None
        number = start
        for number in range(start + 1, steps + 1):
            if (batch := stream.next()) is None:
                number -= 1
                break
            watch.at(number)
            began = time.perf_counter()
            self.state, metrics = run(self.state, self._placed(batch))
            if last is not None:  # of the step before, so that this one is under way
                losses[last[0]] = log.told(*last)
            last = (number, metrics, began, number % self._log_every == 0)
            due = stop.is_due(number)
            if self._checkpoints is not None and (due or number % self._save_every == 0 or number == steps):
                losses[number] = log.told(*last)  # what is no number is not saved
                last = None
                self._checkpoints.save(number, self.state, stream.state(number))
            if due:
                return Ended(number, losses, preempted=True)
        if last is not None:
            losses[last[0]] = log.told(*last)
        return Ended(number, losses, preempted=False)

    # Before the first step ------------------------------------------------------------------------

    def _prepare(self, batch: Any) -> None:
        """Plans, compiles, and puts the state where the plan has it: the start, or the last checkpoint."""
        if self.state is not None:
            return
        like = jax.eval_shape(self.step.start, self._model.params, self._model.carried)
        Target.resolve(self._target)  # which must be here
        self.plan = self.planned(batch)
        if self._lengths is not None:
            self._lengths.check(self.plan.mesh.get("context", 1))
        self._run = self.plan.apply(self.step, config=self.config)
        at = self.plan.placed()
        self._batch_at = at[1]
        self._told: dict[str, Any] = {}
        structs = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), like, at[0])
        if self._checkpoints is not None and (restored := self._restored(self._checkpoints, structs)) is not None:
            self.state, self._told = restored
            return
        start = jax.jit(self.step.start, out_shardings=at[0])
        put = jax.tree.map(_put, (self._model.params, self._model.carried), (at[0].params, at[0].carried))
        self.state = start(*put)

    def _restored(self, checkpoints: Checkpoints, structs: State) -> tuple[State, dict[str, Any]] | None:
        """The last checkpoint; what another number of groups had left of their gradients is these groups' in equal parts."""
        exchange, wanted = self.step.exchange, structs.exchange
        shapes = {n: s for n, s in checkpoints.saved_shapes().items() if n.startswith("exchange/")}
        saved = {shape[0] for name, shape in shapes.items() if name.startswith("exchange/left/")}
        others = bool(exchange and saved and saved != {exchange.count})
        if others:
            left = jax.tree.map(lambda s: _of_groups(s, saved.copy().pop()), wanted["left"])
            structs = dataclasses.replace(structs, exchange={**wanted, "left": left})
        elif shapes and exchange is None:
            raise CheckpointError(
                f"The checkpoint in `{checkpoints.folder}` carries what a compressed exchange of gradients left over, and this run has "
                "none. Train with `exchange=`, or in another folder."
            )
        if (found := checkpoints.restore(structs)) is None:
            return None
        _, state, told = found
        if others:
            at = jax.tree.map(lambda s: s.sharding, wanted["left"])
            spread = jax.jit(
                lambda left: jax.tree.map(lambda a, s: jnp.broadcast_to(jnp.mean(a, 0), s.shape), left, wanted["left"]),
                out_shardings=at,
            )
            state = dataclasses.replace(state, exchange={**state.exchange, "left": spread(state.exchange["left"])})
        return state, told

    def _placed(self, batch: Any) -> Any:
        if self._lengths is not None:
            batch = self._lengths.padded(batch)
        return jax.tree.map(_put, batch, self._batch_at)


def _of_groups(struct: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    """What so many groups have left, each device all of its part's."""
    assert isinstance(struct.sharding, NamedSharding)
    at = NamedSharding(struct.sharding.mesh, PartitionSpec(None, *struct.sharding.spec[1:]))
    return jax.ShapeDtypeStruct((count, *struct.shape[1:]), struct.dtype, sharding=at)


def _put(array: Any, sharding: Any) -> jax.Array:
    """An array that every process has whole, as each process's part of a sharded one."""
    held = np.asarray(array)
    held = held.astype(jax.dtypes.canonicalize_dtype(held.dtype), copy=False)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])


_BYTES = "kpx.bytes"
"""Under which a checkpoint keeps an iterator's state that is bytes."""


class _Stream:
    """Batches, and where they are."""

    def __init__(self, batches: Any, first: Any | None):
        self._batches, self._first = batches, first

    def next(self) -> Any | None:
        if self._first is not None:
            batch, self._first = self._first, None
            return batch
        return next(self._batches, None)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of them."""
        told: dict[str, Any] = {"step": step}
        if hasattr(self._batches, "get_state"):
            given = self._batches.get_state()
            told["data"] = {_BYTES: given.hex()} if isinstance(given, bytes) else given
        return told


def _resumed(data: Iterable, batches: Any, first: Any, start: int, told: Mapping[str, Any]) -> _Stream:
    """Batches from where a checkpoint left them."""
    if start == 0:
        return _Stream(batches, first)
    if "data" in told and hasattr(batches, "set_state"):
        given = told["data"]
        is_bytes = isinstance(given, dict) and [*given] == [_BYTES]
        batches.set_state(bytes.fromhex(given[_BYTES]) if is_bytes else given)
        return _Stream(batches, None)
    for _ in range(start - 1):
        if next(batches, None) is None:
            break
    return _Stream(batches, None)


class _Log:
    """What is told of steps: lines of JSON where nobody watches, a line that is written over where somebody does."""

    def __init__(self, plan: Plan, progress: Callable[[dict], None] | None):
        self._progress = progress
        self._is_first = jax.process_index() == 0
        self._console = None
        if self._is_first and sys.stderr.isatty():
            from rich.console import Console

            self._console = Console(stderr=True)
        self._attempt = int(os.environ.get(ATTEMPT, "0"))
        self._before = None
        told = {"mesh": plan.mesh, "variant": dict(plan.variant), "predicted_seconds": plan.predicted_seconds}
        self._tell({"plan": told, "processes": jax.process_count(), "attempt": self._attempt})

    def told(self, step: int, metrics: Mapping[str, Any], began: float, is_due: bool) -> float:
        """Waits for a step's metrics, checks them, and tells of them where that is due; gives the loss."""
        found = {name: float(number) for name, number in metrics.items()}
        health.check_finite(found, step)
        now = time.perf_counter()
        taken, self._before = now - (self._before or began), now
        if is_due:
            line: dict[str, Any] = {"step": step, **found, "seconds": round(taken, 6)}
            if slow := health.stragglers(taken):
                line["stragglers"] = {str(n): round(times, 2) for n, times in slow.items()}
            if hot := health.devices():
                line["devices"] = hot
            self._tell(line)
        return found["loss"]

    def _tell(self, line: dict[str, Any]) -> None:
        if not self._is_first:
            return
        if self._progress is not None:
            self._progress(line)
        if self._console is None:
            print(json.dumps(line), flush=True)
        elif "step" in line:
            text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
            self._console.print(text, highlight=False, soft_wrap=True)
        else:
            self._console.print(f"plan: {line['plan']['mesh']}, {line['processes']} processes", highlight=False)
