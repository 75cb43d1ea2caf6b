"""A rewrite of a test's own, applied at the end of every compilation."""

from __future__ import annotations

from kpx import pipeline
from kpx.ir.module import stablehlo
from kpx.ir.rewrite import REWRITES, Rewrite


def plant(monkeypatch, apply, *, ops=(stablehlo.SineOp,), exact: bool = False) -> None:
    """Has the last stage of every compilation apply one more rewrite, which is called `planted`."""
    rule = Rewrite("planted", ops, apply, exact=exact, bound="none", doc="Planted.")
    before = pipeline.stages
    monkeypatch.setitem(REWRITES, "planted", rule)
    monkeypatch.setattr(
        pipeline,
        "stages",
        lambda context: [*before(context), pipeline.Stage("planted", pipeline.rewriting([rule]))],
    )
