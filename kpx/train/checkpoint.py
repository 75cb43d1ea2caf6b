"""Checkpoints: Orbax writes them, sharded and beside the training; here is which one is read, and who may write.

A checkpoint that cannot be read is passed over for the one before it. A folder belongs to one job at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import time
import uuid
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from kpx.errors import CheckpointError, CheckpointWarning
from kpx.train.distributed import JOB

_LOCK = "kpx.lock"
_STALE_SECONDS = 60  # after which a lock that nobody renews is another's for the taking


class Checkpoints:
    """A folder of checkpoints of a training state.

    Args:
        folder: made where it is not there; a local one or a shared one, which every process sees.
        keep: how many of the last ones.
        background: whether saving goes on beside the training.

    Raises:
        CheckpointError: another job writes to the folder.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 3, background: bool = True):
        self.folder = pathlib.Path(os.path.abspath(folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _Lock(self.folder) if jax.process_index() == 0 else None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=background, cleanup_tmp_directories=True
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "told": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, told: dict[str, Any]) -> None:
        """Saves a state, and what is to be known beside it (JSON), under a step's number."""
        if self._lock is not None:
            self._lock.renew()
        if step not in self._manager.all_steps():
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), told=ocp.args.JsonSave(told))
            self._manager.save(step, args=args)

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The last whole checkpoint, as `(step, state, told)`; None where there is none.

        Args:
            like: structs with the shardings that the state is to have, whatever those were that it was saved with.

        Raises:
            CheckpointError: the state that was saved is another model's or optimizer's.
        """
        refused: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._check(step, like)
            found, why = self._read(step, like)
            if not _by_all(found is not None):
                refused.append(f"of step {step} ({why or 'another process could not read it'})")
                continue
            assert found is not None
            if refused:
                warnings.warn(
                    f"Checkpoints in `{self.folder}` cannot be read: {', '.join(refused)}. That of step {step} is used instead; "
                    "those are kept beside it, as `*.unreadable`.",
                    CheckpointWarning,
                    stacklevel=2,
                )
                self._set_aside([later for later in self._manager.all_steps() if later > step])
            return step, found["state"], dict(found["told"])
        if refused:
            raise CheckpointError(
                f"No checkpoint in `{self.folder}` can be read: {', '.join(refused)}. Restore the folder from a copy, or train anew "
                "in another."
            )
        return None

    def _read(self, step: int, like: Any) -> tuple[Any, str]:
        """A checkpoint, or None and why it cannot be read."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), told=ocp.args.JsonRestore())
        try:
            return self._manager.restore(step, args=args), ""
        except (ValueError, OSError, KeyError, RuntimeError, TypeError) as error:
            return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames checkpoints, so that their steps can be saved again and nothing is lost."""
        if jax.process_index() == 0:
            for step in steps:
                old = self.folder / str(step)
                old.rename(self.folder / f"{step}.{time.time():.0f}.unreadable")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("kpx.checkpoints.set_aside")
        self._manager.reload()

    def _check(self, step: int, like: Any) -> None:
        """Raises where a checkpoint is readable, and of another state."""
        shapes, wanted = self._shapes(step), _shapes(like)
        if shapes and shapes != wanted:
            differing = [n for n in {**shapes, **wanted} if shapes.get(n) != wanted.get(n)]
            first = differing[0]
            raise CheckpointError(
                f"The checkpoint of step {step} in `{self.folder}` is of another model or optimizer: {len(differing)} arrays differ, as "
                f"{first}, saved as {shapes.get(first)}, wanted as {wanted.get(first)}. Train with what it was saved with, or in "
                "another folder."
            )

    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the last checkpoint's arrays, by their path in the state; none where there is none, or it is not whole."""
        step = self._manager.latest_step()
        return {} if step is None else self._shapes(step)

    def _shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        try:
            saved: Any = self._manager.item_metadata(step)["state"]
            return _shapes(getattr(saved, "tree", saved))
        except (ValueError, OSError, KeyError, RuntimeError, TypeError, AttributeError):
            return {}  # it is not whole, which reading it will say

    def wait(self) -> None:
        """Until what is being saved is saved."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and gives the folder up."""
        self._manager.close()
        if self._lock is not None:
            self._lock.release()


def _by_all(done: bool) -> bool:
    """Whether every process says so."""
    if jax.process_count() == 1:
        return done
    return bool(np.all(multihost_utils.process_allgather(np.array(done))))


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    return {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _name(path: Any) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


class _Lock:
    """A file that says which job writes to a folder; restarts of a job are that job."""

    def __init__(self, folder: pathlib.Path):
        self._path = folder / _LOCK
        self._job = os.environ.get(JOB) or uuid.uuid4().hex
        held = self._read()
        if held is not None and held.get("job") != self._job and self._is_alive(held):
            raise CheckpointError(
                f"`{folder}` belongs to another job, process {held.get('process')} on {held.get('host')}, which wrote to it "
                f"{time.time() - held.get('time', 0):.0f} s ago. Stop that one, or give this one a folder of its own."
            )
        self.renew()

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None

    def _is_alive(self, held: dict[str, Any]) -> bool:
        if held.get("host") == socket.gethostname():
            try:
                os.kill(int(held["process"]), 0)
            except (ProcessLookupError, KeyError, ValueError):
                return False
            except PermissionError:
                return True
            return int(held["process"]) != os.getpid()
        return time.time() - held.get("time", 0) < _STALE_SECONDS

    def renew(self) -> None:
        told = {"job": self._job, "host": socket.gethostname(), "process": os.getpid(), "time": time.time()}
        temporary = self._path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(told))
        temporary.replace(self._path)

    def release(self) -> None:
        held = self._read()
        if held is not None and held.get("job") == self._job:
            with contextlib.suppress(OSError):
                self._path.unlink()
