"""Products with what follows them in Triton: a bias, an activation, a sum, or a gate. Sums are in f32.

Arrays are row-major: `x` is `[ROWS, SIZE]`, a weight `[SIZE, WIDTH]`, or `[WIDTH, SIZE]` where TRANSPOSED. A program has a
tile of BM rows and BN columns; programs of GROUP tiles of rows run one after another, whose weights stay in the cache.
"""

import triton
import triton.language as tl


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # twice: tanh by a logistic
        x = x / (1.0 + tl.exp(-inner))
    return x


@triton.jit
def _tile(ROWS: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The first row and the first column of a program's tile."""
    down: tl.constexpr = (ROWS + BM - 1) // BM
    across: tl.constexpr = (WIDTH + BN - 1) // BN
    group = tl.program_id(0) // (GROUP * across)
    first = group * GROUP
    tall = tl.minimum(down - first, GROUP)
    place = tl.program_id(0) % (GROUP * across)
    return (first + place % tall) * BM, place // tall * BN


@triton.jit
def _weight(w, k, columns, SIZE: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A block `[k, columns]` of a weight."""
    if TRANSPOSED:
        inside = (columns[:, None] < WIDTH) & (k[None, :] < SIZE)
        return tl.trans(tl.load(w + columns[:, None].to(tl.int64) * SIZE + k[None, :], inside, 0.0))
    inside = (k[:, None] < SIZE) & (columns[None, :] < WIDTH)
    return tl.load(w + k[:, None].to(tl.int64) * WIDTH + columns[None, :], inside, 0.0)


@triton.jit
def linear(x, w, bias, residual, out, before, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
           TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`residual + activation(x @ w + bias)`; and what is activated, where it is to be saved."""
    first, left_column = _tile(ROWS, WIDTH, BM, BN, GROUP)
    rows, columns = first + tl.arange(0, BM), left_column + tl.arange(0, BN)
    far = rows[:, None].to(tl.int64)
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(0, SIZE, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + far * SIZE + k[None, :], (rows[:, None] < ROWS) & (k[None, :] < SIZE), 0.0)
        sums = tl.dot(left, _weight(w, k, columns, SIZE, WIDTH, TRANSPOSED), sums, input_precision=PRECISION)
    inside = (rows[:, None] < ROWS) & (columns[None, :] < WIDTH)
    at = far * WIDTH + columns[None, :]
    if BIAS:
        sums += tl.load(bias + columns, columns < WIDTH, 0.0).to(tl.float32)[None, :]
    if SAVE:
        tl.store(before + at, sums.to(before.dtype.element_ty), inside)
    sums = _activated(sums, ACTIVATION)
    if RESIDUAL:
        sums += tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), inside)


@triton.jit
def gated(x, gate, up, out, gates, ups, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
          TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
          BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`activation(x @ gate) * (x @ up)`, `x` read once; and both products, where they are to be saved."""
    first, left_column = _tile(ROWS, WIDTH, BM, BN, GROUP)
    rows, columns = first + tl.arange(0, BM), left_column + tl.arange(0, BN)
    far = rows[:, None].to(tl.int64)
    by_gate, by_up = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for start in range(0, SIZE, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + far * SIZE + k[None, :], (rows[:, None] < ROWS) & (k[None, :] < SIZE), 0.0)
        by_gate = tl.dot(left, _weight(gate, k, columns, SIZE, WIDTH, TRANSPOSED), by_gate, input_precision=PRECISION)
        by_up = tl.dot(left, _weight(up, k, columns, SIZE, WIDTH, TRANSPOSED), by_up, input_precision=PRECISION)
    inside = (rows[:, None] < ROWS) & (columns[None, :] < WIDTH)
    at = far * WIDTH + columns[None, :]
    if SAVE:
        tl.store(gates + at, by_gate.to(gates.dtype.element_ty), inside)
        tl.store(ups + at, by_up.to(ups.dtype.element_ty), inside)
    tl.store(out + at, (_activated(by_gate, ACTIVATION) * by_up).to(out.dtype.element_ty), inside)
