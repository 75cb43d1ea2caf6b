"""ATen's special functions.

Bessel functions with no JAX counterpart are integrals (NIST DLMF 10.9 and 9.5), by Gauss-Legendre quadrature in
double precision: exact to rounding over the range that f32 and f64 tests of PyTorch cover, and seldom used.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import jax.scipy.special as jsp
import numpy as np

from kpx.bridges.torch.aten.common import is_complex, is_float
from kpx.bridges.torch.dtypes import promote, promote_to_float
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(160)


def cast(x, dtype):
    """A cast as C++ does it: complex to real drops the imaginary part, non-zero is True."""
    if is_complex(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        return x != 0 if dtype == jnp.bool_ else cast(x.real, dtype)
    if is_float(x) and jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 32:
        # Out of range, C++ on x86 wraps what fits 32 bits; XLA would saturate.
        return x.astype(jnp.int32).astype(dtype)
    return x.astype(dtype)


def in_f32(function):
    """16-bit floats computed in f32, and rounded once, as PyTorch's kernels do; integers become f32."""

    def wider(*args):
        args = [promote_to_float(a) if hasattr(a, "dtype") else a for a in args]
        dtype = jnp.result_type(*args)
        small = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        if not small:
            return function(*args)
        return function(*(a.astype(jnp.float32) if hasattr(a, "dtype") else a for a in args)).astype(dtype)

    return wider


lgamma = in_f32(jax.lax.lgamma)
erfinv = in_f32(jax.lax.erf_inv)
ndtri = in_f32(jsp.ndtri)
i0, i0e, i1, i1e = (in_f32(f) for f in (jsp.i0, jsp.i0e, jsp.i1, jsp.i1e))


@in_f32
def digamma(x):
    """-inf at 0 (inf at -0), NaN at negative integers."""
    at_zero = jnp.copysign(jnp.asarray(jnp.inf, x.dtype), -x)
    return jnp.where(x == 0, at_zero, jax.lax.digamma(x))


@in_f32
def igamma(a, x):
    return jsp.gammainc(a, x)


@in_f32
def igammac(a, x):
    return jsp.gammaincc(a, x)


@in_f32
def zeta(s, q):
    """Hurwitz's zeta by Euler and Maclaurin's sum (DLMF 25.11.5), for negative q too, as PyTorch's kernel."""
    dtype = jnp.result_type(s, q)
    s, q = jnp.broadcast_arrays(s.astype(jnp.float64), q.astype(jnp.float64))

    def term(k, state):
        total, a = state
        # From nine terms on, and where the next term's base is above 9, the tail takes over.
        counts = (k < 9) | (a <= 9.0)
        return total + jnp.where(counts, a**-s, 0.0), jnp.where(counts, a + 1, a)

    steps = jnp.maximum(9.0, 11.0 - jnp.min(jnp.nan_to_num(q, nan=0.0, neginf=0.0), initial=9.0))
    steps = jnp.minimum(steps, 4096.0).astype(jnp.int32)
    total, a = jax.lax.fori_loop(0, steps, term, (jnp.zeros_like(s), q))
    total = total + a ** (1 - s) / (s - 1) + 0.5 * a**-s
    factor, power = s, a ** (-s - 1)
    for k, bernoulli in enumerate((1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)):
        total = total + bernoulli * factor * power / math.factorial(2 * k + 2)
        factor, power = factor * (s + 2 * k + 1) * (s + 2 * k + 2), power / (a * a)
    whole = q == jnp.floor(q)
    below = jnp.where(whole, jnp.inf, jnp.where(s == jnp.floor(s), total, jnp.nan))
    total = jnp.where(q <= 0, below, total)
    return jnp.where(s == 1, jnp.inf, jnp.where(s < 1, jnp.nan, total)).astype(dtype)


@lowers(aten.polygamma.default)
def polygamma(n, x):
    x = promote_to_float(x)
    if n == 0:
        return digamma(x)
    order = jnp.asarray(n + 1.0, x.dtype)
    sign = 1.0 if n % 2 else -1.0
    return (sign * jnp.exp(jax.lax.lgamma(order)) * zeta(order, x)).astype(x.dtype)


@in_f32
def erfcx(x):
    """`exp(x^2) erfc(x)`; by its asymptotic series where erfc vanishes (DLMF 7.12.1)."""
    dtype = x.dtype
    x = x.astype(jnp.float64)
    direct = jnp.exp(jnp.minimum(x, 25.0) ** 2) * jax.lax.erfc(jnp.minimum(x, 25.0))
    r = 1 / (2 * jnp.maximum(x, 5.0) ** 2)
    series = (1 - r * (1 - 3 * r * (1 - 5 * r * (1 - 7 * r * (1 - 9 * r))))) / (jnp.maximum(x, 5.0) * np.sqrt(np.pi))
    return jnp.where(x > 25.0, series, direct).astype(dtype)


def fmax(x, y):
    """The larger; a NaN counts for nothing."""
    return jnp.fmax(x, y)


def fmin(x, y):
    return jnp.fmin(x, y)


def nextafter(x, y):
    return jax.lax.nextafter(*jnp.broadcast_arrays(x, y)) if jnp.finfo(x.dtype).bits >= 32 else _next16(x, y)


def _next16(x, y):
    """The neighbour of a 16-bit float: its bits as an integer, one up or down."""
    x, y = jnp.broadcast_arrays(x, y)
    bits = jax.lax.bitcast_convert_type(x, jnp.int16)
    away = (y > x) == (x > 0)
    tiny = jnp.where(y > 0, jnp.int16(1), jnp.int16(-32767))
    moved = jnp.where(x == 0, tiny, jnp.where(away, bits + jnp.int16(1), bits - jnp.int16(1)))
    stepped = jax.lax.bitcast_convert_type(moved, x.dtype)
    return jnp.where(jnp.isnan(x) | jnp.isnan(y), jnp.asarray(jnp.nan, x.dtype), jnp.where(x == y, y, stepped))


def frexp(x):
    wide = x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
    mantissa, exponent = jnp.frexp(wide)
    return mantissa.astype(x.dtype), exponent.astype(jnp.int32)


# Bessel functions ------------------------------------------------------------------------------


def _integral(function, upper):
    """The integral of a function from 0 to `upper` (an array), at nodes along a new last axis."""
    upper = jnp.asarray(upper, jnp.float64)[..., None]
    t = (_NODES + 1) / 2 * upper
    return jnp.sum(function(t) * (_WEIGHTS / 2), -1) * upper[..., 0]


def _in_double(function):
    def computed(x):
        x = promote_to_float(x)
        return function(x.astype(jnp.float64)).astype(x.dtype)

    return computed


def _oscillating(x, order, phase):
    """Hankel's expansion for large x (DLMF 10.17): the cosine of its phase gives J, the sine Y."""
    mu = 4.0 * order * order
    p, q, term = 1.0, 0.0, 1.0
    for k in range(1, 9):
        term = term * (mu - (2 * k - 1) ** 2) / (k * 8 * x)
        if k % 2:
            q = q + term * (1 if k % 4 == 1 else -1)
        else:
            p = p + term * (-1 if k % 4 == 2 else 1)
    angle = x - (order / 2 + 0.25) * np.pi
    c, s = jnp.cos(angle), jnp.sin(angle)
    value = p * c - q * s if phase == "J" else p * s + q * c
    return jnp.sqrt(2 / (np.pi * x)) * value


def _decaying(x, order, upper=None):
    """`int exp(-x sinh t - order t) dt` over t > 0."""
    upper = jnp.arcsinh(745.0 / jnp.maximum(x, 1e-300))
    return _integral(lambda t: jnp.exp(-x[..., None] * jnp.sinh(t) - order * t), jnp.minimum(upper, 300.0))


def _first_kind(x, order):
    """J for x >= 0 (DLMF 10.9.6)."""
    near = jnp.minimum(x, 60.0)
    half = jnp.full(x.shape, np.pi)
    value = _integral(lambda t: jnp.cos(order * t - near[..., None] * jnp.sin(t)), half) / np.pi
    if order != int(order):
        value = value - np.sin(order * np.pi) / np.pi * _decaying(near, order)
    return jnp.where(x > 60.0, _oscillating(jnp.maximum(x, 60.0), order, "J"), value)


def _second_kind(x, order):
    """Y for x >= 0 and integer order (DLMF 10.9.7)."""
    near = jnp.clip(x, 1e-300, 60.0)
    half = jnp.full(x.shape, np.pi)
    wave = _integral(lambda t: jnp.sin(near[..., None] * jnp.sin(t) - order * t), half)
    value = (wave - _decaying(near, -order) - (-1) ** order * _decaying(near, order)) / np.pi
    value = jnp.where(x > 60.0, _oscillating(jnp.maximum(x, 60.0), order, "Y"), value)
    return jnp.where(x == 0, -jnp.inf, jnp.where(x < 0, jnp.nan, value))


@_in_double
def bessel_j0(x):
    return _first_kind(jnp.abs(x), 0)


@_in_double
def bessel_j1(x):
    return jnp.sign(x) * _first_kind(jnp.abs(x), 1)


@_in_double
def spherical_j0(x):
    return jnp.where(jnp.isinf(x), 0.0, jnp.sinc(jnp.where(jnp.isinf(x), 1.0, x) / np.pi))


lowers(aten.special_bessel_y0.default)(_in_double(lambda x: _second_kind(x, 0)))
lowers(aten.special_bessel_y1.default)(_in_double(lambda x: _second_kind(x, 1)))
lowers(aten.special_modified_bessel_i0.default)(i0)
lowers(aten.special_modified_bessel_i1.default)(i1)


def _modified_second_kind(x, order, scaled):
    """K, or exp(x) K, for x >= 0 (DLMF 10.32.9)."""
    positive = jnp.maximum(x, 1e-300)
    upper = jnp.arccosh(1 + 745.0 / positive)
    value = _integral(
        lambda t: jnp.exp(-positive[..., None] * (jnp.cosh(t) - 1)) * jnp.cosh(order * t), jnp.minimum(upper, 300.0)
    )
    value = value if scaled else value * jnp.exp(-positive)
    return jnp.where(x == 0, jnp.inf, jnp.where(x < 0, jnp.nan, value))


for _order in (0, 1):
    for _scaled in (False, True):
        _op = getattr(aten, f"special_{'scaled_' if _scaled else ''}modified_bessel_k{_order}").default
        lowers(_op)(_in_double(lambda x, o=_order, s=_scaled: _modified_second_kind(x, o, s)))


@lowers(aten.special_airy_ai.default)
@_in_double
def airy_ai(x):
    """Ai by Bessel functions of order 1/3 (DLMF 9.6)."""
    size = jnp.maximum(jnp.abs(x), 1e-30)
    z = 2 / 3 * size**1.5
    right = jnp.sqrt(size / 3) / np.pi * _modified_second_kind(z, 1 / 3, False)
    left = jnp.sqrt(size) / 3 * (_first_kind(z, 1 / 3) + _first_kind(z, -1 / 3))
    return jnp.where(x > 0, right, left)


# Orthogonal polynomials ------------------------------------------------------------------------


def _polynomial(first, step, shifted=False):
    """`P_0 = 1`, `P_1 = first(x)`, `P_{k+1} = step(k, x, P_k, P_{k-1})`; 0 for a negative degree."""

    def evaluated(x, n):
        x, _ = promote(x, jnp.zeros((), jnp.float32)) if not hasattr(x, "dtype") else (promote_to_float(x), None)
        dtype = x.dtype if not hasattr(n, "dtype") else jnp.promote_types(x.dtype, promote_to_float(n).dtype)
        x, n = jnp.broadcast_arrays(x.astype(jnp.float64), jnp.trunc(jnp.asarray(n, jnp.float64)))
        x = 2 * x - 1 if shifted else x
        top = jnp.max(n, initial=0)

        def body(state):
            k, before, now, result = state
            after = step(k, x, now, before)
            return k + 1, now, after, jnp.where(n == k + 1, after, result)

        start = jnp.where(n < 0, 0.0, jnp.where(n == 0, 1.0, first(x)))
        state = (jnp.asarray(1.0, jnp.float64), jnp.ones_like(x), first(x) + 0 * x, start)
        return jax.lax.while_loop(lambda s: s[0] < top, body, state)[3].astype(dtype)

    return evaluated


def _chebyshev(k, x, now, before):
    return 2 * x * now - before


for _letter, _first in {
    "t": lambda x: x,
    "u": lambda x: 2 * x,
    "v": lambda x: 2 * x - 1,
    "w": lambda x: 2 * x + 1,
}.items():
    for _shifted in (False, True):
        _packet = getattr(aten, f"special_{'shifted_' if _shifted else ''}chebyshev_polynomial_{_letter}")
        lowers(_packet.default, _packet.x_scalar, _packet.n_scalar)(_polynomial(_first, _chebyshev, _shifted))

for _name, _first, _step in (
    ("hermite_polynomial_h", lambda x: 2 * x, lambda k, x, now, before: 2 * x * now - 2 * k * before),
    ("hermite_polynomial_he", lambda x: x, lambda k, x, now, before: x * now - k * before),
    (
        "laguerre_polynomial_l",
        lambda x: 1 - x,
        lambda k, x, now, before: ((2 * k + 1 - x) * now - k * before) / (k + 1),
    ),
    ("legendre_polynomial_p", lambda x: x, lambda k, x, now, before: ((2 * k + 1) * x * now - k * before) / (k + 1)),
):
    _packet = getattr(aten, f"special_{_name}")
    lowers(_packet.default, _packet.x_scalar, _packet.n_scalar)(_polynomial(_first, _step))
