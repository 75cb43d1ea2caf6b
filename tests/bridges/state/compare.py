"""What the state fuzz observes of a call, and how two observations are compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tests.bridges.state.models import WIDTH, Kind, Pair
from tests.bridges.state.registry import Environment, Plan, Side, dtype_of


@dataclasses.dataclass
class Arguments:
    """The arguments of a call, and the tensors whose memory they lie in."""

    args: tuple
    kwargs: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def arguments(kind: Kind, side: Side, plan: Plan, seed: int) -> Arguments:
    """Make the arguments of a plan for one side; its own buffers and parameters may be among them."""
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype_of(side.model)
    shape = kind.shape(plan.batch, plan.length)
    draw = _Draw(generator, dtype)
    if kind.takes_tokens:
        x = base = torch.randint(0, 11, shape[:2], generator=generator)
    else:
        x, base = _laid_out(draw, plan, shape)
    y = _companion(draw, side, plan, x, base, shape)
    if plan.input_grad and x.is_floating_point() and x.is_leaf and not x.is_inference():
        x.requires_grad_()
    tensors = {"x": x, "base": base}
    kwargs: dict[str, Any] = {"factor": plan.factor}
    if y is not None:
        kwargs["y"] = tensors["y"] = y
    if plan.nested:
        weights = [draw(shape[-1]) + 1, {"shift": 0.5}]
        kwargs["nested"] = {"weights": weights, "pair": Pair(draw(1), None)}
    if plan.keywords:
        return Arguments((x,), dict(reversed(kwargs.items())), tensors)
    args = (x, kwargs.pop("y", None), kwargs.pop("factor"))
    return Arguments(args, kwargs, tensors)


@dataclasses.dataclass
class _Draw:
    generator: torch.Generator
    dtype: torch.dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator).to(self.dtype)


def _laid_out(draw: _Draw, plan: Plan, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tensor of a layout, and the tensor whose memory it is part of."""
    if plan.companion == "overlap":
        base = draw(shape[0] + 1, *shape[1:])
        return base[:-1], base
    if plan.layout == "sliced":
        base = draw(2 * shape[0], *shape[1:])
        return base[::2], base
    if plan.layout == "transposed":
        base = draw(*reversed(shape))
        return base.permute(*reversed(range(len(shape)))), base
    if plan.layout == "expanded":
        base = draw(1, *shape[1:])
        return base.expand(shape), base
    if plan.layout == "offset":
        base = draw(torch.Size(shape).numel() + 3)
        return base[3:].view(shape), base
    if plan.layout == "inference":
        with torch.inference_mode():
            base = draw(*shape).clone()
        return base, base
    base = draw(*shape)
    if plan.layout == "parameter":
        base = torch.nn.Parameter(base)
    return base, base


def _companion(draw: _Draw, side: Side, plan: Plan, x, base, shape) -> torch.Tensor | None:
    kind = plan.companion
    if kind in ("same", "view", "overlap") and not x.is_floating_point():
        kind = "other"
    if kind == "other":
        return draw(*shape)
    if kind == "same":
        return x
    if kind == "view":
        return x.detach()[:]
    if kind == "overlap":
        return base[1:]
    if kind == "buffer":
        return side.model.memory
    if kind == "gate":
        return side.model.gate
    if kind == "broadcast":
        return draw(shape[-1] if shape[-1] != 1 else WIDTH)
    return None


# Observing -------------------------------------------------------------------------------------


def leaves(value: Any, path: str = "output") -> list[tuple[str, Any]]:
    """Flatten nested outputs of any type into paths and leaves, with the containers' types."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = list(vars(value).items())
    else:
        return [(path, value)]
    flat: list[tuple[str, Any]] = [(f"{path} type", type(value).__name__)]
    for key, item in items:
        flat += leaves(item, f"{path}[{key!r}]")
    return flat


def observe(side: Side, call: Arguments, result: Any, environment: Environment) -> dict[str, Any]:
    """Return all that eager PyTorch's user can see after a call: what its tensors hold, alias, and carry."""
    seen: dict[str, Any] = {}
    state = {**dict(side.model.named_parameters(remove_duplicate=False)),
             **dict(side.model.named_buffers(remove_duplicate=False))}  # fmt: skip
    sources = {**call.tensors, **state}
    outputs = leaves(result)
    for path, leaf in outputs:
        seen[path] = leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
        if isinstance(leaf, torch.Tensor):
            seen[f"{path} properties"] = _properties(leaf)
            seen[f"{path} aliases"] = _aliases(leaf, sources, [t for t in outputs if t[0] != path])
    backward(outputs, environment)
    for name, tensor in {**call.tensors, **state}.items():
        seen[f"tensor {name}"] = tensor.detach().clone()
        seen[f"tensor {name} properties"] = _properties(tensor)
        if tensor.is_leaf:
            seen[f"gradient {name}"] = None if tensor.grad is None else tensor.grad.clone()
    seen["modes"] = [(name, m.training) for name, m in side.model.named_modules()]
    for number, record in enumerate(side.log):
        seen |= dict(leaves(record, f"record {number}"))
    for name in ("calls", "positions", "history", "last"):
        if name in vars(side.model):
            seen |= dict(leaves(vars(side.model)[name], name))
    return seen


def backward(outputs: list[tuple[str, Any]], environment: Environment) -> None:
    """Run the backward pass from all outputs that have a gradient, weighted by seed."""
    if not environment.grad or environment.inference:
        return
    generator = torch.Generator().manual_seed(7)
    with torch.enable_grad():
        losses = [
            (t.double() * torch.randn(t.shape, dtype=torch.float64, generator=generator)).sum()
            for _, t in outputs
            if isinstance(t, torch.Tensor) and t.requires_grad
        ]
        if losses:
            torch.stack(losses).sum().backward()


def _properties(tensor: torch.Tensor) -> tuple:
    strides = tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1) if tensor.numel() else ()
    return (type(tensor).__name__, tensor.dtype, tuple(tensor.shape), strides, tensor.requires_grad,
            tensor.is_leaf, tensor.is_inference())  # fmt: skip


def _aliases(tensor: torch.Tensor, sources: dict[str, torch.Tensor], others: list[tuple[str, Any]]) -> list[str]:
    """Return the names of what an output is, and of what it shares memory with."""
    if not tensor.numel():
        return []
    pointer = tensor.untyped_storage().data_ptr()
    named = [*sources.items(), *((p, t) for p, t in others if isinstance(t, torch.Tensor))]
    shared = [name for name, t in named if t.numel() and t.untyped_storage().data_ptr() == pointer]
    return sorted([*(f"is {name}" for name, t in named if t is tensor), *shared])


# Comparing -------------------------------------------------------------------------------------

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def difference(observed: dict[str, Any], want: dict[str, Any], environment: Environment, model: Any) -> str | None:
    """Return the first difference between what was observed of kpx and of eager PyTorch, in words; None if equal."""
    if observed.keys() != want.keys():
        return f"missing {sorted(want.keys() - observed.keys())}, unexpected {sorted(observed.keys() - want.keys())}"
    loosest = max(_TOLERANCES[t.dtype] for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    if environment.autocast is not None:
        loosest = max(loosest, _TOLERANCES[torch.bfloat16])
    for path, wanted in want.items():
        got = observed[path]
        if isinstance(wanted, torch.Tensor):
            text = _difference_of_tensors(got, wanted, loosest, _random_share(path, model))
        else:
            text = None if got == wanted else f"{got!r}, eager {wanted!r}"
        if text:
            return f"{path}: {text}"
    return None


def _random_share(path: str, model: Any) -> float | None:
    """Return the share of elements that a model drops at random in an output, if it does."""
    drop = getattr(model, "drop", None)
    if drop is None or "dropped" not in path or not drop.training or drop.p in (0.0, 1.0):
        return None
    return drop.p


def _difference_of_tensors(got: Any, wanted: torch.Tensor, tolerance: float, dropped: float | None) -> str | None:
    if type(got) is not type(wanted) or got.dtype != wanted.dtype or got.shape != wanted.shape:
        return f"{type(got).__name__} {getattr(got, 'dtype', got)} {tuple(getattr(got, 'shape', ()))}, eager {type(wanted).__name__} {wanted.dtype} {tuple(wanted.shape)}"
    if not wanted.numel():
        return None
    if dropped is not None:
        return _difference_of_dropout(got, dropped)
    if not wanted.is_floating_point():
        return None if torch.equal(got, wanted) else f"{got.flatten()[:6]}, eager {wanted.flatten()[:6]}"
    got, wanted = got.double(), wanted.double()
    finite = wanted.isfinite()
    if not torch.equal(got.isnan(), wanted.isnan()) or not torch.equal(got.isfinite(), finite):
        return f"other elements are finite: {got.flatten()[:6]}, eager {wanted.flatten()[:6]}"
    gap = (got - wanted)[finite].abs().max().item() if finite.any() else 0.0
    size = max(0.1, wanted[finite].abs().max().item()) if finite.any() else 1.0
    tolerance = max(tolerance, 1e-6)
    return (
        None
        if gap <= tolerance * size
        else f"differs by {gap:.3g} of {size:.3g}: {got.flatten()[:4].tolist()}, eager {wanted.flatten()[:4].tolist()}"
    )


def _difference_of_dropout(got: torch.Tensor, p: float) -> str | None:
    """Compare a dropped tensor of ones with what dropout's definition says: how many are zero, what the others are."""
    values, share = got.double(), (got == 0).double().mean().item()
    rest = values[values != 0]
    if rest.numel() and not torch.allclose(rest, torch.full_like(rest, 1 / (1 - p)), rtol=1e-2):
        return f"kept elements are {rest[:4].tolist()}, eager {1 / (1 - p)}"
    bound = 6 * (p * (1 - p) / got.numel()) ** 0.5
    return None if abs(share - p) <= bound else f"{share:.3f} of the elements are dropped, eager {p}"
