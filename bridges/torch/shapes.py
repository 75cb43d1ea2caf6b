"""Telling a user which dimension keeps changing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from kpx.errors import RecompileWarning

_QUIET = 3  # so many shapes of one input are compiled without a word


class ShapeHistory:
    """The shapes that one model was compiled for."""

    def __init__(self, model: str, remedy: str = "Pad to a few sizes with `kpx.Buckets(...)`.", *, warns: bool = True):
        self._model = model
        self._warns = warns
        self._remedy = remedy
        self._seen: dict[tuple[int, ...], list[tuple[tuple[int, ...], ...]]] = {}

    def note(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Remembers the shapes of a compilation; from the fourth of its kind on, warns and names what changes."""
        shapes = tuple(map(tuple, shapes))
        known = self._seen.setdefault(tuple(map(len, shapes)), [])
        if shapes in known:
            return
        known.append(shapes)
        if len(known) <= _QUIET:
            return
        changing = [
            f"dimension {d} of input {i} ({', '.join(map(str, dict.fromkeys(s[i][d] for s in known)))})"
            for i, shape in enumerate(shapes)
            for d in range(len(shape))
            if len({s[i][d] for s in known}) > 1
        ]
        if changing and self._warns:
            warnings.warn(
                f"`{self._model}` has now been compiled for {len(known)} shapes: {'; '.join(changing)} keep(s) "
                f"changing, and every new size is compiled anew. {self._remedy}",
                RecompileWarning,
                stacklevel=4,
            )
