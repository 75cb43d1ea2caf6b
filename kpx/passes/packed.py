"""Products and convolutions by weights are calls of oneDNN over packed weights, and what follows goes into them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, integers, ir, producer, stablehlo
from kpx.ir.rewrite import Rewrite, rewrite
from kpx.ir.split import depends_on_weights_alone
from kpx.kernels import onednn, weights_only
from kpx.passes.activations import ROOTS, activation
from kpx.passes.convolution import channel_vector, is_channels_last, padding, strides
from kpx.passes.epilogue import in_memory

# A call costs microseconds, and hides from XLA what it could fuse.
_LEAST_FLOPS = 1 << 18
_FEW_ROWS = 2
_LEAST_ROWS_F32 = 4  # fewer wait for memory, which XLA reads as fast
_BOUND = "sums are added in another order: a few ulps of the largest partial sum; what follows is computed in f32"
_QUANTIZED = "kpx_onednn_quantized"
_CALLS = ("kpx_onednn_matmul", "kpx_onednn_conv", _QUANTIZED)


def _types(values: Sequence[Value], result: str) -> list[str]:
    """Element types as `onednn.packed_bytes` takes them: of the operand, the result, then of what the steps take."""
    return [m.element_type(values[0]), result, *(m.element_type(v) for v in values[1:])]


def _begin(target: str, x: Value, weights: Value, sizes: list[int], result: ir.Type, layout: list[int]) -> Value | None:
    """A call that packs weights, and one that reads them; None where oneDNN has no such."""
    out = str(ir.RankedTensorType(result).element_type)
    count = onednn.packed_bytes(sizes, [], [m.element_type(x), out])
    if count is None:
        return None
    attributes = {"sizes": m.i64_array(sizes)}
    packing = {**attributes, "layout": m.i64_array(layout)}
    packed = m.custom_call("kpx_onednn_pack", m.tensor([count], "ui8"), [weights], packing)
    return m.custom_call(target, result, [x, packed], {**attributes, "steps": m.i64_array([])})


@rewrite(stablehlo.DotGeneralOp, exact=False, bound=_BOUND, lacks=onednn.missing)
def packed_product(op):
    """A product by a weight is a call of oneDNN over the weight as it packs it, which happens once, at load.

    Before:
        func.func @main(%a: tensor<8x32x512xf32>, %b: tensor<256x512xf32> {kpx.weight}) -> tensor<8x32x256xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [2] x [1] : (tensor<8x32x512xf32>, tensor<256x512xf32>) -> tensor<8x32x256xf32>
          return %0 : tensor<8x32x256xf32>
        }
    After:
        func.func @main(%a: tensor<8x32x512xf32>, %b: tensor<256x512xf32> {kpx.weight}) -> tensor<8x32x256xf32> {
          %0 = stablehlo.reshape %a : (tensor<8x32x512xf32>) -> tensor<256x512xf32>
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 1>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<256x512xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%0, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>) -> tensor<256x256xf32>
          %3 = stablehlo.reshape %2 : (tensor<256x256xf32>) -> tensor<8x32x256xf32>
          return %3 : tensor<8x32x256xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<256x512xf32>) -> tensor<256x256xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [1] : (tensor<256x512xf32>, tensor<256x512xf32>) -> tensor<256x256xf32>
          return %0 : tensor<256x256xf32>
        }
    """
    types = m.element_type(op.lhs), m.element_type(op.rhs), m.element_type(op.result)
    if types not in (("f32", "f32", "f32"), ("bf16", "bf16", "f32"), ("bf16", "bf16", "bf16")):
        return None
    if (found := _by_weight(op)) is None:
        return None
    (rows, columns, depth), inner = found
    if types[0] == "f32" and rows < _LEAST_ROWS_F32:
        return None
    sizes = [rows, columns, depth, onednn.column_blocks(rows, columns)]
    result = m.tensor([rows, columns], m.tensor_type(op.result).element_type)
    y = _begin("kpx_onednn_matmul", m.reshape(op.lhs, [rows, depth]), op.rhs, sizes, result, [inner])
    return None if y is None else m.reshape(y, m.shape(op.result))


@rewrite(stablehlo.DotGeneralOp, exact=False, bound=_BOUND, lacks=weights_only.missing)
def few_rows_by_bf16(op):
    """A bf16 product of few rows by a weight waits for the weight: a call that reads each of its rows once, in f32 sums.

    Before:
        func.func @main(%a: tensor<1x512xbf16>, %b: tensor<512x1024xbf16> {kpx.weight}) -> tensor<1x1024xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<1x512xbf16>, tensor<512x1024xbf16>) -> tensor<1x1024xf32>
          return %0 : tensor<1x1024xf32>
        }
    After:
        func.func @main(%a: tensor<1x512xbf16>, %b: tensor<512x1024xbf16> {kpx.weight}) -> tensor<1x1024xf32> {
          %0 = stablehlo.transpose %b, dims = [1, 0] : (tensor<512x1024xbf16>) -> tensor<1024x512xbf16>
          %1 = stablehlo.custom_call @kpx_weights_only(%a, %0) {api_version = 4 : i32, backend_config = {sizes = array<i64: 1, 1024, 512, 16, 512>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<1x512xbf16>, tensor<1024x512xbf16>) -> tensor<1x1024xf32>
          return %1 : tensor<1x1024xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<64x512xbf16>, %b: tensor<512x1024xbf16> {kpx.weight}) -> tensor<64x1024xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<64x512xbf16>, tensor<512x1024xbf16>) -> tensor<64x1024xf32>
          return %0 : tensor<64x1024xf32>
        }
    """
    if (found := _by_weight(op)) is None or {m.element_type(v) for v in (op.lhs, op.rhs)} != {"bf16"}:
        return None
    (rows, columns, depth), inner = found
    if rows > _FEW_ROWS or m.element_type(op.result) not in ("f32", "bf16") or not weights_only.available():
        return None
    weights = op.rhs if inner == 1 else m.transpose(op.rhs, [1, 0])
    sizes = m.i64_array([rows, columns, depth, 16, depth])
    given = [m.reshape(op.lhs, [rows, depth]), weights]
    y = m.custom_call(weights_only.TARGET, m.tensor([rows, columns], "f32"), given, {"sizes": sizes})
    return m.convert(m.reshape(y, m.shape(op.result)), m.tensor_type(op.result).element_type)


def _by_weight(op: Any) -> tuple[tuple[int, int, int], int] | None:
    """Of a product of an array's last dimension by one of a weight's two: its rows, columns and inner size, and which of the
    two it is; None of any other, or of one so small that a call costs more."""
    numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    inner = list(numbers.lhs_contracting_dimensions), list(numbers.rhs_contracting_dimensions)
    if op.algorithm or list(numbers.lhs_batching_dimensions) or m.rank(op.rhs) != 2 or inner[0] != [m.rank(op.lhs) - 1]:
        return None
    if len(inner[1]) != 1 or depends_on_weights_alone(op.lhs) or not depends_on_weights_alone(op.rhs):
        return None
    depth, columns = m.shape(op.lhs)[-1], m.shape(op.rhs)[1 - inner[1][0]]
    rows = m.size(op.lhs) // max(depth, 1)
    return None if 2 * rows * columns * depth < _LEAST_FLOPS else ((rows, columns, depth), inner[1][0])


@rewrite(stablehlo.ConvolutionOp, exact=False, bound=_BOUND, lacks=onednn.missing)
def packed_convolution(op):
    """A convolution by weights, channels last, is a call of oneDNN over the weights as it packs them, once, at load.

    Before:
        func.func @main(%x: tensor<1x8x8x64xf32>, %w: tensor<3x3x64x64xf32> {kpx.weight}) -> tensor<1x8x8x64xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {pad = [[1, 1], [1, 1]]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x64xf32>, tensor<3x3x64x64xf32>) -> tensor<1x8x8x64xf32>
          return %0 : tensor<1x8x8x64xf32>
        }
    After:
        func.func @main(%x: tensor<1x8x8x64xf32>, %w: tensor<3x3x64x64xf32> {kpx.weight}) -> tensor<1x8x8x64xf32> {
          %0 = stablehlo.custom_call @kpx_onednn_pack(%w) {api_version = 4 : i32, backend_config = {layout = array<i64>, sizes = array<i64: 1, 8, 8, 64, 3, 3, 64, 8, 8, 1, 1, 1, 1, 1, 1, 1>}, operand_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<3x3x64x64xf32>) -> tensor<147456xui8>
          %1 = stablehlo.custom_call @kpx_onednn_conv(%x, %0) {api_version = 4 : i32, backend_config = {sizes = array<i64: 1, 8, 8, 64, 3, 3, 64, 8, 8, 1, 1, 1, 1, 1, 1, 1>, steps = array<i64>}, operand_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>]} : (tensor<1x8x8x64xf32>, tensor<147456xui8>) -> tensor<1x8x8x64xf32>
          return %1 : tensor<1x8x8x64xf32>
        }
    Unchanged:
        func.func @main(%x: tensor<1x8x8x64xf32>, %w: tensor<3x3x64x64xf32>) -> tensor<1x8x8x64xf32> {
          %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {pad = [[1, 1], [1, 1]]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x64xf32>, tensor<3x3x64x64xf32>) -> tensor<1x8x8x64xf32>
          return %0 : tensor<1x8x8x64xf32>
        }
    """
    if not is_channels_last(op) or depends_on_weights_alone(op.lhs) or not depends_on_weights_alone(op.rhs):
        return None
    types = {m.element_type(v) for v in (op.lhs, op.rhs)}
    if types not in ({"f32"}, {"bf16"}) or m.element_type(op.result) not in {*types, "f32"}:
        return None
    dilations = [1, 1] if op.rhs_dilation is None else integers(op.rhs_dilation)
    (top, _), (left, _) = padding(op)
    kernel, result, groups = m.shape(op.rhs), m.shape(op.result), op.feature_group_count.value
    flops = 2 * m.size(op.result) * math.prod(kernel[:3])
    if flops < _LEAST_FLOPS or min(top, left) < 0:
        return None
    sizes = [*m.shape(op.lhs), *kernel[:2], kernel[3], *result[1:3], *strides(op), top, left, *dilations, groups]
    return _begin("kpx_onednn_conv", op.lhs, op.rhs, sizes, op.result.type, [])


def _call(value: Value) -> Any:
    """The call that a value is, which is used for that alone; maybe with its rows in several dimensions, or in other
    numbers."""
    call = producer(value)
    while isinstance(call, (stablehlo.ReshapeOp, stablehlo.ConvertOp)):
        if m.shape(call.operand)[-1:] != m.shape(value)[-1:] or not m.has_one_use(call.operand):
            return None
        value, call = call.operand, producer(call.operand)
    if not isinstance(call, stablehlo.CustomCallOp) or call.call_target_name.value not in _CALLS:
        return None
    return call


def _steps(call: Any) -> list[int]:
    return m.integers(m.dictionary(call.backend_config)["steps"])


def _with(call: Any, shape: Sequence[int], element: str, step: str = "", operand: Value | None = None) -> Value | None:
    """A call with a step more, its result in a shape and in numbers of a type; None where oneDNN has no such."""
    config = m.dictionary(call.backend_config)
    steps = [*_steps(call), *([onednn.STEPS[step]] if step else [])]
    operands = list(call.operands)
    if operand is not None:
        like = [m.size(operand)] if step in onednn.VECTORS else m.shape(call.results[0])
        operands.append(m.reshape(operand, like))
    target = call.call_target_name.value
    types = _types([operands[0], *operands[3 if target == _QUANTIZED else 2 :]], element)
    if onednn.packed_bytes(m.integers(config["sizes"]), steps, types, quantized=target == _QUANTIZED) is None:
        return None
    kind = m.tensor(m.shape(call.results[0]), element)
    attributes = {**config, "steps": m.i64_array(steps)}
    return m.reshape(m.custom_call(target, kind, operands, attributes), shape)


@rewrite(stablehlo.AddOp, exact=False, bound=_BOUND, lacks=onednn.missing)
def sum_into_packed(op):
    """A bias, or an array that is in memory anyway, is added by the call that computes what it is added to.

    Before:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<512x256xf32> {kpx.weight}, %v: tensor<256xf32>, %x: tensor<256x256xf32>) -> tensor<256x256xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>) -> tensor<256x256xf32>
          %3 = stablehlo.broadcast_in_dim %v, dims = [1] : (tensor<256xf32>) -> tensor<256x256xf32>
          %4 = stablehlo.add %2, %3 : tensor<256x256xf32>
          %5 = stablehlo.add %4, %x : tensor<256x256xf32>
          return %5 : tensor<256x256xf32>
        }
    After:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<512x256xf32> {kpx.weight}, %v: tensor<256xf32>, %x: tensor<256x256xf32>) -> tensor<256x256xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1, %v, %x) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64: 1, 8>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>, dense<0> : tensor<1xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>, tensor<256xf32>, tensor<256x256xf32>) -> tensor<256x256xf32>
          return %2 : tensor<256x256xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<512x256xf32> {kpx.weight}, %x: tensor<256x256xf32>) -> tensor<256x256xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>) -> tensor<256x256xf32>
          %3 = stablehlo.tanh %x : tensor<256x256xf32>
          %4 = stablehlo.add %2, %3 : tensor<256x256xf32>
          return %4 : tensor<256x256xf32>
        }
    """
    shape, element = m.shape(op.result), m.element_type(op.result)
    for value, other in ((op.lhs, op.rhs), (op.rhs, op.lhs)):
        if not m.has_one_use(value) or (call := _call(value)) is None:
            continue
        vector = channel_vector(other, m.rank(value) - 1)
        if vector is not None:
            return _with(call, shape, element, "shift" if _steps(call) else "bias", vector)
        if in_memory(other):
            return _with(call, shape, element, "add", other)
    return None


@rewrite(stablehlo.MulOp, exact=False, bound=_BOUND, lacks=onednn.missing)
def factor_into_packed(op):
    """A vector, or an array that is in memory anyway, is multiplied by the call that computes the other factor.

    Before:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<512x256xf32> {kpx.weight}, %x: tensor<256x256xf32>) -> tensor<256x256xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>) -> tensor<256x256xf32>
          %3 = stablehlo.multiply %x, %2 : tensor<256x256xf32>
          return %3 : tensor<256x256xf32>
        }
    After:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<512x256xf32> {kpx.weight}, %x: tensor<256x256xf32>) -> tensor<256x256xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1, %x) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64: 9>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>, tensor<256x256xf32>) -> tensor<256x256xf32>
          return %2 : tensor<256x256xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<512x256xf32> {kpx.weight}) -> tensor<256x256xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>) -> tensor<256x256xf32>
          %3 = stablehlo.multiply %2, %2 : tensor<256x256xf32>
          return %3 : tensor<256x256xf32>
        }
    """
    for value, other in ((op.rhs, op.lhs), (op.lhs, op.rhs)):
        if not m.has_one_use(value) or (call := _call(value)) is None:
            continue
        shape, element = m.shape(op.result), m.element_type(op.result)
        if (vector := channel_vector(other, m.rank(value) - 1)) is not None:
            return _with(call, shape, element, "scale", vector)
        if in_memory(other):
            return _with(call, shape, element, "multiply", other)
    return None


@rewrite(
    *ROOTS, exact=False, bound="the activation itself, but for the rounding of its constants", lacks=onednn.missing
)
def activation_into_packed(op):
    """An activation, however it is spelled, is computed by the call that computes its operand.

    Before:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<512x256xf32> {kpx.weight}) -> tensor<256x256xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>) -> tensor<256x256xf32>
          %3 = stablehlo.logistic %2 : tensor<256x256xf32>
          %4 = stablehlo.multiply %2, %3 : tensor<256x256xf32>
          return %4 : tensor<256x256xf32>
        }
    After:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<512x256xf32> {kpx.weight}) -> tensor<256x256xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64: 5>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>) -> tensor<256x256xf32>
          return %2 : tensor<256x256xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<512x256xf32> {kpx.weight}) -> (tensor<256x256xf32>, tensor<256x256xf32>) {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>) -> tensor<256x256xf32>
          %3 = stablehlo.tanh %2 : tensor<256x256xf32>
          return %2, %3 : tensor<256x256xf32>, tensor<256x256xf32>
        }
    """
    found = activation(op)
    if found is None or (call := _call(found[0])) is None:
        return None
    return _with(call, m.shape(op.result), m.element_type(op.result), found[1])


@rewrite(stablehlo.ConvertOp, exact=False, bound=_BOUND, lacks=onednn.missing)
def conversion_into_packed(op):
    """A call's f32 result that is wanted in bf16 is rounded by the call.

    Before:
        func.func @main(%a: tensor<256x512xbf16>, %b: tensor<512x256xbf16> {kpx.weight}) -> tensor<8x32x256xbf16> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xbf16>) -> tensor<262144xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xbf16>, tensor<262144xui8>) -> tensor<256x256xf32>
          %3 = stablehlo.reshape %2 : (tensor<256x256xf32>) -> tensor<8x32x256xf32>
          %4 = stablehlo.convert %3 : (tensor<8x32x256xf32>) -> tensor<8x32x256xbf16>
          return %4 : tensor<8x32x256xbf16>
        }
    After:
        func.func @main(%a: tensor<256x512xbf16>, %b: tensor<512x256xbf16> {kpx.weight}) -> tensor<8x32x256xbf16> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xbf16>) -> tensor<262144xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xbf16>, tensor<262144xui8>) -> tensor<256x256xbf16>
          %3 = stablehlo.reshape %2 : (tensor<256x256xbf16>) -> tensor<8x32x256xbf16>
          return %3 : tensor<8x32x256xbf16>
        }
    Unchanged:
        func.func @main(%a: tensor<256x512xf32>, %b: tensor<512x256xf32> {kpx.weight}) -> tensor<256x256xbf16> {
          %1 = stablehlo.custom_call @kpx_onednn_pack(%b) {api_version = 4 : i32, backend_config = {layout = array<i64: 0>, sizes = array<i64: 256, 256, 512, 1>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<0> : tensor<1xindex>]} : (tensor<512x256xf32>) -> tensor<524288xui8>
          %2 = stablehlo.custom_call @kpx_onednn_matmul(%a, %1) {api_version = 4 : i32, backend_config = {sizes = array<i64: 256, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<256x512xf32>, tensor<524288xui8>) -> tensor<256x256xf32>
          %3 = stablehlo.convert %2 : (tensor<256x256xf32>) -> tensor<256x256xbf16>
          return %3 : tensor<256x256xbf16>
        }
    """
    if m.element_type(op.result) != "bf16" or not m.has_one_use(op.operand) or (call := _call(op.operand)) is None:
        return None
    if m.element_type(call.operands[0]) != "bf16" and call.call_target_name.value != _QUANTIZED:
        return None
    return _with(call, m.shape(op.result), "bf16")


@rewrite(stablehlo.CustomCallOp, exact=True)
def quantized_reads_bf16(op):
    """A call that quantizes what it reads reads bf16 numbers as they are.

    Before:
        func.func @main(%a: tensor<64x512xbf16>, %p: tensor<134144xui8>, %s: tensor<256xf32>) -> tensor<64x256xf32> {
          %0 = stablehlo.convert %a : (tensor<64x512xbf16>) -> tensor<64x512xf32>
          %1 = stablehlo.custom_call @kpx_onednn_quantized(%0, %p, %s) {api_version = 4 : i32, backend_config = {sizes = array<i64: 64, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xf32>, tensor<134144xui8>, tensor<256xf32>) -> tensor<64x256xf32>
          return %1 : tensor<64x256xf32>
        }
    After:
        func.func @main(%a: tensor<64x512xbf16>, %p: tensor<134144xui8>, %s: tensor<256xf32>) -> tensor<64x256xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_quantized(%a, %p, %s) {api_version = 4 : i32, backend_config = {sizes = array<i64: 64, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xbf16>, tensor<134144xui8>, tensor<256xf32>) -> tensor<64x256xf32>
          return %1 : tensor<64x256xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<64x512xf32>, %p: tensor<134144xui8>, %s: tensor<256xf32>) -> tensor<64x256xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_quantized(%a, %p, %s) {api_version = 4 : i32, backend_config = {sizes = array<i64: 64, 256, 512, 1>, steps = array<i64>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>, dense<0> : tensor<1xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xf32>, tensor<134144xui8>, tensor<256xf32>) -> tensor<64x256xf32>
          return %1 : tensor<64x256xf32>
        }
    """
    if op.call_target_name.value != _QUANTIZED:
        return None
    x, *rest = op.operands
    wide = producer(x, stablehlo.ConvertOp)
    if wide is None or m.element_type(wide.operand) != "bf16":
        return None
    return m.custom_call(_QUANTIZED, op.results[0].type, [wide.operand, *rest], m.dictionary(op.backend_config))


def _attention(op: Any) -> dict[str, Any] | None:
    """The attributes of a call of attention, as this module or `jax.ffi` writes them; None for any other op."""
    if op is None or op.call_target_name.value != "kpx_onednn_attention":
        return None
    given = op.operation.attributes
    found = given["mhlo.backend_config" if "mhlo.backend_config" in given else "backend_config"]
    return {name: m.i64_array(m.integers(value)) for name, value in m.dictionary(found).items()}


def _strides(shape: Sequence[int]) -> list[int]:
    """Of the batch, heads and rows of an array that lies row by row, in elements; 0 where it has no batch."""
    found = [math.prod(shape[i + 1 :]) for i in range(len(shape) - 1)]
    return [0] * (3 - len(found)) + found


def _moved(config: dict[str, Any], name: str, shape: Sequence[int], order: Sequence[int]) -> bool:
    """Notes that an array of attention's, which lies row by row, is in memory as its transpose by `order`'s inverse is.

    False, and nothing is noted, where it does not lie so any more, or its last dimension would move.
    """
    _, heads, kv_heads, length, keys = m.integers(config["sizes"])[:5]
    wanted = [kv_heads, keys] if name in ("key", "value") else [heads, length]
    if order[-1] != len(order) - 1 or list(shape[-3:-1]) != wanted:
        return False
    if m.integers(config[name]) != _strides(shape):
        return False
    back = sorted(range(len(order)), key=order.__getitem__)
    there = _strides([shape[d] for d in back])[-len(order) + 1 :]
    config[name] = m.i64_array([0] * (4 - len(order)) + [there[order[d]] for d in range(len(order) - 1)])
    return True


@rewrite(stablehlo.CustomCallOp, exact=True)
def transposes_into_attention(op):
    """Attention reads queries, keys and values where their transposes' operands lie.

    Before:
        func.func @main(%q: tensor<2x32x4x16xf32>, %k: tensor<2x4x32x16xf32>, %v: tensor<2x4x32x16xf32>) -> tensor<2x4x32x16xf32> {
          %0 = stablehlo.transpose %q, dims = [0, 2, 1, 3] : (tensor<2x32x4x16xf32>) -> tensor<2x4x32x16xf32>
          %1 = stablehlo.custom_call @kpx_onednn_attention(%0, %k, %v) {api_version = 4 : i32, backend_config = {key = array<i64: 2048, 512, 16>, numbers = array<i64: 4602678819172646912, -4503599627370496, 0>, out = array<i64: 2048, 512, 16>, query = array<i64: 2048, 512, 16>, sizes = array<i64: 2, 4, 4, 32, 32, 16, 16>, value = array<i64: 2048, 512, 16>}, operand_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>], result_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>]} : (tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>) -> tensor<2x4x32x16xf32>
          return %1 : tensor<2x4x32x16xf32>
        }
    After:
        func.func @main(%q: tensor<2x32x4x16xf32>, %k: tensor<2x4x32x16xf32>, %v: tensor<2x4x32x16xf32>) -> tensor<2x4x32x16xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_attention(%q, %k, %v) {api_version = 4 : i32, backend_config = {key = array<i64: 2048, 512, 16>, numbers = array<i64: 4602678819172646912, -4503599627370496, 0>, out = array<i64: 2048, 512, 16>, query = array<i64: 2048, 16, 64>, sizes = array<i64: 2, 4, 4, 32, 32, 16, 16>, value = array<i64: 2048, 512, 16>}, operand_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>], result_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>]} : (tensor<2x32x4x16xf32>, tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>) -> tensor<2x4x32x16xf32>
          return %1 : tensor<2x4x32x16xf32>
        }
    Unchanged:
        func.func @main(%q: tensor<2x4x16x32xf32>, %k: tensor<2x4x32x16xf32>, %v: tensor<2x4x32x16xf32>) -> tensor<2x4x32x16xf32> {
          %0 = stablehlo.transpose %q, dims = [0, 1, 3, 2] : (tensor<2x4x16x32xf32>) -> tensor<2x4x32x16xf32>
          %1 = stablehlo.custom_call @kpx_onednn_attention(%0, %k, %v) {api_version = 4 : i32, backend_config = {key = array<i64: 2048, 512, 16>, numbers = array<i64: 4602678819172646912, -4503599627370496, 0>, out = array<i64: 2048, 512, 16>, query = array<i64: 2048, 512, 16>, sizes = array<i64: 2, 4, 4, 32, 32, 16, 16>, value = array<i64: 2048, 512, 16>}, operand_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>], result_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>]} : (tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>) -> tensor<2x4x32x16xf32>
          return %1 : tensor<2x4x32x16xf32>
        }
    """
    config, operands = _attention(op), list(op.operands)
    if config is None:
        return None
    for i, name in enumerate(("query", "key", "value")):
        moved = producer(operands[i], stablehlo.TransposeOp)
        if moved is not None and _moved(config, name, m.shape(operands[i]), integers(moved.permutation)):
            operands[i] = moved.operand
    if operands == list(op.operands):
        return None
    return m.custom_call("kpx_onednn_attention", op.results[0].type, operands, config)


@rewrite(stablehlo.TransposeOp, exact=True)
def attention_writes_transposed(op):
    """Attention writes its result where the result's transpose would.

    Before:
        func.func @main(%q: tensor<2x4x32x16xf32>, %k: tensor<2x4x32x16xf32>, %v: tensor<2x4x32x16xf32>) -> tensor<2x32x4x16xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_attention(%q, %k, %v) {api_version = 4 : i32, backend_config = {key = array<i64: 2048, 512, 16>, numbers = array<i64: 4602678819172646912, -4503599627370496, 0>, out = array<i64: 2048, 512, 16>, query = array<i64: 2048, 512, 16>, sizes = array<i64: 2, 4, 4, 32, 32, 16, 16>, value = array<i64: 2048, 512, 16>}, operand_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>], result_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>]} : (tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>) -> tensor<2x4x32x16xf32>
          %2 = stablehlo.transpose %1, dims = [0, 2, 1, 3] : (tensor<2x4x32x16xf32>) -> tensor<2x32x4x16xf32>
          return %2 : tensor<2x32x4x16xf32>
        }
    After:
        func.func @main(%q: tensor<2x4x32x16xf32>, %k: tensor<2x4x32x16xf32>, %v: tensor<2x4x32x16xf32>) -> tensor<2x32x4x16xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_attention(%q, %k, %v) {api_version = 4 : i32, backend_config = {key = array<i64: 2048, 512, 16>, numbers = array<i64: 4602678819172646912, -4503599627370496, 0>, out = array<i64: 2048, 16, 64>, query = array<i64: 2048, 512, 16>, sizes = array<i64: 2, 4, 4, 32, 32, 16, 16>, value = array<i64: 2048, 512, 16>}, operand_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>], result_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>]} : (tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>) -> tensor<2x32x4x16xf32>
          return %1 : tensor<2x32x4x16xf32>
        }
    Unchanged:
        func.func @main(%q: tensor<2x4x32x16xf32>, %k: tensor<2x4x32x16xf32>, %v: tensor<2x4x32x16xf32>) -> tensor<2x4x16x32xf32> {
          %1 = stablehlo.custom_call @kpx_onednn_attention(%q, %k, %v) {api_version = 4 : i32, backend_config = {key = array<i64: 2048, 512, 16>, numbers = array<i64: 4602678819172646912, -4503599627370496, 0>, out = array<i64: 2048, 512, 16>, query = array<i64: 2048, 512, 16>, sizes = array<i64: 2, 4, 4, 32, 32, 16, 16>, value = array<i64: 2048, 512, 16>}, operand_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>], result_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>]} : (tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>, tensor<2x4x32x16xf32>) -> tensor<2x4x32x16xf32>
          %2 = stablehlo.transpose %1, dims = [0, 1, 3, 2] : (tensor<2x4x32x16xf32>) -> tensor<2x4x16x32xf32>
          return %2 : tensor<2x4x16x32xf32>
        }
    """
    call = producer(op.operand, stablehlo.CustomCallOp)
    if (config := _attention(call)) is None:
        return None
    order = integers(op.permutation)
    back = sorted(range(len(order)), key=order.__getitem__)
    if not m.has_one_use(op.operand) or not _moved(config, "out", m.shape(op.operand), back):
        return None
    return m.custom_call("kpx_onednn_attention", op.result.type, list(call.operands), config)


PRODUCTS: list[Rewrite] = [few_rows_by_bf16, packed_product]
CONVOLUTIONS: list[Rewrite] = [packed_convolution]
STEPS: list[Rewrite] = [
    sum_into_packed, activation_into_packed, factor_into_packed, conversion_into_packed, quantized_reads_bf16,
]  # fmt: skip
ATTENTION: list[Rewrite] = [transposes_into_attention, attention_writes_transposed]
