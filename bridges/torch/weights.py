"""Weights as arrays that a program holds between calls, and the checks that tell when they have changed.

A weight that an executable reads in place (same memory) shows in-place updates by itself. One that was prepared from, or
copied, must be read again. A weight may change by being replaced, by an in-place op, or behind autograd's back through
`.data` or a NumPy view. The identity, pointer and version checks are exact; an update behind autograd's back of a prepared
weight is seen by elements spread over it, about one in each 64th of its memory.
"""

from __future__ import annotations

import functools
import math
import operator
import random
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch

from kpx.bridges.torch.tensors import canonical, dense_order, to_array
from kpx.errors import InputError
from kpx.runtime.build import ModelProgram

_version = operator.attrgetter("_version")
_SAMPLES = 64  # elements of a weight that are compared at each call; a weight of fewer is compared whole
_MOST_SETS = 16  # sets of weights that one program keeps: layers that share a graph, or adapters that take turns


class Watch:
    """Arrays over the memory of weights, and what tells that the weights have changed since.

    Attributes:
        arrays: one array a weight, over its memory where it is dense and aligned.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], names: Sequence[str], device: jax.Device):
        """Read the weights.

        Raises:
            InputError: a weight is not a dense CPU tensor, or its memory was freed.
        """
        self.arrays = []
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.numel() and not tensor.untyped_storage().size():
                raise InputError(
                    "This signature is not compiled, and the weights to compile it with were freed by "
                    "`free_originals()`. Compile every signature first, or optimize a new copy of the model."
                )
            try:
                self.arrays.append(to_array(canonical(tensor.detach()), device))
            except InputError as error:
                raise InputError(f"The weight `{name}` cannot be used: {error}") from None
        self.pointers = [t.data_ptr() for t in tensors]
        self._indices: list[int] = []

    def watch(self, tensors: Sequence[torch.Tensor], prepared: Sequence[int]) -> None:
        """Record versions and samples of the weights that are not read in place.

        Args:
            prepared: indices of the weights whose prepared values the program holds.
        """
        copied = {
            i
            for i, (a, p) in enumerate(zip(self.arrays, self.pointers, strict=True))
            if a.size and a.unsafe_buffer_pointer() != p
        }
        self._indices = sorted(copied | set(prepared))
        self._pick = _picker(self._indices)
        watched = self._pick(tensors)
        self._versions = list(map(_version, watched))
        self._samples = [_sample(t) for t in watched]
        self._sampled = [view.tobytes() for view in self._samples]

    def release(self) -> None:
        """Let go of the weights' memory."""
        self.arrays, self._samples, self._sampled = [], [], []

    def changed(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether the same tensors, by identity, must be read again."""
        return (
            [t.data_ptr() for t in tensors] != self.pointers
            or list(map(_version, self._pick(tensors))) != self._versions
            or [view.tobytes() for view in self._samples] != self._sampled
        )


def _picker(indices: list[int]) -> Callable[[Sequence], Sequence]:
    """Return a function that picks items by index (operator.itemgetter returns no tuple for one or none)."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda items: [items[i] for i in indices]


class LiveWeights:
    """The weights of a module by name: read again when one of them has changed or was replaced."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str], constants: dict[str, torch.Tensor]):
        self._slots: list[tuple[dict, str]] = []
        self.names = list(names)
        for name in names:
            if name in constants:
                self._slots.append((constants, name))
                continue
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            owner = module._parameters if leaf in module._parameters else module._buffers
            self._slots.append((owner, leaf))  # type: ignore[arg-type]

    def tensors(self) -> list[torch.Tensor]:
        """Return the weights as they are now."""
        return [d[k] for d, k in self._slots]

    def read(self, device: jax.Device, prepared: Sequence[int]) -> list[jax.Array]:
        """Return the weights as arrays, and record what they are.

        Args:
            prepared: indices of the weights whose values are computed upon, and not read in place.

        Raises:
            InputError: a weight is not a dense CPU tensor.
        """
        tensors = self.tensors()
        self._read = tensors
        self._watch = Watch(tensors, self.names, device)
        self._watch.watch(tensors, prepared)
        return self._watch.arrays

    def changed(self) -> bool:
        """Return whether the weights must be read again."""
        tensors = self.tensors()
        return not all(map(operator.is_, tensors, self._read)) or self._watch.changed(tensors)


class _WeightSet:
    """What a program holds of one set of weights."""

    def __init__(
        self, program: ModelProgram, tensors: Sequence[torch.Tensor], names: Sequence[str], device: jax.Device
    ):
        watch = Watch(tensors, names, device)
        self.held = program.held = program.prepared(watch.arrays)
        watch.watch(tensors, program.prepare_weights)
        watch.arrays = []  # what the program does not hold may be freed with the model
        self.watch = watch
        self.references: list[weakref.ref] = []


class WeightSets:
    """The prepared arrays of one program, for each set of weights that it is called with.

    Dynamo calls one graph with the weights of several modules, layers of one class for example. Weights are told apart by
    identity; what was prepared of a tensor is dropped when the tensor is.
    """

    def __init__(self, program: ModelProgram, names: Sequence[str], device: jax.Device):
        self._program, self._names, self._device = program, list(names), device
        self._sets: OrderedDict[tuple[int, ...], _WeightSet] = OrderedDict()
        self._last: tuple[tuple[int, ...], _WeightSet] | None = None
        self._lock = threading.RLock()
        self._frozen = False

    def held(self, tensors: Sequence[torch.Tensor]) -> list[jax.Array]:
        """Return the arrays that the program reads for these weights, prepared anew where one has changed.

        Raises:
            InputError: a weight is not a dense CPU tensor, or its memory was freed.
        """
        key = tuple(map(id, tensors))
        last = self._last
        if last is not None and last[0] == key and (self._frozen or not last[1].watch.changed(tensors)):
            return last[1].held
        with self._lock:
            known = self._sets.get(key)
            if known is None or not (self._frozen or not known.watch.changed(tensors)):
                known = _WeightSet(self._program, tensors, self._names, self._device)
                drop = functools.partial(_drop, weakref.ref(self), key)
                known.references = [weakref.ref(tensor, drop) for tensor in tensors]
                self._sets[key] = known
            self._sets.move_to_end(key)
            while len(self._sets) > _MOST_SETS:
                self._sets.popitem(last=False)
            self._last = key, known
            return known.held

    def freeze(self) -> set[int]:
        """Stop looking for changes of the weights; return the addresses of those that the program reads in place."""
        with self._lock:
            self._frozen = True
            for known in self._sets.values():
                known.watch.release()
            return {a.unsafe_buffer_pointer() for known in self._sets.values() for a in known.held}

    def clear(self) -> None:
        """Drop everything that was prepared."""
        with self._lock:
            self._sets.clear()
            self._last = None

    def drop(self, key: tuple[int, ...]) -> None:
        """Drop what was prepared of one set of weights."""
        with self._lock:
            self._sets.pop(key, None)
            if self._last is not None and self._last[0] == key:
                self._last = None


def _drop(sets: weakref.ref[WeightSets], key: tuple[int, ...], _: Any) -> None:
    if (owner := sets()) is not None:
        owner.drop(key)


def _sample(tensor: torch.Tensor) -> memoryview:
    """Return elements spread evenly over a weight's memory and along each dimension; none of one that has gaps."""
    flat = _bits(tensor)
    step = max(flat.numel() // _SAMPLES, 1)
    while math.gcd(step, flat.numel()) > 1:  # a step of whole rows would sample one column
        step -= 1
    first = random.Random(flat.numel()).randrange(step)
    return memoryview(flat.numpy())[first::step]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as a flat one of integers, over the same memory (empty where it has gaps)."""
    flat = tensor.detach()
    if not flat.is_contiguous():
        if (order := dense_order(flat)) is None:
            return torch.empty(0, dtype=torch.uint8)
        flat = flat.permute(order)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.reshape(-1).view(integers.get(flat.element_size(), torch.uint8))
