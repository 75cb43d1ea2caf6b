"""Comparisons that tests share: arguments by seed, and the closer-than rule."""

from __future__ import annotations

import numpy as np

from kpx.ir.call import signature


def random_arguments(module, seed: int) -> list[np.ndarray]:
    """Arguments for a module's `main`: normal floats, small integers, fair bools."""
    rng = np.random.default_rng(seed)
    return [random_array(rng, s.shape, s.dtype) for s in signature(module)[0]]


def random_array(rng, shape, dtype) -> np.ndarray:
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        return rng.integers(0 if dtype.kind == "u" else -4, 5, shape).astype(dtype)
    if dtype.kind == "c":
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def distance(values, reference) -> float:
    """The root-mean-square difference from an f64 reference, over the reference's root mean square."""
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    assert values.shape == reference.shape
    assert np.array_equal(np.isnan(values), np.isnan(reference))
    scale = np.sqrt(np.nanmean(np.square(reference))) if reference.size else 1.0
    return float(np.sqrt(np.nanmean(np.square(values - reference))) / (scale or 1.0)) if reference.size else 0.0


def assert_closer(candidate, competitor, reference, *, relative: float = 0.0) -> None:
    """The candidate is no farther from an f64 reference than the competitor, or within `relative` of it.

    Two ways of rounding differ by chance: a tenth more than the competitor's distance still counts as equal.
    """
    ours, theirs = distance(candidate, reference), distance(competitor, reference)
    assert ours <= max(relative, 1.1 * theirs), f"{ours:.3g} from the reference, where the competitor is {theirs:.3g}"
