"""In which precision a model computes: names, and policies by op and by place in the model.

`kpx.Config(precision="bf16")` takes a name; `kpx.precision.Policy` says more: which of them where.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from kpx.errors import ConfigError

PRECISIONS = {
    "f32": "as the model is",
    "bf16": "products of numbers rounded to bf16, summed in f32; all else as the model is",
    "f16": "products of numbers rounded to f16, summed in f32; all else as the model is",
    "int8": "products by weights of int8: weights quantized at load, by output channel, the other factor as it is read, by "
    "row, both symmetric; sums in int32. Other products in bf16",
    "int8-weights": "weights of products and embeddings kept in int8, by output channel or row, and widened as they are read; all "
    "else as the model is",
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
        least_rows, least_columns, least_inner: sizes of a product (rows x inner size by inner size x columns) below which
            the rule does not hold.

    Raises:
        ConfigError: a name is not known.
    """

    precision: str
    op: str = "*"
    path: str = "*"
    least_rows: int = 0
    least_columns: int = 0
    least_inner: int = 0

    def __post_init__(self):
        known(self.precision)
        if self.op != "*" and self.op not in OPS:
            raise ConfigError(f"`op={self.op!r}` is not known. Use one of {', '.join(map(repr, OPS))}, or '*'.")

    def holds(self, op: str, path: str, sizes: tuple[int, int, int]) -> bool:
        """Whether it is about an op of a kind, at a place, of some rows, columns and inner size."""
        least = self.least_rows, self.least_columns, self.least_inner
        return self.op in ("*", op) and fnmatch.fnmatchcase(path, self.path) and all(map(int.__ge__, sizes, least))


@dataclass(frozen=True)
class Policy:
    """In which precision each op is computed: as the first rule says that is about it.

    Attributes:
        default: of what no rule is about.
        rules: in order.

    Raises:
        ConfigError: a name is not known.
    """

    default: str = "f32"
    rules: tuple[Rule, ...] = ()

    def __post_init__(self):
        known(self.default)
        if not all(isinstance(rule, Rule) for rule in self.rules):
            raise ConfigError(f"`rules={self.rules!r}` are not kpx.precision.Rule objects.")
        object.__setattr__(self, "rules", tuple(self.rules))

    @property
    def is_the_same_everywhere(self) -> bool:
        """Whether no rule is about a place in the model."""
        return all(rule.path == "*" for rule in self.rules)

    def of(self, op: str, path: str, sizes: tuple[int, int, int]) -> str:
        """The precision of an op."""
        return next((rule.precision for rule in self.rules if rule.holds(op, path, sizes)), self.default)


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
