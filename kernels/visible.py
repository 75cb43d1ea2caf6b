"""Masks that are known while compiling, in words: what a kernel can skip is read off them.

A description is "" for an unknown mask, "all", "causal", "window 128", "causal window 128", or "bits " and the mask itself.
"""

from __future__ import annotations

import base64
import functools
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

_BLOCK = 128
_MOST_BLOCKS = 0.75  # of those that a causal mask, or none, would have computed; above, skipping is not worth lists


@dataclass(frozen=True)
class Visible:
    """What is known of a mask: attributes, and where these do not say it all, the mask itself in bits."""

    causal: bool = False
    window: int = 0
    bits: str = ""


def describe(mask: np.ndarray) -> str:
    """What a mask `[length, kv_length]` of bools is, in words; "" where kernels gain nothing by knowing it."""
    if mask.all():
        return "all"
    length, kv_length = mask.shape
    earlier = np.tri(length, kv_length, dtype=bool)
    causal = not (mask & ~earlier).any()
    seen = earlier if causal else np.ones_like(mask)
    if np.array_equal(mask, seen):
        return "causal"
    row, some = np.arange(length), mask.any(1)
    first, last = mask.argmax(1), kv_length - 1 - mask[:, ::-1].argmax(1)
    far = int(np.maximum(row - first, last - row)[some].max(initial=0)) + 1
    near = np.tri(length, kv_length, far - 1, dtype=bool) & ~np.tri(length, kv_length, -far, dtype=bool)
    if np.array_equal(mask, seen & near):
        return f"{'causal ' if causal else ''}window {far}"
    needed = blocks(mask, _BLOCK, _BLOCK) > 0
    otherwise = blocks(seen, _BLOCK, _BLOCK) > 0
    if needed.sum() > _MOST_BLOCKS * otherwise.sum():
        return ""
    return in_bits(mask)


def in_bits(mask: np.ndarray) -> str:
    """A mask itself, as a description."""
    return "bits " + base64.b85encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode()


@functools.lru_cache(maxsize=64)
def read(description: str) -> Visible | None:
    """What a description says; None where it says nothing."""
    if not description:
        return None
    words = description.split()
    if words[0] == "bits":
        return Visible(bits=words[1])
    return Visible("causal" in words, int(words[-1]) if "window" in words else 0)


def narrowed(
    further: dict[str, Any], causal: bool, window: int, description: str
) -> tuple[dict[str, Any], bool, int, str]:
    """Arrays beside queries, keys and values, causality and window, with what is known of the mask among them: where
    attributes say it all, or bits do, the mask is gone."""
    if (known := read(description)) is None:
        return dict(further), bool(causal), int(window), ""
    rest = {name: array for name, array in further.items() if name != "mask"}
    windows = [w for w in (window, known.window) if w]
    return rest, bool(causal or known.causal), min(windows, default=0), known.bits


@functools.lru_cache(maxsize=8)
def mask_of(bits: str, shape: tuple[int, int]) -> np.ndarray:
    """The mask `[length, kv_length]` that bits stand for."""
    packed = np.frombuffer(zlib.decompress(base64.b85decode(bits)), np.uint8)
    return np.unpackbits(packed, count=shape[0] * shape[1]).reshape(shape).astype(bool)


def shown(description: str, shape: tuple[int, int]) -> np.ndarray:
    """A mask `[length, kv_length]` that a description is of; one that hides nothing for an unknown one."""
    known = read(description) or Visible()
    if known.bits:
        return mask_of(known.bits, shape)
    mask = np.tri(*shape, dtype=bool) if known.causal else np.ones(shape, bool)
    if known.window:
        mask &= np.tri(*shape, known.window - 1, dtype=bool) & ~np.tri(*shape, -known.window, dtype=bool)
    return mask


def blocks(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Of each block of a mask: 0 where nothing is seen, 2 where all is, 1 otherwise. Beyond the mask's end nothing is."""
    cut = _cut(mask, rows, columns)
    return np.asarray(cut.any((2, 3)).astype(np.int8) + cut.all((2, 3)))


def _cut(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    padded = np.pad(mask, [(0, -mask.shape[0] % rows), (0, -mask.shape[1] % columns)])
    return padded.reshape(-1, rows, padded.shape[1] // columns, columns).swapaxes(1, 2)


def lists(mask: np.ndarray, rows: int, columns: int, *, by_columns: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What a kernel computes of a mask, by blocks.

    Returns:
        For each row of blocks (column, with `by_columns`), i32: how many are whole, how many are seen at all, which, whole
        ones first, and for each its place in the second array; and the blocks themselves, `[n, rows, columns]`, each once,
        the whole one first.
    """
    cut = _cut(mask, rows, columns)
    kinds = cut.any((2, 3)).astype(np.int8) + cut.all((2, 3))
    own = {np.packbits(np.ones((rows, columns), bool)).tobytes(): 0}
    places = np.zeros(kinds.shape, np.int32)
    for at in zip(*np.nonzero(kinds == 1), strict=True):
        places[at] = own.setdefault(np.packbits(cut[at]).tobytes(), len(own))
    each = np.unpackbits(np.frombuffer(b"".join(own), np.uint8)).reshape(-1, rows, columns).astype(bool)
    if by_columns:
        kinds, places = kinds.T, places.T
    counts = np.stack([(kinds == 2).sum(1), (kinds > 0).sum(1)], 1)
    order = np.argsort(-kinds, axis=1, kind="stable")[:, : max(1, counts[:, 1].max(initial=0))]
    return np.concatenate([counts, order, np.take_along_axis(places, order, 1)], 1).astype(np.int32), each
