"""The depthwise-separable block in Triton: what the first convolution gives is multiplied by the second before it is written.

Images are `[batch, HEIGHT, WIDTH, CHANNELS]`, row-major; a program has a tile of BM positions of the result, and BN of its
channels. Sums are in f32.
"""

import triton
import triton.language as tl


@triton.jit
def forward(x, depthwise, scale, shift, pointwise, out, POSITIONS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
            CHANNELS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, DEPTH: tl.constexpr, KH: tl.constexpr,
            KW: tl.constexpr, STRIDE: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, ACTIVATION: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`[batch, DOWN, ACROSS, DEPTH]`, of POSITIONS in all."""
    tiles: tl.constexpr = (DEPTH + BN - 1) // BN
    at = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    sample, row, column = at // (DOWN * ACROSS), at // ACROSS % DOWN, at % ACROSS
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(0, CHANNELS, BK):
        channels = start + tl.arange(0, BK)
        there = channels < CHANNELS
        inner = tl.zeros([BM, BK], tl.float32)
        for i in range(KH):
            for j in range(KW):
                h, w = row * STRIDE + i - TOP, column * STRIDE + j - LEFT
                inside = (at < POSITIONS) & (h >= 0) & (h < HEIGHT) & (w >= 0) & (w < WIDTH)
                place = ((sample * HEIGHT + h) * WIDTH + w).to(tl.int64) * CHANNELS
                pixels = tl.load(x + place[:, None] + channels[None, :], inside[:, None] & there[None, :], 0.0)
                weight = tl.load(depthwise + (i * KW + j) * CHANNELS + channels, there, 0.0)
                inner += pixels.to(tl.float32) * weight.to(tl.float32)[None, :]
        inner = inner * tl.load(scale + channels, there, 0.0).to(tl.float32)[None, :]
        inner = inner + tl.load(shift + channels, there, 0.0).to(tl.float32)[None, :]
        if ACTIVATION == "relu":
            inner = tl.where(inner < 0.0, 0.0, inner)  # NaN stays
        elif ACTIVATION == "relu6":
            inner = tl.where(inner < 0.0, 0.0, tl.where(inner > 6.0, 6.0, inner))
        elif ACTIVATION == "silu":
            inner = inner / (1.0 + tl.exp(-inner))
        factors = tl.load(
            pointwise + channels[:, None].to(tl.int64) * DEPTH + columns[None, :],
            there[:, None] & (columns[None, :] < DEPTH), 0.0,
        )  # fmt: skip
        sums = tl.dot(inner.to(x.dtype.element_ty), factors, sums, input_precision=PRECISION)
    tl.store(out + at[:, None].to(tl.int64) * DEPTH + columns[None, :], sums.to(out.dtype.element_ty),
             (at[:, None] < POSITIONS) & (columns[None, :] < DEPTH))  # fmt: skip
