"""The largest batch that a machine holds, by plans and its compiler, with no trial on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from kpx.api import compile
from kpx.config import Config
from kpx.errors import ConfigError, OutOfMemoryError, PlanError
from kpx.hardware import plugins
from kpx.hardware.target import Target
from kpx.sharding.plan import Plan, plan
from kpx.train.step import State, Step

_MOST = 1 << 20  # rows


def fit_batch(
    step: Step,
    state: State,
    batch: Callable[[int], Any],
    *,
    target: str | Target | None = None,
    fixed: Mapping[str, int] | None = None,
    confirm: bool | None = None,
    config: Config | None = None,
) -> tuple[int, Plan]:
    """The largest number of rows with which a step fits a machine, and the plan for it.

    Rows are doubled, and then the largest multiple of the machine's devices between is looked for. Microbatches are counted as
    one step's rows: with `microbatches=None` a plan may take more of them, and a much larger batch fits.

    Args:
        state: arrays or structs, as of `jax.eval_shape(step.start, params)`.
        batch: structs of a batch with so many rows.
        fixed: as of `kpx.plan`.
        confirm: whether the target's compiler has the last word, rows being taken off until it agrees; by default where it is
            installed and the target is not here.

    Raises:
        PlanError: not even one row a device fits.
    """
    target = Target.resolve(target, may_be_absent=True)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    least = target.device_count
    options = {"target": target, "fixed": fixed, "config": config}

    def planned(rows: int, **further: Any) -> Plan | None:
        try:
            return plan(step, like, batch(rows), **options, **further)
        except (PlanError, ConfigError):  # too large, or nothing divides it
            return None

    found = plan(step, like, batch(least), **options, confirm=0)  # its error says what would fit
    rows, over = least, least * 2
    while over <= _MOST and (larger := planned(over, confirm=0)) is not None:
        rows, over, found = over, over * 2, larger
    while over - rows > least:
        middle = (rows + over) // 2 // least * least
        if (between := planned(middle, confirm=0)) is not None:
            rows, found = middle, between
        else:
            over = middle
    while (told := _compiled(found, step, confirm, config)) is None:
        rows = rows * 7 // 8 // least * least
        if rows < least or (smaller := planned(rows, confirm=0)) is None:
            raise PlanError(
                f"No batch fits {target}: its compiler refused every plan, the last of {max(rows, least)} rows."
            )
        found = smaller
    return rows, told


def _compiled(found: Plan, step: Step, confirm: bool | None, config: Config | None) -> Plan | None:
    """The plan as its compiler has it; None where that says that it does not fit."""
    asks = (
        not found.target.is_present and plugins.find(found.target.platform) is not None if confirm is None else confirm
    )
    if not asks:
        return found
    try:
        compiled = compile(found.apply(step, config=config), *found.specs, target=found.target, config=config)
    except OutOfMemoryError:
        return None
    fits = compiled.memory.fits is not False
    return (
        dataclasses.replace(found, memory_per_device_bytes=compiled.memory.peak_bytes, confirmed=True) if fits else None
    )
