"""Formats of few bits: bit for bit what ml_dtypes and the OCP specifications have."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kpx.errors import ConfigError
from kpx.precision import formats

_ALL_BF16 = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
# OCP OFP8 1.0, tables 1 and 2, and MX 1.0, table 5: the largest number, the least normal one, the least of all.
_TABLE = {
    "e4m3": (448.0, 2.0**-6, 2.0**-9),
    "e5m2": (57344.0, 2.0**-14, 2.0**-16),
    "e2m1": (6.0, 1.0, 0.5),
}


def _same(a, b):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())


def _numbers(name, seed):
    """Numbers around every one that a format holds and around the middle of every two."""
    held = (
        np.arange(1 << (4 if name == "e2m1" else 8), dtype=np.uint8)
        .view(formats.FORMATS[name].dtype)
        .astype(np.float32)
    )
    held = np.unique(held[np.isfinite(held)])
    near = np.concatenate([held, (held[1:] + held[:-1]) / 2])
    near = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))])
    random = np.random.default_rng(seed)
    wild = random.standard_normal(4096) * 10.0 ** random.integers(-12, 12, 4096)
    return np.concatenate([near, wild.astype(np.float32), [np.inf, -np.inf, np.nan, -0.0]]).astype(np.float32)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_rounding_is_ml_dtypes_bit_for_bit(name):
    fmt = formats.FORMATS[name]
    for x in (_numbers(name, 0), _ALL_BF16):
        got = jax.jit(lambda x: formats.rounded(x, name))(x)
        limited = np.clip(np.nan_to_num(x, nan=0.0), -fmt.largest, fmt.largest)
        wanted = np.where(np.isnan(x), np.float32(np.nan), limited.astype(fmt.dtype).astype(np.float32))
        assert _same(got, wanted)


@pytest.mark.parametrize("name", _TABLE)
def test_the_specifications_tables_are_held(name):
    largest, normal, least = _TABLE[name]
    x = np.float32([largest, 2 * largest, normal, least, least / 2, np.nextafter(np.float32(least / 2), np.float32(1))])
    np.testing.assert_array_equal(formats.rounded(x, name), np.float32([largest, largest, normal, least, 0, least]))
    assert formats.FORMATS[name].largest == largest


def test_e2m1_holds_eight_magnitudes():
    x = np.linspace(-8, 8, 10001, dtype=np.float32)
    assert sorted(set(np.abs(np.asarray(formats.rounded(x, "e2m1"))))) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def _microscaled(x, name, block):
    """MX 1.0, section 6.3, in NumPy, with ml_dtypes' conversions."""
    fmt = formats.FORMATS[name]
    parts = x.reshape(-1, block)
    out = np.empty_like(parts)
    for i, part in enumerate(parts):
        if not np.isfinite(part).all():
            out[i] = np.nan
            continue
        largest = np.abs(part).max()
        exponent = int(np.frexp(largest)[1]) - 1 - int(np.log2(fmt.largest)) if largest else -127
        scale = np.float64(ml_dtypes.float8_e8m0fnu(2.0 ** np.clip(exponent, -127, 127)))
        numbers = np.clip(part.astype(np.float64) / scale, -fmt.largest, fmt.largest)
        out[i] = (numbers.astype(np.float32).astype(fmt.dtype).astype(np.float64) * scale).astype(np.float32)
    return out.reshape(x.shape)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp8-e5m2", "mxfp4"])
def test_mx_blocks_are_the_specifications_bit_for_bit(scheme, seed):
    random = np.random.default_rng(seed)
    x = (random.standard_normal((16, 256)) * 10.0 ** random.integers(-30, 30, (16, 1))).astype(np.float32)
    x[0, :32], x[1, 3], x[2, 5], x[3, 7] = 0, np.inf, np.nan, 1e30
    name, block = formats.BLOCKS[scheme]
    got = jax.jit(lambda x: formats.quantize_dequantize(x, scheme))(x)
    assert _same(got, _microscaled(x, name, block))


def _two_levels(x):
    """NVFP4 in NumPy, each step rounded to f32 as its definition has it, with ml_dtypes' conversions."""
    whole = np.float32(np.abs(x).max() / np.float32(6.0 * 448.0))
    inverse = np.float32(1) / whole
    parts = x.reshape(-1, 16)
    level = (np.abs(parts).max(-1, keepdims=True) * np.float32(1 / 6) * inverse).clip(max=448)
    level = level.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    by = np.divide(inverse, level, out=np.zeros_like(level), where=level > 0)
    numbers = np.clip(parts * by, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (numbers * level * whole).reshape(x.shape)


@pytest.mark.parametrize("seed", range(4))
def test_nvfp4_is_its_definition_bit_for_bit(seed):
    random = np.random.default_rng(seed)
    x = (random.standard_normal((8, 64)) * 10.0 ** random.integers(-4, 1, (8, 1))).astype(np.float32)
    x[0, :16] = 0
    assert _same(formats.quantize_dequantize(x, "nvfp4"), _two_levels(x))


@pytest.mark.parametrize("scheme", [*formats.FORMATS, *formats.BLOCKS, "int8", "int4"])
def test_what_a_scheme_holds_it_keeps(scheme):
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    once = formats.quantize_dequantize(x, scheme)
    np.testing.assert_allclose(formats.quantize_dequantize(once, scheme), once, rtol=2e-6, atol=1e-7)
    bits = {"e2m1": 0.26, "mxfp4": 0.35, "nvfp4": 0.26, "int4": 0.15}.get(scheme, 0.13)
    assert np.abs(once - x).max() / np.abs(x).max() < bits


@pytest.mark.parametrize("scheme", [*formats.FORMATS, *formats.BLOCKS, "int8", "int4"])
def test_odd_numbers_give_zeros_and_nan_where_they_share_a_scale(scheme):
    x = np.ones((5, 64), np.float32)
    x[0], x[1, 40], x[2, 40], x[3, 40] = 0, np.inf, np.nan, 1e30
    rows = [formats.quantize_dequantize(row, scheme) for row in x]  # nvfp4's second scale is the whole array's
    assert (rows[0] == 0).all()
    assert np.isnan(rows[1]).any()
    assert np.isnan(rows[2]).any()
    np.testing.assert_allclose(rows[3][40], 1e30, rtol=0.3)
    np.testing.assert_allclose(rows[4], 1, rtol=0.15)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1"])
def test_stochastic_rounding_is_right_on_average_and_goes_to_a_neighbour(name):
    number = np.float32(1.3)
    random = np.random.default_rng(0)
    found = []
    for _ in range(200):
        x = np.full(512, number, np.float32)
        x[0] = random.standard_normal()  # the rest is the same: another array is rounded otherwise
        found.append(np.asarray(formats.rounded(x, name, stochastic=True))[1:])
    found = np.concatenate(found)
    step = 2.0 ** -formats.FORMATS[name].mantissa
    low = np.floor(1.3 / step) * step
    assert set(np.unique(found)) == {np.float32(low), np.float32(low + step)}
    assert abs(found.mean() - 1.3) < 5 * step / 2 / np.sqrt(found.size)


def test_stochastic_rounding_of_the_same_array_is_the_same():
    x = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    first, second = (np.asarray(formats.rounded(x, "e5m2", stochastic=True)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (first != np.asarray(formats.rounded(x, "e5m2"))).mean() > 0.2


def test_stochastic_rounding_keeps_what_a_format_holds():
    held = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert _same(formats.rounded(held, "e4m3", stochastic=True), held)


@pytest.mark.parametrize(
    ("x", "scheme", "axis", "says"),
    [
        (np.ones((4, 33)), "mxfp8", -1, "blocks of 32"),
        (np.ones((4, 32)), "mxfp8", None, "blocks of 32"),
        (np.ones((4, 32)), "fp7", -1, "not a format"),
        (np.ones((4, 32)), "e4m3", 2, "not an axis"),
    ],
)
def test_what_cannot_be_is_refused(x, scheme, axis, says):
    with pytest.raises(ConfigError, match=says):
        formats.quantize_dequantize(x, scheme, axis)


def test_a_power_of_two_brings_numbers_below_a_limit_and_not_far():
    for number in (1e-30, 1e-8, 1.0, 3e5):
        by = float(formats.power_of_two(jnp.float32([number, 0.0]), 2.0**14))
        assert np.log2(by) == round(np.log2(by))
        assert 2.0**13 < number * by <= 2.0**14 or by == 2.0**126
    assert float(formats.power_of_two(jnp.zeros(3), 4.0)) == 1
