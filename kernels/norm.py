"""Layer normalization (arXiv 1607.06450) and RMS normalization (arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kpx.errors import InputError
from kpx.kernels.registry import kernel


def _statistics_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def shifted(x, axes):
    """Return an array less its first element along axes, if it has any: of the same variance, without the rounding of sums
    and means that are large beside the deviations (Chan, Golub and LeVeque 1983, section 3)."""
    first = jax.lax.slice(x, (0,) * x.ndim, [min(n, 1) if d in axes else n for d, n in enumerate(x.shape)])
    return x - first if all(x.shape[d] for d in axes) else x


@kernel("kpx.layer_norm", version=1)
def _layer_norm(x, *parameters, axes, eps, affine):
    dtype = _statistics_dtype(x.dtype)
    reduced = tuple(range(x.ndim - axes, x.ndim))
    wide = x.astype(dtype)
    mean = jnp.mean(wide, reduced, keepdims=True)
    centred = wide - mean
    variance = jnp.mean(jnp.square(centred), reduced, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + np.asarray(eps, dtype))
    rest = list(parameters)
    if "w" in affine:
        y = y * rest.pop(0).astype(dtype)
    if "b" in affine:
        y = y + rest.pop(0).astype(dtype)
    return y.astype(x.dtype)


def layer_norm(
    x, weight=None, bias=None, *, axes: int = 1, eps: float = 1e-5, residual=None, index=None, dtype=None, scale=None
):
    """Normalizes the last `axes` dimensions to zero mean and unit variance.

    Args:
        x: `[..., *normalized]`, floating. Statistics are computed in f32 (f64 for f64).
        weight, bias: `[*normalized]` or None.
        axes: how many trailing dimensions are normalized; 1 with any of what follows.
        eps: added to the (biased) variance.
        residual: like `x`, or None: what is normalized is `x + residual`, and that is given too.
        index: `[...]`, integers, or None: `x` is a table `[rows, size]`, and what is normalized is `x[index]`, each within the
            table.
        dtype: int8 or an f8 dtype that the result is quantized to, or None; rounded to nearest, and bounded.
        scale: a number, or a scalar, that a quantized result is divided by first. By default each row has its own, which
            takes its largest magnitude to the dtype's largest number, and the scales are given too.

    Returns:
        An array like `x`, or of `dtype`. With scales, these next, `[..., 1]`, f32; with `residual` the sum last: a tuple.

    Raises:
        InputError: shapes or dtypes do not go together.
    """
    given = {"residual": residual, "index": index, "weight": weight, "bias": bias}
    if residual is None and index is None and dtype is None and scale is None:
        affine = "w" * (weight is not None) + "b" * (bias is not None)
        arrays = [a for a in (weight, bias) if a is not None]
        return _layer_norm(x, *arrays, axes=axes, eps=float(eps), affine=affine or "none")
    return _fused(x, given, axes, eps, True, dtype, scale)


@kernel("kpx.rms_norm", version=1)
def _rms_norm(x, *weight, axes, eps):
    dtype = _statistics_dtype(x.dtype)
    reduced = tuple(range(x.ndim - axes, x.ndim))
    wide = x.astype(dtype)
    mean_square = jnp.mean(jnp.square(wide), reduced, keepdims=True)
    y = wide * jax.lax.rsqrt(mean_square + np.asarray(eps, dtype))
    if weight:
        y = y * weight[0].astype(dtype)
    return y.astype(x.dtype)


def rms_norm(x, weight=None, *, axes: int = 1, eps: float = 1e-6, residual=None, index=None, dtype=None, scale=None):
    """Divides by the root mean square of the last `axes` dimensions.

    Args:
        x: `[..., *normalized]`, floating. The mean square is computed in f32 (f64 for f64).
        weight: `[*normalized]` or None.
        axes, eps, residual, index, dtype, scale: see `layer_norm`.

    Returns:
        What `layer_norm` gives.

    Raises:
        InputError: shapes or dtypes do not go together.
    """
    if residual is None and index is None and dtype is None and scale is None:
        return _rms_norm(x, *([] if weight is None else [weight]), axes=axes, eps=float(eps))
    return _fused(x, {"residual": residual, "index": index, "weight": weight}, axes, eps, False, dtype, scale)


# With what comes before and after: a sum or a table's rows, and a narrow dtype -------------------------

LARGEST = {
    "int8": 127.0,
    "float8_e4m3fn": 448.0,
    "float8_e4m3fnuz": 240.0,
    "float8_e5m2": 57344.0,
    "float8_e5m2fnuz": 57344.0,
}
"""What a norm may be quantized to, with the largest number that is used of it."""


def quantized(y, scale, out: str):
    """`y / scale` rounded to a narrow dtype, and bounded by what that holds."""
    bound = np.asarray(LARGEST[out], y.dtype)
    y = jnp.clip(y / scale, -bound, bound)
    return (jnp.round(y) if out == "int8" else y).astype(out)


def row_scale(y, out: str):
    """What takes each row's largest magnitude to the largest number of a dtype; 1 for a row of zeros."""
    top = jnp.max(jnp.abs(y), -1, keepdims=True)
    return jnp.where(top == 0, np.asarray(1, y.dtype), top / np.asarray(LARGEST[out], y.dtype))


@kernel("kpx.fused_norm", version=1)
def fused_norm_kernel(x, *arrays, eps, centred, given, out="", total=False, fill=False):
    """A norm of `x + residual`, or of `x[index]`, as rows of a narrow dtype or not; `given` names the arrays. With `total`,
    what is normalized is a result too. With `fill`, an index outside gives NaN; else the nearest row, from the end if negative.
    """
    further = dict(zip(given.split(), arrays, strict=True))
    if "index" in further:
        index = further["index"]
        x = x.at[index].get(mode="fill", wrap_negative_indices=False) if fill else x[index]
    if "residual" in further:
        x = x + further["residual"]
    y = x.astype(_statistics_dtype(x.dtype))
    if centred:
        y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + np.asarray(eps, y.dtype))
    if "weight" in further:
        y = y * further["weight"].astype(y.dtype)
    if "bias" in further:
        y = y + further["bias"].astype(y.dtype)
    made = [y.astype(x.dtype)]
    if out and "scale" in further:
        made = [quantized(y, further["scale"].astype(y.dtype), out)]
    elif out:
        scale = row_scale(y, out)
        made = [quantized(y, scale, out), scale.astype(jnp.float32)]
    return (*made, x) if total else tuple(made)


def _fused(x, given, axes: int, eps: float, centred: bool, dtype, scale):
    out = "" if dtype is None else jnp.dtype(dtype).name
    _check(x, given, axes, out, scale)
    arrays = {name: jnp.asarray(a) for name, a in given.items() if a is not None}
    residual = given["residual"]
    if scale is not None:
        arrays["scale"] = jnp.asarray(scale, jnp.float32)
    options = {name: value for name, value in {"out": out, "total": residual is not None}.items() if value}
    made = fused_norm_kernel(x, *arrays.values(), eps=float(eps), centred=centred, given=" ".join(arrays), **options)
    first, *rest = made
    return made if rest else first


def _check(x, given, axes: int, out: str, scale) -> None:
    """Raises InputError where what is given with a norm does not go with it."""
    residual, index = given["residual"], given["index"]
    if axes != 1:
        raise InputError(
            f"A norm with a residual, an index or a dtype was given axes={axes}. It is of the last one alone."
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or index is not None):
        raise InputError(
            f"A norm of {x.dtype}{list(x.shape)} was given a residual {residual.dtype}{list(residual.shape)}"
            f"{' and an index' if index is not None else ''}. A residual is like the array, and comes without an index."
        )
    if index is not None and (x.ndim != 2 or not jnp.issubdtype(index.dtype, jnp.integer)):
        raise InputError(
            f"A norm of {x.dtype}{list(x.shape)} was given an index of {index.dtype}. Integers choose rows of a table "
            "`[rows, size]`."
        )
    for name in ("weight", "bias"):
        if (array := given.get(name)) is not None and array.shape != x.shape[-1:]:
            raise InputError(f"A norm of rows of {x.shape[-1]} was given a {name} {list(array.shape)}.")
    if out and out not in LARGEST:
        raise InputError(f"A norm was given dtype={out}. It may be quantized to {', '.join(LARGEST)}.")
    if scale is not None and (not out or jnp.ndim(scale) != 0):
        raise InputError(
            "A norm was given a scale that is not one number, or no dtype to quantize to. Give both, or neither."
        )


def _sample(rng, structs, attributes):
    """Random numbers, and rows that are in the table."""
    found = [rng.standard_normal(structs[0].shape).astype(structs[0].dtype)]
    for name, struct in zip(attributes["given"].split(), structs[1:], strict=True):
        if name == "index":
            found.append(rng.integers(0, structs[0].shape[0], struct.shape).astype(struct.dtype))
        else:
            found.append(rng.standard_normal(struct.shape).astype(struct.dtype) if struct.shape else np.float32(0.1))
    return found


fused_norm_kernel.sample = _sample


# In training steps: what patterns put in place of either norm, where they find it with its gradient ---------


def _normalized(x, parameters, eps, centred: bool, affine: str):
    if centred:
        return _layer_norm.decomposition(x, *parameters, axes=1, eps=eps, affine=affine)
    return _rms_norm.decomposition(x, *parameters, axes=1, eps=eps)


@kernel("kpx.norm", version=1)
def norm_kernel(x, *parameters, eps, centred, affine):
    """Either norm of the last dimension; `affine` names the parameters, as for `kpx.layer_norm`."""
    return _normalized(x, parameters, eps, centred, affine)


@kernel("kpx.norm_carried", version=1)
def carried_kernel(x, *parameters, eps, centred, affine):
    """The norm, and `x` as it is, for what goes around the norm (a residual): its gradient is added by the kernel."""
    return _normalized(x, parameters, eps, centred, affine), x
