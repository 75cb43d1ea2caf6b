"""Products of groups of rows in Triton. Arrays are row-major; sums are in f32.

Rows come in tiles of one group each: `groups`, `firsts` and `ends` say, for each tile, its group, its first row and the row
after its group's last. The group after the last is of rows that have none, and give zeros.
"""

import triton
import triton.language as tl


@triton.jit
def rows_by_group(x, weight, groups, firsts, ends, out, SIZE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
                  TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """A tile of `[m, SIZE]` by its group's `[SIZE, WIDTH]`, or `[WIDTH, SIZE]` where TRANSPOSED."""
    across: tl.constexpr = (WIDTH + BN - 1) // BN
    tile = tl.program_id(0) // across
    columns = tl.program_id(0) % across * BN + tl.arange(0, BN)
    group = tl.load(groups + tile)
    rows = tl.load(firsts + tile) + tl.arange(0, BM)
    inside = rows < tl.load(ends + tile)
    matrix = weight + group.to(tl.int64) * SIZE * WIDTH
    sums = tl.zeros([BM, BN], tl.float32)
    length = tl.where(group < GROUPS, SIZE, 0)
    for start in range(0, length, BK):
        k = start + tl.arange(0, BK)
        at = x + rows[:, None].to(tl.int64) * SIZE + k[None, :]
        left = tl.load(at, inside[:, None] & (k[None, :] < SIZE), 0.0)
        if TRANSPOSED:
            right = tl.load(matrix + columns[:, None] * SIZE + k[None, :],
                            (columns[:, None] < WIDTH) & (k[None, :] < SIZE), 0.0)  # fmt: skip
            sums = tl.dot(left, tl.trans(right), sums, input_precision=PRECISION)
        else:
            right = tl.load(matrix + k[:, None] * WIDTH + columns[None, :],
                            (k[:, None] < SIZE) & (columns[None, :] < WIDTH), 0.0)  # fmt: skip
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
    at = out + rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), inside[:, None] & (columns[None, :] < WIDTH))


@triton.jit
def sums_by_group(x, y, firsts, ends, out, SIZE: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of a group's `[rows, SIZE]` and `[rows, WIDTH]` the product over rows, a block of `[SIZE, WIDTH]`."""
    across: tl.constexpr = (WIDTH + BN - 1) // BN
    blocks: tl.constexpr = (SIZE + BM - 1) // BM * across
    group = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    down, columns = block // across * BM + tl.arange(0, BM), block % across * BN + tl.arange(0, BN)
    begin, end = tl.load(firsts + group), tl.load(ends + group)
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(begin, end, BK):
        rows = start + tl.arange(0, BK)
        inside = rows[:, None] < end
        far = rows[:, None].to(tl.int64)
        left = tl.load(x + far * SIZE + down[None, :], inside & (down[None, :] < SIZE), 0.0)
        right = tl.load(y + far * WIDTH + columns[None, :], inside & (columns[None, :] < WIDTH), 0.0)
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
    at = out + group.to(tl.int64) * SIZE * WIDTH + down[:, None] * WIDTH + columns[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), (down[:, None] < SIZE) & (columns[None, :] < WIDTH))
