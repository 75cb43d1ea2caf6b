"""A PyTorch model as `kpx.validate` looks at it: outputs and gradients, in its own numbers and in f64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from kpx.bridges.torch.ahead import example
from kpx.bridges.torch.module import OptimizedModule
from kpx.config import Config


class TorchReference:
    """See `kpx.observe.validate.Reference`."""

    def __init__(self, model: torch.nn.Module, inputs: Sequence[Any]):
        self._model, self.inputs = model, tuple(map(example, inputs))

    def values(self, call: Callable, inputs: Sequence[Any]) -> dict[str, tuple[str, np.ndarray]]:
        """The outputs of a call."""
        torch.manual_seed(0)
        with torch.no_grad():
            return _named(call(*inputs))

    def reference(self) -> Callable:
        """The model itself."""
        return self._model

    def wide(self) -> tuple[Callable, tuple]:
        """The model in f64, and the inputs."""
        model = copy.deepcopy(self._model).double()
        return model, tuple(pytree.tree_map_only(torch.Tensor, _widened, self.inputs))

    def gradients(self, call: Callable, inputs: Sequence[Any]) -> dict[str, tuple[str, np.ndarray]] | None:
        """The gradients of weighed outputs by the inputs and parameters of a call; None where it computes none."""
        given = pytree.tree_map_only(torch.Tensor, _leaf, tuple(inputs))
        parameters = dict(call.named_parameters()) if isinstance(call, torch.nn.Module) else {}
        before = {name: p.grad for name, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        torch.manual_seed(0)
        try:
            outputs = [t for t in pytree.tree_leaves(call(*given)) if isinstance(t, torch.Tensor) and t.requires_grad]
            if not outputs:
                return None
            total = sum((t.double() * _weights(t)).sum() for t in outputs)
            assert isinstance(total, torch.Tensor)
            total.backward()
            leaves = [t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor) and t.grad is not None]
            found = {f"gradient by input {i}": _array(t.grad) for i, t in enumerate(leaves)}
            return found | {
                f"gradient by {name.removeprefix('_model.')}": _array(p.grad)
                for name, p in parameters.items()
                if p.grad is not None
            }
        finally:
            for name, p in parameters.items():
                p.grad = before[name]

    def optimized(self, config: Config, *, gradients: bool) -> Callable:
        """The model, optimized anew."""
        import kpx

        return kpx.optimize(self._model, config=config)

    def planted(self, number: float) -> list[tuple[str, tuple]]:
        """The inputs with one number changed in each floating one, and what it is called."""
        found = []
        for i, tensor in enumerate(self.inputs):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                changed = tensor.detach().clone()
                changed.view(-1)[tensor.numel() // 2] = number
                found.append((f"input {i}", (*self.inputs[:i], changed, *self.inputs[i + 1 :])))
        return found


def is_trainable(candidate: Any) -> bool:
    """Return whether an optimized model computes gradients."""
    return isinstance(candidate, OptimizedModule)


def _named(outputs: Any) -> dict[str, tuple[str, np.ndarray]]:
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    return {f"output {i}": _array(t) for i, t in enumerate(tensors)}


def _array(tensor: torch.Tensor | None) -> tuple[str, np.ndarray]:
    assert tensor is not None
    dtype = str(tensor.dtype).removeprefix("torch.")
    wide = tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
    return dtype, wide.numpy().copy()


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().clone()
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def _weights(tensor: torch.Tensor) -> torch.Tensor:
    return torch.sin(torch.arange(tensor.numel(), dtype=torch.float64)).reshape(tensor.shape)
