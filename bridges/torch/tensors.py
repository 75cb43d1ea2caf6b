"""Tensors as JAX arrays and back, over the same memory, and weights that may change between calls."""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence

import jax
import torch
from torch.utils import dlpack

from kpx.bridges.torch.dtypes import to_jax
from kpx.errors import InputError
from kpx.jax_internals import array_from_capsule, capsule_from_array

_version = operator.attrgetter("_version")
_ALIGNED = 64  # bytes; XLA reads in place what begins at a multiple, as memory of PyTorch's own does


def to_array(tensor: torch.Tensor, device: jax.Device) -> jax.Array:
    """A JAX array over a CPU tensor's memory (over a copy where it is not contiguous, or not aligned).

    Raises:
        InputError: the tensor is not a dense CPU tensor of a dtype JAX has.
    """
    if tensor.is_conj() or tensor.is_neg():  # views whose values their memory does not hold
        tensor = tensor.resolve_conj().resolve_neg()
    try:
        # DLPack would carry the strides, and an executable takes row-major arrays alone.
        tensor = tensor.contiguous()
        if tensor.data_ptr() % _ALIGNED:
            # XLA would copy in a thread of its own, which then gives the tensor back to Python: at a time when the
            # interpreter may be ending, and that aborts the process.
            tensor = tensor.detach().clone()
        return array_from_capsule(dlpack.to_dlpack(tensor), device)
    except (RuntimeError, ValueError, BufferError) as error:
        return array_from_capsule(dlpack.to_dlpack(plain(tensor, error)), device)


def plain(tensor: torch.Tensor, error: Exception | None = None) -> torch.Tensor:
    """A dense, contiguous, detached tensor of the same values, for those that DLPack refuses.

    Raises:
        InputError: there is none.
    """
    if tensor.layout is not torch.strided:
        raise InputError(f"A tensor of layout {tensor.layout} was given. Pass a dense one: `x.to_dense()`.")
    if tensor.device.type != "cpu":
        raise InputError(
            f"A tensor on {tensor.device} was given, and the model is compiled for the CPU. Move it: `x.cpu()`."
        )
    to_jax(tensor.dtype)
    resolved = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if error is not None and resolved.data_ptr() == tensor.data_ptr() and not tensor.requires_grad:
        raise InputError(f"This tensor cannot be read: {error}") from error
    return resolved


def dense_order(tensor: torch.Tensor) -> list[int] | None:
    """The order of dimensions in which a tensor lies densely in memory (a transposed weight, a channels_last image), or
    None where that is its own order, or it does not lie densely: then it is copied at each call."""
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.ndim), key=lambda d: (-tensor.stride(d), d))
    return order if tensor.permute(order).is_contiguous() else None


def canonical(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor whose dimensions of size 1 have the strides of a row-major array; the same memory if it can."""
    return tensor.reshape(-1).view(tensor.shape)


def to_tensor(array: jax.Array) -> torch.Tensor:
    """A tensor over a JAX array's memory; waits until it is computed."""
    return dlpack.from_dlpack(capsule_from_array(array))


class LiveWeights:
    """The weights of a module as JAX arrays, and whether any of them has changed since.

    A weight that an executable reads in place (same memory) shows in-place updates by itself; one that
    was prepared from, or copied, must be read again. A weight may change by being replaced, by an in-place
    op, or behind autograd's back through `.data`: the first three checks below are exact; updates through
    `.data` of prepared weights are seen by one sampled element each.
    """

    def __init__(self, model: torch.nn.Module, names: Sequence[str], constants: dict[str, torch.Tensor]):
        self._slots: list[tuple[dict, str]] = []
        self.names = list(names)
        for name in names:
            if name in constants:
                self._slots.append((constants, name))
                continue
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            held = module._parameters if leaf in module._parameters else module._buffers
            self._slots.append((held, leaf))  # type: ignore[arg-type]

    def tensors(self) -> list[torch.Tensor]:
        """The weights as they are now."""
        return [d[k] for d, k in self._slots]

    def read(self, device: jax.Device, prepared: Sequence[int]) -> list[jax.Array]:
        """The weights as arrays; remembers what they were, to tell when they change.

        Args:
            prepared: positions whose values are computed upon, and not read in place.

        Raises:
            InputError: a weight is not a dense CPU tensor.
        """
        tensors = self.tensors()
        arrays = []
        for name, tensor in zip(self.names, tensors, strict=True):
            try:
                arrays.append(to_array(canonical(tensor.detach()), device))
            except InputError as error:
                raise InputError(f"The weight `{name}` cannot be used: {error}") from None
        self._places = [(*slot, tensor) for slot, tensor in zip(self._slots, tensors, strict=True)]
        self._pointer_of = [t.data_ptr for t in tensors]
        self._pointers = [f() for f in self._pointer_of]
        copied = {
            i
            for i, (a, p) in enumerate(zip(arrays, self._pointers, strict=True))
            if a.size and a.unsafe_buffer_pointer() != p
        }
        self._watched = [tensors[i] for i in sorted(copied | set(prepared))]
        self._versions = list(map(_version, self._watched))
        chosen = random.Random(0)
        self._samples = [
            (memoryview(flat.numpy()), chosen.randrange(flat.numel()))
            for t in self._watched
            if (flat := _bits(t)).numel()
        ]
        self._sampled = [view[i] for view, i in self._samples]
        return arrays

    def freeze(self) -> None:
        """Lets go of the weights: from now on they count as unchanged."""
        self._places, self._pointer_of, self._pointers = [], [], []
        self._watched, self._versions, self._samples, self._sampled = [], [], [], []

    def changed(self) -> bool:
        """Whether the weights must be read again."""
        for held, key, tensor in self._places:  # a plain loop: this runs at every call
            if held[key] is not tensor:
                return True
        return (
            [f() for f in self._pointer_of] != self._pointers
            or list(map(_version, self._watched)) != self._versions
            or [view[i] for view, i in self._samples] != self._sampled
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as a flat one of integers, over the same memory (empty where it is strided)."""
    flat = tensor.detach()
    if not flat.is_contiguous():
        return torch.empty(0, dtype=torch.uint8)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.reshape(-1).view(integers.get(flat.element_size(), torch.uint8))
