"""Flash attention (arXiv 2205.14135, 2307.08691) in Triton: one source for NVIDIA's and AMD's GPUs.

Arrays are row-major: queries `[BATCH * HEADS, LENGTH, SIZE]`, keys `[BATCH * HEADS // GROUP, KV_LENGTH, SIZE]`, values
`[BATCH * HEADS // GROUP, KV_LENGTH, VALUE_SIZE]`; query head `h` reads key head `h // GROUP`. Blocks are powers of two, of
which what is beyond an array's end is not read and not written. Sums are in f32; powers are of two.

Of what all kernels share: SCALE multiplies scores; SOFTCAP caps them (0: not); CAUSAL hides later keys; WINDOW hides keys
that far away (0: none); MASK is 0 without a mask, 1 for bools, where what is hidden gets the score LOW (times log2(e)), 2 for
numbers that are added, and the mask's strides over the batch, heads and queries are MASK_BATCH, MASK_HEAD and MASK_ROW;
PRECISION is that of products of f32. Arrays that are
not there are not read: `slopes [HEADS]` of what scores lose by distance (SLOPES); `bounds [BATCH, 2]`, the first query's
position and the number of keys that are there (BOUNDS); `segments [BATCH, LENGTH]` and `kv_segments [BATCH, KV_LENGTH]`,
which must be alike (SEGMENTS); and `blocks`, for each block of queries (of keys, where gradients by those are computed):
how many blocks are seen whole, how many at all, which, and for each the place of its own mask `[BQ, BK]` in `mask`, in a row
of BLOCKS numbers (0: they are not listed).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Where all scores are LOW, their total's logarithm would be lost beside it: in its place is this over the total.
ALIKE = tl.constexpr(-1e30)


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
def _hide(scores, rows, columns, mask, slope, offset, kv_length, segments, kv_segments, LENGTH: tl.constexpr,
          KV_LENGTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, LOW: tl.constexpr, MASK_ROW: tl.constexpr,
          SLOPES: tl.constexpr, SEGMENTS: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Masked scores: -inf where a query (`rows`) does not see a key (`columns`). EDGE: the block may not be seen whole."""
    if SLOPES:
        scores -= slope * tl.abs(rows + offset - columns).to(tl.float32)
    if MASK > 0:
        given = tl.load(mask + rows * MASK_ROW + columns, (rows < LENGTH) & (columns < KV_LENGTH), 0)
        if MASK == 1:
            scores = tl.where(given, scores, LOW)
        else:
            scores += given.to(tl.float32) * LOG2_E
    if SEGMENTS:
        of_rows = tl.load(segments + rows, rows < LENGTH, 0)
        of_columns = tl.load(kv_segments + columns, columns < KV_LENGTH, 0)
        scores = tl.where(of_rows == of_columns, scores, float("-inf"))
    if EDGE:
        seen = (columns < kv_length) & (rows >= 0)
        if CAUSAL:
            seen = seen & (rows + offset >= columns)
        if WINDOW > 0:
            seen = seen & (rows + offset - columns < WINDOW) & (columns - rows - offset < WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _of_head(head, mask, slopes, bounds, segments, kv_segments, LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr,
             HEADS: tl.constexpr, MASK_BATCH: tl.constexpr, MASK_HEAD: tl.constexpr, SLOPES: tl.constexpr,
             BOUNDS: tl.constexpr):  # fmt: skip
    """What of the arrays that all heads share is a query head's: of the mask, its slope, bounds, segments."""
    batch = head // HEADS
    mask += batch * MASK_BATCH + head % HEADS * MASK_HEAD
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes + head % HEADS) * LOG2_E
    offset = 0
    kv_length = KV_LENGTH
    if BOUNDS:
        offset = tl.load(bounds + 2 * batch)
        kv_length = tl.minimum(tl.maximum(tl.load(bounds + 2 * batch + 1), 0), KV_LENGTH)
    return mask, slope, offset, kv_length, segments + batch * LENGTH, kv_segments + batch * KV_LENGTH


@triton.jit
def _keys_in_sight(first, kv_length, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """Of a block of queries whose positions begin at `first`: the first key, the end of what every one sees, and the end."""
    begin = first * 0
    end = begin + kv_length
    whole = end // BK * BK
    if CAUSAL:
        whole = tl.minimum(whole, tl.maximum(first, 0) // BK * BK)
        end = tl.maximum(tl.minimum(end, first + BQ), 0)
    if WINDOW > 0:
        begin = tl.maximum(begin, first - WINDOW + 1) // BK * BK
        end = tl.minimum(end, first + BQ + WINDOW - 1)
        whole = begin
    return begin, whole, end


@triton.jit
def _own_mask(mask, listed, i, row, column, BLOCKS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """Where a listed block's mask would begin, were it part of one of all positions; `i` is the block's place in the list."""
    place = tl.load(listed + (BLOCKS - 2) // 2 + i).to(tl.int64)
    return mask + place * BQ * BK - row * BK - column


@triton.jit
def take_in(scores, values, top, total, sums, PRECISION: tl.constexpr):
    """A block of masked scores and values taken into queries' maxima, totals and weighted sums."""
    highest = tl.maximum(top, tl.max(scores, 1))
    least = tl.where(highest == float("-inf"), 0.0, highest)  # of a query that has seen nothing
    weights = tl.exp2(scores - least[:, None])
    shrink = tl.exp2(top - least)
    total = total * shrink + tl.sum(weights, 1)
    sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
    return highest, total, sums


@triton.jit
def _attend(query, top, total, sums, first, begin, end, key, value, mask, slope, offset, kv_length, segments, kv_segments,
            listed, LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
            SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, LOW: tl.constexpr,
            MASK_ROW: tl.constexpr, SLOPES: tl.constexpr, SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr, BQ: tl.constexpr,
            BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Takes keys `begin` to `end`, or blocks of them by their places in a list, into a block of queries' maxima, totals and
    weighted sums."""
    rows, d, v = first + tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BV)
    for i in range(begin, end, 1 if BLOCKS > 0 else BK):
        start = i
        hidden = mask
        if BLOCKS > 0:
            start = tl.load(listed + i) * BK
            if MASK > 0:
                hidden = _own_mask(mask, listed, i, first, start, BLOCKS, BQ, BK)
        columns = start + tl.arange(0, BK)
        keys = _load(key, columns, d, KV_LENGTH, SIZE, BK, BD)
        scores = _score(query, keys, SCALE, SOFTCAP, PRECISION)
        scores = _hide(scores, rows[:, None], columns[None, :], hidden, slope, offset, kv_length, segments, kv_segments, LENGTH,
                       KV_LENGTH, CAUSAL, WINDOW, MASK, LOW, MASK_ROW, SLOPES, SEGMENTS, EDGE)  # fmt: skip
        values = _load(value, columns, v, KV_LENGTH, VALUE_SIZE, BK, BV)
        top, total, sums = take_in(scores, values, top, total, sums, PRECISION)
    return top, total, sums


@triton.jit
def forward(query, key, value, mask, slopes, bounds, segments, kv_segments, sinks, blocks, out, log_total,
            LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
            HEADS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
            WINDOW: tl.constexpr, MASK: tl.constexpr, LOW: tl.constexpr, MASK_BATCH: tl.constexpr, MASK_HEAD: tl.constexpr,
            MASK_ROW: tl.constexpr, SLOPES: tl.constexpr, BOUNDS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr,
            SINKS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """The attention of a block of queries, and the logarithm (base 2) of what its weights were divided by.

    `sinks [HEADS]` are further scores, without a value (SINKS).
    """
    count: tl.constexpr = (LENGTH + BQ - 1) // BQ
    block = tl.program_id(0) % count
    if CAUSAL:
        block = count - 1 - block  # the longest first
    head = (tl.program_id(0) // count).to(tl.int64)
    rows, d, v = block * BQ + tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BV)
    queries = _load(query + head * LENGTH * SIZE, rows, d, LENGTH, SIZE, BQ, BD)
    key += head // GROUP * KV_LENGTH * SIZE
    value += head // GROUP * KV_LENGTH * VALUE_SIZE
    mask, slope, offset, kv_length, segments, kv_segments = _of_head(
        head,
        mask,
        slopes,
        bounds,
        segments,
        kv_segments,
        LENGTH,
        KV_LENGTH,
        HEADS,
        MASK_BATCH,
        MASK_HEAD,
        SLOPES,
        BOUNDS,
    )
    top = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    sums = tl.zeros([BQ, BV], tl.float32)
    listed = blocks + block * BLOCKS
    if BLOCKS > 0:
        begin, whole, end = 2, 2 + tl.load(listed), 2 + tl.load(listed + 1)
    else:
        begin, whole, end = _keys_in_sight(block * BQ + offset, kv_length, CAUSAL, WINDOW, BQ, BK)
    if WINDOW == 0 or BLOCKS > 0:
        top, total, sums = _attend(
            queries, top, total, sums, block * BQ, begin, whole, key, value, mask, slope, offset, kv_length, segments, kv_segments,
            listed, LENGTH, KV_LENGTH, SIZE, VALUE_SIZE, SCALE, SOFTCAP, CAUSAL, WINDOW, 0 if BLOCKS > 0 else MASK, LOW, MASK_ROW,
            SLOPES, SEGMENTS, BLOCKS, BQ, BK, BD, BV, PRECISION, False)  # fmt: skip
    if CAUSAL or WINDOW > 0 or BOUNDS or BLOCKS > 0 or KV_LENGTH % BK != 0:
        top, total, sums = _attend(
            queries, top, total, sums, block * BQ, whole, end, key, value, mask, slope, offset, kv_length, segments, kv_segments,
            listed, LENGTH, KV_LENGTH, SIZE, VALUE_SIZE, SCALE, SOFTCAP, CAUSAL, WINDOW, MASK, LOW, MASK_ROW, SLOPES, SEGMENTS,
            BLOCKS, BQ, BK, BD, BV, PRECISION, True)  # fmt: skip
    if SINKS:
        sink = tl.load(sinks + head % HEADS) * LOG2_E
        highest = tl.maximum(top, sink)
        least = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp2(top - least)
        total = total * shrink + tl.exp2(sink - least)
        sums = sums * shrink[:, None]
        top = highest
    sums = sums / tl.where(total == 0, 1.0, total)[:, None]
    _store(out + head * LENGTH * VALUE_SIZE, rows, v, sums, LENGTH, VALUE_SIZE)
    logs = tl.where(total == 0, float("inf"), top + tl.log2(total))  # of a query that sees nothing, no weight
    if float("-inf") < LOW:
        logs = tl.where(top <= LOW, ALIKE / total, logs)
    tl.store(log_total + head * LENGTH + rows, logs, rows < LENGTH)


@triton.jit
def _weights(scores, logs, LOW: tl.constexpr):
    weights = tl.exp2(scores - logs)
    if float("-inf") < LOW:
        weights = tl.where(logs <= -1e20, tl.where(scores == LOW, logs / ALIKE, 0.0), weights)
    return weights


@triton.jit
def _by_scores(scores, weights, by_weights, deltas, unmasked, LOW: tl.constexpr, SOFTCAP: tl.constexpr):
    """The gradient by scores, given that by weights, and each query's sum of both."""
    by_scores = tl.where(scores <= LOW, 0.0, weights * (by_weights - deltas))
    if SOFTCAP > 0:
        capped = unmasked / (SOFTCAP * LOG2_E)
        by_scores *= 1.0 - capped * capped
    return by_scores


@triton.jit
def backward_keys(query, key, value, mask, slopes, bounds, segments, kv_segments, blocks, gradient, log_total, delta,
                  key_gradient, value_gradient, LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, SIZE: tl.constexpr,
                  VALUE_SIZE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
                  SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, LOW: tl.constexpr,
                  MASK_BATCH: tl.constexpr, MASK_HEAD: tl.constexpr, MASK_ROW: tl.constexpr, SLOPES: tl.constexpr,
                  BOUNDS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
                  BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients by a block of keys and of values, summed over the query heads that share them."""
    count: tl.constexpr = (KV_LENGTH + BK - 1) // BK
    block = tl.program_id(0) % count
    kv_head = (tl.program_id(0) // count).to(tl.int64)
    columns, d, v = block * BK + tl.arange(0, BK), tl.arange(0, BD), tl.arange(0, BV)
    keys = _load(key + kv_head * KV_LENGTH * SIZE, columns, d, KV_LENGTH, SIZE, BK, BD)
    values = _load(value + kv_head * KV_LENGTH * VALUE_SIZE, columns, v, KV_LENGTH, VALUE_SIZE, BK, BV)
    by_keys = tl.zeros([BK, BD], tl.float32)
    by_values = tl.zeros([BK, BV], tl.float32)
    for shared in range(GROUP):
        head = kv_head * GROUP + shared
        hidden, slope, offset, kv_length, of_rows, of_columns = _of_head(
            head,
            mask,
            slopes,
            bounds,
            segments,
            kv_segments,
            LENGTH,
            KV_LENGTH,
            HEADS,
            MASK_BATCH,
            MASK_HEAD,
            SLOPES,
            BOUNDS,
        )
        begin, end = offset * 0, offset * 0 + LENGTH
        if CAUSAL:
            begin = tl.maximum(block * BK - offset, 0) // BQ * BQ
        if WINDOW > 0:
            begin = tl.maximum(begin, block * BK - WINDOW + 1 - offset) // BQ * BQ
            end = tl.minimum(end, (block + 1) * BK + WINDOW - 1 - offset)
        if BOUNDS:
            end = tl.where(block * BK < kv_length, end, 0)
        listed = blocks + block * BLOCKS
        if BLOCKS > 0:
            begin, end = 2, 2 + tl.load(listed + 1)
        for i in range(begin, end, 1 if BLOCKS > 0 else BQ):
            start = i
            own = hidden
            if BLOCKS > 0:
                start = tl.load(listed + i) * BQ
                own = _own_mask(hidden, listed, i, start, block * BK, BLOCKS, BQ, BK)
            rows = start + tl.arange(0, BQ)
            queries = _load(query + head * LENGTH * SIZE, rows, d, LENGTH, SIZE, BQ, BD)
            cotangents = _load(gradient + head * LENGTH * VALUE_SIZE, rows, v, LENGTH, VALUE_SIZE, BQ, BV)
            logs = tl.load(log_total + head * LENGTH + rows, rows < LENGTH, float("inf"))  # no weight beyond the end
            deltas = tl.load(delta + head * LENGTH + rows, rows < LENGTH, 0.0)
            unmasked = _score(keys, queries, SCALE, SOFTCAP, PRECISION)
            scores = _hide(
                unmasked, rows[None, :], columns[:, None], own, slope, offset, kv_length, of_rows, of_columns, LENGTH,
                KV_LENGTH, CAUSAL, WINDOW, MASK, LOW, MASK_ROW, SLOPES, SEGMENTS,
                CAUSAL or WINDOW > 0 or BOUNDS or KV_LENGTH % BK != 0)  # fmt: skip
            weights = _weights(scores, logs[None, :], LOW)
            by_values = tl.dot(weights.to(cotangents.dtype), cotangents, by_values, input_precision=PRECISION)
            by_weights = tl.dot(values, tl.trans(cotangents), input_precision=PRECISION)
            by_scores = _by_scores(scores, weights, by_weights, deltas[None, :], unmasked, LOW, SOFTCAP)
            by_keys = tl.dot(by_scores.to(queries.dtype), queries, by_keys, input_precision=PRECISION)
    _store(key_gradient + kv_head * KV_LENGTH * SIZE, columns, d, by_keys * SCALE, KV_LENGTH, SIZE)
    _store(value_gradient + kv_head * KV_LENGTH * VALUE_SIZE, columns, v, by_values, KV_LENGTH, VALUE_SIZE)


@triton.jit
def backward_queries(query, key, value, mask, slopes, bounds, segments, kv_segments, blocks, gradient, log_total, delta,
                     query_gradient, LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, SIZE: tl.constexpr,
                     VALUE_SIZE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
                     SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, LOW: tl.constexpr,
                     MASK_BATCH: tl.constexpr, MASK_HEAD: tl.constexpr, MASK_ROW: tl.constexpr, SLOPES: tl.constexpr,
                     BOUNDS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
                     BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients by a block of queries."""
    count: tl.constexpr = (LENGTH + BQ - 1) // BQ
    block = tl.program_id(0) % count
    if CAUSAL:
        block = count - 1 - block
    head = (tl.program_id(0) // count).to(tl.int64)
    rows, d, v = block * BQ + tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BV)
    queries = _load(query + head * LENGTH * SIZE, rows, d, LENGTH, SIZE, BQ, BD)
    cotangents = _load(gradient + head * LENGTH * VALUE_SIZE, rows, v, LENGTH, VALUE_SIZE, BQ, BV)
    logs = tl.load(log_total + head * LENGTH + rows, rows < LENGTH, float("inf"))
    deltas = tl.load(delta + head * LENGTH + rows, rows < LENGTH, 0.0)
    key += head // GROUP * KV_LENGTH * SIZE
    value += head // GROUP * KV_LENGTH * VALUE_SIZE
    mask, slope, offset, kv_length, segments, kv_segments = _of_head(
        head,
        mask,
        slopes,
        bounds,
        segments,
        kv_segments,
        LENGTH,
        KV_LENGTH,
        HEADS,
        MASK_BATCH,
        MASK_HEAD,
        SLOPES,
        BOUNDS,
    )
    by_queries = tl.zeros([BQ, BD], tl.float32)
    listed = blocks + block * BLOCKS
    if BLOCKS > 0:
        begin, end = 2, 2 + tl.load(listed + 1)
    else:
        begin, _, end = _keys_in_sight(block * BQ + offset, kv_length, CAUSAL, WINDOW, BQ, BK)
    for i in range(begin, end, 1 if BLOCKS > 0 else BK):
        start = i
        hidden = mask
        if BLOCKS > 0:
            start = tl.load(listed + i) * BK
            hidden = _own_mask(mask, listed, i, block * BQ, start, BLOCKS, BQ, BK)
        columns = start + tl.arange(0, BK)
        keys = _load(key, columns, d, KV_LENGTH, SIZE, BK, BD)
        values = _load(value, columns, v, KV_LENGTH, VALUE_SIZE, BK, BV)
        unmasked = _score(queries, keys, SCALE, SOFTCAP, PRECISION)
        scores = _hide(unmasked, rows[:, None], columns[None, :], hidden, slope, offset, kv_length, segments, kv_segments,
                       LENGTH, KV_LENGTH, CAUSAL, WINDOW, MASK, LOW, MASK_ROW, SLOPES, SEGMENTS,
                       CAUSAL or WINDOW > 0 or BOUNDS or KV_LENGTH % BK != 0)  # fmt: skip
        weights = _weights(scores, logs[:, None], LOW)
        by_weights = tl.dot(cotangents, tl.trans(values), input_precision=PRECISION)
        by_scores = _by_scores(scores, weights, by_weights, deltas[:, None], unmasked, LOW, SOFTCAP)
        by_queries = tl.dot(by_scores.to(keys.dtype), keys, by_queries, input_precision=PRECISION)
    _store(query_gradient + head * LENGTH * SIZE, rows, d, by_queries * SCALE, LENGTH, SIZE)


@triton.jit
def backward_mask(query, key, value, mask, slopes, bounds, segments, kv_segments, gradient, log_total, delta, mask_gradient,
                  LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
                  HEADS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
                  CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, LOW: tl.constexpr, MASK_BATCH: tl.constexpr,
                  MASK_HEAD: tl.constexpr, MASK_ROW: tl.constexpr, SLOPES: tl.constexpr, BOUNDS: tl.constexpr,
                  SEGMENTS: tl.constexpr, BATCHES: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
                  BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients by a block of a mask of numbers, `[batch or 1, heads or 1, LENGTH, KV_LENGTH]`, summed over the batches, of
    which there are BATCHES, and the heads that share it."""
    wide: tl.constexpr = (KV_LENGTH + BK - 1) // BK
    count: tl.constexpr = (LENGTH + BQ - 1) // BQ * wide
    of_heads: tl.constexpr = HEADS if MASK_HEAD > 0 else 1
    shared_heads: tl.constexpr = HEADS // of_heads
    shared_batches: tl.constexpr = 1 if MASK_BATCH > 0 else BATCHES
    block = tl.program_id(0) % count
    part = (tl.program_id(0) // count).to(tl.int64)
    rows, d = block // wide * BQ + tl.arange(0, BQ), tl.arange(0, BD)
    columns, v = block % wide * BK + tl.arange(0, BK), tl.arange(0, BV)
    by_mask = tl.zeros([BQ, BK], tl.float32)
    for shared in range(shared_batches * shared_heads):
        batch = part // of_heads + shared // shared_heads
        head = batch * HEADS + part % of_heads + shared % shared_heads
        added, slope, offset, kv_length, of_rows, of_columns = _of_head(
            head,
            mask,
            slopes,
            bounds,
            segments,
            kv_segments,
            LENGTH,
            KV_LENGTH,
            HEADS,
            MASK_BATCH,
            MASK_HEAD,
            SLOPES,
            BOUNDS,
        )
        queries = _load(query + head * LENGTH * SIZE, rows, d, LENGTH, SIZE, BQ, BD)
        cotangents = _load(gradient + head * LENGTH * VALUE_SIZE, rows, v, LENGTH, VALUE_SIZE, BQ, BV)
        keys = _load(key + head // GROUP * KV_LENGTH * SIZE, columns, d, KV_LENGTH, SIZE, BK, BD)
        values = _load(value + head // GROUP * KV_LENGTH * VALUE_SIZE, columns, v, KV_LENGTH, VALUE_SIZE, BK, BV)
        logs = tl.load(log_total + head * LENGTH + rows, rows < LENGTH, float("inf"))
        deltas = tl.load(delta + head * LENGTH + rows, rows < LENGTH, 0.0)
        scores = _hide(_score(queries, keys, SCALE, SOFTCAP, PRECISION), rows[:, None], columns[None, :], added, slope, offset,
                       kv_length, of_rows, of_columns, LENGTH, KV_LENGTH, CAUSAL, WINDOW, MASK, LOW, MASK_ROW, SLOPES, SEGMENTS,
                       True)  # fmt: skip
        by_weights = tl.dot(cotangents, tl.trans(values), input_precision=PRECISION)
        by_mask += tl.exp2(scores - logs[:, None]) * (by_weights - deltas[:, None])
    _store(mask_gradient + part * LENGTH * KV_LENGTH, rows, columns, by_mask, LENGTH, KV_LENGTH)
