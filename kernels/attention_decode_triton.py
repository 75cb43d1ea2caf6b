"""Attention of few queries to many keys in Triton (a decoding step; "Flash-Decoding", pytorch.org/blog/flash-decoding).

Keys are split over programs, each of which gives its part's maxima, totals and weighted sums. The rows of a program are all
queries that share a key head: `[BATCH * KV_HEADS, GROUP * LENGTH, SIZE]`. Keys and values are `[BATCH, KV_HEADS, KV_LENGTH,
...]`, or where PAGE is not 0, pages of so many keys, `[KV_HEADS, POOL, PAGE, ...]`, of which `pages [BATCH, PAGES]` tells
which are a batch's. Keys from `bounds[batch, 1]` on are not read. The rest is as in `attention_triton`.
"""

import triton
import triton.language as tl

from kpx.kernels.attention_triton import LOG2_E, _score, _store, take_in


@triton.jit
def _rows_of_keys(start, rows, columns, kv_length, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    at = start + rows[:, None] * SIZE + tl.arange(0, COLUMNS)[None, :]
    return tl.load(at, (columns[:, None] < kv_length) & (tl.arange(0, COLUMNS)[None, :] < SIZE), 0.0)


@triton.jit
def decode(query, key, value, mask, slopes, bounds, pages, sums_out, tops, totals,
           LENGTH: tl.constexpr, KV_LENGTH: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
           KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
           WINDOW: tl.constexpr, MASK: tl.constexpr, LOW: tl.constexpr, MASK_BATCH: tl.constexpr, MASK_HEAD: tl.constexpr,
           MASK_ROW: tl.constexpr, SLOPES: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, POOL: tl.constexpr,
           CHUNK: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """What one part of the keys, CHUNK of them, gives to the queries of a key head."""
    count: tl.constexpr = (KV_LENGTH + CHUNK - 1) // CHUNK
    rows_there: tl.constexpr = GROUP * LENGTH
    part = tl.program_id(0) % count
    kv_head = (tl.program_id(0) // count).to(tl.int64)
    batch = kv_head // KV_HEADS
    offset = tl.load(bounds + 2 * batch)
    kv_length = tl.minimum(tl.load(bounds + 2 * batch + 1), KV_LENGTH)
    rows, d, v = tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BV)
    head = kv_head % KV_HEADS * GROUP + rows // LENGTH
    position = offset + rows % LENGTH
    there = rows < rows_there
    at = query + kv_head * rows_there * SIZE + rows[:, None] * SIZE + d[None, :]
    queries = tl.load(at, there[:, None] & (d[None, :] < SIZE), 0.0)
    hidden = mask + batch * MASK_BATCH + head * MASK_HEAD + rows % LENGTH * MASK_ROW
    top = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    sums = tl.zeros([BQ, BV], tl.float32)
    begin, end = part * CHUNK, tl.minimum((part + 1) * CHUNK, kv_length)
    if WINDOW > 0:
        begin = tl.maximum(begin, (offset - WINDOW + 1) // BK * BK)
    for start in range(begin, end, BK):
        columns = start + tl.arange(0, BK)
        if PAGE > 0:
            page = tl.load(pages + batch * PAGES + columns // PAGE, columns < kv_length, 0)
            places = (kv_head % KV_HEADS * POOL + page) * PAGE + columns % PAGE
        else:
            places = kv_head * KV_LENGTH + columns
        keys = _rows_of_keys(key, places, columns, kv_length, SIZE, BD)
        scores = _score(queries, keys, SCALE, SOFTCAP, PRECISION)
        if SLOPES:
            slope = tl.load(slopes + head, there, 0.0) * LOG2_E
            scores -= slope[:, None] * tl.abs(position[:, None] - columns[None, :]).to(tl.float32)
        if MASK > 0:
            given = tl.load(hidden[:, None] + columns[None, :], there[:, None] & (columns[None, :] < KV_LENGTH), 0)
            if MASK == 1:
                scores = tl.where(given, scores, LOW)
            else:
                scores += given.to(tl.float32) * LOG2_E
        seen = columns[None, :] < kv_length
        if CAUSAL:
            seen = seen & (position[:, None] >= columns[None, :])
        if WINDOW > 0:
            seen = (
                seen & (position[:, None] - columns[None, :] < WINDOW) & (columns[None, :] - position[:, None] < WINDOW)
            )
        scores = tl.where(seen, scores, float("-inf"))
        values = _rows_of_keys(value, places, columns, kv_length, VALUE_SIZE, BV)
        top, total, sums = take_in(scores, values, top, total, sums, PRECISION)
    place = (part * (tl.num_programs(0) // count) + kv_head) * rows_there
    _store(sums_out + place * VALUE_SIZE, rows, v, sums, rows_there, VALUE_SIZE)
    tl.store(tops + place + rows, top, there)
    tl.store(totals + place + rows, total, there)
