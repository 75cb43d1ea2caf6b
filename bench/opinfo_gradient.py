"""Gradients of an op of PyTorch's op database: kpx's backward graph against PyTorch's autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bench.opinfo_check import disagreement, in_double, is_random, tensors_of
from kpx.bridges.torch.dynamo import differentiable


def _leaves(sample: Any) -> list[torch.Tensor]:
    found = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    return [x for x in found if isinstance(x, torch.Tensor)]


def _differentiable(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t for t in tensors if t.requires_grad]


def _apply(op: Any, sample: Any) -> list[torch.Tensor]:
    result = op(sample.input, *sample.args, **sample.kwargs)
    return tensors_of(sample.output_process_fn_grad(result))


def _cotangents(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for out in outputs:
        real = out.real.dtype if out.is_complex() else out.dtype
        shape = (*out.shape, 2) if out.is_complex() else tuple(out.shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(real)
        drawn.append(torch.view_as_complex(noise) if out.is_complex() else noise)
    return drawn


def _gradients(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    outputs = _differentiable(outputs)
    found = torch.autograd.grad(outputs, inputs, _cotangents(outputs), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _gradients_of_each(samples: Sequence[Any], results: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Each sample's gradients, by one backward pass: it is one graph's, which frees what it saved."""
    inputs = [_differentiable(_leaves(s)) for s in samples]
    outputs, cotangents = [], []
    for result in results:
        own = _differentiable(result)
        outputs += own
        cotangents += _cotangents(own)
    every = [x for own in inputs for x in own]
    left = iter(torch.autograd.grad(outputs, every, cotangents, allow_unused=True))
    return [[torch.zeros_like(x) if (g := next(left)) is None else g for x in own] for own in inputs]


def _reference(op: Any, sample: Any, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients in double precision, or PyTorch's own where it has none."""
    wide = in_double(sample).transform(
        lambda x: (
            x.requires_grad_() if isinstance(x, torch.Tensor) and x.dtype in (torch.float64, torch.complex128) else x
        )
    )
    inputs = [w for w, x in zip(_leaves(wide), _leaves(sample), strict=True) if x.requires_grad]
    try:
        return _gradients(_apply(op, wide), inputs)
    except (RuntimeError, TypeError, ValueError):
        return wanted


def gradient_of_chunk(op: Any, name: str, samples: list[Any]) -> list[str | None]:
    """What is wrong with each sample's gradients, or None."""
    # The gradient of a draw is that draw's own: tests of dropout cover it.
    samples = [s for s in samples if not is_random(op, name, s)]
    samples = [s for s in samples if _differentiable(_leaves(s)) and _has_gradient(op, s)]
    samples = _with_inputs_of_their_own(samples)
    if not samples:
        return []
    positions, tensors = [], []
    for sample in samples:
        mine = _leaves(sample)
        positions.append(range(len(tensors), len(tensors) + len(mine)))
        tensors += mine

    def every(*given):
        results = []
        for sample, at in zip(samples, positions, strict=True):
            replaced = dict(zip(map(id, _leaves(sample)), (given[i] for i in at), strict=True))
            results.append(_apply(op, sample.transform(lambda x, r=replaced: r.get(id(x), x))))
        return results

    got = differentiable(every)(*tensors)
    found = []
    for sample, ours in zip(samples, _gradients_of_each(samples, got), strict=True):
        inputs = _differentiable(_leaves(sample))
        wanted = _gradients(_apply(op, sample), inputs)
        exact = _reference(op, sample, wanted)
        reasons = (disagreement(g, w, e) for g, w, e in zip(ours, wanted, exact, strict=True))
        found.append(next((f"gradient: {r}" for r in reasons if r), None))
    return found


def _with_inputs_of_their_own(samples: Sequence[Any]) -> list[Any]:
    """Return samples that share no tensor with each other, whose gradients one backward pass would add up."""
    seen: set[int] = set()
    apart = []
    for sample in samples:
        if any(id(x) in seen for x in _leaves(sample)):
            copies: dict[int, torch.Tensor] = {}

            def copied(x: Any, copies: dict[int, torch.Tensor] = copies) -> Any:
                if not isinstance(x, torch.Tensor):
                    return x
                return copies.setdefault(id(x), x.detach().clone().requires_grad_(x.requires_grad))

            sample = sample.transform(copied)
        seen |= {id(x) for x in _leaves(sample)}
        apart.append(sample)
    return apart


def _has_gradient(op: Any, sample: Any) -> bool:
    """Whether PyTorch itself can differentiate the op here."""
    try:
        outputs = _differentiable(_apply(op, sample))
        if outputs:
            _gradients(outputs, _differentiable(_leaves(sample)))
        return bool(outputs)
    except RuntimeError:  # "derivative for ... is not implemented", and its kin
        return False
