"""`kpx.precision.Budget`: the error that may be made, instead of which products to compute in what."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpx.errors import BudgetError, ConfigError
from kpx.precision.assignment import Assignment, Row
from kpx.precision.calibrated import Calibration

Outputs = list[list[np.ndarray]]

BITS = {"f32": 32, "bf16": 16, "f16": 16, "int8": 8, "fp8": 8, "mxfp8": 8, "mxfp4": 4, "nvfp4": 4}
"""Precisions that a budget may choose from, with what a number's bits are: what a product costs is taken to go with them."""

_FLOATS = ("f32", "bf16", "f16")

STRATEGIES = {
    "output": "how far the model's outputs move when that product alone is rounded, measured",
    "local": "how far the product's own result moves, measured",
    "entropy": "how few of its levels the numbers that it reads use: eight bits less the entropy of their magnitudes, times how much "
    "larger the largest is than their root mean square",
    "gradient": "how far the outputs move, to first order: the product's own error through the model's derivative, a random "
    "combination of outputs at a time",
}
"""How a product's sensitivity is estimated."""


def relative_error(outputs: Outputs, reference: Outputs) -> float:
    """The largest relative distance of a batch's outputs (root mean square)."""
    found = [
        _distance(o, r) for outs, refs in zip(outputs, reference, strict=True) for o, r in zip(outs, refs, strict=True)
    ]
    return max(found, default=0.0)


def cosine(outputs: Outputs, reference: Outputs) -> float:
    """The mean cosine of the first output's rows with those of the reference."""
    a, b = (
        np.concatenate([np.reshape(o[0], (-1, o[0].shape[-1])) for o in x]).astype(np.float64)
        for x in (outputs, reference)
    )
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.mean((a * b).sum(-1) / np.maximum(norms, 1e-30)))


def top_1(outputs: Outputs, reference: Outputs) -> float:
    """In how many rows of the first output the largest number is where it is in the reference."""
    return float(
        np.mean(
            np.concatenate(
                [(o[0].argmax(-1) == r[0].argmax(-1)).ravel() for o, r in zip(outputs, reference, strict=True)]
            )
        )
    )


METRICS: dict[str, Callable[[Outputs, Outputs], float]] = {
    "relative error": relative_error,
    "cosine": cosine,
    "top-1": top_1,
}
"""Metrics by name."""


@dataclass(frozen=True)
class Budget:
    """What a model's outputs may lose; the cheapest precisions that keep it are found on data.

    `Config(precision=Budget(...))` finds them when a model is optimized, and takes a saved assignment where there is one that
    fits; `assign` finds them alone.

    Attributes:
        metric: a name of `METRICS`, or `(outputs, reference) -> float` of what the model gives for each batch, a list of NumPy
            arrays, and of what it gave in its own precision.
        limit: at least this, where the metric of the reference with itself is more, at most this, where it is less.
        data: batches of inputs, as the model takes them: a tuple, a dict by name, or one array.
        precisions: to choose from, of `BITS`; those of eight bits and fewer are for products by weights. The last that is a
            float one is what is left where nothing cheaper will do.
        strategy: of `STRATEGIES`.
        calibration: what `calibrate` gave, for a precision with fewer bits.
        file: where the assignment is saved (JSON), and read from where it was made for the same places, limit and choices.

    Raises:
        ConfigError: a name is not known, or a value is not allowed.
    """

    metric: str | Callable[[Outputs, Outputs], float]
    limit: float
    data: Sequence[Any] = field(repr=False)
    precisions: tuple[str, ...] = ("int8", "bf16", "f32")
    strategy: str = "output"
    calibration: Calibration | None = None
    file: str | os.PathLike | None = None

    def __post_init__(self):
        object.__setattr__(self, "precisions", tuple(self.precisions))
        if isinstance(self.metric, str) and self.metric not in METRICS:
            raise ConfigError(f"`metric={self.metric!r}` is not known. Use one of {_listed(METRICS)}, or a function.")
        if not isinstance(self.metric, str) and not callable(self.metric):
            raise ConfigError(f"`metric={self.metric!r}` is neither a name nor a function. Names: {_listed(METRICS)}.")
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"`strategy={self.strategy!r}` is not known. Use one of {_listed(STRATEGIES)}.")
        if unknown := [p for p in self.precisions if p not in BITS]:
            raise ConfigError(f"`precisions` has {unknown[0]!r}. Use some of {_listed(BITS)}.")
        if not set(self.precisions) & set(_FLOATS):
            raise ConfigError(
                f"`precisions={self.precisions!r}` needs one of {_listed(_FLOATS)}, for what is no product by a weight."
            )
        if isinstance(self.limit, bool) or not isinstance(self.limit, (int, float)) or math.isnan(self.limit):
            raise ConfigError(f"`limit={self.limit!r}` is not a number.")

    @property
    def name(self) -> str:
        """The metric's."""
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "metric")

    def score(self, outputs: Outputs, reference: Outputs) -> float:
        """The metric of outputs."""
        function = METRICS[self.metric] if isinstance(self.metric, str) else self.metric
        return float(function(outputs, reference))


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    if not np.issubdtype(np.asarray(b).dtype, np.floating):
        return 0.0
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    found = math.sqrt(float(np.mean((a - b) ** 2))) / max(math.sqrt(float(np.mean(b**2))), 1e-30)
    return found if math.isfinite(found) else math.inf


def assign(model: Any, budget: Budget) -> Assignment:
    """The cheapest precisions of a model's products that keep a budget.

    All are as cheap as they can be at first; then those are raised that gain most by a budget's strategy for what they cost,
    as few as keep the limit on the data (by bisection, for what raises one more can hardly hurt). What is found is verified with
    the optimized model itself, on the same data.

    Args:
        model: a `torch.nn.Module`, a flax module that holds its weights, or a function that holds its weights.

    Returns:
        The assignment: its `policy` goes into `Config(precision=...)`; it prints as a table, and has `plot` and `save`.

    Raises:
        BudgetError: the dearest choices do not keep the limit; the error says what was reached.
        InputError: the data does not fit the model.
    """
    from kpx.precision.study import Study  # which the passes are part of

    study = Study(model, list(budget.data))
    if (saved := _saved(study, budget)) is not None:
        return saved
    found = _Search(study, budget).run()
    verified = _verified(model, study, budget, found)
    if budget.file is not None:
        verified.save(budget.file)
    return verified


def _saved(study: Any, budget: Budget) -> Assignment | None:
    if budget.file is None or not pathlib.Path(budget.file).exists():
        return None
    saved = Assignment.load(budget.file)
    same = [row.key for row in saved.rows] == [place.key for place in study.places]
    of = (saved.metric, saved.limit, saved.precisions, saved.strategy)
    if not same or of != (budget.name, budget.limit, budget.precisions, budget.strategy):
        return None
    return saved.with_calibration(budget.calibration)


class _Search:
    """Looks for the cheapest choices that keep a limit."""

    def __init__(self, study: Any, budget: Budget):
        from kpx.precision.products import Emulated

        self.study, self.budget = study, budget
        self.reference = study.outputs
        self.perfect = budget.score(self.reference, self.reference)
        dear_first = sorted(budget.precisions, key=lambda p: -BITS[p])
        self.exact = next(p for p in dear_first if p in _FLOATS)
        cheap_first = dear_first[::-1]
        self.choices = {
            place.key: [p for p in cheap_first if place.by_weight or p in _FLOATS] for place in study.places
        }
        self.ways = {
            place.key: [Emulated("f32"), *(self._way(place, p) for p in self.choices[place.key])]
            for place in study.places
        }
        self.run_with = study.chooser(self.ways)
        self.tries = 0

    def _way(self, place: Any, precision: str) -> Any:
        from kpx.precision.products import Emulated

        calibration = self.budget.calibration
        found = calibration and place.by_weight and calibration.find(place.path, place.nth, precision, place.sizes[2])
        return Emulated(precision, found.balance, found.scale) if found else Emulated(precision)

    def run(self) -> Assignment:
        """The choices, and how they were come to."""
        cheapest = dict.fromkeys(self.choices, 0)
        if self.is_kept(score := self.score(cheapest)):
            return self._assignment(cheapest, None, [], score)
        sensitivity = self._sensitivities()
        steps = self._steps(sensitivity)
        scores = {0: score}

        def keeps(count: int) -> bool:
            if count not in scores:
                scores[count] = self.score(self._raised(steps[:count]))
            return self.is_kept(scores[count])

        if not keeps(len(steps)):
            best = max(scores.values()) if self.perfect > self.budget.limit else min(scores.values())
            raise BudgetError(
                f"The budget cannot be kept: {self.budget.name} {self._sign} {self.budget.limit} was asked for, and {best:.6g} is "
                f"reached with {self.exact} everywhere. Give another limit, or add 'f32' to `precisions`."
            )
        low, high = 0, len(steps)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(middle) else (middle, high)
        return self._assignment(self._raised(steps[:high]), sensitivity, steps[:high], scores[high])

    @property
    def _sign(self) -> str:
        return "≥" if self.perfect > self.budget.limit else "≤"

    def is_kept(self, score: float) -> bool:
        """Whether a score is within the budget."""
        return score >= self.budget.limit if self.perfect > self.budget.limit else score <= self.budget.limit

    def score(self, chosen: Mapping[Any, int]) -> float:
        """That of choices."""
        self.tries += 1
        return self.budget.score(self.run_with({key: level + 1 for key, level in chosen.items()}), self.reference)

    def _raised(self, steps: Sequence[Any]) -> dict[Any, int]:
        levels = dict.fromkeys(self.choices, 0)
        for key in steps:
            levels[key] += 1
        return levels

    def _sensitivities(self) -> dict[Any, list[float]]:
        """By place, what each choice costs in accuracy."""
        strategy = self.budget.strategy
        if strategy == "output":
            return {key: [self._moved(key, i) for i in range(len(names))] for key, names in self.choices.items()}
        from kpx.precision import sensitivity

        return sensitivity.STRATEGIES[strategy](self.study, self.choices, self.ways)

    def _moved(self, key: Any, level: int) -> float:
        if self.choices[key][level] == "f32":
            return 0.0
        return relative_error(self.run_with({key: level + 1}), self.reference)

    def _steps(self, sensitivity: Mapping[Any, Sequence[float]]) -> list[Any]:
        """Which place is raised by one choice, in which order: by what is gained over what it costs."""
        flops = {place.key: place.flops for place in self.study.places}
        found = []
        for key, names in self.choices.items():
            worth = math.inf
            for level in range(len(names) - 1):
                gain = max(sensitivity[key][level] - sensitivity[key][level + 1], 0.0)
                worth = min(worth, gain / (flops[key] * (BITS[names[level + 1]] - BITS[names[level]]) or 1))
                found.append((-worth, level, key))  # a place's own steps stay in order
        return [key for _, _, key in sorted(found, key=lambda step: step[:2])]

    def _assignment(
        self,
        chosen: Mapping[Any, int],
        sensitivity: Mapping[Any, Sequence[float]] | None,
        steps: Sequence[Any],
        score: float,
    ) -> Assignment:
        order = {key: i for i, key in reversed(list(enumerate(steps)))}
        rows = []
        for place in self.study.places:
            key, precision = place.key, self.choices[place.key][chosen[place.key]]
            why = f"raised as number {order[key] + 1} of {len(steps)}" if key in order else "as cheap as may be"
            why += "" if place.by_weight else "; no product by a weight"
            estimated = None if sensitivity is None else float(sensitivity[key][0])
            rows.append(Row(place.path, place.nth, place.sizes, place.flops, precision, estimated, why))
        b, tries = self.budget, self.tries
        made = (b.name, b.limit, score, self.exact, b.precisions, b.strategy, tries)
        return Assignment(tuple(rows), *made, calibration=b.calibration)


def _verified(model: Any, study: Any, budget: Budget, found: Assignment) -> Assignment:
    """The assignment, with what the optimized model itself reaches; raised where that is not enough.

    Raises:
        BudgetError: it is not reached.
    """
    import kpx

    optimized = kpx.optimize(model, config=kpx.Config(precision=found.policy, measure_seconds=0))
    score = budget.score(study.run(optimized), study.outputs)
    perfect = budget.score(study.outputs, study.outputs)
    if not (score >= budget.limit if perfect > budget.limit else score <= budget.limit):
        raise BudgetError(
            f"The assignment keeps the budget where rounding is emulated ({found.score:.6g}), and not as it is computed "
            f"({score:.6g}, where {budget.limit} was asked for). Leave a margin: give a stricter limit."
        )
    return found.verified_at(score)


def resolved(config: Any, model: Any, training: bool = False) -> Any:
    """A config whose precision is a policy, where it was a budget.

    Raises:
        ConfigError: a budget was given for a model that trains.
        BudgetError: it cannot be kept.
    """
    if not isinstance(config.precision, Budget):
        return config
    if training:
        raise ConfigError(
            "A budget is for inference. Name a precision for training: `Config.training(precision='fp8')`."
        )
    return dataclasses.replace(config, precision=assign(model, config.precision).policy)
