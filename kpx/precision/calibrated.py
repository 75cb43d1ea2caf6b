"""What data tells of a model's products: how large each channel of their inputs gets, and what is made of that."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpx.errors import ConfigError, InputError

_FORMAT = "kpx calibration 1"


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What a product by a weight is computed with.

    Attributes:
        balance: by which each input channel of the weight is multiplied, and the other factor divided; f32 `[inner]`, or None.
        scale: of the first factor's numbers, after that; None: found at each call.
    """

    balance: np.ndarray | None = None
    scale: float | None = None


class Calibration:
    """What was learnt of a model's products: by place, number there, and precision.

    Equal where all numbers are equal. Made by `kpx.precision.calibrate`; saved with `save`, read with `load`.
    """

    def __init__(self, entries: Mapping[tuple[str, int, str], Calibrated], notes: Mapping[str, float] | None = None):
        self.entries = dict(entries)
        self.notes = dict(notes or {})
        digest = hashlib.sha256()
        for key, found in sorted(self.entries.items(), key=lambda item: item[0]):
            balance = b"" if found.balance is None else np.asarray(found.balance, np.float32).tobytes()
            digest.update(repr((key, found.scale)).encode() + balance)
        self._digest = digest.hexdigest()[:16]

    def find(self, path: str, nth: int, precision: str, inner: int) -> Calibrated | None:
        """What a product is computed with in a precision; None where nothing was learnt of it.

        Raises:
            InputError: another product was calibrated at that place.
        """
        found = self.entries.get((path, nth, precision))
        if found is not None and found.balance is not None and found.balance.shape != (inner,):
            raise InputError(
                f"The calibration of `{path}` is of {found.balance.shape[0]} input channels, and the product has {inner}. "
                "Calibrate this model: `kpx.precision.calibrate(model, batches)`."
            )
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Writes it to a file (NumPy's .npz), which `load` reads."""
        keys = list(self.entries)
        arrays: dict[str, Any] = {
            "format": _FORMAT,
            "keys": np.array([[p, str(n), s] for p, n, s in keys], str).reshape(-1, 3),
        }
        arrays["scales"] = np.array([np.nan if f.scale is None else f.scale for f in self.entries.values()], np.float64)
        for i, found in enumerate(self.entries.values()):
            if found.balance is not None:
                arrays[f"balance{i}"] = found.balance
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """What `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or is not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["format"]) != _FORMAT:
                    raise ValueError(f"its format is {str(file['format'])!r}")
                scales = [None if np.isnan(s) else float(s) for s in file["scales"]]
                balances = [file.get(f"balance{i}") for i in range(len(scales))]
                keys = [(str(p), int(n), str(s)) for p, n, s in file["keys"]]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ConfigError(
                f"`{os.fspath(path)}` is not a calibration that can be read ({type(error).__name__}: {error}). Make one with "
                "`kpx.precision.calibrate(model, batches).save(path)`."
            ) from None
        return cls({k: Calibrated(b, s) for k, b, s in zip(keys, balances, scales, strict=True)})

    def merged(self, other: Calibration) -> Calibration:
        """This one with another's entries over it."""
        return Calibration({**self.entries, **other.entries}, {**self.notes, **other.notes})

    def __eq__(self, other):
        return isinstance(other, Calibration) and self._digest == other._digest

    def __hash__(self):
        return hash(self._digest)

    def __repr__(self):
        return f"<kpx.precision.Calibration of {len(self.entries)} products, {self._digest}>"
