"""Drawn inputs and paddings: a model's results for its real rows and positions must not depend on what pads them.

One comparison on a caller's numbers shows little: a mean over a batch of zeros is zero at every size. So inputs are drawn
anew, of several magnitudes and of one sign as well as of both, and the padded region is filled with large values of both
signs, not with the zeros that a call pads with. A result that keeps its value under all of them reads no padding.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kpx.errors import InputError

_LARGE = 80.0  # against inputs of about 1; `exp` is finite, and an additive mask of -10,000 still hides it
# Kinds of drawn inputs, and what the padded region holds in turn.
DRAWS: dict[str, tuple[str, ...]] = {
    "normal": ("zeros", "high", "low"),
    "negative": ("zeros", "spread"),
    "positive": ("zeros", "low"),
    "large": ("high", "spread"),
}
_MASK_NAME = re.compile(r"(^|_)masks?$")
_MOST_VALUES = 64  # of an integer input's values


@dataclass(frozen=True)
class Leaf:
    """A tensor among the arguments: how it is drawn.

    Attributes:
        tensor: the caller's; drawn values have its shape.
        is_mask: its parameter's name says mask, or it is boolean: it is padded with zeros in every draw.
        values: of an integer input, the values that may be drawn, as int64.
    """

    tensor: torch.Tensor
    is_mask: bool
    values: torch.Tensor | None


class Inputs:
    """A model's arguments as leaves, from which others of the same shapes are drawn."""

    def __init__(self, model: torch.nn.Module, args: Sequence, kwargs: Mapping[str, Any]):
        self._leaves, self._spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        names = _leaf_names(model, args, kwargs)
        self._drawn = {
            i: Leaf(t.detach(), t.dtype == torch.bool or bool(_MASK_NAME.search(name)), _present(t))
            for i, (t, name) in enumerate(zip(self._leaves, names, strict=True))
            if isinstance(t, torch.Tensor)
        }

    def own(self) -> tuple[tuple, dict]:
        """Return copies of the caller's own arguments."""
        return self._unflatten({i: leaf.tensor.clone() for i, leaf in self._drawn.items()})

    def draw(self, kind: str, seed: int) -> tuple[tuple, dict]:
        """Return drawn arguments. Masks stay the caller's."""
        generator = torch.Generator().manual_seed(seed)
        return self._unflatten({i: _real(leaf, kind, generator) for i, leaf in self._drawn.items()})

    def fill(self, args: Sequence, kwargs: Mapping[str, Any], kind: str, seed: int, shown: torch.Tensor | None = None):
        """Return padded arguments whose padded region is filled anew.

        Args:
            args, kwargs: arguments of the caller's structure, padded with zeros at the end of dimensions.
            shown: where the sizes are the caller's, the positions (batch, sequence) that are no padding.
        """
        if kind == "zeros":
            return args, kwargs
        generator = torch.Generator().manual_seed(seed)
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        for i, leaf in self._drawn.items():
            if leaf.is_mask:
                continue
            real = _is_real(leaves[i], leaf.tensor.shape, shown)
            leaves[i] = torch.where(real, leaves[i], _filling(leaves[i], leaf, kind, generator))
        return pytree.tree_unflatten(leaves, spec)

    def widen(self, succeeds: Callable[[tuple, dict], bool]) -> None:
        """Add 1 and 2 to the values of the integer inputs that take them; a caller may have passed zeros alone."""
        integers = [i for i, leaf in self._drawn.items() if leaf.values is not None and not leaf.is_mask]
        if integers and not self._widened(integers, (1, 2), succeeds):
            for i in integers:
                self._widened([i], (1, 2), succeeds) or self._widened([i], (1,), succeeds)

    def are_constant(self) -> bool:
        """Return whether every draw is the same: integer inputs of one value, and no others."""
        drawn = [leaf for leaf in self._drawn.values() if not leaf.is_mask and leaf.tensor.numel()]
        return bool(drawn) and all(leaf.values is not None and len(leaf.values) < 2 for leaf in drawn)

    def _widened(self, places: list[int], extra: tuple[int, ...], succeeds: Callable[[tuple, dict], bool]) -> bool:
        before = dict(self._drawn)
        for i in places:
            leaf = self._drawn[i]
            values = torch.unique(torch.cat([leaf.values, torch.tensor(extra)]))
            self._drawn[i] = Leaf(leaf.tensor, leaf.is_mask, values)
        trial = {i: leaf.tensor.clone() for i, leaf in before.items()}
        for i in places:
            trial[i] = (
                torch.tensor(extra, dtype=trial[i].dtype)
                .repeat(trial[i].numel())[: trial[i].numel()]
                .reshape(trial[i].shape)
            )
        if succeeds(*self._unflatten(trial)):
            return True
        self._drawn = before
        return False

    def _unflatten(self, tensors: Mapping[int, torch.Tensor]) -> tuple[tuple, dict]:
        leaves = [tensors.get(i, leaf) for i, leaf in enumerate(self._leaves)]
        return pytree.tree_unflatten(leaves, self._spec)


def _is_real(padded: torch.Tensor, shape: Sequence[int], shown: torch.Tensor | None) -> torch.Tensor:
    """Where an input is not padding, by its shape before; or by the positions shown, where it has them."""
    real = torch.ones(padded.shape, dtype=torch.bool)
    if shown is not None and padded.shape[:2] == shown.shape:
        return real & shown.reshape(*shown.shape, *[1] * (padded.ndim - 2))
    for dim, size in enumerate(shape):
        real.narrow(dim, size, padded.shape[dim] - size).fill_(False)
    return real


def _leaf_names(model: torch.nn.Module, args: Sequence, kwargs: Mapping[str, Any]) -> list[str]:
    """The parameter that each leaf belongs to; '' where it has no name of its own."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    named = [*zip(positional + [""] * len(args), args, strict=False), *kwargs.items()]
    return [name for name, value in named for _ in pytree.tree_leaves(value)]


def _present(tensor: torch.Tensor) -> torch.Tensor | None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return None
    values = torch.unique(tensor.detach().to(torch.int64))
    values = values[:: max(1, -(-len(values) // _MOST_VALUES))]
    return torch.unique(torch.cat([values, values.new_zeros(1)]))


def _real(leaf: Leaf, kind: str, generator: torch.Generator) -> torch.Tensor:
    tensor = leaf.tensor
    if leaf.is_mask:
        return tensor.clone()
    if leaf.values is not None:
        return _chosen(leaf.values, tensor.shape, generator).to(tensor.dtype)
    if tensor.is_complex():
        return torch.randn(tensor.shape, generator=generator, dtype=torch.complex64).to(tensor.dtype)
    drawn = torch.randn(tensor.shape, generator=generator)
    drawn = {
        "normal": drawn, "negative": -drawn.abs() - 0.5, "positive": drawn.abs() + 0.5, "large": 30 * drawn,
    }[kind]  # fmt: skip
    return drawn.to(tensor.dtype)


def _filling(like: torch.Tensor, leaf: Leaf, kind: str, generator: torch.Generator) -> torch.Tensor:
    if leaf.values is not None:
        if kind == "spread":
            return _chosen(leaf.values, like.shape, generator).to(like.dtype)
        return (leaf.values.max() if kind == "high" else leaf.values.min()).to(like.dtype)
    if kind == "spread":
        return (_LARGE / 3 * torch.randn(like.shape, generator=generator)).to(like.dtype)
    return torch.tensor(_LARGE if kind == "high" else -_LARGE, dtype=like.dtype)


def _chosen(values: torch.Tensor, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return values[torch.randint(len(values), tuple(shape), generator=generator)]


# Running a model without a trace --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A call's output leaves, and the buffers after it."""

    leaves: list[Any]
    buffers: dict[str, torch.Tensor]


class _NoWrites(TorchDispatchMode):
    """Refuses an op before it writes one of these tensors, which a copy of a model shares with the model."""

    def __init__(self, tensors: Iterable[torch.Tensor], name: str):
        super().__init__()
        self._storages = {t.untyped_storage()._cdata for t in tensors}
        self._name = name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._check(value)
            self._check(kwargs.get("out"))
        return func(*args, **kwargs)

    def _check(self, written: Any) -> None:
        for tensor in pytree.tree_leaves(written):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self._storages:
                raise InputError(
                    f"`{self._name}` writes one of its parameters in its forward pass, so buckets cannot be proved. "
                    "Hold what is written in a buffer (`register_buffer`), or pad the inputs yourself."
                )


def run_copy(model: torch.nn.Module, args: Sequence, kwargs: Mapping[str, Any], seed: int = 0) -> Run:
    """Run a copy of a model, in the model's mode: neither its state nor the random state changes.

    Parameters are shared with the copy, but for those that are zero throughout: they would hide a dependence that a
    later value shows, and are drawn.

    Raises:
        InputError: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        drawn = parameter
        if parameter.is_floating_point() and parameter.numel() and not parameter.any():
            values = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / 2
            drawn = torch.nn.Parameter(values, parameter.requires_grad)
        memo[id(parameter)] = drawn
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # whatever an attribute's own `__deepcopy__` or pickling raises
        raise InputError(
            f"`{type(model).__name__}` cannot be copied ({type(error).__name__}: {error}), and buckets are proved on a "
            "copy, so that the proof changes nothing. Give the attribute a `__deepcopy__`, or pad the inputs yourself."
        ) from error
    guard = _NoWrites(model.parameters(), type(model).__name__)
    with torch.random.fork_rng(devices=[]), guard:
        torch.manual_seed(seed)
        leaves = pytree.tree_leaves(copied(*args, **kwargs))
    leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return Run(leaves, {name: buffer.detach() for name, buffer in copied.named_buffers()})


def draws(model: torch.nn.Module, inputs: Inputs) -> Iterator[tuple[str, int, tuple, dict, Run]]:
    """Yield drawn inputs that the model takes, with its results: the kind, the seed, the arguments and the run.

    Raises:
        InputError: the model takes no drawn inputs, or all are the same.
    """
    inputs.widen(lambda args, kwargs: _attempt(model, args, kwargs)[0] is not None)
    if inputs.are_constant():
        raise InputError(
            f"Every integer input of `{type(model).__name__}` is 0 and can be nothing else that is known, so padding "
            "with 0 cannot be told from it. Make the first padded call with inputs of at least two values."
        )
    error, count = None, 0
    for seed, kind in enumerate(DRAWS):
        args, kwargs = inputs.draw(kind, seed)
        run, error = _attempt(model, *pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs)))
        if run is not None:
            count += 1
            yield kind, seed, args, kwargs, run
    if not count:
        raise InputError(
            f"`{type(model).__name__}` refuses the inputs that buckets are proved with ({type(error).__name__}: {error}), "
            "so a bucket cannot be accepted. Pad the inputs yourself, or move the check of values out of the model."
        ) from error


def _attempt(model: torch.nn.Module, args: Sequence, kwargs: Mapping[str, Any]) -> tuple[Run | None, Exception | None]:
    try:
        return run_copy(model, args, kwargs), None
    except InputError:
        raise
    except Exception as error:  # a model may check its inputs' values, and raise what it likes
        return None, error
