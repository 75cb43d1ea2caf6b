"""ATen's elementwise ops: arithmetic, comparison, logic, unary functions, casts."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
import numpy as np

from kpx.bridges.torch import checks
from kpx.bridges.torch.aten.common import is_float
from kpx.bridges.torch.aten.special import cast
from kpx.bridges.torch.dtypes import promote, promote_to_float, result_type, to_jax
from kpx.bridges.torch.operators import aten, prims
from kpx.bridges.torch.registry import lowers
from kpx.errors import UnsupportedError
from kpx.kernels.activation import gelu as fused_gelu

# Arithmetic ------------------------------------------------------------------------------------


def _scaled(y, alpha):
    return y if isinstance(alpha, (int, float)) and alpha == 1 else y * jnp.asarray(alpha, y.dtype)


@lowers(aten.add.Tensor, aten.add.Scalar)
def add(x, y, alpha=1):
    x, y = promote(x, y)
    if x.dtype == bool:
        return jnp.logical_or(x, jnp.logical_and(y, bool(alpha)))
    return x + _scaled(y, alpha)


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def sub(x, y, alpha=1):
    x, y = promote(x, y)
    return x - _scaled(y, alpha)


@lowers(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(x, y, alpha=1):
    return sub(y, x, alpha)


@lowers(aten.mul.Tensor, aten.mul.Scalar)
def mul(x, y):
    x, y = promote(x, y)
    return jnp.logical_and(x, y) if x.dtype == bool else x * y


@lowers(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, aten.true_divide.Scalar)
def div(x, y):
    dtype = result_type(x, y)
    dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else np.dtype(np.float32)
    return jnp.asarray(x, dtype) / jnp.asarray(y, dtype)


def division(x, y):
    """Return both operands of a division, promoted; a zero among integer divisors is an error, as in eager PyTorch.

    Raises:
        UnsupportedError: the divisor is the number 0. One in an array is found as the program runs.
    """
    is_number, is_zero = isinstance(y, (int, float)), isinstance(y, (int, float)) and y == 0
    x, y = promote(x, y)
    if jnp.issubdtype(y.dtype, jnp.integer):
        if is_zero:
            raise UnsupportedError("An integer is divided by the number 0: eager PyTorch raises ZeroDivisionError.")
        if not is_number:
            checks.holds(jnp.all(y != 0), "ZeroDivisionError: an integer is divided by 0", "RuntimeError")
    return x, y


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(x, y, *, rounding_mode=None):
    if rounding_mode is None:
        return div(x, y)
    if rounding_mode == "floor":
        return floor_divide(x, y)
    x, y = jnp.broadcast_arrays(*division(x, y))
    return jax.lax.div(x, y) if jnp.issubdtype(x.dtype, jnp.integer) else jnp.trunc(x / y)


@lowers(aten.floor_divide.default)
def floor_divide(x, y):
    x, y = division(x, y)
    quotient = jnp.floor_divide(x, y)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return quotient
    return jnp.where(quotient == 0, jnp.copysign(jnp.zeros((), x.dtype), x / y), quotient)


@lowers(aten.remainder.Tensor, aten.remainder.Scalar)
def remainder(x, y):
    return jnp.remainder(*division(x, y))


@lowers(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def pow(x, y):
    if isinstance(y, (int, float)) and not isinstance(y, bool) and y == int(y) and abs(y) <= 8:
        (base, _) = promote(x, y)
        if jnp.issubdtype(base.dtype, jnp.inexact) or y >= 0:
            return jax.lax.integer_pow(base, int(y))
    if isinstance(y, float) and y == 0.5:
        return jnp.sqrt(promote(x, y)[0])
    x, y = promote(x, y)
    if jnp.issubdtype(x.dtype, jnp.signedinteger):  # a negative power is 0, but of 1 and -1
        inverse = jnp.where(x == 1, 1, jnp.where(x == -1, 1 - 2 * (y & 1), 0)).astype(x.dtype)
        return jnp.where(y < 0, inverse, jnp.power(x, jnp.maximum(y, 0)))
    return jnp.power(x, y)


@lowers(aten.maximum.default)
def maximum(x, y):
    return jnp.maximum(*promote(x, y))


@lowers(aten.minimum.default)
def minimum(x, y):
    return jnp.minimum(*promote(x, y))


@lowers(aten.clamp.default, aten.clamp.Tensor)
def clamp(x, low=None, high=None):
    bounds = [b for b in (low, high) if b is not None]
    dtype = result_type(x, *bounds)
    x = x.astype(dtype)
    if low is not None:
        x = jnp.maximum(x, jnp.asarray(low, dtype))
    return x if high is None else jnp.minimum(x, jnp.asarray(high, dtype))


# Comparison and logic --------------------------------------------------------------------------

for _name, _function in {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}.items():  # fmt: skip

    def _compare(x, y, _function=_function):
        return _function(*promote(x, y))

    lowers(getattr(aten, _name).Tensor, getattr(aten, _name).Scalar)(_compare)

for _name, _function in {"and": jnp.bitwise_and, "or": jnp.bitwise_or, "xor": jnp.bitwise_xor}.items():

    def _bitwise(x, y, _function=_function):
        return _function(*promote(x, y))

    _op = getattr(aten, f"bitwise_{_name}")
    lowers(_op.Tensor, _op.Scalar)(_bitwise)


def _shift_amount(x, y):
    """Promoted operands, and where the amount is within the type; beyond that eager shifts everything out."""
    x, y = promote(x, y)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise NotImplementedError(f"a shift of {x.dtype}: PyTorch shifts integers alone")
    return x, y, (y >= 0) & (y < jnp.iinfo(x.dtype).bits)


@lowers(
    aten.__lshift__.Tensor, aten.__lshift__.Scalar, aten.bitwise_left_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar, aten.bitwise_left_shift.Scalar_Tensor, prims.shift_left.default,
)  # fmt: skip
def left_shift(x, y):
    """A negative amount, or one of the type's bits or more, gives 0."""
    x, y, within = _shift_amount(x, y)
    return jnp.where(within, jnp.left_shift(x, jnp.where(within, y, 0)), 0)


@lowers(
    aten.__rshift__.Tensor, aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar, aten.bitwise_right_shift.Scalar_Tensor,
    prims.shift_right_arithmetic.default,
)  # fmt: skip
def right_shift(x, y):
    """A negative amount, or one of the type's bits or more, leaves the sign alone."""
    x, y, within = _shift_amount(x, y)
    shifted = jnp.right_shift(x, jnp.where(within, y, jnp.iinfo(x.dtype).bits - 1))
    return shifted if jnp.issubdtype(x.dtype, jnp.signedinteger) else jnp.where(within, shifted, 0)


for _name, _function in {"and": jnp.logical_and, "or": jnp.logical_or, "xor": jnp.logical_xor}.items():

    def _logical(x, y, _function=_function):
        return _function(x, y)

    lowers(getattr(aten, f"logical_{_name}").default)(_logical)


@lowers(aten.logical_not.default)
def logical_not(x):
    return jnp.logical_not(x)


@lowers(aten.bitwise_not.default)
def bitwise_not(x):
    return jnp.bitwise_not(x)


@lowers(aten.where.self)
def where(condition, x, y):
    x, y = promote(x, y)
    return jnp.where(condition, x, y)


@lowers(aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where_scalar(condition, x, y):
    return where(condition, x, y)


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(x, mask, value):
    return jnp.where(mask, jnp.asarray(value, x.dtype), x)


@lowers(aten.signbit.default)
def signbit(x):
    return jnp.signbit(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x < 0)


@lowers(aten.copysign.Tensor, aten.copysign.Scalar)
def copysign(x, y):
    x, y = promote(*(promote_to_float(a) if hasattr(a, "dtype") else float(a) for a in (x, y)))
    return jnp.copysign(x, y)


@lowers(aten.isnan.default)
def isnan(x):
    return jnp.isnan(x)


@lowers(aten.isinf.default)
def isinf(x):
    return jnp.isinf(x)


# Unary functions -------------------------------------------------------------------------------

# Integers come back as float32.
for _name, _function in {
    "exp": jnp.exp, "exp2": jnp.exp2, "expm1": jnp.expm1, "log": jnp.log, "log2": jnp.log2,
    "log10": jnp.log10, "log1p": jnp.log1p, "sqrt": jnp.sqrt, "rsqrt": jax.lax.rsqrt,
    "sin": jnp.sin, "cos": jnp.cos, "tan": jnp.tan, "asin": jnp.arcsin, "acos": jnp.arccos,
    "atan": jnp.arctan, "sinh": jnp.sinh, "cosh": jnp.cosh, "tanh": jnp.tanh,
    "asinh": jnp.arcsinh, "acosh": jnp.arccosh, "atanh": jnp.arctanh, "erf": jax.lax.erf,
    "erfc": jax.lax.erfc, "sigmoid": jax.nn.sigmoid, "reciprocal": jnp.reciprocal,
}.items():  # fmt: skip

    def _float_unary(x, _function=_function):
        return _function(promote_to_float(x))

    lowers(getattr(aten, _name).default)(_float_unary)


def sign(x):
    """0.0 for NaN and for -0.0, as PyTorch has it."""
    return jnp.where(jnp.isnan(x) | (x == 0), jnp.zeros((), x.dtype), jnp.sign(x)) if is_float(x) else jnp.sign(x)


# The dtype stays.
for _name, _function in {
    "neg": jnp.negative, "abs": jnp.abs, "relu": jax.nn.relu,
    "sign": lambda x: x if x.dtype == jnp.bool_ else sign(x),
}.items():  # fmt: skip

    def _unary(x, _function=_function):
        return _function(x)

    lowers(getattr(aten, _name).default)(_unary)

for _name, _function in {"floor": jnp.floor, "ceil": jnp.ceil, "trunc": jnp.trunc, "round": jnp.round}.items():

    def _rounding(x, _function=_function):
        return _function(x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    lowers(getattr(aten, _name).default)(_rounding)


@lowers(aten.silu.default)
def silu(x):
    return jax.nn.silu(x)


@lowers(aten.gelu.default)
def gelu(x, *, approximate="none"):
    return fused_gelu(x, approximate=approximate == "tanh")


@lowers(aten.leaky_relu.default)
def leaky_relu(x, negative_slope=0.01):
    return jnp.where(x > 0, x, x * jnp.asarray(negative_slope, x.dtype))


@lowers(aten.elu.default)
def elu(x, alpha=1, scale=1, input_scale=1):
    a, s, i = (jnp.asarray(c, x.dtype) for c in (alpha, scale, input_scale))
    return jnp.where(x > 0, x * s, jnp.expm1(jnp.minimum(x, 0) * i) * a * s)


@lowers(aten.hardtanh.default)
def hardtanh(x, min_val=-1, max_val=1):
    return jnp.clip(x, jnp.asarray(min_val, x.dtype), jnp.asarray(max_val, x.dtype))


@lowers(aten.hardsigmoid.default)
def hardsigmoid(x):
    return jnp.clip(x + 3, 0, 6) / 6


@lowers(aten.hardswish.default)
def hardswish(x):
    return x * hardsigmoid(x)


@lowers(aten.softplus.default)
def softplus(x, beta=1, threshold=20):
    b = jnp.asarray(beta, x.dtype)
    return jnp.where(x * b > threshold, x, jax.nn.softplus(x * b) / b)


# Copies and casts ------------------------------------------------------------------------------


@lowers(aten._to_copy.default)
def to_copy(x, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    return x if dtype is None else cast(x, to_jax(dtype))


@lowers(aten.clone.default, aten.contiguous.default)
def clone(x, *, memory_format=None):
    return x


@lowers(aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def alias(x):
    return x
