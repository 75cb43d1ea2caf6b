"""ATen's linear algebra: factorizations, solves, determinants, eigenvalues.

PyTorch's `info` outputs are 0 where LAPACK succeeded. XLA reports failure as NaN, so `info` is 1 where a
factorization failed, whatever the position.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.lax import linalg as lax_linalg

from kpx.bridges.torch import checks
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers, was_contiguous


def _adjoint(x):
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def _failed(x):
    return jnp.any(~jnp.isfinite(x), (-2, -1)).astype(jnp.int32)


@lowers(aten._linalg_check_errors.default)
def check_errors(info, api_name, *, is_matrix):
    checks.holds(jnp.all(info == 0), f"{api_name}: the input is singular or not positive-definite", "LinAlgError")


# Cholesky --------------------------------------------------------------------------------------


@lowers(aten.linalg_cholesky_ex.default)
def cholesky_ex(x, *, upper=False, check_errors=False):
    if not x.size:
        return x, jnp.zeros(x.shape[:-2], jnp.int32)
    # The triangle asked for alone is read.
    factor = lax_linalg.cholesky(_adjoint(x) if upper else x, symmetrize_input=False)
    failed = _failed(factor)
    return jnp.triu(_adjoint(factor)) if upper else jnp.tril(factor), failed


@lowers(aten.cholesky.default)
def cholesky(x, upper=False):
    factor, failed = cholesky_ex(x, upper=upper)
    checks.holds(jnp.all(failed == 0), "cholesky: the input is not positive-definite", "LinAlgError")
    return factor


@lowers(aten.cholesky_solve.default, aten._cholesky_solve_helper.default)
def cholesky_solve(b, factor, upper=False):
    lead = jnp.broadcast_shapes(b.shape[:-2], factor.shape[:-2])
    b = jnp.broadcast_to(b, (*lead, *b.shape[-2:]))
    factor = jnp.broadcast_to(factor, (*lead, *factor.shape[-2:]))
    lower = _adjoint(jnp.triu(factor)) if upper else jnp.tril(factor)
    half = _triangular(lower, b, lower=True)
    return _triangular(_adjoint(lower), half, lower=False)


@lowers(aten.cholesky_inverse.default)
def cholesky_inverse(factor, upper=False):
    identity = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return cholesky_solve(identity, factor, upper)


# Triangular solves -----------------------------------------------------------------------------


def _triangular(a, b, *, lower, left=True, unit=False):
    if not a.size or not b.size:
        return jnp.zeros(b.shape, b.dtype)
    return lax_linalg.triangular_solve(a, b, left_side=left, lower=lower, unit_diagonal=unit)


def _batched(a, b):
    lead = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return jnp.broadcast_to(a, (*lead, *a.shape[-2:])), jnp.broadcast_to(b, (*lead, *b.shape[-2:]))


@lowers(aten.linalg_solve_triangular.default)
def solve_triangular(a, b, *, upper, left=True, unitriangular=False):
    a, b = _batched(a, b)
    return _triangular(a, b, lower=not upper, left=left, unit=unitriangular)


@lowers(aten.triangular_solve.default)
def triangular_solve(b, a, upper=True, transpose=False, unitriangular=False):
    a, b = _batched(a, b)
    used = jnp.triu(a) if upper else jnp.tril(a)
    used = jnp.swapaxes(used, -1, -2) if transpose else used
    return _triangular(used, b, lower=upper == transpose, unit=unitriangular), a


# LU --------------------------------------------------------------------------------------------


def _lu(x):
    """LAPACK's packed factors, 1-based pivots, and the permutation of rows."""
    if not x.size:
        k = min(x.shape[-2:])
        rows = jnp.broadcast_to(jnp.arange(x.shape[-2], dtype=jnp.int32), x.shape[:-1])
        return x, jnp.zeros((*x.shape[:-2], k), jnp.int32), rows
    factors, pivots, permutation = lax_linalg.lu(x)
    return factors, (pivots + 1).astype(jnp.int32), permutation


def _singular(factors):
    if not factors.size:
        return jnp.zeros(factors.shape[:-2], jnp.int32)
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    zero = (diagonal == 0) | ~jnp.isfinite(diagonal)
    return jnp.where(zero.any(-1), jnp.argmax(zero, -1) + 1, 0).astype(jnp.int32)


@lowers(aten.linalg_lu_factor_ex.default)
def lu_factor_ex(x, *, pivot=True, check_errors=False):
    if not pivot:
        raise NotImplementedError("LU without pivoting has no CPU kernel, in PyTorch either")
    factors, pivots, _ = _lu(x)
    return factors, pivots, _singular(factors)


def _unpacked(factors):
    m, n = factors.shape[-2:]
    k = min(m, n)
    lower = jnp.tril(factors[..., :, :k], -1) + jnp.eye(m, k, dtype=factors.dtype)
    return lower, jnp.triu(factors[..., :k, :])


def _permutation_matrix(permutation, dtype):
    """`P` of `A = P @ L @ U`, from the order of rows that LU found."""
    n = permutation.shape[-1]
    return (jnp.arange(n)[:, None] == permutation[..., None, :]).astype(dtype)


@lowers(aten.linalg_lu.default)
def lu(x, *, pivot=True):
    if not pivot:
        raise NotImplementedError("LU without pivoting has no CPU kernel, in PyTorch either")
    factors, _, permutation = _lu(x)
    return (_permutation_matrix(permutation, x.dtype), *_unpacked(factors))


def _order(pivots, rows):
    if not pivots.size:
        return jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (*pivots.shape[:-1], rows))
    return lax_linalg.lu_pivots_to_permutation((pivots - 1).astype(jnp.int32), rows)


@lowers(aten.lu_unpack.default)
def lu_unpack(factors, pivots, unpack_data=True, unpack_pivots=True):
    empty = jnp.zeros((0,), factors.dtype)
    p = _permutation_matrix(_order(pivots, factors.shape[-2]), factors.dtype) if unpack_pivots else empty
    return (p, *(_unpacked(factors) if unpack_data else (empty, empty)))


@lowers(aten.linalg_lu_solve.default)
def lu_solve(factors, pivots, b, *, left=True, adjoint=False):
    lead = jnp.broadcast_shapes(factors.shape[:-2], b.shape[:-2])
    order = jnp.broadcast_to(_order(pivots, factors.shape[-1]), (*lead, factors.shape[-1]))
    factors, b = _batched(factors, b)
    if not left:  # X A = B is A^H X^H = B^H
        return _adjoint(_lu_solved(factors, order, _adjoint(b), not adjoint))
    return _lu_solved(factors, order, b, adjoint)


def _lu_solved(factors, order, b, adjoint):
    if not b.size:
        return b
    lower, upper = _unpacked(factors)
    if not adjoint:
        b = jnp.take_along_axis(b, order[..., None], -2)
        return _triangular(upper, _triangular(lower, b, lower=True, unit=True), lower=False)
    b = _triangular(_adjoint(lower), _triangular(_adjoint(upper), b, lower=True), lower=False, unit=True)
    return jnp.take_along_axis(b, jnp.argsort(order, -1)[..., None], -2)


@lowers(aten._linalg_solve_ex.default)
def solve_ex(a, b, *, left=True, check_errors=False):
    vector = b.ndim == 1 or (a.ndim - 1 == b.ndim and b.shape == a.shape[:-1])
    factors, pivots, _ = _lu(a)
    x = lu_solve(factors, pivots, b[..., None] if vector else b, left=left)
    return (x[..., 0] if vector else x), factors, pivots, _singular(factors)


@lowers(aten.linalg_inv_ex.default)
def inv_ex(x, *, check_errors=False):
    factors, pivots, _ = _lu(x)
    identity = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    return lu_solve(factors, pivots, identity), _singular(factors)


def _sign_of(pivots, dtype):
    swaps = jnp.sum(pivots != jnp.arange(1, pivots.shape[-1] + 1), -1)
    return jnp.where(swaps % 2 == 1, -1, 1).astype(dtype)


def _lu_as_pytorch_keeps_it(x):
    """PyTorch factors the transpose of a real row-major matrix, to save a copy, and its gradients expect just that."""
    turned = not jnp.issubdtype(x.dtype, jnp.complexfloating) and was_contiguous(0)
    return _lu(jnp.swapaxes(x, -1, -2) if turned else x)


@lowers(aten._linalg_det.default)
def det(x):
    factors, pivots, _ = _lu_as_pytorch_keeps_it(x)
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    return jnp.prod(diagonal, -1) * _sign_of(pivots, x.dtype), factors, pivots


@lowers(aten._linalg_slogdet.default)
def slogdet(x):
    factors, pivots, _ = _lu_as_pytorch_keeps_it(x)
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    size = jnp.abs(diagonal)
    sign = jnp.prod(jnp.where(size == 0, 0, diagonal / jnp.where(size == 0, 1, size)), -1)
    return sign * _sign_of(pivots, x.dtype), jnp.sum(jnp.log(size), -1), factors, pivots


# Orthogonal factorizations ---------------------------------------------------------------------


@lowers(aten.linalg_qr.default)
def qr(x, mode="reduced"):
    m, n = x.shape[-2:]
    if not x.size:
        k = m if mode == "complete" else min(m, n)
        q = jnp.broadcast_to(jnp.eye(m, k, dtype=x.dtype), (*x.shape[:-2], m, k))
        r = jnp.zeros((*x.shape[:-2], k, n), x.dtype)
        return (jnp.zeros((0,), x.dtype) if mode == "r" else q), r
    q, r = lax_linalg.qr(x, full_matrices=mode == "complete")
    return (jnp.zeros((0,), x.dtype) if mode == "r" else q), jnp.triu(r)


@lowers(aten.geqrf.default)
def geqrf(x):
    if not x.size:
        return x, jnp.zeros((*x.shape[:-2], min(x.shape[-2:])), x.dtype)
    packed, tau = jnp.linalg.qr(x, mode="raw")
    return jnp.swapaxes(packed, -1, -2), tau


@lowers(aten.linalg_householder_product.default)
def householder_product(x, tau):
    return lax_linalg.householder_product(x, tau) if x.size and tau.size else _orthonormal(x)


def _orthonormal(x):
    return jnp.broadcast_to(jnp.eye(*x.shape[-2:], dtype=x.dtype), x.shape)


@lowers(aten.ormqr.default)
def ormqr(x, tau, other, left=True, transpose=False):
    m, k = x.shape[-2], tau.shape[-1]
    square = jnp.zeros((*x.shape[:-1], m), x.dtype).at[..., :, :k].set(x[..., :, :k])
    q = householder_product(square, tau) if k else _orthonormal(square)
    q = _adjoint(q) if transpose else q
    return q @ other if left else other @ q


@lowers(aten._linalg_svd.default)
def svd(x, full_matrices=False, compute_uv=True, *, driver=None):
    m, n = x.shape[-2:]
    lead, k = x.shape[:-2], min(m, n)
    real = jnp.finfo(x.dtype).dtype
    if not x.size:
        u = jnp.broadcast_to(
            jnp.eye(m, m if full_matrices else k, dtype=x.dtype), (*lead, m, m if full_matrices else k)
        )
        v = jnp.broadcast_to(
            jnp.eye(n if full_matrices else k, n, dtype=x.dtype), (*lead, n if full_matrices else k, n)
        )
        s, nothing = jnp.zeros((*lead, k), real), jnp.zeros((0,), x.dtype)
        return (u, s, v) if compute_uv else (nothing, s, nothing)
    if compute_uv:
        return tuple(jnp.linalg.svd(x, full_matrices=full_matrices))
    nothing = jnp.zeros((0,), x.dtype)
    return nothing, jnp.linalg.svd(x, compute_uv=False), nothing


@lowers(aten.linalg_pinv.atol_rtol_tensor)
def pinv(x, *, atol=None, rtol=None, hermitian=False):
    """Moore and Penrose's inverse: singular values up to `max(atol, rtol * largest)` count as zero."""
    real = jnp.finfo(x.dtype).dtype
    if not x.size:
        return jnp.zeros((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype)
    if hermitian:
        values, u = eigh(x)
        size, vh = jnp.abs(values), _adjoint(u)
    else:
        u, values, vh = svd(x)
        size = values
    absolute = jnp.zeros((), real) if atol is None else atol.astype(real)
    if rtol is None:
        rtol = jnp.where(absolute > 0, 0, max(x.shape[-2:]) * jnp.finfo(real).eps).astype(real)
    limit = jnp.maximum(absolute, rtol.astype(real) * size.max(-1))[..., None]
    inverse = jnp.where(size > limit, 1 / jnp.where(size > limit, values, 1), 0).astype(x.dtype)
    return (_adjoint(vh) * inverse[..., None, :]) @ _adjoint(u)


# Eigenvalues -----------------------------------------------------------------------------------


@lowers(aten._linalg_eigh.default)
def eigh(x, UPLO="L", compute_v=True):
    nothing = jnp.zeros((0,), x.dtype)
    if not x.size:
        values = jnp.zeros(x.shape[:-1], jnp.finfo(x.dtype).dtype)
        return values, (x if compute_v else nothing)
    # The triangle asked for alone is read; the diagonal counts as real.
    lower = _adjoint(x) if UPLO.upper() == "U" else x
    vectors, values = lax_linalg.eigh(lower, lower=True, symmetrize_input=False)
    return values, (vectors if compute_v else nothing)


@lowers(aten.linalg_eig.default)
def eig(x):
    kind = jnp.result_type(x.dtype, jnp.complex64)
    if not x.size:
        return jnp.zeros(x.shape[:-1], kind), x.astype(kind)
    values, vectors = lax_linalg.eig(x, compute_left_eigenvectors=False)
    return values.astype(kind), vectors.astype(kind)


@lowers(aten._linalg_eigvals.default, aten.linalg_eigvals.default)
def eigvals(x):
    return eig(x)[0]


@lowers(aten.linalg_matrix_exp.default)
def matrix_exp(x):
    if x.dtype in (jnp.bfloat16, jnp.float16):
        return matrix_exp(x.astype(jnp.float32)).astype(x.dtype)
    return jax.scipy.linalg.expm(x, max_squarings=48) if x.size else x
