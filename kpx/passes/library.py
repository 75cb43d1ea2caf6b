"""Matrix products by a library, where the target has one that is faster than XLA's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kpx.ir import module as m
from kpx.ir.module import Value, integers, producer, stablehlo
from kpx.ir.rewrite import rewrite
from kpx.ir.split import depends_on_weights_alone
from kpx.passes.precision import bf16_parts

# XLA's own code is as fast for less work than this, and fuses it with what is around.
_LEAST_FLOPS = 1 << 20
# A product of fewer rows, or with another side shorter, waits for memory more than for arithmetic, and is slower in
# three parts.
_LEAST_ROWS, _LEAST_SIDE = 64, 256


@dataclass(frozen=True)
class _Matrix:
    """How an operand's elements lie: as a matrix for each index of the batch dimensions, in elements."""

    transposed: bool
    leading: int
    batch_strides: tuple[int, ...]

    def attribute(self) -> list[int]:
        return [int(self.transposed), self.leading, *self.batch_strides]


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _collapsed(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, int] | None:
    """Size and stride of several dimensions as one, or None where their strides do not chain."""
    strides = _strides(shape)
    dims = [d for d in dims if shape[d] != 1]
    for outer, inner in itertools.pairwise(dims):
        if strides[outer] != strides[inner] * shape[inner]:
            return None
    return math.prod(shape[d] for d in dims), strides[dims[-1]] if dims else 0


def _matrix(shape, batch, rows, columns) -> _Matrix | None:
    """An array as matrices that a BLAS reads in place: rows or columns are contiguous. None where neither is."""
    r, c = _collapsed(shape, rows), _collapsed(shape, columns)
    if r is None or c is None:
        return None
    (height, row_stride), (width, column_stride) = r, c
    strides = _strides(shape)
    along = tuple(strides[d] for d in batch)
    if (column_stride == 1 or width == 1) and (height == 1 or row_stride >= width):
        return _Matrix(False, row_stride if height > 1 else width, along)
    if (row_stride == 1 or height == 1) and (width == 1 or column_stride >= height):
        return _Matrix(True, column_stride if width > 1 else height, along)
    return None


def _plan(dot, order: Sequence[int] | None = None) -> dict[str, list[int]] | None:
    """The attributes of a dot_general's custom call (see kernels/mkl.cc), its result's dimensions permuted by `order`.

    None where an operand or the result would have to be copied first, or where the work is too little.
    """
    numbers = stablehlo.DotDimensionNumbers(dot.dot_dimension_numbers)
    left, right, result = m.shape(dot.lhs), m.shape(dot.rhs), m.shape(dot.result)
    batch = list(numbers.lhs_batching_dimensions), list(numbers.rhs_batching_dimensions)
    inner = list(numbers.lhs_contracting_dimensions), list(numbers.rhs_contracting_dimensions)
    free = [[d for d in range(len(s)) if d not in b + c] for s, b, c in zip((left, right), batch, inner, strict=True)]
    count, rows = len(batch[0]), len(free[0])
    order = range(len(result)) if order is None else order
    at = [list(order).index(d) for d in range(len(result))]  # where each of the result's dimensions goes
    lhs = _matrix(left, batch[0], free[0], inner[0])
    rhs = _matrix(right, batch[1], inner[1], free[1])
    out = _matrix([result[d] for d in order], at[:count], at[count : count + rows], at[count + rows :])
    if lhs is None or rhs is None or out is None or out.transposed:
        return None
    sizes = [math.prod(left[d] for d in dims) for dims in (free[0], inner[0])]
    sizes.insert(1, math.prod(right[d] for d in free[1]))
    sizes += [left[d] for d in batch[0]]
    plan = {"sizes": sizes, "lhs": lhs.attribute(), "rhs": rhs.attribute(), "out": out.attribute()[1:]}
    too_long = max(max(numbers) for numbers in plan.values()) >= 1 << 31  # for MKL's integers
    is_by_vector = min(sizes[:2]) == 1  # waits for memory, whoever multiplies
    if 2 * math.prod(sizes) < _LEAST_FLOPS or is_by_vector or too_long:
        return None
    return plan


def _is(dot, *elements: str) -> bool:
    """Whether a dot takes and gives these element types, by no algorithm of its own."""
    found = (m.element_type(dot.lhs), m.element_type(dot.rhs), m.element_type(dot.result))
    return found == elements and dot.algorithm is None


def _call(target: str, plan: dict[str, list[int]], result_type, operands: Sequence[Value]) -> Value:
    return m.custom_call(target, result_type, operands, {k: m.i64_array(v) for k, v in plan.items()})


_ORDER = "sums are added in another order: a few ulps of the largest partial sum"


@rewrite(stablehlo.TransposeOp, exact=False, bound=_ORDER)
def mkl_product_writes_transposed(op):
    """A product and the transpose of its result are one call of MKL, which writes where the transpose would.

    Before:
        func.func @main(%a: tensor<4x8x32x64xf32>, %b: tensor<4x8x64x32xf32>) -> tensor<4x32x8x32xf32> {
          %0 = stablehlo.dot_general %a, %b, batching_dims = [0, 1] x [0, 1], contracting_dims = [3] x [2] : (tensor<4x8x32x64xf32>, tensor<4x8x64x32xf32>) -> tensor<4x8x32x32xf32>
          %1 = stablehlo.transpose %0, dims = [0, 2, 1, 3] : (tensor<4x8x32x32xf32>) -> tensor<4x32x8x32xf32>
          return %1 : tensor<4x32x8x32xf32>
        }
    After:
        func.func @main(%a: tensor<4x8x32x64xf32>, %b: tensor<4x8x64x32xf32>) -> tensor<4x32x8x32xf32> {
          %0 = stablehlo.custom_call @kpx_matmul_f32(%a, %b) {api_version = 4 : i32, backend_config = {lhs = array<i64: 0, 64, 16384, 2048>, out = array<i64: 256, 8192, 32>, rhs = array<i64: 0, 32, 16384, 2048>, sizes = array<i64: 32, 32, 64, 4, 8>}, operand_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>], result_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>]} : (tensor<4x8x32x64xf32>, tensor<4x8x64x32xf32>) -> tensor<4x32x8x32xf32>
          return %0 : tensor<4x32x8x32xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x8x32x64xf32>, %b: tensor<4x8x64x32xf32>) -> tensor<4x32x32x8xf32> {
          %0 = stablehlo.dot_general %a, %b, batching_dims = [0, 1] x [0, 1], contracting_dims = [3] x [2] : (tensor<4x8x32x64xf32>, tensor<4x8x64x32xf32>) -> tensor<4x8x32x32xf32>
          %1 = stablehlo.transpose %0, dims = [0, 2, 3, 1] : (tensor<4x8x32x32xf32>) -> tensor<4x32x32x8xf32>
          return %1 : tensor<4x32x32x8xf32>
        }
    """
    dot = producer(op.operand, stablehlo.DotGeneralOp)
    if dot is None or not m.has_one_use(op.operand) or not _is(dot, "f32", "f32", "f32"):
        return None
    plan = _plan(dot, integers(op.permutation))
    return None if plan is None else _call("kpx_matmul_f32", plan, op.result.type, [dot.lhs, dot.rhs])


@rewrite(stablehlo.DotGeneralOp, exact=False, bound=_ORDER)
def mkl_product(op):
    """A product of f32 arrays is a call of MKL, where that reads and writes them as they lie.

    Before:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<256x512xf32>) -> tensor<64x256xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [1] : (tensor<64x512xf32>, tensor<256x512xf32>) -> tensor<64x256xf32>
          return %0 : tensor<64x256xf32>
        }
    After:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<256x512xf32>) -> tensor<64x256xf32> {
          %0 = stablehlo.custom_call @kpx_matmul_f32(%a, %b) {api_version = 4 : i32, backend_config = {lhs = array<i64: 0, 512>, out = array<i64: 256>, rhs = array<i64: 1, 512>, sizes = array<i64: 64, 256, 512>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xf32>, tensor<256x512xf32>) -> tensor<64x256xf32>
          return %0 : tensor<64x256xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<64x16xf32>, %b: tensor<16x64xf32>) -> tensor<64x64xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<64x16xf32>, tensor<16x64xf32>) -> tensor<64x64xf32>
          return %0 : tensor<64x64xf32>
        }
    """
    if not _is(op, "f32", "f32", "f32"):
        return None
    only = m.users(op.result) if m.has_one_use(op.result) else []
    if only and isinstance(only[0], stablehlo.TransposeOp) and _plan(op, integers(only[0].permutation)):
        return None  # the rule above takes both
    plan = _plan(op)
    return None if plan is None else _call("kpx_matmul_f32", plan, op.result.type, [op.lhs, op.rhs])


@rewrite(stablehlo.DotGeneralOp, exact=False, bound=_ORDER)
def mkl_product_of_bf16(op):
    """A product of bf16 arrays summed in f32 is a call of MKL, where that reads and writes them as they lie.

    Before:
        func.func @main(%a: tensor<64x512xbf16>, %b: tensor<256x512xbf16>) -> tensor<64x256xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [1] : (tensor<64x512xbf16>, tensor<256x512xbf16>) -> tensor<64x256xf32>
          return %0 : tensor<64x256xf32>
        }
    After:
        func.func @main(%a: tensor<64x512xbf16>, %b: tensor<256x512xbf16>) -> tensor<64x256xf32> {
          %0 = stablehlo.custom_call @kpx_matmul_bf16(%a, %b) {api_version = 4 : i32, backend_config = {lhs = array<i64: 0, 512>, out = array<i64: 256>, rhs = array<i64: 1, 512>, sizes = array<i64: 64, 256, 512>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xbf16>, tensor<256x512xbf16>) -> tensor<64x256xf32>
          return %0 : tensor<64x256xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<64x512xbf16>, %b: tensor<256x512xbf16>) -> tensor<64x256xbf16> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [1] : (tensor<64x512xbf16>, tensor<256x512xbf16>) -> tensor<64x256xbf16>
          return %0 : tensor<64x256xbf16>
        }
    """
    plan = _plan(op) if _is(op, "bf16", "bf16", "f32") else None
    return None if plan is None else _call("kpx_matmul_bf16", plan, op.result.type, [op.lhs, op.rhs])


@rewrite(
    stablehlo.DotGeneralOp,
    exact=False,
    bound="each product of two f32 numbers within 2^-15 of itself: about 1e-5 of the output's scale",
)
def mkl_product_in_three_bf16(op):
    """An f32 product by a weight is three bf16 products by MKL, which splits the other operand as it goes.

    The weight's parts are made at load. See `f32_dot_as_three_bf16` for the method and its source.

    Before:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x512xf32> {kpx.weight}) -> tensor<64x512xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<64x512xf32>, tensor<512x512xf32>) -> tensor<64x512xf32>
          return %0 : tensor<64x512xf32>
        }
    After:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x512xf32> {kpx.weight}) -> tensor<64x512xf32> {
          %0 = stablehlo.reduce_precision %b, format = e8m7 : tensor<512x512xf32>
          %1 = stablehlo.convert %0 : (tensor<512x512xf32>) -> tensor<512x512xbf16>
          %2 = stablehlo.subtract %b, %0 : tensor<512x512xf32>
          %3 = stablehlo.convert %2 : (tensor<512x512xf32>) -> tensor<512x512xbf16>
          %4 = stablehlo.custom_call @kpx_matmul_f32_as_three_bf16(%a, %1, %3) {api_version = 4 : i32, backend_config = {lhs = array<i64: 0, 512>, out = array<i64: 512>, rhs = array<i64: 0, 512>, sizes = array<i64: 64, 512, 512>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xf32>, tensor<512x512xbf16>, tensor<512x512xbf16>) -> tensor<64x512xf32>
          return %4 : tensor<64x512xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x512xf32>) -> tensor<64x512xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<64x512xf32>, tensor<512x512xf32>) -> tensor<64x512xf32>
          return %0 : tensor<64x512xf32>
        }
    """
    if not _is(op, "f32", "f32", "f32") or depends_on_weights_alone(op.lhs) or not depends_on_weights_alone(op.rhs):
        return None
    plan = _plan(op)
    if plan is None or plan["lhs"][0] or plan["sizes"][0] < _LEAST_ROWS or min(plan["sizes"][1:3]) < _LEAST_SIDE:
        return None
    high, low = bf16_parts(op.rhs)
    return _call("kpx_matmul_f32_as_three_bf16", plan, op.result.type, [op.lhs, high, low])
