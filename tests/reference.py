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
    if dtype == bool:
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        return rng.integers(0 if dtype.kind == "u" else -4, 5, shape).astype(dtype)
    if dtype.kind == "c":
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def assert_closer(candidate, competitor, reference, *, relative: float = 1e-4) -> None:
    """The candidate is within `relative` of an f64 reference, or no farther from it than the competitor.

    The distance is the largest difference over the largest magnitude of the reference.
    """
    candidate, competitor, reference = (
        np.asarray(a, np.float64) for a in (candidate, competitor, reference)
    )
    assert candidate.shape == reference.shape
    assert np.array_equal(np.isnan(candidate), np.isnan(reference))
    scale = np.nanmax(np.abs(reference), initial=0.0) or 1.0
    distance = np.nanmax(np.abs(candidate - reference), initial=0.0) / scale
    allowed = max(relative, np.nanmax(np.abs(competitor - reference), initial=0.0) / scale)
    assert distance <= allowed, f"{distance:.3g} from the reference; {allowed:.3g} is allowed"
