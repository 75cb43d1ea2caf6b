"""`kpx.precision.calibrate`: how a model's products are best quantized, found on its own data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from kpx.errors import ConfigError, InputError
from kpx.precision.calibrated import Calibrated, Calibration
from kpx.precision.products import Emulated

_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_LARGEST = {"int8": 127.0, "fp8": 224.0}  # of FP8 half of what it holds: to be wide costs it nothing, and more may come
_LEAST = 1e-4  # of the largest: below, a channel is taken to be as large as that

PRECISIONS = ("int8", "fp8", "int8-weights", "int4-weights")
"""What can be calibrated."""


def calibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    precision: str = "int8",
    balance: bool = True,
    static: bool = False,
    progress: bool = True,
) -> Calibration:
    """What `Policy(precision, calibration=...)` quantizes a model's products by weights with.

    Balancing divides a product's input channels by numbers, and multiplies the weight's by them, so that large channels do not
    leave others few levels. For `int8` and `fp8` it is SmoothQuant's (Xiao et al., arXiv 2211.10438): by the channels' largest,
    to a power, over the weight's to the rest; for weights alone AWQ's (Lin et al., arXiv 2306.00978): by the channels' mean
    magnitude to a power. The power is, product by product, the one of five with the smallest error of the product on the data,
    nought (no balancing) among them: none becomes worse.

    Args:
        model: a `torch.nn.Module`, a flax module that holds its weights, or a function that holds its weights.
        batches: inputs, as the model takes them: a tuple, a dict by name, or one array. Some hundred rows are enough.
        precision: of `PRECISIONS`.
        balance: whether to look for that.
        static: fix the scale of the first factor too, by the largest number that the data has, so that none is computed at
            each call (`int8`, `fp8`). Numbers beyond it become it. On the CPU, where oneDNN finds each row's scale as it reads
            it, this is slower, not faster.
        progress: show a bar, where there is a terminal.

    Raises:
        ConfigError: the precision cannot be calibrated.
        InputError: this is not a model, there is no batch, one does not fit the model, or a product's input is not finite.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"`precision={precision!r}` cannot be calibrated. Use one of {', '.join(map(repr, PRECISIONS))}."
        )
    if static and precision not in _LARGEST:
        raise ConfigError(
            f"`static=True` fixes the scales of what weights are multiplied by, which `{precision}` does not have."
        )
    from kpx.precision.study import Study  # which the passes are part of

    study = Study(model, list(batches))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        seen = _seen(study, _said(bar, "largest numbers"))
        strengths = _STRENGTHS if balance else _STRENGTHS[:1]
        candidates = {key: [_balance(found, precision, s) for s in strengths] for key, found in seen.items()}
        errors = _errors(study, candidates, seen, precision, static, _said(bar, "errors"))
    entries, notes = {}, {}
    for key, found in seen.items():
        best = int(np.argmin(errors[key]))
        chosen = candidates[key][best]
        entries[(*key, precision)] = Calibrated(chosen, _scale(found, chosen, precision) if static else None)
        notes[key[0]] = float(errors[key][best] / max(errors[key][0], 1e-30))
    return Calibration(entries, notes)


def _said(bar: Progress, what: str) -> Callable[[str], None]:
    task = bar.add_task(what, total=None)
    return lambda text: bar.update(task, description=f"{what}: {text}")


def _seen(study: Any, say: Callable[[str], None]) -> dict[Any, np.ndarray]:
    """By place, of each input channel: the largest and the mean magnitude, and the weight's largest; `[3, inner]`."""

    def look(place: Any) -> Callable:
        def found(x, w):
            rows = jnp.abs(x.reshape(-1, x.shape[-1]))
            return jnp.stack([rows.max(0), rows.mean(0), jnp.abs(w).max(0)])

        return found

    total: dict[Any, np.ndarray] = {}
    for result in study.observe(look, say):
        for key, found in result.items():
            if not np.isfinite(found).all():
                raise InputError(
                    f"The product at `{key[0]}` reads, or has, infinities or NaN. Calibrate with inputs that the model gives "
                    "finite numbers for."
                )
            before = total.get(key)
            if before is not None:
                found = np.stack([np.maximum(found[0], before[0]), found[1] + before[1], found[2]])
            total[key] = found
    return total


def _balance(found: np.ndarray, precision: str, strength: float) -> np.ndarray | None:
    if not strength:
        return None
    largest, mean, weight = (np.maximum(row, max(_LEAST * row.max(), 1e-30)).astype(np.float64) for row in found)
    if precision.endswith("-weights"):
        by = mean**strength
    else:
        by = largest**strength / weight ** (1 - strength)
    by = by / np.exp(np.mean(np.log(by)))
    return np.clip(by, 1e-4, 1e4).astype(np.float32)


def _scale(found: np.ndarray, balance: np.ndarray | None, precision: str) -> float:
    largest = found[0] if balance is None else found[0] / balance
    return max(float(largest.max()), 1e-30) / _LARGEST[precision]


def _errors(study, candidates, seen, precision: str, static: bool, say) -> dict[Any, np.ndarray]:
    """By place, the mean squared error of the product with each way of balancing."""

    def look(place: Any) -> Callable | None:
        if place.key not in candidates:
            return None
        scales = [_scale(seen[place.key], b, precision) if static else None for b in candidates[place.key]]
        ways = [Emulated(precision, b, s) for b, s in zip(candidates[place.key], scales, strict=True)]

        def found(x, w):
            rows, dimensions = x.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ()))
            exact = Emulated("f32")(rows, w, dimensions=dimensions)
            return jnp.stack([jnp.mean((way(rows, w, dimensions=dimensions) - exact) ** 2) for way in ways])

        return found

    total: dict[Any, np.ndarray] = {}
    for result in study.observe(look, say):
        for key, found in result.items():
            total[key] = total.get(key, 0) + found.astype(np.float64)
    return total
