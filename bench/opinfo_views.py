"""An op of PyTorch's op database on views that the graph itself takes: permuted, sliced, stepped, expanded, copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree


def _reversed(x: torch.Tensor) -> torch.Tensor:
    return x.permute(list(reversed(range(x.ndim))))


def _picked(x: torch.Tensor, order: Callable[[int], list[int]]) -> torch.Tensor:
    """Along every dimension, the elements at `order(size)`."""
    for d, n in enumerate(x.shape):
        if n:
            x = x.index_select(d, torch.tensor(order(n)))
    return x


def _framed(n: int) -> list[int]:
    return [n - 1, *range(n), 0]


def _interleaved(n: int) -> list[int]:
    return [j for i in range(n) for j in (i, n - 1 - i)]


def _sliced(x: torch.Tensor) -> torch.Tensor:
    for d, n in enumerate(x.shape):
        x = x.narrow(d, 1, n - 2) if n else x
    return x


def _stepped(x: torch.Tensor) -> torch.Tensor:
    return x[tuple(slice(None, None, 2) for _ in x.shape)]


def _expanded(x: torch.Tensor, trailing: int = 0) -> torch.Tensor:
    """Along the first dimension of several elements (before the last `trailing` ones), the first element throughout."""
    dim = next((d for d, n in enumerate(x.shape[: x.ndim - trailing]) if n > 1), None)
    return x if dim is None else x.narrow(dim, 0, 1).expand(x.shape)


# For each view: a contiguous tensor from which the view gives a tensor, and the view. The elements beside the view are
# other elements of the tensor, so that they are valid indices where it is one, and differ from those they lie beside.
VIEWS: dict[str, tuple[Callable, Callable]] = {
    "permuted": (lambda x: _reversed(x).contiguous(), _reversed),
    "sliced": (lambda x: _picked(x, _framed), _sliced),
    "stepped": (lambda x: _picked(x, _interleaved), _stepped),
    "expanded": (lambda x: x.contiguous(), _expanded),
    # For linear algebra: a matrix of equal rows would be singular.
    "expanded over a batch": (lambda x: x.contiguous(), lambda x: _expanded(x, 2)),
    "copied": (lambda x: _reversed(x).contiguous(), lambda x: _reversed(x).clone()),
}


_ON_MATRICES = ("linalg.", "cholesky", "geqrf", "inverse", "logdet", "lu", "matrix_exp", "ormqr", "pca_lowrank", "pinverse", "qr",
                "svd", "triangular_solve")  # fmt: skip


# Eager PyTorch itself is wrong on memory that overlaps (see `docs/differences.md`), or writes it without a check.
_NOT_EXPANDED = ("masked.median", "median", "nanmedian", "_batch_norm_with_update")


class Viewed:
    """An op of the database whose samples hold the tensors that views are taken of, and which takes the views."""

    def __init__(self, op: Any):
        self._op = op
        self._writes = op.name.endswith("_") or "in_place" in op.variant_test_name or "inplace" in op.variant_test_name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    @property
    def op(self) -> Callable:
        return self.__call__

    def __call__(self, *args, view: str, **kwargs) -> Any:
        def viewed(x: torch.Tensor) -> torch.Tensor:
            return VIEWS[view][1](x.clone() if self._writes else x)

        args, kwargs = pytree.tree_map_only(torch.Tensor, viewed, (args, kwargs))
        return self._op.op(*args, **kwargs)

    def samples(self, samples: list[Any], limit: int | None) -> Iterator[Any]:
        """Each sample once for each view; of more than `limit`, those with several dimensions, spread evenly."""
        if limit and len(samples) > limit:
            samples = [s for s in samples if _is_wide(s)] or samples
            count = min(limit, len(samples))
            samples = [samples[i * len(samples) // count] for i in range(count)]
        left_out = {"expanded" if self._op.name.startswith(_ON_MATRICES) else "expanded over a batch"}
        if self._op.name in _NOT_EXPANDED:
            left_out |= {"expanded", "expanded over a batch"}
        for sample in samples:
            for view in [v for v in VIEWS if v not in left_out]:
                yield _based(sample, view)


def _is_wide(sample: Any) -> bool:
    tensors = [x for x in pytree.tree_leaves((sample.input, sample.args)) if isinstance(x, torch.Tensor)]
    return any(sum(n > 1 for n in x.shape) > 1 for x in tensors) and all(x.numel() for x in tensors)


def _based(sample: Any, view: str) -> Any:
    from torch.testing._internal.opinfo.core import SampleInput

    def base(x: torch.Tensor) -> torch.Tensor:
        return VIEWS[view][0](x.detach()).detach().requires_grad_(x.requires_grad)

    arguments, kwargs = pytree.tree_map_only(torch.Tensor, base, ((sample.input, *sample.args), sample.kwargs))
    return SampleInput(
        arguments[0], args=arguments[1:], kwargs={**kwargs, "view": view},
        output_process_fn_grad=sample.output_process_fn_grad,
    )  # fmt: skip


def without_view(sample: Any) -> Any:
    """A sample of a viewed op as the op itself is given it; another sample unchanged."""
    if "view" not in sample.kwargs:
        return sample
    from torch.testing._internal.opinfo.core import SampleInput

    rest = {k: v for k, v in sample.kwargs.items() if k != "view"}
    take = VIEWS[sample.kwargs["view"]][1]
    arguments, rest = pytree.tree_map_only(torch.Tensor, take, ((sample.input, *sample.args), rest))
    return SampleInput(arguments[0], args=arguments[1:], kwargs=rest)
