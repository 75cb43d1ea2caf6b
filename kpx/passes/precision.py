"""In which precision products are computed."""

from __future__ import annotations

from kpx.config import Config
from kpx.ir import module as m
from kpx.ir.module import stablehlo
from kpx.ir.rewrite import Rewrite, rewrite


@rewrite(
    stablehlo.DotGeneralOp,
    exact=False,
    bound="sums are rounded to bf16 once, at the end: no farther from the true sum than before",
)
def bf16_dot_yields_f32(op):
    """A bf16 product is accumulated in f32 and rounded once, which the CPU's bf16 units do.

    Before:
        func.func @main(%a: tensor<4x8xbf16>, %b: tensor<8x4xbf16>) -> tensor<4x4xbf16> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<4x8xbf16>, tensor<8x4xbf16>) -> tensor<4x4xbf16>
          return %0 : tensor<4x4xbf16>
        }
    After:
        func.func @main(%a: tensor<4x8xbf16>, %b: tensor<8x4xbf16>) -> tensor<4x4xbf16> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<4x8xbf16>, tensor<8x4xbf16>) -> tensor<4x4xf32>
          %1 = stablehlo.convert %0 : (tensor<4x4xf32>) -> tensor<4x4xbf16>
          return %1 : tensor<4x4xbf16>
        }
    Unchanged:
        func.func @main(%a: tensor<4x8xf32>, %b: tensor<8x4xf32>) -> tensor<4x4xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<4x8xf32>, tensor<8x4xf32>) -> tensor<4x4xf32>
          return %0 : tensor<4x4xf32>
        }
    """
    if {m.element_type(v) for v in (op.lhs, op.rhs, op.result)} != {"bf16"} or op.algorithm is not None:
        return None
    wide = stablehlo.dot_general(
        m.tensor(m.shape(op.result), "f32"),
        op.lhs,
        op.rhs,
        op.dot_dimension_numbers,
        precision_config=op.precision_config,
    )
    return m.convert(wide, "bf16")


def rules(config: Config) -> list[Rewrite]:
    """The precision rewrites that a config asks for."""
    return [bf16_dot_yields_f32]
