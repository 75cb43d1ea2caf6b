"""Group normalization in Triton: a program has one group of channels of one sample, `[POSITIONS, CHANNELS / GROUPS]`.

Arrays are `[batch, POSITIONS, CHANNELS]`, row-major. It is read once for mean and variance, which are put together tile by
tile (Chan's formula), and once more, mostly from the cache, to be written.
"""

import triton
import triton.language as tl


@triton.jit
def forward(x, weight, bias, out, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, EPS: tl.constexpr,
            SILU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Groups to zero mean and unit variance, then `* weight + bias`, and SiLU."""
    own: tl.constexpr = CHANNELS // GROUPS
    sample, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    within = tl.arange(0, BC)
    columns = group * own + within
    base = sample.to(tl.int64) * POSITIONS * CHANNELS
    mean, squares, count = 0.0, 0.0, 0.0
    for start in range(0, POSITIONS, BP):
        rows = start + tl.arange(0, BP)
        inside = (rows[:, None] < POSITIONS) & (within[None, :] < own)
        tile = tl.load(x + base + rows[:, None].to(tl.int64) * CHANNELS + columns[None, :], inside, 0.0).to(tl.float32)
        some = tl.minimum(POSITIONS - start, BP) * own * 1.0
        middle = tl.sum(tile) / some
        off = tl.where(inside, tile - middle, 0.0)
        whole = count + some
        squares += tl.sum(off * off) + (middle - mean) * (middle - mean) * count * some / whole
        mean += (middle - mean) * some / whole
        count = whole
    scale = 1.0 / tl.sqrt(squares / count + EPS)
    factor = tl.load(weight + columns, within < own, 0.0).to(tl.float32) * scale
    shift = tl.load(bias + columns, within < own, 0.0).to(tl.float32)
    for start in range(0, POSITIONS, BP):
        rows = start + tl.arange(0, BP)
        inside = (rows[:, None] < POSITIONS) & (within[None, :] < own)
        at = base + rows[:, None].to(tl.int64) * CHANNELS + columns[None, :]
        y = (tl.load(x + at, inside, 0.0).to(tl.float32) - mean) * factor[None, :] + shift[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out + at, y.to(out.dtype.element_ty), inside)
