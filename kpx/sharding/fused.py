"""What a target's kernels compute at once is marked in a module, so that planning counts nothing between in memory."""

from __future__ import annotations

from kpx.config import Config
from kpx.hardware.target import Target
from kpx.ir import module as m
from kpx.ir.module import ir
from kpx.passes import fusion, loops
from kpx.pipeline import optimize_module
from kpx.runtime.build import context_for
from kpx.sharding.graph import FUSED


def mark(module: ir.Module, target: Target, config: Config) -> None:
    """Canonicalizes a module as a target's pipeline does, and marks what its fusion patterns would take, in place."""
    context = context_for(target, config)
    optimize_module(module, context, before="fuse")
    if target.platform == "cpu" or not context.device.is_known or not config.may_be_inexact:
        return
    loops.sink_constants(module)
    m.run_passes(module, "cse")  # as fusion does first
    number = 0
    taken = set()
    for match in sorted(
        fusion.matches(module, context.device, frozenset(config.disable)), key=lambda match: -match.gain
    ):
        made = {r for op in match.ops for r in op.results if not fusion.is_free(op)}
        if made & taken:
            continue
        taken |= made
        number += 1
        for op in match.ops:
            if not fusion.is_free(op):
                with module.context:
                    kind = ir.IntegerType.get_signless(64)
                    op.operation.attributes[FUSED] = ir.IntegerAttr.get(kind, number)
