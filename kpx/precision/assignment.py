"""What a budget came to: a precision for each product of a model, and why."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from kpx.errors import ConfigError, InputError
from kpx.precision.calibrated import Calibration

_FORMAT = "kpx assignment 1"


@dataclass(frozen=True)
class Row:
    """A product of a model.

    Attributes:
        path, nth: where in the model (see `kpx.precision.Rule`); `nth` is None for what is no product by a weight.
        sizes: rows, columns, inner size.
        flops: of a batch.
        precision: what was chosen.
        sensitivity: what the cheapest choice costs there, by the budget's strategy; None where all could be cheap, and none was
            estimated.
        why: how it came to the choice.
    """

    path: str
    nth: int | None
    sizes: tuple[int, int, int]
    flops: int
    precision: str
    sensitivity: float | None
    why: str

    @property
    def key(self) -> tuple[str, int | None]:
        """What tells the place from others."""
        return self.path, self.nth


@dataclass(frozen=True)
class Assignment:
    """The precisions of a model's products that keep a budget.

    Attributes:
        rows: the products, in the model's order.
        metric, limit, precisions, strategy: the budget's.
        score: the metric that was reached with rounding emulated; `verified`: by the optimized model itself.
        exact: the precision of what the rows do not name.
        tries: how often the model was run on all data with some products rounded.
    """

    rows: tuple[Row, ...]
    metric: str
    limit: float
    score: float
    exact: str
    precisions: tuple[str, ...]
    strategy: str
    tries: int
    verified: float | None = None
    calibration: Calibration | None = None

    @property
    def policy(self) -> Any:
        """The policy for `Config(precision=...)`."""
        from kpx.precision import Policy, Rule

        named = [r for r in self.rows if r.nth is not None]
        rest = [r for r in self.rows if r.nth is None]
        rules = [Rule(r.precision, op="product", path=_literal(r.path), nth=r.nth, by_weight=True) for r in named]
        rules += [
            Rule(r.precision, op=op, path=_literal(r.path), by_weight=False)
            for r in rest
            for op in ("product", "attention")
        ]
        return Policy(self.exact, tuple(rules), calibration=self.calibration)

    @property
    def shares(self) -> dict[str, float]:
        """How much of all products' FLOPs is in each precision."""
        total: dict[str, int] = defaultdict(int)
        for row in self.rows:
            total[row.precision] += row.flops
        return {name: flops / max(sum(total.values()), 1) for name, flops in sorted(total.items(), key=lambda e: -e[1])}

    @property
    def verdict(self) -> str:
        """In a sentence, what was reached with what."""
        shares = ", ".join(f"{share:.0%} in {name}" for name, share in self.shares.items())
        score = self.score if self.verified is None else self.verified
        return f"{self.metric} {score:.6g} (limit {self.limit:g}); of the products' FLOPs {shares}."

    def __rich__(self) -> Table:
        table = Table(
            "where",
            "rows x columns x inner",
            "GFLOP",
            "precision",
            f"sensitivity ({self.strategy})",
            "why",
            title=self.verdict,
        )
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def to_markdown(self) -> str:
        """A table in Markdown: what is computed in which precision, and why."""
        head = ["where", "rows x columns x inner", "GFLOP", "precision", f"sensitivity ({self.strategy})", "why"]
        lines = [self.verdict, "", "| " + " | ".join(head) + " |", "|-" * len(head) + "|"]
        return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in self._cells()]) + "\n"

    def _cells(self) -> list[list[str]]:
        return [
            [
                f"{r.path or '(no name)'}{f' #{r.nth}' if r.nth else ''}", " x ".join(map(str, r.sizes)), f"{r.flops / 1e9:.3g}",
                r.precision, "" if r.sensitivity is None else f"{r.sensitivity:.2g}", r.why,
            ]
            for r in self.rows
        ]  # fmt: skip

    def plot(self, path: str | os.PathLike) -> None:
        """Draws each product's sensitivity over its share of the FLOPs, by precision, to a picture's file.

        Raises:
            InputError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError("A plot needs matplotlib: `pip install matplotlib`.") from None
        figure = Figure(figsize=(9, 4.5))
        axes = figure.add_subplot()
        total = sum(r.flops for r in self.rows) or 1
        for precision in dict.fromkeys(r.precision for r in self.rows):
            rows = [r for r in self.rows if r.precision == precision]
            shares = [100 * r.flops / total for r in rows]
            axes.scatter(
                shares, [max(r.sensitivity or 0.0, 1e-12) for r in rows], label=f"{precision}, {len(rows)} products"
            )
        axes.set(xlabel="share of FLOPs, %", ylabel=f"sensitivity ({self.strategy})", yscale="log", title=self.verdict)
        axes.legend()
        figure.savefig(os.fspath(path), bbox_inches="tight")

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON; a calibration has a file of its own."""
        plain = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("calibration", "rows")
        }
        rows = [dataclasses.asdict(row) for row in self.rows]
        pathlib.Path(path).write_text(json.dumps({"format": _FORMAT, **plain, "rows": rows}, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Assignment:
        """What `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or is not such a file.
        """
        try:
            found = json.loads(pathlib.Path(path).read_text())
            if found.pop("format") != _FORMAT:
                raise ValueError("it is of another format")
            rows = tuple(Row(**{**row, "sizes": tuple(row["sizes"])}) for row in found.pop("rows"))
            return cls(rows, **{**found, "precisions": tuple(found["precisions"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"`{os.fspath(path)}` is not an assignment that can be read ({type(error).__name__}: {error}). Remove it: it is "
                "made anew."
            ) from None

    def with_calibration(self, calibration: Calibration | None) -> Assignment:
        """It with a calibration."""
        return dataclasses.replace(self, calibration=calibration)

    def verified_at(self, score: float) -> Assignment:
        """It with what the optimized model reached."""
        return dataclasses.replace(self, verified=score)


def _literal(path: str) -> str:
    """A path as a pattern that it alone fits."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)
