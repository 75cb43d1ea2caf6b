"""What earlier measurements say of a new case: which implementations of a kernel are worth measuring first.

For each implementation, how long it takes over plain XLA is predicted, as a logarithm, by ridge regression on features of
the case (sizes of its arrays and their products, dtypes, attributes) and of the machine (cores, and the peaks of devices in
the table of chips). Cases come from the files that `kpx.tune` writes, of any machine.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kpx.hardware import chips
from kpx.kernels import selection
from kpx.kernels.selection import PLAIN

_CASE = re.compile(r"(?P<kernel>\S+) v\d+ \((?P<arrays>.*?)(?:; (?P<given>.*?))?\)(?P<gradient> with gradient)?$")
_ARRAY = re.compile(r"(\w+)\[([\d, ]*)\]")
_GIVEN = re.compile(r"(\w+)=('[^']*'|[-\w.+]+)")
_LEAST_CASES = 3  # of an implementation, before anything is said of it
_DAMPING = 1.0  # of weights, against cases of which there are few
_ARRAYS, _DIMENSIONS = 3, 4  # that features look at


@dataclass
class Ranking:
    """What is known of a kernel's implementations, by kernel and name: features and logarithms of ratios."""

    known: dict[tuple[str, str], tuple[list[np.ndarray], list[float]]] = field(default_factory=dict)

    @classmethod
    def of_files(cls, paths: Iterable[str | os.PathLike]) -> Ranking:
        """A ranking by the files that `kpx.tune` wrote; a file that cannot be read says nothing."""
        found = cls()
        for path in paths:
            kept = selection.entries(path)
            if isinstance(kept, str):
                continue
            for text, entry in kept["cases"].items():
                seconds = entry.get("seconds")
                if isinstance(seconds, dict):
                    found.add(text, kept["environment"], seconds)
        return found

    def add(self, text: str, environment: Mapping[str, str], seconds: Mapping[str, float]) -> None:
        """Adds a case, by its text, and the seconds of each implementation, plain XLA's among them."""
        given, plain = features(text, environment), seconds.get(PLAIN)
        if given is None or not plain or plain <= 0:
            return
        for name, taken in seconds.items():
            if name != PLAIN and taken > 0:
                xs, ys = self.known.setdefault((text.partition(" ")[0], name), ([], []))
                xs.append(given)
                ys.append(math.log(taken / plain))

    def predicted(self, text: str, environment: Mapping[str, str], names: Sequence[str]) -> dict[str, float]:
        """By name, how long an implementation is expected to take over plain XLA; those that nothing is known of are not
        there."""
        given, kernel = features(text, environment), text.partition(" ")[0]
        if given is None:
            return {}
        found = {PLAIN: 1.0} if PLAIN in names else {}
        for name in names:
            xs, ys = self.known.get((kernel, name), ([], []))
            if name != PLAIN and len(xs) >= _LEAST_CASES:
                found[name] = math.exp(_ridge(np.stack(xs), np.asarray(ys), given))
        return found if len(found) > 1 or PLAIN not in found else {}

    def order(self, text: str, environment: Mapping[str, str], names: Sequence[str]) -> tuple[list[str], bool]:
        """Names, those first that are expected to be the fastest, then the others as they came; and whether anything
        was known."""
        expected = self.predicted(text, environment, names)
        if not expected:
            return list(names), False
        return sorted(names, key=lambda n: expected.get(n, math.inf)), True


def features(text: str, environment: Mapping[str, str]) -> np.ndarray | None:
    """A case's, and its machine's; None for a text that is of no case."""
    found = _CASE.fullmatch(text)
    if found is None:
        return None
    arrays = [
        (dtype, [int(n) for n in dims.split(",") if n.strip()]) for dtype, dims in _ARRAY.findall(found["arrays"])
    ]
    given = dict(_GIVEN.findall(found["given"] or ""))
    numbers = [math.log2(1 + sum(math.prod(dims) for _, dims in arrays)), float(len(arrays))]
    for i in range(_ARRAYS):
        dims = arrays[i][1] if i < len(arrays) else []
        numbers += [math.log2(1 + n) for n in ([1] * _DIMENSIONS + dims)[-_DIMENSIONS:]]
    numbers += [float(any(d == each for d, _ in arrays)) for each in ("float32", "bfloat16", "float16", "bool")]
    numbers += [
        float(given.get("causal", "0") not in ("0", "")),
        float("window" in given),
        float(bool(found["gradient"])),
    ]
    return np.asarray([*numbers, *_machine(environment)])


def _machine(environment: Mapping[str, str]) -> list[float]:
    cores = math.log2(1 + float(environment.get("cores", "0") or 0))
    chip = next((c for c in chips.chips().values() if environment.get("device", "") in c.device_kinds), None)
    if chip is None:
        return [cores, 0.0, 0.0]
    return [cores, math.log10(max(chip.peaks.values())), math.log10(chip.bandwidth)]


def _ridge(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> float:
    """The prediction at a point of a ridge regression whose features are scaled to those it was made of."""
    middle, spread = x.mean(0), x.std(0)
    scale = np.where(spread > 0, spread, 1.0)
    scaled = (x - middle) / scale
    # No farther out than a little beyond what was seen: a line says nothing there.
    point = np.clip((at - middle) / scale, scaled.min(0) - 1, scaled.max(0) + 1) * (spread > 0)
    squares = scaled.T @ scaled + _DAMPING * np.eye(len(middle))
    weights = np.linalg.solve(squares, scaled.T @ (y - y.mean()))
    return float(np.clip(y.mean() + point @ weights, y.min() - 1, y.max() + 1))
