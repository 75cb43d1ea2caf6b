"""A plan in words: what each axis does, which exchanges it costs, and what else there was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kpx.sharding.plan import Plan

_NAMED = 6  # of what an axis splits, so many are named
_DOES = {
    "data": "splits the batch; weights are whole on each, gradients are summed over it",
    "fsdp": "splits the batch, and stores weights and the optimizer's state in parts, gathered where they are used",
    "context": "splits the sequence, and stores weights in parts as fsdp does",
    "expert": "splits experts, and the batch beside them",
    "tensor": "splits weights' own dimensions, and the products with them",
    "pipeline": "splits layers into stages that microbatches go through",
}


def explained(plan: Plan) -> str:
    """See `Plan.explain`."""
    by = "by its compiler" if plan.confirmed else "foreseen"
    lines = [
        f"Plan for {plan.target}: {text(plan)}",
        f"  {seconds(plan.predicted_seconds)} a step (foreseen), {gib(plan.memory_per_device_bytes)} a device ({by}), of which "
        f"{gib(plan.price.argument_bytes)} are arguments; {seconds(plan.price.compute_seconds)} are computing.",
    ]
    for axis, size in plan.mesh.items():
        if size > 1:
            lines.append(f"  {axis} {size}: {_DOES[axis]}" + _split(plan, axis))
    lines.append("  Exchanges of a step, on each device:")
    for axes, kinds in sorted(plan.price.by_axis().items(), key=lambda item: -sum(s for _, s in item[1].values())):
        for kind, (size, taken) in sorted(kinds.items(), key=lambda item: -item[1][1]):
            beside = sum(e.seconds for e in plan.collectives if e.axes == axes and e.kind == kind and e.overlaps)
            rest = ", beside computing" if beside > 0.5 * taken else ""
            lines.append(f"    {kind} along {', '.join(axes)}: {amount(size)}, {seconds(taken)}{rest}")
    if not plan.collectives:
        lines.append("    none")
    lines += [f"  Note: {remark}." for remark in plan.remarks]
    if plan.runners_up:
        lines.append("  What else there was:")
        lines += [
            f"    {text(other)}: {other.predicted_seconds / plan.predicted_seconds:.2f} times the time, "
            f"{gib(other.memory_per_device_bytes)}" + ("" if other.fits else ", which does not fit")
            for other in plan.runners_up
        ]
    return "\n".join(lines)


def _split(plan: Plan, axis: str) -> str:
    """Which dimensions of which arguments an axis splits, a few of them."""
    if axis not in ("tensor", "expert"):
        return ""
    import jax

    named = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(plan.specs)]
    state = set(plan.roles.state)
    found = [f"{named[p]} along {d}" for (p, d), axes in plan.split.items() if axis in axes and p in state]
    return f" ({', '.join(found[:_NAMED])}{', ...' if len(found) > _NAMED else ''})" if found else ""


def text(plan: Plan) -> str:
    """A plan's mesh, and what was chosen of the step, in words."""
    mesh = " x ".join(f"{name} {n}" for name, n in plan.mesh.items())
    return mesh + variant(plan.variant)


def variant(chosen: Mapping) -> str:
    said = [k if v is True else f"{k} {v}" for k, v in chosen.items() if v is not False]
    return f" ({', '.join(said)})" if said else ""


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def amount(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def seconds(taken: float) -> str:
    return f"{taken:.3g} s" if taken >= 1 else f"{taken * 1e3:.3g} ms" if taken >= 1e-3 else f"{taken * 1e6:.3g} us"
