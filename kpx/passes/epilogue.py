"""What follows a library's product goes into its call, where that saves a pass over memory."""

from __future__ import annotations

from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, producer, stablehlo
from kpx.ir.rewrite import rewrite
from kpx.passes.convolution import channel_vector


def _product(value: Value) -> Any:
    """The call of a library's product that a value is, used here alone; maybe with its rows in several dimensions."""
    shape, call = m.shape(value), producer(value)
    if not m.has_one_use(value):
        return None
    if isinstance(call, stablehlo.ReshapeOp):
        if not m.has_one_use(call.operand) or shape[-1:] != m.shape(call.operand)[-1:]:
            return None
        call = producer(call.operand)
    if not isinstance(call, stablehlo.CustomCallOp) or not call.call_target_name.value.startswith("kpx_matmul"):
        return None
    return None if "epilogue" in m.dictionary(call.backend_config) else call


def _sum(value: Value) -> list[tuple[Value, Value]]:
    """The operands of the addition that a value is, used here alone, in both orders."""
    add = producer(value, stablehlo.AddOp)
    return [] if add is None or not m.has_one_use(value) else [(add.lhs, add.rhs), (add.rhs, add.lhs)]


def _with_bias(value: Value) -> tuple[Any, Value | None]:
    """The product that a value is, and the vector added to each of its rows."""
    if (call := _product(value)) is not None:
        return call, None
    for term, other in _sum(value):
        vector = channel_vector(other, m.rank(value) - 1)
        if vector is not None and (call := _product(term)) is not None:
            columns = m.integers(m.dictionary(call.backend_config)["sizes"])[1]
            return (call, vector) if m.size(vector) == columns else (None, None)
    return None, None


def _with_addend(value: Value) -> tuple[Any, Value | None, Value | None]:
    """The product that a value is, the vector added to each of its rows, and the array added then."""
    call, bias = _with_bias(value)
    if call is not None:
        return call, bias, None
    for term, other in _sum(value):
        if in_memory(other) and (found := _with_bias(term))[0] is not None:
            return *found, other
    return None, None, None


def in_memory(value: Value) -> bool:
    """Whether a value is stored whatever uses it: it has other uses, or nothing could be fused with what makes it."""
    op = producer(value)
    if isinstance(op, stablehlo.ReshapeOp):
        return in_memory(op.operand)
    if op is None or isinstance(op, (stablehlo.CustomCallOp, stablehlo.ConvolutionOp, stablehlo.DotGeneralOp)):
        return True
    return not m.has_one_use(value) and not isinstance(op, (stablehlo.BroadcastInDimOp, stablehlo.ConstantOp))


@rewrite(stablehlo.MaxOp, exact=False, bound="the same sums, in the same order or the other; a zero's sign may differ")
def relu_into_product(op):
    """A ReLU after a library's product, and a bias and an array added between, are done by the call.

    Without a ReLU they stay: XLA fuses them with what follows, which was faster on transformers.

    Before:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x256xf32>, %v: tensor<256xf32>, %x: tensor<8x8x256xf32>) -> tensor<8x8x256xf32> {
          %0 = stablehlo.custom_call @kpx_matmul_f32(%a, %b) {api_version = 4 : i32, backend_config = {lhs = array<i64: 0, 512>, out = array<i64: 256>, rhs = array<i64: 0, 256>, sizes = array<i64: 64, 256, 512>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xf32>, tensor<512x256xf32>) -> tensor<64x256xf32>
          %1 = stablehlo.reshape %0 : (tensor<64x256xf32>) -> tensor<8x8x256xf32>
          %2 = stablehlo.broadcast_in_dim %v, dims = [2] : (tensor<256xf32>) -> tensor<8x8x256xf32>
          %3 = stablehlo.add %1, %2 : tensor<8x8x256xf32>
          %4 = stablehlo.add %3, %x : tensor<8x8x256xf32>
          %z = stablehlo.constant dense<0.0> : tensor<8x8x256xf32>
          %5 = stablehlo.maximum %4, %z : tensor<8x8x256xf32>
          return %5 : tensor<8x8x256xf32>
        }
    After:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x256xf32>, %v: tensor<256xf32>, %x: tensor<8x8x256xf32>) -> tensor<8x8x256xf32> {
          %r = stablehlo.reshape %x : (tensor<8x8x256xf32>) -> tensor<64x256xf32>
          %0 = stablehlo.custom_call @kpx_matmul_f32(%a, %b, %v, %r) {api_version = 4 : i32, backend_config = {epilogue = array<i64: 1, 1, 1>, lhs = array<i64: 0, 512>, out = array<i64: 256>, rhs = array<i64: 0, 256>, sizes = array<i64: 64, 256, 512>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xf32>, tensor<512x256xf32>, tensor<256xf32>, tensor<64x256xf32>) -> tensor<64x256xf32>
          %1 = stablehlo.reshape %0 : (tensor<64x256xf32>) -> tensor<8x8x256xf32>
          return %1 : tensor<8x8x256xf32>
        }
    Before:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x256xf32>) -> tensor<64x256xf32> {
          %0 = stablehlo.custom_call @kpx_matmul_f32(%a, %b) {api_version = 4 : i32, backend_config = {lhs = array<i64: 0, 512>, out = array<i64: 256>, rhs = array<i64: 0, 256>, sizes = array<i64: 64, 256, 512>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xf32>, tensor<512x256xf32>) -> tensor<64x256xf32>
          %z = stablehlo.constant dense<0.0> : tensor<64x256xf32>
          %1 = stablehlo.maximum %0, %z : tensor<64x256xf32>
          return %1 : tensor<64x256xf32>
        }
    After:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x256xf32>) -> tensor<64x256xf32> {
          %0 = stablehlo.custom_call @kpx_matmul_f32(%a, %b) {api_version = 4 : i32, backend_config = {epilogue = array<i64: 0, 0, 1>, lhs = array<i64: 0, 512>, out = array<i64: 256>, rhs = array<i64: 0, 256>, sizes = array<i64: 64, 256, 512>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xf32>, tensor<512x256xf32>) -> tensor<64x256xf32>
          return %0 : tensor<64x256xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x256xf32>, %x: tensor<64x256xf32>) -> tensor<64x256xf32> {
          %0 = stablehlo.custom_call @kpx_matmul_f32(%a, %b) {api_version = 4 : i32, backend_config = {lhs = array<i64: 0, 512>, out = array<i64: 256>, rhs = array<i64: 0, 256>, sizes = array<i64: 64, 256, 512>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xf32>, tensor<512x256xf32>) -> tensor<64x256xf32>
          %1 = stablehlo.tanh %x : tensor<64x256xf32>
          %2 = stablehlo.add %1, %0 : tensor<64x256xf32>
          %z = stablehlo.constant dense<0.0> : tensor<64x256xf32>
          %3 = stablehlo.maximum %2, %z : tensor<64x256xf32>
          return %3 : tensor<64x256xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<64x512xf32>, %b: tensor<512x256xf32>) -> tensor<64x256xf32> {
          %0 = stablehlo.custom_call @kpx_matmul_f32(%a, %b) {api_version = 4 : i32, backend_config = {lhs = array<i64: 0, 512>, out = array<i64: 256>, rhs = array<i64: 0, 256>, sizes = array<i64: 64, 256, 512>}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<64x512xf32>, tensor<512x256xf32>) -> tensor<64x256xf32>
          %z = stablehlo.constant dense<1.0> : tensor<64x256xf32>
          %1 = stablehlo.maximum %0, %z : tensor<64x256xf32>
          return %1 : tensor<64x256xf32>
        }
    """
    for value, zero in ((op.lhs, op.rhs), (op.rhs, op.lhs)):
        if m.splat(zero) != 0:
            continue
        call, bias, addend = _with_addend(value)
        if call is None:
            continue
        kind = call.results[0].type
        more = [] if bias is None else [bias]
        if addend is not None:
            more.append(m.reshape(addend, kind.shape))
        steps = m.i64_array([bias is not None, addend is not None, True])
        attributes = {**m.dictionary(call.backend_config), "epilogue": steps}
        y = m.custom_call(call.call_target_name.value, kind, [*call.operands, *more], attributes)
        return m.reshape(y, m.shape(value))
    return None
