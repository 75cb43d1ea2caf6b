"""Flash attention (arXiv 2205.14135, 2307.08691) in Triton: one source for NVIDIA's and AMD's GPUs.

Arrays are row-major: queries `[BATCH * HEADS, LENGTH, SIZE]`, keys `[BATCH * HEADS // GROUP, KV_LENGTH, SIZE]`, values
`[BATCH * HEADS // GROUP, KV_LENGTH, VALUE_SIZE]`; query head `h` reads key head `h // GROUP`. Blocks are powers of two, of
which what is beyond an array's end is not read and not written. Sums are in f32; powers are of two.

Of what all kernels share: SCALE multiplies scores; SOFTCAP caps them (0: not); CAUSAL hides later keys; WINDOW hides keys
that far away (0: none); MASK is 0 without a mask, 1 for bools, 2 for numbers that are added, and the mask's strides over
the batch, heads and queries are MASK_BATCH, MASK_HEAD and MASK_ROW; PRECISION is that of products of f32.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(start, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """A block of a row-major matrix; zeros beyond its end."""
    at = start + rows[:, None] * COLUMNS + columns[None, :]
    if ROWS % BR == 0 and COLUMNS == BC:
        return tl.load(at)
    return tl.load(at, (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS), 0.0)


@triton.jit
def _store(start, rows, columns, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = start + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(at, block.to(start.dtype.element_ty), (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS))


@triton.jit
def _score(left, right, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores times log2(e), before they are masked."""
    product = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    if SOFTCAP > 0:
        return (2.0 * tl.sigmoid(product * (2.0 * SCALE / SOFTCAP)) - 1.0) * (SOFTCAP * LOG2_E)
    return product * (SCALE * LOG2_E)


@triton.jit
def _hide(scores, rows, columns, mask, LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, CAUSAL: tl.constexpr,
          WINDOW: tl.constexpr, MASK: tl.constexpr, MASK_ROW: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Masked scores: -inf where a query (`rows`) does not see a key (`columns`). EDGE: the block may not be seen whole."""
    if MASK > 0:
        given = tl.load(mask + rows * MASK_ROW + columns, (rows < LENGTH) & (columns < KV_LENGTH), 0)
        if MASK == 1:
            scores = tl.where(given, scores, float("-inf"))
        else:
            scores += given.to(tl.float32) * LOG2_E
    if EDGE:
        seen = (columns < KV_LENGTH) & (rows >= 0)
        if CAUSAL:
            seen = seen & (rows >= columns)
        if WINDOW > 0:
            seen = seen & (rows - columns < WINDOW) & (columns - rows < WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _keys_in_sight(first, KV_LENGTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BQ: tl.constexpr,
                   BK: tl.constexpr):  # fmt: skip
    """Of a block of queries that begins at `first`: the first key, the end of what every one sees, and the end."""
    begin = first * 0
    end = begin + KV_LENGTH
    whole = begin + KV_LENGTH // BK * BK
    if CAUSAL:
        whole = tl.minimum(whole, first // BK * BK)
        end = tl.minimum(end, first + BQ)
    if WINDOW > 0:
        begin = tl.maximum(begin, first - WINDOW + 1) // BK * BK
        end = tl.minimum(end, first + BQ + WINDOW - 1)
        whole = begin
    return begin, whole, end


@triton.jit
def _attend(query, top, total, sums, rows, begin, end, key, value, mask,
            LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
            SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
            MASK_ROW: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
            EDGE: tl.constexpr):  # fmt: skip
    """Takes keys `begin` to `end` into a block of queries' maxima, totals and weighted sums."""
    d, v = tl.arange(0, BD), tl.arange(0, BV)
    for start in range(begin, end, BK):
        columns = start + tl.arange(0, BK)
        keys = _load(key, columns, d, KV_LENGTH, SIZE, BK, BD)
        scores = _score(query, keys, SCALE, SOFTCAP, PRECISION)
        scores = _hide(scores, rows[:, None], columns[None, :], mask, LENGTH, KV_LENGTH, CAUSAL, WINDOW, MASK, MASK_ROW,
                       EDGE)  # fmt: skip
        highest = tl.maximum(top, tl.max(scores, 1))
        least = tl.where(highest == float("-inf"), 0.0, highest)  # of a query that has seen nothing
        weights = tl.exp2(scores - least[:, None])
        shrink = tl.exp2(top - least)
        values = _load(value, columns, v, KV_LENGTH, VALUE_SIZE, BK, BV)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
        top = highest
    return top, total, sums


@triton.jit
def forward(query, key, value, mask, out, log_total,
            LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
            HEADS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
            WINDOW: tl.constexpr, MASK: tl.constexpr, MASK_BATCH: tl.constexpr, MASK_HEAD: tl.constexpr,
            MASK_ROW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """The attention of a block of queries, and the logarithm (base 2) of what its weights were divided by."""
    blocks: tl.constexpr = (LENGTH + BQ - 1) // BQ
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    head = (tl.program_id(0) // blocks).to(tl.int64)
    rows, d, v = block * BQ + tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BV)
    queries = _load(query + head * LENGTH * SIZE, rows, d, LENGTH, SIZE, BQ, BD)
    key += head // GROUP * KV_LENGTH * SIZE
    value += head // GROUP * KV_LENGTH * VALUE_SIZE
    mask += head // HEADS * MASK_BATCH + head % HEADS * MASK_HEAD
    top = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    sums = tl.zeros([BQ, BV], tl.float32)
    begin, whole, end = _keys_in_sight(block * BQ, KV_LENGTH, CAUSAL, WINDOW, BQ, BK)
    if WINDOW == 0:
        top, total, sums = _attend(
            queries, top, total, sums, rows, begin, whole, key, value, mask, LENGTH, KV_LENGTH, SIZE, VALUE_SIZE, SCALE,
            SOFTCAP, CAUSAL, WINDOW, MASK, MASK_ROW, BK, BD, BV, PRECISION, False)  # fmt: skip
    if CAUSAL or WINDOW > 0 or KV_LENGTH % BK != 0:
        top, total, sums = _attend(
            queries, top, total, sums, rows, whole, end, key, value, mask, LENGTH, KV_LENGTH, SIZE, VALUE_SIZE, SCALE,
            SOFTCAP, CAUSAL, WINDOW, MASK, MASK_ROW, BK, BD, BV, PRECISION, True)  # fmt: skip
    sums = sums / tl.where(total == 0, 1.0, total)[:, None]
    _store(out + head * LENGTH * VALUE_SIZE, rows, v, sums, LENGTH, VALUE_SIZE)
    logs = tl.where(total == 0, float("inf"), top + tl.log2(total))  # of a query that sees nothing, no weight
    tl.store(log_total + head * LENGTH + rows, logs, rows < LENGTH)


@triton.jit
def backward_keys(query, key, value, mask, gradient, log_total, delta, key_gradient, value_gradient,
                  LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
                  HEADS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
                  CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, MASK_BATCH: tl.constexpr,
                  MASK_HEAD: tl.constexpr, MASK_ROW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
                  BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients by a block of keys and of values, summed over the query heads that share them."""
    blocks: tl.constexpr = (KV_LENGTH + BK - 1) // BK
    block = tl.program_id(0) % blocks
    kv_head = (tl.program_id(0) // blocks).to(tl.int64)
    columns, d, v = block * BK + tl.arange(0, BK), tl.arange(0, BD), tl.arange(0, BV)
    keys = _load(key + kv_head * KV_LENGTH * SIZE, columns, d, KV_LENGTH, SIZE, BK, BD)
    values = _load(value + kv_head * KV_LENGTH * VALUE_SIZE, columns, v, KV_LENGTH, VALUE_SIZE, BK, BV)
    by_keys = tl.zeros([BK, BD], tl.float32)
    by_values = tl.zeros([BK, BV], tl.float32)
    begin, end = 0, LENGTH
    if CAUSAL:
        begin = block * BK // BQ * BQ
    if WINDOW > 0:
        begin = tl.maximum(begin, block * BK - WINDOW + 1) // BQ * BQ
        end = tl.minimum(end, (block + 1) * BK + WINDOW - 1)
    for shared in range(GROUP):
        head = kv_head * GROUP + shared
        hidden = mask + head // HEADS * MASK_BATCH + head % HEADS * MASK_HEAD
        for start in range(begin, end, BQ):
            rows = start + tl.arange(0, BQ)
            queries = _load(query + head * LENGTH * SIZE, rows, d, LENGTH, SIZE, BQ, BD)
            cotangents = _load(gradient + head * LENGTH * VALUE_SIZE, rows, v, LENGTH, VALUE_SIZE, BQ, BV)
            logs = tl.load(log_total + head * LENGTH + rows, rows < LENGTH, float("inf"))  # no weight beyond the end
            deltas = tl.load(delta + head * LENGTH + rows, rows < LENGTH, 0.0)
            unmasked = _score(keys, queries, SCALE, SOFTCAP, PRECISION)
            scores = _hide(unmasked, rows[None, :], columns[:, None], hidden, LENGTH, KV_LENGTH, CAUSAL, WINDOW, MASK,
                           MASK_ROW, CAUSAL or WINDOW > 0 or KV_LENGTH % BK != 0)  # fmt: skip
            weights = tl.exp2(scores - logs[None, :])
            by_values = tl.dot(weights.to(cotangents.dtype), cotangents, by_values, input_precision=PRECISION)
            by_scores = weights * (tl.dot(values, tl.trans(cotangents), input_precision=PRECISION) - deltas[None, :])
            if SOFTCAP > 0:
                capped = unmasked / (SOFTCAP * LOG2_E)
                by_scores *= 1.0 - capped * capped
            by_keys = tl.dot(by_scores.to(queries.dtype), queries, by_keys, input_precision=PRECISION)
    _store(key_gradient + kv_head * KV_LENGTH * SIZE, columns, d, by_keys * SCALE, KV_LENGTH, SIZE)
    _store(value_gradient + kv_head * KV_LENGTH * VALUE_SIZE, columns, v, by_values, KV_LENGTH, VALUE_SIZE)


@triton.jit
def backward_queries(query, key, value, mask, gradient, log_total, delta, query_gradient,
                     LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
                     HEADS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
                     CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, MASK_BATCH: tl.constexpr,
                     MASK_HEAD: tl.constexpr, MASK_ROW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
                     BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients by a block of queries."""
    blocks: tl.constexpr = (LENGTH + BQ - 1) // BQ
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block
    head = (tl.program_id(0) // blocks).to(tl.int64)
    rows, d, v = block * BQ + tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BV)
    queries = _load(query + head * LENGTH * SIZE, rows, d, LENGTH, SIZE, BQ, BD)
    cotangents = _load(gradient + head * LENGTH * VALUE_SIZE, rows, v, LENGTH, VALUE_SIZE, BQ, BV)
    logs = tl.load(log_total + head * LENGTH + rows, rows < LENGTH, float("inf"))
    deltas = tl.load(delta + head * LENGTH + rows, rows < LENGTH, 0.0)
    key += head // GROUP * KV_LENGTH * SIZE
    value += head // GROUP * KV_LENGTH * VALUE_SIZE
    mask += head // HEADS * MASK_BATCH + head % HEADS * MASK_HEAD
    by_queries = tl.zeros([BQ, BD], tl.float32)
    begin, _, end = _keys_in_sight(block * BQ, KV_LENGTH, CAUSAL, WINDOW, BQ, BK)
    for start in range(begin, end, BK):
        columns = start + tl.arange(0, BK)
        keys = _load(key, columns, d, KV_LENGTH, SIZE, BK, BD)
        values = _load(value, columns, v, KV_LENGTH, VALUE_SIZE, BK, BV)
        unmasked = _score(queries, keys, SCALE, SOFTCAP, PRECISION)
        scores = _hide(unmasked, rows[:, None], columns[None, :], mask, LENGTH, KV_LENGTH, CAUSAL, WINDOW, MASK, MASK_ROW,
                       CAUSAL or WINDOW > 0 or KV_LENGTH % BK != 0)  # fmt: skip
        weights = tl.exp2(scores - logs[:, None])
        by_scores = weights * (tl.dot(cotangents, tl.trans(values), input_precision=PRECISION) - deltas[:, None])
        if SOFTCAP > 0:
            capped = unmasked / (SOFTCAP * LOG2_E)
            by_scores *= 1.0 - capped * capped
        by_queries = tl.dot(by_scores.to(keys.dtype), keys, by_queries, input_precision=PRECISION)
    _store(query_gradient + head * LENGTH * SIZE, rows, d, by_queries * SCALE, LENGTH, SIZE)
