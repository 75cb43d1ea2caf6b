"""Layer and RMS normalization in Triton, forward and backward, each one pass over memory.

Arrays are `[ROWS, SIZE]`, row-major; a program has BR whole rows at a time, BS columns wide, a power of two. Sums are in f32.
CENTRED: the mean is subtracted. WEIGHT and BIAS: there is one, `[SIZE]`.
"""

import triton
import triton.language as tl


@triton.jit
def forward(x, weight, bias, out, means, scales, ROWS: tl.constexpr, SIZE: tl.constexpr, EPS: tl.constexpr,
            CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BR: tl.constexpr,
            BS: tl.constexpr):  # fmt: skip
    """Rows normalized, their means (zeros where not CENTRED), and what they were multiplied by."""
    rows, columns = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BS)
    inside = (rows < ROWS)[:, None] & (columns < SIZE)[None, :]
    at = rows[:, None].to(tl.int64) * SIZE + columns[None, :]
    wide = tl.load(x + at, inside, 0.0).to(tl.float32)
    mean = tl.zeros([BR], tl.float32)
    if CENTRED:
        mean = tl.sum(wide, 1) / SIZE
        wide = tl.where(inside, wide - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / SIZE + EPS)
    y = wide * scale[:, None]
    if WEIGHT:
        y *= tl.load(weight + columns, columns < SIZE, 0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias + columns, columns < SIZE, 0.0).to(tl.float32)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), inside)
    tl.store(means + rows, mean, rows < ROWS)
    tl.store(scales + rows, scale, rows < ROWS)


@triton.jit
def fused(x, residual, index, weight, bias, scale, out, scales, total, ROWS: tl.constexpr, SIZE: tl.constexpr,
          EPS: tl.constexpr, CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, INDEX: tl.constexpr, TABLE: tl.constexpr, TOTAL: tl.constexpr,
          WEIGHT: tl.constexpr, BIAS: tl.constexpr, QUANTIZED: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr, BY_ROW: tl.constexpr, BR: tl.constexpr,
          BS: tl.constexpr):  # fmt: skip
    """Rows of `x` (of TABLE rows), or `x + residual`, or `x[index]`, which become `total` where TOTAL, normalized; and where QUANTIZED, as numbers
    up to LARGEST, divided by `scale`, or BY_ROW by one of each row's own, which becomes `scales`."""
    rows, columns = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BS)
    inside = (rows < ROWS)[:, None] & (columns < SIZE)[None, :]
    at = rows[:, None].to(tl.int64) * SIZE + columns[None, :]
    if INDEX:
        wanted = tl.load(index + rows, rows < ROWS, 0).to(tl.int64)
        there = (wanted >= 0) & (wanted < TABLE)
        wide = tl.load(x + wanted[:, None] * SIZE + columns[None, :], inside & there[:, None], 0.0)
        wide = tl.where(there[:, None], wide.to(tl.float32), float("nan")).to(x.dtype.element_ty)
    else:
        wide = tl.load(x + at, inside, 0.0)
    if RESIDUAL:
        wide = (wide.to(tl.float32) + tl.load(residual + at, inside, 0.0).to(tl.float32)).to(x.dtype.element_ty)
    if TOTAL:
        tl.store(total + at, wide, inside)
    wide = wide.to(tl.float32)
    if CENTRED:
        wide = tl.where(inside, wide - (tl.sum(wide, 1) / SIZE)[:, None], 0.0)
    y = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 1) / SIZE + EPS))[:, None]
    if WEIGHT:
        y *= tl.load(weight + columns, columns < SIZE, 0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias + columns, columns < SIZE, 0.0).to(tl.float32)[None, :]
    if QUANTIZED:
        if BY_ROW:
            top = tl.max(tl.where(inside, tl.abs(y), 0.0), 1)
            by = tl.where(top == 0.0, 1.0, top / LARGEST)
            tl.store(scales + rows, by, rows < ROWS)
            y = y / by[:, None]
        else:
            y = y / tl.load(scale)
        y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
        if ROUND:  # to nearest, ties to even, as adding and taking away 1.5 * 2**23 rounds
            y = (y + 12582912.0) - 12582912.0
    tl.store(out + at, y.to(out.dtype.element_ty), inside)


@triton.jit
def backward(x, weight, gradient, further, means, scales, by_x, by_weight, by_bias, ROWS: tl.constexpr,
             SIZE: tl.constexpr, CENTRED: tl.constexpr, WEIGHT: tl.constexpr, FURTHER: tl.constexpr, PROGRAMS: tl.constexpr,
             BR: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """The gradient by rows, with what else flows into them (FURTHER); and each program's part of those by weight and bias."""
    columns = tl.arange(0, BS)
    factor = tl.full([BS], 1.0, tl.float32)
    if WEIGHT:
        factor = tl.load(weight + columns, columns < SIZE, 0.0).to(tl.float32)
    weights, biases = tl.zeros([BS], tl.float32), tl.zeros([BS], tl.float32)
    for start in range(tl.program_id(0) * BR, ROWS, PROGRAMS * BR):
        rows = start + tl.arange(0, BR)
        inside = (rows < ROWS)[:, None] & (columns < SIZE)[None, :]
        at = rows[:, None].to(tl.int64) * SIZE + columns[None, :]
        scale = tl.load(scales + rows, rows < ROWS, 0.0)[:, None]
        wide = tl.load(x + at, inside, 0.0).to(tl.float32)
        if CENTRED:
            wide = tl.where(inside, wide - tl.load(means + rows, rows < ROWS, 0.0)[:, None], 0.0)
        normal = wide * scale
        cotangent = tl.load(gradient + at, inside, 0.0).to(tl.float32)
        weights += tl.sum(cotangent * normal, 0)
        biases += tl.sum(cotangent, 0)
        cotangent *= factor[None, :]
        found = cotangent - normal * (tl.sum(cotangent * normal, 1) / SIZE)[:, None]
        if CENTRED:
            found -= (tl.sum(cotangent, 1) / SIZE)[:, None]
        found *= scale
        if FURTHER:
            found += tl.load(further + at, inside, 0.0).to(tl.float32)
        tl.store(by_x + at, found.to(by_x.dtype.element_ty), inside)
    part = tl.program_id(0) * SIZE + columns
    tl.store(by_weight + part, weights, columns < SIZE)
    tl.store(by_bias + part, biases, columns < SIZE)
