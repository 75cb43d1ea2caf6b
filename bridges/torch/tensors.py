"""Tensors as JAX arrays and back, over the same memory."""

from __future__ import annotations

import ctypes

import jax
import torch

from kpx.bridges.torch.dtypes import to_jax
from kpx.bridges.torch.internals import capsule_from_tensor, tensor_from_capsule
from kpx.errors import InputError
from kpx.jax_internals import array_from_capsule, capsule_from_array

_MOST_ADDRESSES = 16  # that an input's arrays are kept for
_PLAIN = (torch.Tensor, torch.nn.Parameter)
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
        return array_from_capsule(capsule_from_tensor(tensor), device)
    except (RuntimeError, ValueError, BufferError) as error:
        return array_from_capsule(capsule_from_tensor(plain(tensor, error)), device)


class InputArrays:
    """JAX arrays over the memory of the tensors that one input of a program is given, made once for each address.

    PyTorch's allocator gives a loop's tensors a few addresses over and over. A kept array does not own its memory, so that
    no tensor outlives its use; it is read only in calls with a tensor at that address, of the first tensor's shape and dtype.
    """

    def __init__(self, device: jax.Device):
        self._device = device
        self._arrays: dict[int, jax.Array] = {}
        self._kind: tuple[torch.Size, torch.dtype] | None = None  # of what is kept

    def __call__(self, tensor: torch.Tensor) -> jax.Array:
        """Return an array of a tensor's values, over its memory where that is contiguous and aligned.

        The tensor must live until the results of the program have been waited for.

        Raises:
            InputError: the tensor is not a dense CPU tensor of a dtype JAX has.
        """
        try:
            array = self._arrays.get(tensor.data_ptr())
        except RuntimeError:  # a tensor of another layout, which has no address
            return to_array(tensor, self._device)
        if (
            array is None
            or (tensor.shape, tensor.dtype) != self._kind
            or not tensor.is_contiguous()
            or tensor.is_neg()
            or tensor.is_conj()
        ):
            return self._new(tensor)
        return array

    def _new(self, tensor: torch.Tensor) -> jax.Array:
        address = tensor.data_ptr()
        is_view = tensor.is_neg() or tensor.is_conj() or not tensor.is_contiguous()
        self._kind = self._kind or (tensor.shape, tensor.dtype)
        is_view = is_view or (tensor.shape, tensor.dtype) != self._kind
        if is_view or not address or address % _ALIGNED or type(tensor) not in _PLAIN or tensor.device.type != "cpu":
            return to_array(canonical(tensor), self._device)
        memory = (ctypes.c_char * tensor.nbytes).from_address(address)
        unowned = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
        array = array_from_capsule(capsule_from_tensor(unowned), self._device)
        if len(self._arrays) >= _MOST_ADDRESSES:
            self._arrays = {}
        self._arrays[address] = array
        return array


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
    return tensor_from_capsule(capsule_from_array(array))
