"""Convolutions and pooling in the forms that the CPU's kernels take (see docs in each rule)."""

from __future__ import annotations

import functools

from kpx.ir import module as m
from kpx.ir.module import integers, producer, stablehlo
from kpx.ir.rewrite import Rewrite, rewrite
from kpx.ir.split import depends_on_weights_alone

_NHWC = ([0, 1, 2, 3],) * 3


def _numbers(op):
    return stablehlo.ConvDimensionNumbers(op.dimension_numbers)


def _orders(numbers):
    """How input, kernel and output are permuted into NHWC, HWIO and NHWC."""
    return (
        [numbers.input_batch_dimension, *numbers.input_spatial_dimensions, numbers.input_feature_dimension],
        [*numbers.kernel_spatial_dimensions, numbers.kernel_input_feature_dimension,
         numbers.kernel_output_feature_dimension],
        [numbers.output_batch_dimension, *numbers.output_spatial_dimensions, numbers.output_feature_dimension],
    )  # fmt: skip


def _channels_last():
    return stablehlo.ConvDimensionNumbers.get(0, 3, [1, 2], 2, 3, [0, 1], 0, 3, [1, 2])


def _convolve(lhs, rhs, result_type, like, numbers):
    fields = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "window_reversal", "precision_config")
    kept = {name: getattr(like, name) for name in fields}
    return stablehlo.convolution(
        result_type, lhs, rhs, numbers, like.feature_group_count, like.batch_group_count, **kept
    )


@rewrite(
    stablehlo.ConvolutionOp,
    exact=False,
    bound="the products of each sum may be added in another order: a few ulps of the largest partial sum",
)
def convolution_channels_last(op):
    """A 2-D convolution runs with channels last (NHWC and HWIO), the order XLA's CPU kernels take.

    Before:
        func.func @main(%x: tensor<1x3x8x8xf32>, %w: tensor<4x3x3x3xf32>) -> tensor<1x4x6x6xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, f, 0, 1]x[o, i, 0, 1]->[b, f, 0, 1], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x3x8x8xf32>, tensor<4x3x3x3xf32>) -> tensor<1x4x6x6xf32>
          return %0 : tensor<1x4x6x6xf32>
        }
    After:
        func.func @main(%x: tensor<1x3x8x8xf32>, %w: tensor<4x3x3x3xf32>) -> tensor<1x4x6x6xf32> {
          %0 = stablehlo.transpose %x, dims = [0, 2, 3, 1] : (tensor<1x3x8x8xf32>) -> tensor<1x8x8x3xf32>
          %1 = stablehlo.transpose %w, dims = [2, 3, 1, 0] : (tensor<4x3x3x3xf32>) -> tensor<3x3x3x4xf32>
          %2 = stablehlo.convolution(%0, %1) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x3xf32>, tensor<3x3x3x4xf32>) -> tensor<1x6x6x4xf32>
          %3 = stablehlo.transpose %2, dims = [0, 3, 1, 2] : (tensor<1x6x6x4xf32>) -> tensor<1x4x6x6xf32>
          return %3 : tensor<1x4x6x6xf32>
        }
    Unchanged:
        func.func @main(%x: tensor<1x8x8x3xf32>, %w: tensor<3x3x3x4xf32>) -> tensor<1x6x6x4xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x3xf32>, tensor<3x3x3x4xf32>) -> tensor<1x6x6x4xf32>
          return %0 : tensor<1x6x6x4xf32>
        }
    """
    if m.rank(op.lhs) != 4:
        return None
    orders = _orders(_numbers(op))
    if orders == _NHWC:
        return None
    kind = m.tensor_type(op.result)
    y = _convolve(
        m.transpose(op.lhs, orders[0]),
        m.transpose(op.rhs, orders[1]),
        m.tensor([kind.shape[d] for d in orders[2]], kind.element_type),
        op,
        _channels_last(),
    )
    return m.transpose(y, [orders[2].index(d) for d in range(4)])


def is_channels_last(op) -> bool:
    """A 2-D convolution with channels last, its input not dilated, with neither reversal nor batch groups."""
    if m.rank(op.lhs) != 4 or _orders(_numbers(op)) != _NHWC or op.batch_group_count.value != 1:
        return False
    dilated = op.lhs_dilation is not None and any(d != 1 for d in integers(op.lhs_dilation))
    return not dilated and (op.window_reversal is None or not any(m.bools(op.window_reversal)))


def _plain(op) -> bool:
    """Channels last, with neither dilation nor reversal nor batch groups."""
    return is_channels_last(op) and (op.rhs_dilation is None or all(d == 1 for d in integers(op.rhs_dilation)))


def padding(op) -> list[tuple[int, int]]:
    """What a convolution pads its input by, before and after, by dimension."""
    return [(0, 0), (0, 0)] if op.padding is None else m.pairs(op.padding)


def strides(op) -> list[int]:
    """By how much a convolution's windows move, by dimension."""
    return [1, 1] if op.window_strides is None else integers(op.window_strides)


@rewrite(
    stablehlo.ConvolutionOp,
    exact=False,
    bound="the products of each sum may be added in another order: a few ulps of the largest partial sum",
)
def pointwise_convolution_is_dot(op):
    """A 1x1 convolution with channels last is a matrix product over the channels.

    Before:
        func.func @main(%x: tensor<1x8x8x3xf32>, %w: tensor<1x1x3x4xf32>) -> tensor<1x8x8x4xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x3xf32>, tensor<1x1x3x4xf32>) -> tensor<1x8x8x4xf32>
          return %0 : tensor<1x8x8x4xf32>
        }
    After:
        func.func @main(%x: tensor<1x8x8x3xf32>, %w: tensor<1x1x3x4xf32>) -> tensor<1x8x8x4xf32> {
          %0 = stablehlo.reshape %x : (tensor<1x8x8x3xf32>) -> tensor<64x3xf32>
          %1 = stablehlo.reshape %w : (tensor<1x1x3x4xf32>) -> tensor<3x4xf32>
          %2 = stablehlo.dot_general %0, %1, contracting_dims = [1] x [0] : (tensor<64x3xf32>, tensor<3x4xf32>) -> tensor<64x4xf32>
          %3 = stablehlo.reshape %2 : (tensor<64x4xf32>) -> tensor<1x8x8x4xf32>
          return %3 : tensor<1x8x8x4xf32>
        }
    Unchanged:
        func.func @main(%x: tensor<1x8x8x3xf32>, %w: tensor<1x2x3x4xf32>) -> tensor<1x8x7x4xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x3xf32>, tensor<1x2x3x4xf32>) -> tensor<1x8x7x4xf32>
          return %0 : tensor<1x8x7x4xf32>
        }
    """
    if not _plain(op) or m.shape(op.rhs)[:2] != (1, 1) or op.feature_group_count.value != 1:
        return None
    if any(p != (0, 0) for p in padding(op)):
        return None
    n, h, w, c = m.shape(op.lhs)
    x = m.slice_(op.lhs, [0] * 4, [n, h, w, c], [1, *strides(op), 1])
    return _windows_by_kernel(x, op)


def _windows_by_kernel(windows, op):
    """A convolution as the product of its windows' elements, row by row, and its kernel as a matrix."""
    kind, out = m.tensor_type(op.result), m.shape(op.rhs)[3]
    rows, length = m.size(op.result) // out, m.size(op.rhs) // out
    y = stablehlo.dot_general(
        m.tensor([rows, out], kind.element_type),
        m.reshape(windows, [rows, length]),
        m.reshape(op.rhs, [length, out]),
        stablehlo.DotDimensionNumbers.get([], [], [1], [0]),
        precision_config=op.precision_config,
    )
    return m.reshape(y, kind.shape)


@rewrite(
    stablehlo.ConvolutionOp,
    exact=False,
    bound="the products of each sum may be added in another order: a few ulps of the largest partial sum",
)
def patch_convolution_is_dot(op):
    """A convolution whose windows neither overlap nor leave gaps is a matrix product over the patches.

    Before:
        func.func @main(%x: tensor<2x8x6x3xf32>, %w: tensor<4x2x3x5xf32>) -> tensor<2x2x3x5xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {stride = [4, 2]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<2x8x6x3xf32>, tensor<4x2x3x5xf32>) -> tensor<2x2x3x5xf32>
          return %0 : tensor<2x2x3x5xf32>
        }
    After:
        func.func @main(%x: tensor<2x8x6x3xf32>, %w: tensor<4x2x3x5xf32>) -> tensor<2x2x3x5xf32> {
          %0 = stablehlo.reshape %x : (tensor<2x8x6x3xf32>) -> tensor<2x2x4x3x2x3xf32>
          %1 = stablehlo.transpose %0, dims = [0, 1, 3, 2, 4, 5] : (tensor<2x2x4x3x2x3xf32>) -> tensor<2x2x3x4x2x3xf32>
          %2 = stablehlo.reshape %1 : (tensor<2x2x3x4x2x3xf32>) -> tensor<12x24xf32>
          %3 = stablehlo.reshape %w : (tensor<4x2x3x5xf32>) -> tensor<24x5xf32>
          %4 = stablehlo.dot_general %2, %3, contracting_dims = [1] x [0] : (tensor<12x24xf32>, tensor<24x5xf32>) -> tensor<12x5xf32>
          %5 = stablehlo.reshape %4 : (tensor<12x5xf32>) -> tensor<2x2x3x5xf32>
          return %5 : tensor<2x2x3x5xf32>
        }
    Unchanged:
        func.func @main(%x: tensor<2x9x6x3xf32>, %w: tensor<4x2x3x5xf32>) -> tensor<2x2x3x5xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {stride = [4, 2]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<2x9x6x3xf32>, tensor<4x2x3x5xf32>) -> tensor<2x2x3x5xf32>
          return %0 : tensor<2x2x3x5xf32>
        }
    """
    if not _plain(op) or op.feature_group_count.value != 1 or any(p != (0, 0) for p in padding(op)):
        return None
    (n, h, w, c), (kernel_h, kernel_w, *_) = m.shape(op.lhs), m.shape(op.rhs)
    if [kernel_h, kernel_w] != strides(op) or kernel_h * kernel_w == 1 or h % kernel_h or w % kernel_w:
        return None
    by_patch = m.reshape(op.lhs, [n, h // kernel_h, kernel_h, w // kernel_w, kernel_w, c])
    return _windows_by_kernel(m.transpose(by_patch, [0, 1, 3, 2, 4, 5]), op)


@rewrite(
    stablehlo.MulOp,
    exact=False,
    bound="one rounding of each weight in place of one of each output: 1 ulp of the largest partial sum",
)
def scale_into_convolution(op):
    """A per-channel factor after a convolution goes into its weights (BatchNorm folding).

    Only where weights and factor are known at load, so that the product costs nothing.

    Before:
        func.func @main(%x: tensor<1x8x8x3xf32>, %w: tensor<3x3x3x4xf32> {kpx.weight}, %s: tensor<4xf32> {kpx.weight}) -> tensor<1x6x6x4xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x3xf32>, tensor<3x3x3x4xf32>) -> tensor<1x6x6x4xf32>
          %1 = stablehlo.broadcast_in_dim %s, dims = [3] : (tensor<4xf32>) -> tensor<1x6x6x4xf32>
          %2 = stablehlo.multiply %0, %1 : tensor<1x6x6x4xf32>
          return %2 : tensor<1x6x6x4xf32>
        }
    After:
        func.func @main(%x: tensor<1x8x8x3xf32>, %w: tensor<3x3x3x4xf32> {kpx.weight}, %s: tensor<4xf32> {kpx.weight}) -> tensor<1x6x6x4xf32> {
          %0 = stablehlo.broadcast_in_dim %s, dims = [3] : (tensor<4xf32>) -> tensor<3x3x3x4xf32>
          %1 = stablehlo.multiply %w, %0 : tensor<3x3x3x4xf32>
          %2 = stablehlo.convolution(%x, %1) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x3xf32>, tensor<3x3x3x4xf32>) -> tensor<1x6x6x4xf32>
          return %2 : tensor<1x6x6x4xf32>
        }
    Unchanged:
        func.func @main(%x: tensor<1x8x8x3xf32>, %w: tensor<3x3x3x4xf32> {kpx.weight}, %s: tensor<4xf32>) -> tensor<1x6x6x4xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x3xf32>, tensor<3x3x3x4xf32>) -> tensor<1x6x6x4xf32>
          %1 = stablehlo.broadcast_in_dim %s, dims = [3] : (tensor<4xf32>) -> tensor<1x6x6x4xf32>
          %2 = stablehlo.multiply %0, %1 : tensor<1x6x6x4xf32>
          return %2 : tensor<1x6x6x4xf32>
        }
    """
    for value, factor in ((op.lhs, op.rhs), (op.rhs, op.lhs)):
        conv = producer(value, stablehlo.ConvolutionOp)
        if conv is None or not m.has_one_use(value) or m.rank(value) != 4 or _orders(_numbers(conv)) != _NHWC:
            continue
        scale = channel_vector(factor, 3)
        if scale is None or not depends_on_weights_alone(scale) or not depends_on_weights_alone(conv.rhs):
            continue
        weights = stablehlo.multiply(conv.rhs, m.broadcast(scale, m.shape(conv.rhs), [3]))
        return _convolve(conv.lhs, weights, conv.result.type, conv, _channels_last())
    return None


def channel_vector(value, dimension):
    """The 1-d array that a value repeats along all dimensions but one, or None."""
    op = producer(value, stablehlo.BroadcastInDimOp)
    if op is None or integers(op.broadcast_dimensions) != [dimension]:
        return None
    return op.operand if m.shape(op.operand) == (m.shape(value)[dimension],) else None


@rewrite(
    stablehlo.ConvolutionOp,
    exact=False,
    bound="the products of each sum may be added in another order: a few ulps of the largest partial sum",
)
def depthwise_convolution_as_shifts(op):
    """A depthwise convolution is a sum of shifted arrays, each times its own vector of weights, in f32 at least.

    Before:
        func.func @main(%x: tensor<1x4x4x3xf32>, %w: tensor<1x2x1x3xf32>) -> tensor<1x4x3x3xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 3 : i64} : (tensor<1x4x4x3xf32>, tensor<1x2x1x3xf32>) -> tensor<1x4x3x3xf32>
          return %0 : tensor<1x4x3x3xf32>
        }
    After:
        func.func @main(%x: tensor<1x4x4x3xf32>, %w: tensor<1x2x1x3xf32>) -> tensor<1x4x3x3xf32> {
          %0 = stablehlo.slice %x [0:1, 0:4, 0:3, 0:3] : (tensor<1x4x4x3xf32>) -> tensor<1x4x3x3xf32>
          %1 = stablehlo.slice %w [0:1, 0:1, 0:1, 0:3] : (tensor<1x2x1x3xf32>) -> tensor<1x1x1x3xf32>
          %2 = stablehlo.reshape %1 : (tensor<1x1x1x3xf32>) -> tensor<3xf32>
          %3 = stablehlo.broadcast_in_dim %2, dims = [3] : (tensor<3xf32>) -> tensor<1x4x3x3xf32>
          %4 = stablehlo.multiply %0, %3 : tensor<1x4x3x3xf32>
          %5 = stablehlo.slice %x [0:1, 0:4, 1:4, 0:3] : (tensor<1x4x4x3xf32>) -> tensor<1x4x3x3xf32>
          %6 = stablehlo.slice %w [0:1, 1:2, 0:1, 0:3] : (tensor<1x2x1x3xf32>) -> tensor<1x1x1x3xf32>
          %7 = stablehlo.reshape %6 : (tensor<1x1x1x3xf32>) -> tensor<3xf32>
          %8 = stablehlo.broadcast_in_dim %7, dims = [3] : (tensor<3xf32>) -> tensor<1x4x3x3xf32>
          %9 = stablehlo.multiply %5, %8 : tensor<1x4x3x3xf32>
          %10 = stablehlo.add %4, %9 : tensor<1x4x3x3xf32>
          return %10 : tensor<1x4x3x3xf32>
        }
    Unchanged:
        func.func @main(%x: tensor<1x4x4x4xf32>, %w: tensor<1x2x2x4xf32>) -> tensor<1x4x3x4xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 2 : i64} : (tensor<1x4x4x4xf32>, tensor<1x2x2x4xf32>) -> tensor<1x4x3x4xf32>
          return %0 : tensor<1x4x3x4xf32>
        }
    """
    n, _, _, channels = m.shape(op.lhs) if m.rank(op.lhs) == 4 else (0,) * 4
    if not _plain(op) or op.feature_group_count.value != channels or m.shape(op.rhs)[3] != channels:
        return None
    given, wide = m.element_type(op.lhs), m.element_type(op.result)
    if channels == 1 or given not in ("bf16", "f16", wide):
        return None
    wide = "f32" if wide in ("bf16", "f16") else wide
    kind, (stride_h, stride_w) = m.tensor_type(op.result), strides(op)
    _, out_h, out_w, _ = kind.shape
    x, taps = m.convert(_padded(op.lhs, padding(op)), wide), m.convert(op.rhs, wide)

    def product(i, j):
        ends = [n, i + (out_h - 1) * stride_h + 1, j + (out_w - 1) * stride_w + 1, channels]
        shifted = m.slice_(x, [0, i, j, 0], ends, [1, stride_h, stride_w, 1])
        tap = m.reshape(m.slice_(taps, [i, j, 0, 0], [i + 1, j + 1, 1, channels], [1] * 4), [channels])
        return stablehlo.multiply(shifted, m.broadcast(tap, kind.shape, [3]))

    kernel_h, kernel_w = m.shape(op.rhs)[:2]
    # Row by row: one sum over all taps is slower by a third in XLA's code.
    rows = [functools.reduce(stablehlo.add, (product(i, j) for j in range(kernel_w))) for i in range(kernel_h)]
    return m.convert(functools.reduce(stablehlo.add, rows), m.element_type(op.result))


def _padded(x, padding):
    """An array with channels last and zeros around its height and width."""
    (top, bottom), (left, right) = padding
    if not any((top, bottom, left, right)):
        return x
    zero = m.full(m.tensor([], m.element_type(x)), 0)
    amounts = [0, top, left, 0], [0, bottom, right, 0], [0] * 4
    return stablehlo.pad(x, zero, *(m.i64_array(a) for a in amounts))


@rewrite(stablehlo.ReduceWindowOp, exact=True)
def max_pool_by_dimension(op):
    """A maximum over windows is the maximum of shifted arrays, one dimension after another.

    Before:
        func.func @main(%x: tensor<6x3xf32>) -> tensor<2x3xf32> {
          %i = stablehlo.constant dense<0xFF800000> : tensor<f32>
          %0 = "stablehlo.reduce_window"(%x, %i) <{window_dimensions = array<i64: 3, 1>, window_strides = array<i64: 3, 1>}> ({
          ^bb0(%a: tensor<f32>, %b: tensor<f32>):
            %1 = stablehlo.maximum %a, %b : tensor<f32>
            stablehlo.return %1 : tensor<f32>
          }) : (tensor<6x3xf32>, tensor<f32>) -> tensor<2x3xf32>
          return %0 : tensor<2x3xf32>
        }
    After:
        func.func @main(%x: tensor<6x3xf32>) -> tensor<2x3xf32> {
          %0 = stablehlo.slice %x [0:4:3, 0:3] : (tensor<6x3xf32>) -> tensor<2x3xf32>
          %1 = stablehlo.slice %x [1:5:3, 0:3] : (tensor<6x3xf32>) -> tensor<2x3xf32>
          %2 = stablehlo.maximum %0, %1 : tensor<2x3xf32>
          %3 = stablehlo.slice %x [2:6:3, 0:3] : (tensor<6x3xf32>) -> tensor<2x3xf32>
          %4 = stablehlo.maximum %2, %3 : tensor<2x3xf32>
          return %4 : tensor<2x3xf32>
        }
    Unchanged:
        func.func @main(%x: tensor<6x3xf32>, %i: tensor<f32>) -> tensor<2x3xf32> {
          %0 = "stablehlo.reduce_window"(%x, %i) <{window_dimensions = array<i64: 3, 1>, window_strides = array<i64: 3, 1>}> ({
          ^bb0(%a: tensor<f32>, %b: tensor<f32>):
            %1 = stablehlo.maximum %a, %b : tensor<f32>
            stablehlo.return %1 : tensor<f32>
          }) : (tensor<6x3xf32>, tensor<f32>) -> tensor<2x3xf32>
          return %0 : tensor<2x3xf32>
        }
    """
    if len(op.inputs) != 1 or not isinstance(next(iter(op.regions[0].blocks[0].operations)), stablehlo.MaxOp):
        return None
    window = integers(op.window_dimensions)
    dilations = [d for a in (op.base_dilations, op.window_dilations) if a is not None for d in integers(a)]
    low = m.splat(op.init_values[0])
    if any(d != 1 for d in dilations) or low != float("-inf") or sum(window) > 24:
        return None
    strides = [1] * len(window) if op.window_strides is None else integers(op.window_strides)
    padding = [(0, 0)] * len(window) if op.padding is None else m.pairs(op.padding)
    x = op.inputs[0]
    if any(p != (0, 0) for p in padding):
        amounts = [p[0] for p in padding], [p[1] for p in padding], [0] * len(window)
        x = stablehlo.pad(x, op.init_values[0], *(m.i64_array(a) for a in amounts))
    dims = m.shape(op.results[0])
    for axis, length in enumerate(window):
        if length > 1 or strides[axis] > 1:
            x = _maximum_along(x, axis, length, strides[axis], dims[axis])
    return x


def _maximum_along(x, axis, length, stride, count):
    best = None
    for k in range(length):
        starts, limits, steps = [0] * m.rank(x), list(m.shape(x)), [1] * m.rank(x)
        starts[axis], limits[axis], steps[axis] = k, k + (count - 1) * stride + 1, stride
        part = m.slice_(x, starts, limits, steps)
        best = part if best is None else stablehlo.maximum(best, part)
    return best


# What moves a convolution, then what takes its place.
LAYOUT: list[Rewrite] = [convolution_channels_last, scale_into_convolution]
FORMS: list[Rewrite] = [
    pointwise_convolution_is_dot,
    patch_convolution_is_dot,
    depthwise_convolution_as_shifts,
    max_pool_by_dimension,
]
