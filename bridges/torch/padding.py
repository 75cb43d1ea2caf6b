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
from kpx.bridges.torch.independence import DRAWS, Inputs, Run, draws, run_copy
from kpx.bridges.torch.module import OptimizedModule, subclass_instance
from kpx.bridges.torch.shapes import ShapeHistory
from kpx.buckets import Buckets
from kpx.errors import InputError

_KINDS = ("batch", "sequence")
_MASK = "attention_mask"
_FEW = 4  # rows that a proof by row compares
_FLAGS = (bool, str, type(None))


class BucketedModule(OptimizedModule):
    """A model whose inputs are padded with zeros to a bucket's sizes, and whose outputs are cut back.

    Dimension 0 of every input that has the batch's size is padded, and dimension 1 of every input that has the
    sequence's; both sizes are those of the first tensor. Where the model takes an `attention_mask`, it masks the
    padding. At a bucket's first padded call, a copy of the model runs with drawn inputs, padded with large values of both
    signs and unpadded (see `independence`); a bucket in which the results differ is refused.
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
        masked = (
            self._with_mask(args, kwargs, sizes) if goal.get("sequence") != sizes.get("sequence") else (args, kwargs)
        )
        kinds = tuple(kind for kind in sizes if goal[kind] != sizes[kind])
        key = (tuple(goal.items()), kinds, self._signature(args, kwargs, sizes))
        if key not in self._cuts:
            self._cuts[key] = self._prove(args, kwargs, masked, sizes, goal)
        padded = _pad_all(*masked, sizes, goal)
        leaves, spec = pytree.tree_flatten(self._call(*padded[0], **padded[1]))
        return pytree.tree_unflatten(
            [_cut(x, dims, sizes) for x, dims in zip(leaves, self._cuts[key], strict=True)], spec
        )

    def _signature(self, args, kwargs, sizes) -> Any:
        """What a proof holds for, beside the bucket: the arguments' kinds, and how the model stands."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        return str(spec), tuple(_described(leaf, sizes) for leaf in leaves), _modes(self._model)

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
        signature = self._signature(args, kwargs, sizes)
        for length, rows in parts.items():
            key = ("rows", length, length < sizes["sequence"], sizes["batch"] > 1, signature)
            if key not in self._cuts:
                self._cuts[key] = self._prove_rows(args, kwargs, sizes, rows, length, ("along", signature))
            along = self._cuts[key]
            for chosen in torch.split(rows, self._buckets.largest("batch", len(rows))):
                part = _take_all(args, kwargs, sizes, chosen, length)
                inner = {**sizes, "batch": len(chosen), "sequence": length}
                outputs, spec = pytree.tree_flatten(self._whole(part[0], part[1], inner))
                leaves = leaves or [_room(x, sizes, flag) for x, flag in zip(outputs, along, strict=True)]
                hidden = self._mask(*part) == 0
                for whole, x, flag in zip(leaves, outputs, along, strict=True):
                    if flag:
                        whole[:, :length][chosen] = x.masked_fill(_like(hidden, x), 0)
                    elif isinstance(x, torch.Tensor):
                        whole[chosen] = x
        assert spec is not None
        return pytree.tree_unflatten(leaves, spec)

    def _prove_rows(self, args, kwargs, sizes, rows, length: int, key: Any) -> list[bool]:
        """Compares rows alone and at their own length with the same rows in their batch; gives which outputs have the
        sequence's dimension. A few of the rows are compared, beside a few others."""
        few = rows[: max(1, min(_FEW, sizes["batch"] // 2))]
        others = torch.tensor(
            [i for i in range(sizes["batch"]) if i not in set(few.tolist())][:_FEW], dtype=torch.int64
        )
        base = _take_all(args, kwargs, sizes, torch.cat([few, others]), sizes["sequence"])
        shown = self._mask(*base) != 0
        inputs = Inputs(self._model, *base)
        inside = {"batch": len(shown), "sequence": sizes["sequence"]}

        def compare(batch_args, batch_kwargs):
            part = _take_all(batch_args, batch_kwargs, inside, torch.arange(len(few)), length)
            wanted = run_copy(self._model, *_cloned(batch_args, batch_kwargs))
            pairs = list(zip(run_copy(self._model, *_cloned(*part)).leaves, wanted.leaves, strict=True))
            if key not in self._cuts:  # the first length is shorter than the batch's: what has it, has the dimension
                self._cuts[key] = [_has_sequence(x, w, length, sizes["sequence"]) for x, w in pairs]
            for i, (x, w) in enumerate(pairs):
                if isinstance(w, torch.Tensor):
                    hidden = ~shown[: len(few), :length] if self._cuts[key][i] else None
                    self._compare_rows(x, w, i, hidden, inside)

        compare(*inputs.own())
        for kind, seed, drawn_args, drawn_kwargs, _ in draws(self._model, inputs):
            for filling in DRAWS[kind]:
                compare(*inputs.fill(drawn_args, drawn_kwargs, filling, seed, shown))
        return self._cuts[key]

    def _compare_rows(self, ours: torch.Tensor, theirs: torch.Tensor, output: int, hidden: Any, inside) -> None:
        """Compares an output of some rows alone with that of their batch, whose first rows they are."""
        name, count = type(self._model).__name__, inside["batch"]
        if not theirs.ndim or theirs.shape[0] != count or not ours.ndim:
            raise InputError(
                f"Output {output} of `{name}`, {list(theirs.shape)} of {count} rows, does not hold them. Leave `by_row` out."
            )
        theirs = theirs[: len(ours)]
        if hidden is not None:
            theirs = theirs[:, : hidden.shape[1]]
            ours, theirs = (t.masked_fill(_like(hidden, t), 0) for t in (ours, theirs))
        if ours.shape != theirs.shape:
            raise InputError(
                f"Output {output} of `{name}` is {list(theirs.shape)}, and {list(ours.shape)} where rows are cut to their "
                "length: it has the sequence elsewhere than in dimension 1. Leave `by_row` out."
            )
        self._compare(ours, theirs, f"output {output}", inside)

    def _with_mask(self, args, kwargs, sizes):
        """Where the model takes a mask and was given none, one that shows every position there is."""
        position = self._names.index(_MASK) if self._takes_mask else -1
        if not self._takes_mask or kwargs.get(_MASK) is not None or len(args) > position:
            return args, kwargs
        shown = torch.ones(sizes["batch"], sizes["sequence"], dtype=torch.int64)
        return args, {**kwargs, _MASK: shown}

    def _prove(self, args, kwargs, masked, sizes, goal) -> list[dict[int, str]]:
        """Compares padded with unpadded results of the model itself, for the caller's inputs and for drawn ones (see
        `independence`); gives which dimensions of each output to cut.

        Args:
            args, kwargs: the caller's own.
            masked: the same, with the mask that the padding needs.
        """
        inputs = Inputs(self._model, args, kwargs)
        mask = _pad_all((), {k: v for k, v in masked[1].items() if k not in kwargs or v is not kwargs[k]}, sizes, goal)[
            1
        ]
        cuts: list[dict[int, str]] = []

        def compare(real: tuple[tuple, dict], filling: str, seed: int, wanted: Run):
            filled_args, filled_kwargs = inputs.fill(*_pad_all(*real, sizes, goal), filling, seed)
            padded = self._run_padded(*_cloned(filled_args, {**filled_kwargs, **mask}), goal)
            self._compare_runs(padded, wanted, sizes, goal, cuts)

        wanted = run_copy(self._model, *inputs.own())
        again = run_copy(self._model, *inputs.own(), seed=1)
        pairs = zip(wanted.leaves, again.leaves, strict=True)
        if any(isinstance(w, torch.Tensor) and _worst(a, w) is not None for w, a in pairs):
            raise InputError(
                f"`{type(self._model).__name__}` draws random numbers (dropout, in training mode?), so that its outputs "
                "cannot be compared with padded ones. Call `eval()`, or bucket no sizes."
            )
        compare(inputs.own(), "zeros", 0, wanted)
        for kind, seed, drawn_args, drawn_kwargs, run in draws(self._model, inputs):
            for filling in DRAWS[kind]:
                compare((drawn_args, drawn_kwargs), filling, seed, run)
        return cuts

    def _run_padded(self, args, kwargs, goal) -> Run:
        try:
            return run_copy(self._model, args, kwargs)
        except InputError:
            raise
        except Exception as error:  # what a model raises at sizes it was not written for, of any type
            raise InputError(
                f"`{type(self._model).__name__}` fails where its inputs are padded to {goal}: {type(error).__name__}: "
                f"{error}\nUse other sizes, or bucket the other dimension alone."
            ) from error

    def _compare_runs(self, padded: Run, wanted: Run, sizes, goal, cuts: list[dict[int, str]]) -> None:
        """Compares a padded run with the unpadded one; the first fills in which dimensions of each output grow."""
        is_first = not cuts
        for i, (p, w) in enumerate(zip(padded.leaves, wanted.leaves, strict=True)):
            if is_first:
                cuts.append(_grown(p, w, sizes, goal, i) if isinstance(w, torch.Tensor) else {})
            if isinstance(w, torch.Tensor):
                self._compare(_cut(p, cuts[i], sizes), w, f"output {i}", goal)
        for name, w in wanted.buffers.items():
            p = padded.buffers.get(name)
            if p is None or p.shape != w.shape:
                raise InputError(
                    f"Padding to {goal} changes the shape of the buffer `{name}`, so this bucket is refused."
                )
            self._compare(p, w, f"the buffer `{name}`", goal)

    def _compare(self, got: torch.Tensor, wanted: torch.Tensor, what: str, goal: dict[str, int]) -> None:
        if (worst := _worst(got, wanted)) is None:
            return
        raise InputError(
            f"Padding to {goal} changes {what} of `{type(self._model).__name__}` by up to {worst:.3g}, so this "
            "bucket is refused: something in the model (a mean over the sequence, say, or a missing mask) sees the "
            "padding. Pass an `attention_mask` if the model takes one, or bucket the other dimension alone."
        )


def _sizes(args, kwargs) -> dict[str, int]:
    first = next((t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim), None)
    if first is None:
        raise InputError("No tensor with dimensions was given, so there is nothing to pad.")
    return dict(zip(_KINDS, first.shape, strict=False))


def _worst(got: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """The largest difference of two tensors; None where they are equal but for rounding."""
    exact = not (wanted.is_floating_point() or wanted.is_complex())
    if exact and torch.equal(got, wanted):
        return None
    scale = 0.0 if exact or not wanted.numel() else float(wanted.abs().nan_to_num(posinf=0, neginf=0).max())
    loose = 2e-2 if wanted.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not exact and torch.allclose(got, wanted, rtol=loose, atol=loose * max(scale, 1e-6), equal_nan=True):
        return None
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    return float((got.to(wide) - wanted.to(wide)).abs().max())


def _described(leaf: Any, sizes: dict[str, int]) -> Any:
    """An argument's kind: a tensor's dtype, and its sizes but for those that are padded."""
    if not isinstance(leaf, torch.Tensor):
        return type(leaf), repr(leaf)
    dims = [kind if size == sizes.get(kind) else size for kind, size in zip(_KINDS, leaf.shape, strict=False)]
    return leaf.dtype, (*dims, *leaf.shape[len(_KINDS) :])


def _modes(model: torch.nn.Module) -> Any:
    """How a model stands: its modules, their modes, flags and hooks. A number that it counts with is not part of it."""
    return tuple(
        (
            type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
            tuple((k, v) for k, v in vars(module).items() if isinstance(v, _FLAGS)), vars(module).get("forward"),
        )
        for module in model.modules()
    )  # fmt: skip


def _cloned(args, kwargs) -> tuple[tuple, dict]:
    return pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(args), dict(kwargs)))


def _has_sequence(part: Any, whole: Any, length: int, sequence: int) -> bool:
    """Return whether dimension 1 of an output is the sequence's, where rows were cut to a length."""
    tensors = isinstance(part, torch.Tensor) and isinstance(whole, torch.Tensor)
    return tensors and whole.ndim > 1 and part.shape[1] == length and whole.shape[1] == sequence


def _pad_all(args, kwargs, sizes, goal) -> tuple[tuple, dict]:
    return pytree.tree_map_only(torch.Tensor, lambda t: _padded(t, sizes, goal), (tuple(args), dict(kwargs)))


def _take_all(args, kwargs, sizes, rows: torch.Tensor, length: int) -> tuple[tuple, dict]:
    return pytree.tree_map_only(torch.Tensor, lambda t: _taken(t, sizes, rows, length), (tuple(args), dict(kwargs)))


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
