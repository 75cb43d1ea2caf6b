"""In which precision a model computes: names, and policies by op and by place in the model.

`kpx.Config(precision="bf16")` takes a name; `kpx.precision.Policy` says more: which of them where.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from kpx.errors import ConfigError
from kpx.precision.assignment import Assignment
from kpx.precision.budget import Budget, assign
from kpx.precision.cache import KVCache
from kpx.precision.calibrated import Calibrated, Calibration
from kpx.precision.calibration import calibrate

__all__ = [
    "OPS", "PRECISIONS", "Assignment", "Budget", "Calibrated", "Calibration", "KVCache", "Policy", "Rule", "assign", "calibrate", "known", "policy",
]  # fmt: skip

PRECISIONS = {
    "f32": "as the model is",
    "bf16": "products of numbers rounded to bf16, summed in f32; all else as the model is",
    "f16": "products of numbers rounded to f16, summed in f32; all else as the model is",
    "int8": "products by weights of int8: weights quantized at load, by output channel, the other factor as it is read, by "
    "row, both symmetric; sums in int32. Other products in bf16",
    "int8-weights": "weights of products and embeddings kept in int8, by output channel or row, and widened as they are read; all "
    "else as the model is",
    "fp8": "products of numbers in FP8, each row and output channel of a product by a weight with a scale of its own, each factor of "
    "another one; e4m3, gradients in e5m2; sums in f32. Products of stacks, convolutions and attention in bf16",
    "mxfp8": "products of numbers in e4m3, 32 to a scale that is a power of two; all else as in fp8",
    "mxfp4": "products of numbers in e2m1, 32 to a scale that is a power of two; all else as in fp8",
    "nvfp4": "products of numbers in e2m1, 16 to a scale in e4m3, and one scale for the whole; all else as in fp8",
    "int4-weights": "weights of products kept in int4, by groups of 32 of an output channel, of embeddings in int8; all else as the "
    "model is",
}
"""Names of precisions, and what they mean."""

OPS = ("product", "convolution", "attention", "embedding")
"""What may be computed, or kept, in another precision: matrix products, convolutions, attention, which is one op, and tables
that rows are taken of."""


@dataclass(frozen=True)
class Rule:
    """What is computed in which precision.

    Attributes:
        precision: a name of `PRECISIONS`.
        op: a name of `OPS`, or `*`.
        path: where in the model, by names: `encoder/layer/*/attention/*`; `*` is any number of names.
        nth: which of the ops of its kind at a place, products by weights counted apart from others; None: all.
        by_weight: True: products by a matrix of weights alone; False: all else; None: both.
        stochastic: of `fp8` and block formats: round gradients by chance (see `kpx.precision.formats.rounded`).
        least_rows, least_columns, least_inner: sizes of a product (rows x inner size by inner size x columns) below which
            the rule does not hold.

    Raises:
        ConfigError: a name is not known.
    """

    precision: str
    op: str = "*"
    path: str = "*"
    nth: int | None = None
    by_weight: bool | None = None
    stochastic: bool = False
    least_rows: int = 0
    least_columns: int = 0
    least_inner: int = 0

    def __post_init__(self):
        known(self.precision)
        if self.op != "*" and self.op not in OPS:
            raise ConfigError(f"`op={self.op!r}` is not known. Use one of {', '.join(map(repr, OPS))}, or '*'.")

    def holds(self, op: str, path: str, sizes: tuple[int, int, int], nth: int = 0, *, by_weight: bool = False) -> bool:
        """Whether it is about an op of a kind, at a place, of some rows, columns and inner size."""
        least = self.least_rows, self.least_columns, self.least_inner
        return (
            self.op in ("*", op)
            and self.nth in (None, nth)
            and self.by_weight in (None, by_weight)
            # What is computed at `encoder/0` itself is of `encoder/0/*` too.
            and any(fnmatch.fnmatchcase(p, self.path) for p in (path, path + "/"))
            and all(map(int.__ge__, sizes, least))
        )


@dataclass(frozen=True)
class Policy:
    """In which precision each op is computed: as the first rule says that is about it.

    Attributes:
        default: of what no rule is about.
        rules: in order.
        stochastic: what a rule's is, of what no rule is about.
        calibration: what was learnt of the model on data (see `kpx.precision.calibrate`).

    Raises:
        ConfigError: a name is not known.
    """

    default: str = "f32"
    rules: tuple[Rule, ...] = ()
    stochastic: bool = False
    calibration: Calibration | None = None

    def __post_init__(self):
        known(self.default)
        if not all(isinstance(rule, Rule) for rule in self.rules):
            raise ConfigError(f"`rules={self.rules!r}` are not kpx.precision.Rule objects.")
        object.__setattr__(self, "rules", tuple(self.rules))

    @property
    def is_the_same_everywhere(self) -> bool:
        """Whether no rule is about a place in the model."""
        return self.calibration is None and all(rule.path == "*" and rule.nth is None for rule in self.rules)

    def rule(self, op: str, path: str, sizes: tuple[int, int, int], nth: int = 0, *, by_weight: bool = False) -> Rule:
        """The rule for an op."""
        default = Rule(self.default, stochastic=self.stochastic)
        return next((rule for rule in self.rules if rule.holds(op, path, sizes, nth, by_weight=by_weight)), default)

    def of(self, op: str, path: str, sizes: tuple[int, int, int], nth: int = 0) -> str:
        """The precision of an op."""
        return self.rule(op, path, sizes, nth).precision

    def calibrated(self, path: str, nth: int, precision: str, inner: int) -> Calibrated | None:
        """What was learnt of a product for a precision, or None."""
        return None if self.calibration is None else self.calibration.find(path, nth, precision, inner)


def known(name: str) -> str:
    """The name itself.

    Raises:
        ConfigError: no precision has it.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"`precision={name!r}` is not known. Use one of {', '.join(map(repr, PRECISIONS))}.")
    return name


def policy(precision: str | Policy) -> Policy:
    """The policy that a name stands for, or the one that was given."""
    return precision if isinstance(precision, Policy) else Policy(precision)
