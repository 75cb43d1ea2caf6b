"""In which precision products are computed."""

from __future__ import annotations

from kpx.ir import module as m
from kpx.ir.module import stablehlo
from kpx.ir.rewrite import rewrite
from kpx.ir.split import depends_on_weights_alone


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


@rewrite(
    stablehlo.ConvertOp,
    exact=False,
    bound="matrix units sum bf16 products in f32 and round once, as before; where one does not, sums are of bf16",
)
def rounded_product_yields_bf16(op):
    """A bf16 product that is rounded is one that gives bf16, which accelerators sum in f32 all the same.

    Before:
        func.func @main(%a: tensor<4x8xbf16>, %b: tensor<8x4xbf16>) -> tensor<4x4xbf16> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<4x8xbf16>, tensor<8x4xbf16>) -> tensor<4x4xf32>
          %1 = stablehlo.convert %0 : (tensor<4x4xf32>) -> tensor<4x4xbf16>
          return %1 : tensor<4x4xbf16>
        }
    After:
        func.func @main(%a: tensor<4x8xbf16>, %b: tensor<8x4xbf16>) -> tensor<4x4xbf16> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<4x8xbf16>, tensor<8x4xbf16>) -> tensor<4x4xbf16>
          return %0 : tensor<4x4xbf16>
        }
    Unchanged:
        func.func @main(%a: tensor<4x8xbf16>, %b: tensor<8x4xbf16>) -> (tensor<4x4xbf16>, tensor<4x4xf32>) {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<4x8xbf16>, tensor<8x4xbf16>) -> tensor<4x4xf32>
          %1 = stablehlo.convert %0 : (tensor<4x4xf32>) -> tensor<4x4xbf16>
          return %1, %0 : tensor<4x4xbf16>, tensor<4x4xf32>
        }
    """
    product = m.producer(op.operand, stablehlo.DotGeneralOp)
    if product is None or product.algorithm is not None or not m.has_one_use(op.operand):
        return None
    if [m.element_type(v) for v in (product.lhs, product.rhs, op.operand, op.result)] != [
        "bf16",
        "bf16",
        "f32",
        "bf16",
    ]:
        return None
    return stablehlo.dot_general(
        op.result.type,
        product.lhs,
        product.rhs,
        product.dot_dimension_numbers,
        precision_config=product.precision_config,
    )


@rewrite(
    stablehlo.DotGeneralOp,
    exact=False,
    bound="the same products, which f32 holds exactly, summed in f32 in another order",
)
def product_of_widened(op):
    """A product in f32 of arrays that were widened for it is one of the arrays as they are, summed in f32.

    Matrix units take bf16 twice as fast as f32 rounded to TF32, and read half as much. JAX's gradient of a product that
    is summed in f32 is of this form.

    Before:
        func.func @main(%a: tensor<4x8xbf16>, %b: tensor<8x4xbf16>) -> tensor<4x4xf32> {
          %0 = stablehlo.convert %a : (tensor<4x8xbf16>) -> tensor<4x8xf32>
          %1 = stablehlo.convert %b : (tensor<8x4xbf16>) -> tensor<8x4xf32>
          %2 = stablehlo.dot_general %0, %1, contracting_dims = [1] x [0] : (tensor<4x8xf32>, tensor<8x4xf32>) -> tensor<4x4xf32>
          return %2 : tensor<4x4xf32>
        }
    After:
        func.func @main(%a: tensor<4x8xbf16>, %b: tensor<8x4xbf16>) -> tensor<4x4xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<4x8xbf16>, tensor<8x4xbf16>) -> tensor<4x4xf32>
          return %0 : tensor<4x4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x8xbf16>, %b: tensor<8x4xf32>) -> tensor<4x4xf32> {
          %0 = stablehlo.convert %a : (tensor<4x8xbf16>) -> tensor<4x8xf32>
          %1 = stablehlo.dot_general %0, %b, contracting_dims = [1] x [0] : (tensor<4x8xf32>, tensor<8x4xf32>) -> tensor<4x4xf32>
          return %1 : tensor<4x4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x8xbf16>, %b: tensor<8x4xf16>) -> tensor<4x4xf32> {
          %0 = stablehlo.convert %a : (tensor<4x8xbf16>) -> tensor<4x8xf32>
          %1 = stablehlo.convert %b : (tensor<8x4xf16>) -> tensor<8x4xf32>
          %2 = stablehlo.dot_general %0, %1, contracting_dims = [1] x [0] : (tensor<4x8xf32>, tensor<8x4xf32>) -> tensor<4x4xf32>
          return %2 : tensor<4x4xf32>
        }
    """
    made = [m.producer(v, stablehlo.ConvertOp) for v in (op.lhs, op.rhs)]
    if any(convert is None for convert in made) or op.algorithm is not None or m.element_type(op.result) != "f32":
        return None
    narrow = [convert.operand for convert in made]
    if {m.element_type(v) for v in narrow} not in ({"bf16"}, {"f16"}):
        return None
    return stablehlo.dot_general(
        op.result.type, *narrow, op.dot_dimension_numbers, precision_config=op.precision_config
    )


OFF_CPU = [product_of_widened, rounded_product_yields_bf16]
"""What matrix units of accelerators take better."""


@rewrite(stablehlo.DotGeneralOp, exact=True)
def bf16_dot_that_xla_refuses(op):
    """A bf16 product summed in f32 whose layout XLA:CPU moves only after it has settled how bf16 is computed.

    "DotThunk: unsupported element type BF16 x BF16 = F32" (XLA of jax 0.10): the left operand has its batch
    dimensions first and contracts the one before the last, the right has its batch dimensions elsewhere. It is what
    attention's backward pass does with values. As f32 operands, which hold bf16 exactly, XLA takes it. (The example's
    batch of one is the only one that XLA takes as it is, so that a test can compare.)

    Before:
        func.func @main(%a: tensor<1x8x4xbf16>, %b: tensor<8x1x5xbf16>) -> tensor<1x4x5xf32> {
          %0 = stablehlo.dot_general %a, %b, batching_dims = [0] x [1], contracting_dims = [1] x [0] : (tensor<1x8x4xbf16>, tensor<8x1x5xbf16>) -> tensor<1x4x5xf32>
          return %0 : tensor<1x4x5xf32>
        }
    After:
        func.func @main(%a: tensor<1x8x4xbf16>, %b: tensor<8x1x5xbf16>) -> tensor<1x4x5xf32> {
          %0 = stablehlo.convert %a : (tensor<1x8x4xbf16>) -> tensor<1x8x4xf32>
          %1 = stablehlo.convert %b : (tensor<8x1x5xbf16>) -> tensor<8x1x5xf32>
          %2 = stablehlo.dot_general %0, %1, batching_dims = [0] x [1], contracting_dims = [1] x [0] : (tensor<1x8x4xf32>, tensor<8x1x5xf32>) -> tensor<1x4x5xf32>
          return %2 : tensor<1x4x5xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x8x4xbf16>, %b: tensor<2x8x5xbf16>) -> tensor<2x4x5xf32> {
          %0 = stablehlo.dot_general %a, %b, batching_dims = [0] x [0], contracting_dims = [1] x [1] : (tensor<2x8x4xbf16>, tensor<2x8x5xbf16>) -> tensor<2x4x5xf32>
          return %0 : tensor<2x4x5xf32>
        }
    """
    kinds = m.element_type(op.lhs), m.element_type(op.rhs), m.element_type(op.result)
    if kinds != ("bf16", "bf16", "f32") or op.algorithm is not None:
        return None
    dims = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    leading = list(range(len(dims.lhs_batching_dimensions)))
    transposed = list(dims.lhs_contracting_dimensions) == [len(leading)]
    if not leading or not transposed or list(dims.rhs_batching_dimensions) == leading:
        return None
    operands = m.convert(op.lhs, "f32"), m.convert(op.rhs, "f32")
    return stablehlo.dot_general(
        op.result.type, *operands, op.dot_dimension_numbers, precision_config=op.precision_config
    )


@rewrite(stablehlo.TransposeOp, exact=True)
def transposed_bf16_dot_that_xla_refuses(op):
    """A bf16 product summed in f32 that is transposed is the product of the factors in the other order.

    XLA:CPU (of jax 0.10) folds the transpose into the product's layout, and then has no kernel: "Unsupported element type
    for DotThunk::Execute: BF16 x BF16 = F32". It is what JAX's gradient of a weight is. (A row of one is what XLA takes as it
    is, so that a test can compare.)

    Before:
        func.func @main(%a: tensor<1x4xbf16>, %b: tensor<4x5xbf16>) -> tensor<5x1xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<1x4xbf16>, tensor<4x5xbf16>) -> tensor<1x5xf32>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<1x5xf32>) -> tensor<5x1xf32>
          return %1 : tensor<5x1xf32>
        }
    After:
        func.func @main(%a: tensor<1x4xbf16>, %b: tensor<4x5xbf16>) -> tensor<5x1xf32> {
          %0 = stablehlo.dot_general %b, %a, contracting_dims = [0] x [1] : (tensor<4x5xbf16>, tensor<1x4xbf16>) -> tensor<5x1xf32>
          return %0 : tensor<5x1xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<1x4xf32>, %b: tensor<4x5xf32>) -> tensor<5x1xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<1x4xf32>, tensor<4x5xf32>) -> tensor<1x5xf32>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<1x5xf32>) -> tensor<5x1xf32>
          return %1 : tensor<5x1xf32>
        }
    """
    dot = m.producer(op.operand, stablehlo.DotGeneralOp)
    if dot is None or dot.algorithm is not None or not m.has_one_use(dot.result):
        return None
    if [m.element_type(v) for v in (dot.lhs, dot.rhs, dot.result)] != ["bf16", "bf16", "f32"]:
        return None
    dims = stablehlo.DotDimensionNumbers(dot.dot_dimension_numbers)
    inner = list(dims.lhs_contracting_dimensions), list(dims.rhs_contracting_dimensions)
    left = m.rank(dot.lhs) - len(inner[0])
    exchanged = [*range(left, m.rank(dot.result)), *range(left)]
    if list(dims.lhs_batching_dimensions) or m.integers(op.permutation) != exchanged:
        return None
    numbers = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=[], rhs_batching_dimensions=[], lhs_contracting_dimensions=inner[1],
        rhs_contracting_dimensions=inner[0],
    )  # fmt: skip
    return stablehlo.dot_general(op.result.type, dot.rhs, dot.lhs, numbers, precision_config=dot.precision_config)


@rewrite(
    stablehlo.DotGeneralOp,
    exact=False,
    bound="each product of two f32 numbers within 2^-15 of itself: about 1e-5 of the output's scale",
)
def f32_dot_as_three_bf16(op):
    """An f32 product by a weight is three bf16 products: high by high, high by low, low by high.

    A number is split into bf16 numbers that carry its upper 16 bits; the product of the two low parts is left
    out, and so are low parts that are not finite. The weight's parts are made at load. PyTorch calls this
    precision "high" (bf16x3).
    Source: Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For
    Higher-Precision Computations", arXiv 1904.06376.

    Before:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x512xf32> {kpx.weight}) -> tensor<64x512xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<64x512xf32>, tensor<512x512xf32>) -> tensor<64x512xf32>
          return %0 : tensor<64x512xf32>
        }
    After:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x512xf32> {kpx.weight}) -> tensor<64x512xf32> {
          %0 = stablehlo.reduce_precision %a, format = e8m7 : tensor<64x512xf32>
          %1 = stablehlo.convert %0 : (tensor<64x512xf32>) -> tensor<64x512xbf16>
          %2 = stablehlo.subtract %a, %0 : tensor<64x512xf32>
          %3 = stablehlo.convert %2 : (tensor<64x512xf32>) -> tensor<64x512xbf16>
          %4 = stablehlo.reduce_precision %b, format = e8m7 : tensor<512x512xf32>
          %5 = stablehlo.convert %4 : (tensor<512x512xf32>) -> tensor<512x512xbf16>
          %6 = stablehlo.subtract %b, %4 : tensor<512x512xf32>
          %7 = stablehlo.convert %6 : (tensor<512x512xf32>) -> tensor<512x512xbf16>
          %8 = stablehlo.dot_general %1, %7, contracting_dims = [1] x [0] : (tensor<64x512xbf16>, tensor<512x512xbf16>) -> tensor<64x512xf32>
          %9 = stablehlo.dot_general %3, %5, contracting_dims = [1] x [0] : (tensor<64x512xbf16>, tensor<512x512xbf16>) -> tensor<64x512xf32>
          %10 = stablehlo.add %8, %9 : tensor<64x512xf32>
          %11 = stablehlo.is_finite %10 : (tensor<64x512xf32>) -> tensor<64x512xi1>
          %12 = stablehlo.constant dense<0.0> : tensor<64x512xf32>
          %13 = stablehlo.select %11, %10, %12 : tensor<64x512xi1>, tensor<64x512xf32>
          %14 = stablehlo.dot_general %1, %5, contracting_dims = [1] x [0] : (tensor<64x512xbf16>, tensor<512x512xbf16>) -> tensor<64x512xf32>
          %15 = stablehlo.add %14, %13 : tensor<64x512xf32>
          return %15 : tensor<64x512xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x512xf32>) -> tensor<64x512xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<64x512xf32>, tensor<512x512xf32>) -> tensor<64x512xf32>
          return %0 : tensor<64x512xf32>
        }
    """
    if {m.element_type(v) for v in (op.lhs, op.rhs, op.result)} != {"f32"} or op.algorithm is not None:
        return None
    by_weight = depends_on_weights_alone(op.rhs) and not depends_on_weights_alone(op.lhs)
    # A small product, or one of few rows or very many results, waits for memory more than for arithmetic, and
    # is slower in three parts.
    length = _contracted(op)
    rows, columns = m.size(op.lhs) // length, m.size(op.rhs) // length
    if not by_weight or rows < 64 or min(length, columns) < 512 or rows * columns > 1 << 23:
        return None
    (high_l, low_l), (high_r, low_r) = bf16_parts(op.lhs), bf16_parts(op.rhs)

    def product(lhs, rhs):
        return stablehlo.dot_general(op.result.type, lhs, rhs, op.dot_dimension_numbers)

    small = stablehlo.add(product(high_l, low_r), product(low_l, high_r))
    # Infinities and NaN come from the product of the high parts alone.
    small = stablehlo.select(stablehlo.is_finite(small), small, m.full(op.result.type, 0))
    return stablehlo.add(product(high_l, high_r), small)


def _contracted(op) -> int:
    length = 1
    for d in stablehlo.DotDimensionNumbers(op.dot_dimension_numbers).lhs_contracting_dimensions:
        length *= m.shape(op.lhs)[d]
    return length


def bf16_parts(value):
    """An f32 array as two bf16 ones: what bf16 holds of it, and what it holds of the rest."""
    # reduce_precision, not a convert there and back: XLA may take that for nothing.
    high = stablehlo.reduce_precision(value, 8, 7)
    return m.convert(high, "bf16"), m.convert(stablehlo.subtract(value, high), "bf16")


_MOVES = (stablehlo.TransposeOp, stablehlo.ReshapeOp, stablehlo.BroadcastInDimOp)


def _moved(op, value):
    """What a movement does, done to another value."""
    return m.rebuild(op, [value], [m.tensor(m.shape(op.results[0]), m.tensor_type(value).element_type)]).results[0]


@rewrite(stablehlo.ConvertOp, exact=True)
def narrowed_before_moved(op):
    """Floating numbers are rounded before they are moved: half the bytes, and what made them can round them.

    Before:
        func.func @main(%a: tensor<4x8xf32>) -> tensor<8x4xbf16> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<4x8xf32>) -> tensor<8x4xf32>
          %1 = stablehlo.convert %0 : (tensor<8x4xf32>) -> tensor<8x4xbf16>
          return %1 : tensor<8x4xbf16>
        }
    After:
        func.func @main(%a: tensor<4x8xf32>) -> tensor<8x4xbf16> {
          %0 = stablehlo.convert %a : (tensor<4x8xf32>) -> tensor<4x8xbf16>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<4x8xbf16>) -> tensor<8x4xbf16>
          return %1 : tensor<8x4xbf16>
        }
    Unchanged:
        func.func @main(%a: tensor<4x8xbf16>) -> tensor<8x4xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<4x8xbf16>) -> tensor<8x4xbf16>
          %1 = stablehlo.convert %0 : (tensor<8x4xbf16>) -> tensor<8x4xf32>
          return %1 : tensor<8x4xf32>
        }
    """
    move = m.producer(op.operand)
    if not isinstance(move, _MOVES) or not m.has_one_use(op.operand) or not _narrows(op.operand, op.result):
        return None
    return _moved(move, m.convert(move.operand, m.tensor_type(op.result).element_type))


def _widened_after(op):
    wide = m.producer(op.operand, stablehlo.ConvertOp)
    if wide is None or not m.has_one_use(op.operand) or not _narrows(wide.result, wide.operand):
        return None
    return m.convert(_moved(op, wide.operand), m.tensor_type(op.result).element_type)


@rewrite(stablehlo.TransposeOp, exact=True)
def widened_after_transposed(op):
    """Floating numbers are widened after they are transposed: half the bytes, and rounded again they are as they were.

    Before:
        func.func @main(%a: tensor<4x8xbf16>) -> tensor<8x4xf32> {
          %0 = stablehlo.convert %a : (tensor<4x8xbf16>) -> tensor<4x8xf32>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<4x8xf32>) -> tensor<8x4xf32>
          return %1 : tensor<8x4xf32>
        }
    After:
        func.func @main(%a: tensor<4x8xbf16>) -> tensor<8x4xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<4x8xbf16>) -> tensor<8x4xbf16>
          %1 = stablehlo.convert %0 : (tensor<8x4xbf16>) -> tensor<8x4xf32>
          return %1 : tensor<8x4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x8xf32>) -> tensor<8x4xbf16> {
          %0 = stablehlo.convert %a : (tensor<4x8xf32>) -> tensor<4x8xbf16>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<4x8xbf16>) -> tensor<8x4xbf16>
          return %1 : tensor<8x4xbf16>
        }
    """
    return _widened_after(op)


@rewrite(stablehlo.ReshapeOp, exact=True)
def widened_after_reshaped(op):
    """Floating numbers are widened after they are reshaped, so that rounded again they are as they were.

    Before:
        func.func @main(%a: tensor<4x8xbf16>) -> tensor<32xf32> {
          %0 = stablehlo.convert %a : (tensor<4x8xbf16>) -> tensor<4x8xf32>
          %1 = stablehlo.reshape %0 : (tensor<4x8xf32>) -> tensor<32xf32>
          return %1 : tensor<32xf32>
        }
    After:
        func.func @main(%a: tensor<4x8xbf16>) -> tensor<32xf32> {
          %0 = stablehlo.reshape %a : (tensor<4x8xbf16>) -> tensor<32xbf16>
          %1 = stablehlo.convert %0 : (tensor<32xbf16>) -> tensor<32xf32>
          return %1 : tensor<32xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x8xf32>) -> tensor<32xbf16> {
          %0 = stablehlo.convert %a : (tensor<4x8xf32>) -> tensor<4x8xbf16>
          %1 = stablehlo.reshape %0 : (tensor<4x8xbf16>) -> tensor<32xbf16>
          return %1 : tensor<32xbf16>
        }
    """
    return _widened_after(op)


@rewrite(stablehlo.ConvertOp, exact=True)
def rounded_again(op):
    """Numbers that were widened and are rounded to what they were are what they were.

    Before:
        func.func @main(%a: tensor<8xbf16>) -> tensor<8xbf16> {
          %0 = stablehlo.convert %a : (tensor<8xbf16>) -> tensor<8xf32>
          %1 = stablehlo.convert %0 : (tensor<8xf32>) -> tensor<8xbf16>
          return %1 : tensor<8xbf16>
        }
    After:
        func.func @main(%a: tensor<8xbf16>) -> tensor<8xbf16> {
          return %a : tensor<8xbf16>
        }
    Unchanged:
        func.func @main(%a: tensor<8xf32>) -> tensor<8xf32> {
          %0 = stablehlo.convert %a : (tensor<8xf32>) -> tensor<8xbf16>
          %1 = stablehlo.convert %0 : (tensor<8xbf16>) -> tensor<8xf32>
          return %1 : tensor<8xf32>
        }
    """
    wide = m.producer(op.operand, stablehlo.ConvertOp)
    if wide is None or wide.operand.type != op.result.type or not _narrows(wide.result, wide.operand):
        return None
    return wide.operand


def _narrows(wide, narrow) -> bool:
    """Whether one array's floating numbers are f32 and the other's are half as wide, each of which f32 holds."""
    return m.element_type(wide) == "f32" and m.element_type(narrow) in ("bf16", "f16")


MOVED = [narrowed_before_moved, widened_after_transposed, widened_after_reshaped, rounded_again]
"""Conversions go to where they cost least."""
