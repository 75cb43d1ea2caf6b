"""An optimized module that pads its inputs to buckets, and proves that padding changes nothing."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kpx.bridges.torch.module import OptimizedModule
from kpx.buckets import Buckets
from kpx.config import Config
from kpx.errors import InputError
from kpx.hardware.target import Target

_KINDS = ("batch", "sequence")
_MASK = "attention_mask"


class BucketedModule(OptimizedModule):
    """A model whose inputs are padded with zeros to a bucket's sizes, and whose outputs are cut back.

    Dimension 0 of every input that has the batch's size is padded, and dimension 1 of every input that has the
    sequence's; both sizes are those of the first tensor. Where the model takes an `attention_mask`, it masks the
    padding. At a bucket's first padded call, the outputs are compared with the model's own on the unpadded inputs; a
    bucket in which they differ is refused.
    """

    def __init__(self, model: torch.nn.Module, target: Target, config: Config, buckets: Buckets):
        super().__init__(model, target, config)
        self.__dict__["_buckets"] = buckets
        self.__dict__["_cuts"] = {}
        parameters = inspect.signature(model.forward).parameters
        self.__dict__["_names"] = list(parameters)
        self.__dict__["_takes_mask"] = _MASK in parameters

    def __reduce__(self):
        return BucketedModule, (self._model, self._target, self._config, self._buckets)

    def forward(self, *args, **kwargs):
        """The model's outputs for the unpadded inputs.

        Raises:
            InputError: an input is larger than the largest bucket, or padding would change the outputs.
        """
        sizes = _sizes(args, kwargs)
        goal = {kind: self._buckets.fit(kind, size) for kind, size in sizes.items()}
        if goal == sizes:
            return super().forward(*args, **kwargs)
        if goal.get("sequence") != sizes.get("sequence"):
            args, kwargs = self._with_mask(args, kwargs, sizes)
        padded_args, padded_kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: _padded(t, sizes, goal), (tuple(args), dict(kwargs))
        )
        outputs = super().forward(*padded_args, **padded_kwargs)
        leaves, spec = pytree.tree_flatten(outputs)
        key = (tuple(goal.items()), tuple(kind for kind in sizes if goal[kind] != sizes[kind]))
        if key not in self._cuts:
            self._cuts[key] = self._prove(args, kwargs, leaves, sizes, goal)
        return pytree.tree_unflatten(
            [_cut(x, dims, sizes) for x, dims in zip(leaves, self._cuts[key], strict=True)], spec
        )

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
