"""Tensors as JAX arrays and back, over the same memory."""

from __future__ import annotations

import jax
import torch
from torch.utils import dlpack

from kpx.bridges.torch.dtypes import to_jax
from kpx.errors import InputError
from kpx.jax_internals import array_from_capsule, capsule_from_array

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
