"""An optimized module that pads its inputs to buckets, and proves that padding changes nothing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kpx.bridges.torch import internals
from kpx.bridges.torch.graphs import Settings
from kpx.bridges.torch.module import OptimizedModule, subclass_instance
from kpx.bridges.torch.shapes import ShapeHistory
from kpx.buckets import Buckets
from kpx.errors import InputError

_KINDS = ("batch", "sequence")
_MASK = "attention_mask"


class BucketedModule(OptimizedModule):
    """A model whose inputs are padded with zeros to a bucket's sizes, and whose outputs are cut back.

    Dimension 0 of every input that has the batch's size is padded, and dimension 1 of every input that has the
    sequence's; both sizes are those of the first tensor. Where the model takes an `attention_mask`, it masks the
    padding. At a bucket's first padded call, the outputs are compared with the model's own on the unpadded inputs; a
    bucket in which they differ is refused.
    """

    _kpx_padded: Padded

    def __call__(self, *args, **kwargs):
        """Return the model's outputs for the unpadded inputs.

        Raises:
            InputError: an input is larger than the largest bucket, or padding would change the outputs.
        """
        if internals.is_tracing_elsewhere():
            return super().__call__(*args, **kwargs)
        return type(self)._kpx_padded.forward(*args, **kwargs)


def wrap_in_buckets(model: torch.nn.Module, settings: Settings, buckets: Buckets, dynamic: bool | None = None) -> Any:
    """Return a module that shares a model's state and pads its inputs to buckets."""
    settings.history = ShapeHistory("", warns=False)  # many sizes are what was asked for
    again = functools.partial(_wrap_again, buckets=buckets)
    wrapper = subclass_instance(model, settings, BucketedModule, again, dynamic)
    type(wrapper)._kpx_padded = Padded(model, type(wrapper)._kpx_engine, buckets)
    return wrapper


def _wrap_again(model: torch.nn.Module, settings: Settings, buckets: Buckets, dynamic: bool | None = None) -> Any:
    return wrap_in_buckets(model, settings, buckets, dynamic)


class Padded:
    """A model's calls on padded inputs, and the proofs that padding changes nothing."""

    def __init__(self, model: torch.nn.Module, call: Callable, buckets: Buckets):
        """Prepare to pad.

        Args:
            call: the compiled model.
        """
        self._model, self._call, self._buckets = model, call, buckets
        self._cuts: dict[Any, Any] = {}
        parameters = inspect.signature(model.forward).parameters
        self._names = list(parameters)
        self._takes_mask = _MASK in parameters

    def forward(self, *args, **kwargs):
        """The model's outputs for the unpadded inputs.

        Raises:
            InputError: an input is larger than the largest bucket, or padding would change the outputs.
        """
        sizes = _sizes(args, kwargs)
        if self._buckets.by_row and (parts := self._parts(args, kwargs, sizes)) is not None:
            return self._by_row(args, kwargs, sizes, parts)
        return self._whole(args, kwargs, sizes)

    def _whole(self, args, kwargs, sizes):
        """The outputs of a batch whose rows are all computed at one length."""
        goal = {kind: self._buckets.fit(kind, size) for kind, size in sizes.items()}
        if goal == sizes:
            return self._call(*args, **kwargs)
        if goal.get("sequence") != sizes.get("sequence"):
            args, kwargs = self._with_mask(args, kwargs, sizes)
        padded_args, padded_kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: _padded(t, sizes, goal), (tuple(args), dict(kwargs))
        )
        outputs = self._call(*padded_args, **padded_kwargs)
        leaves, spec = pytree.tree_flatten(outputs)
        key = (tuple(goal.items()), tuple(kind for kind in sizes if goal[kind] != sizes[kind]))
        if key not in self._cuts:
            self._cuts[key] = self._prove(args, kwargs, leaves, sizes, goal)
        return pytree.tree_unflatten(
            [_cut(x, dims, sizes) for x, dims in zip(leaves, self._cuts[key], strict=True)], spec
        )

    def _mask(self, args, kwargs) -> Any:
        """The mask that was given, or None."""
        position = self._names.index(_MASK) if self._takes_mask else len(args)
        return kwargs.get(_MASK) if position >= len(args) else args[position]

    def _parts(self, args, kwargs, sizes) -> dict[int, torch.Tensor] | None:
        """Which rows go into which bucket of lengths; None where no mask says, or all go into the last."""
        mask = self._mask(args, kwargs)
        if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != (sizes["batch"], sizes.get("sequence")):
            return None
        shown = mask != 0
        lengths = shown.sum(1)
        if not torch.equal(shown, torch.arange(mask.shape[1]) < lengths[:, None]):
            return None  # padded on the left, or within
        buckets = [min(self._buckets.fit("sequence", max(n, 1)), sizes["sequence"]) for n in lengths.tolist()]
        if min(buckets) == sizes["sequence"]:
            return None
        of_rows = torch.tensor(buckets)
        return {bucket: torch.nonzero(of_rows == bucket).flatten() for bucket in sorted(set(buckets))}

    def _by_row(self, args, kwargs, sizes, parts: dict[int, torch.Tensor]):
        """The outputs of a batch whose rows are computed at their own lengths."""
        leaves: list[Any] = []
        spec = None
        for length, rows in parts.items():
            for chosen in torch.split(rows, self._buckets.largest("batch", len(rows))):
                part = pytree.tree_map_only(
                    torch.Tensor, lambda t, r=chosen, n=length: _taken(t, sizes, r, n), (tuple(args), dict(kwargs))
                )
                inner = {**sizes, "batch": len(chosen), "sequence": length}
                found, spec = pytree.tree_flatten(self._whole(part[0], part[1], inner))
                along = self._prove_rows(args, kwargs, sizes, chosen, found, inner)
                leaves = leaves or [_room(x, sizes, flag) for x, flag in zip(found, along, strict=True)]
                hidden = self._mask(*part) == 0
                for whole, x, flag in zip(leaves, found, along, strict=True):
                    if flag:
                        whole[:, :length][chosen] = x.masked_fill(_like(hidden, x), 0)
                    elif isinstance(x, torch.Tensor):
                        whole[chosen] = x
        assert spec is not None
        return pytree.tree_unflatten(leaves, spec)

    def _prove_rows(self, args, kwargs, sizes, chosen, found, inner) -> list[bool]:
        """Compares rows at their own length with the model itself at the batch's, once for each length; gives which
        outputs have the sequence's dimension."""
        length, key = inner["sequence"], ("rows", inner["sequence"])
        if key in self._cuts:
            return self._cuts["rows"]
        few = chosen[:4]
        part = pytree.tree_map_only(
            torch.Tensor, lambda t: _taken(t, sizes, few, sizes["sequence"]), (tuple(args), dict(kwargs))
        )
        with torch.no_grad():
            wanted = pytree.tree_leaves(self._model(*part[0], **part[1]))
        pairs = list(zip(found, wanted, strict=True))
        if "rows" not in self._cuts:  # the first length is shorter than the batch's: what has it, has the dimension
            self._cuts["rows"] = [
                isinstance(w, torch.Tensor) and w.ndim > 1 and x.shape[1] == length and w.shape[1] == sizes["sequence"]
                for x, w in pairs
            ]
        hidden = self._mask(*part)[:, :length] == 0
        for i, (ours, theirs) in enumerate(pairs):
            if not isinstance(theirs, torch.Tensor):
                continue
            if not theirs.ndim or theirs.shape[0] != len(few) or ours.shape[0] != len(chosen):
                raise InputError(
                    f"Output {i} of `{type(self._model).__name__}`, {list(theirs.shape)} of {len(few)} rows, does not hold "
                    "them. Leave `by_row` out."
                )
            ours = ours[: len(few)]
            if self._cuts["rows"][i]:
                ours, theirs = (t.masked_fill(_like(hidden, t), 0) for t in (ours, theirs[:, :length]))
            if ours.shape != theirs.shape:
                raise InputError(
                    f"Output {i} of `{type(self._model).__name__}` is {list(theirs.shape)}, and {list(ours.shape)} where rows "
                    f"are cut to {length}: it has the sequence elsewhere than in dimension 1. Leave `by_row` out."
                )
            self._compare(ours, theirs, i, {"batch": len(few), "sequence": length})
        self._cuts[key] = []
        return self._cuts["rows"]

    def _with_mask(self, args, kwargs, sizes):
        """Where the model takes a mask and was given none, one that shows every position there is."""
        position = self._names.index(_MASK) if self._takes_mask else -1
        if not self._takes_mask or kwargs.get(_MASK) is not None or len(args) > position:
            return args, kwargs
        shown = torch.ones(sizes["batch"], sizes["sequence"], dtype=torch.int64)
        return args, {**kwargs, _MASK: shown}

    def _prove(self, args, kwargs, padded, sizes, goal) -> list[dict[int, str]]:
        """Compares with the model itself on the unpadded inputs; gives which dimensions of each output to cut."""
        with torch.no_grad():
            wanted = pytree.tree_leaves(self._model(*args, **kwargs))
        cuts = []
        for i, (p, w) in enumerate(zip(padded, wanted, strict=True)):
            dims = _grown(p, w, sizes, goal, i) if isinstance(w, torch.Tensor) else {}
            cuts.append(dims)
            if isinstance(w, torch.Tensor):
                self._compare(_cut(p, dims, sizes), w, i, goal)
        return cuts

    def _compare(self, got: torch.Tensor, wanted: torch.Tensor, output: int, goal: dict[str, int]) -> None:
        exact = not wanted.is_floating_point()
        scale = 0.0 if exact or not wanted.numel() else float(wanted.abs().nan_to_num(posinf=0, neginf=0).max())
        loose = 2e-2 if wanted.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if exact and torch.equal(got, wanted):
            return
        if not exact and torch.allclose(got, wanted, rtol=loose, atol=loose * max(scale, 1e-6), equal_nan=True):
            return
        worst = float((got.double() - wanted.double()).abs().max())
        raise InputError(
            f"Padding to {goal} changes output {output} of `{type(self._model).__name__}` by up to {worst:.3g}, so this "
            "bucket is refused: something in the model (a mean over the sequence, say, or a missing mask) sees the "
            "padding. Pass an `attention_mask` if the model takes one, or bucket the other dimension alone."
        )


def _sizes(args, kwargs) -> dict[str, int]:
    first = next((t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim), None)
    if first is None:
        raise InputError("No tensor with dimensions was given, so there is nothing to pad.")
    return dict(zip(_KINDS, first.shape, strict=False))


def _taken(tensor: torch.Tensor, sizes: dict[str, int], rows: torch.Tensor, length: int) -> torch.Tensor:
    """Some rows of an input that has the batch's, cut to a length where it has the sequence's."""
    if not tensor.ndim or tensor.shape[0] != sizes["batch"]:
        return tensor
    taken = tensor[rows]
    return taken[:, :length].contiguous() if tensor.ndim > 1 and tensor.shape[1] == sizes["sequence"] else taken


def _like(mask: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return mask.reshape(*mask.shape, *[1] * (tensor.ndim - 2))


def _room(value: Any, sizes: dict[str, int], has_sequence: bool) -> Any:
    """Zeros for an output of all rows, as a part's are; what is no tensor as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    first = (sizes["batch"], sizes["sequence"]) if has_sequence else (sizes["batch"],)
    return value.new_zeros(*first, *value.shape[len(first) :])


def _padded(tensor: torch.Tensor, sizes: dict[str, int], goal: dict[str, int]) -> torch.Tensor:
    pad: list[int] = []
    for dim, kind in reversed(list(enumerate(_KINDS))):
        if dim < tensor.ndim:
            grows = kind in sizes and tensor.shape[dim] == sizes[kind]
            pad += [0, goal[kind] - sizes[kind] if grows else 0]
    pad = [0, 0] * max(tensor.ndim - len(_KINDS), 0) + pad
    return torch.nn.functional.pad(tensor, pad) if any(pad) else tensor


def _grown(padded: torch.Tensor, wanted: torch.Tensor, sizes, goal, output: int) -> dict[int, str]:
    """Which dimensions of an output grew with the padding, and with what."""
    found: dict[int, str] = {}
    if padded.ndim != wanted.ndim:
        raise InputError(f"Padding to {goal} changes the number of dimensions of output {output}.")
    for dim, (p, w) in enumerate(zip(padded.shape, wanted.shape, strict=True)):
        if p == w:
            continue
        kind = next((k for k in sizes if w == sizes[k] and p == goal[k]), None)
        if kind is None:
            raise InputError(
                f"Padding to {goal} changes dimension {dim} of output {output} from {w} to {p}, which is neither the "
                "batch nor the sequence. Bucket the other dimension alone."
            )
        found[dim] = kind
    return found


def _cut(value: Any, dims: dict[int, str], sizes: dict[str, int]) -> Any:
    for dim, kind in dims.items():
        value = value.narrow(dim, 0, sizes[kind])
    return value
