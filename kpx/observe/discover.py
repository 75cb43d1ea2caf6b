"""`kpx discover`: what a model computes between its products, over and over, that no fusion pattern takes."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kpx.api import optimized
from kpx.errors import InputError
from kpx.hardware.target import Target
from kpx.ir import module as m
from kpx.observe.as_jax import pattern_source
from kpx.observe.compiling import load
from kpx.observe.explain_table import size
from kpx.passes.regions import Region, regions

_SHOWN = {
    "stablehlo.constant",
    "stablehlo.iota",
    "stablehlo.broadcast_in_dim",
    "stablehlo.reshape",
    "stablehlo.convert",
}


@dataclass(frozen=True)
class Finding:
    """Regions of one shape.

    Attributes:
        count: how many there are, and `runs` how often they run in one call, loops counted.
        saved: bytes that one pass over memory each would not move, in one call.
        passes: over memory, that each makes now.
        operations: what it computes, in short.
        where: the path in the model of the first.
        source: a pattern's source, or None where it has an op that has no form in JAX.
    """

    name: str
    count: int
    runs: int
    saved: float
    passes: int
    operations: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    where: str
    source: str | None


def discover(fun: Any, *specs: Any, target: str | Target = "cuda:h100") -> list[Finding]:
    """What a function computes between its products that passes over memory more than once, most to save first.

    It is a model of the compiler, not a measurement: elementwise ops are fused, and a sum that is used along what it sums
    over begins another pass. Nothing is compiled; what kpx's patterns take for the target is not among it.

    Args:
        specs: the inputs, arrays or `jax.ShapeDtypeStruct`s.
    """
    module = optimized(fun, *specs, target=target)
    alike: dict[str, list[Region]] = collections.defaultdict(list)
    for region in regions(module):
        alike[region.shape].append(region)
    ranked = sorted(alike.values(), key=lambda found: -sum(r.saved * r.runs for r in found))
    return [_finding(found, f"region_{i + 1}") for i, found in enumerate(ranked)]


def _finding(found: Sequence[Region], name: str) -> Finding:
    first, saved = found[0], sum(r.saved * r.runs for r in found)
    kinds = collections.Counter(op.operation.name for op in first.ops if op.operation.name not in _SHOWN)
    operations = ", ".join(
        f"{n} {kind.partition('.')[2]}" if n > 1 else kind.partition(".")[2] for kind, n in kinds.items()
    )
    where = m.source_path(first.ops[-1])
    runs = sum(r.runs for r in found)
    told = (
        f"Runs {runs} times in a call; one pass over memory each would save {size(saved)}. First in {where or 'main'}."
    )
    inputs, outputs = (tuple(str(v.type).removeprefix("tensor") for v in of) for of in (first.inputs, first.outputs))
    source = pattern_source(first, name, [told])
    return Finding(name, len(found), runs, saved, first.passes, operations, inputs, outputs, where, source)


def run(name: str, inputs: Sequence[str], target: str, write: str | None, progress: Console) -> list[dict[str, Any]]:
    """What the command prints, and writes.

    Raises:
        InputError: there is nothing to write.
    """
    fun, specs = load(name, inputs)
    found = discover(fun, *specs, target=target)
    if write:
        source = next((f.source for f in found if f.source), None)
        if source is None:
            raise InputError(
                f"`{name}` has no region that a pattern could be written of: nothing was written to {write}."
            )
        pathlib.Path(write).write_text(source)
        progress.print(f"The pattern's skeleton is {write}.", highlight=False)
    return [vars(f) for f in found]


def show(console: Console, result: Sequence[dict[str, Any]]) -> None:
    """Prints findings, the first ten."""
    if not result:
        console.print("Nothing passes over memory more than once between products.")
        return
    table = Table("", "runs", "passes", "would save", "what", "where")
    for found in result[:10]:
        table.add_row(
            found["name"], str(found["runs"]), str(found["passes"]), size(found["saved"]), escape(found["operations"]),
            escape(found["where"]),
        )  # fmt: skip
    console.print(table)
    if len(result) > 10:
        console.print(f"and {len(result) - 10} more (`--json`)")
