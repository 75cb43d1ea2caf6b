"""Steps of random PyTorch programs that index, and that write in place (see `tests.torch_programs`)."""

from __future__ import annotations

import torch

from tests.torch_programs import Line, Program, Value, steps
from tests.torch_steps import basic_key, slice_text

# Indexing --------------------------------------------------------------------------------------


def _advanced_key(p: Program, x: Value, *, distinct: bool = False) -> tuple[str, list[Value]] | None:
    """A key of index tensors, slices, numbers and None; `distinct`: no place is named twice."""
    parts: list[str] = []
    operands: list[Value] = []
    if not x.tensor.ndim or not min(x.shape):
        return None
    count = p.rng.randint(1, 3)
    shapes = [[count], [1], [2, count]] if not distinct else [[count]]
    tensors = p.rng.randint(1, 1 if distinct else 2)
    places = set(p.rng.sample(range(x.tensor.ndim), min(tensors, x.tensor.ndim)))
    for d, n in enumerate(x.shape):
        if d in places:
            i = p.distinct(min(count, n), n) if distinct else p.index(p.rng.choice(shapes), n)
            if i is None:
                return None
            operands.append(i)
            parts.append(i.name)
        else:
            parts.append(p.rng.choice([":", ":", slice_text(p, n), str(p.rng.randrange(n))]))
        if p.rng.random() < 0.1:
            parts.append("None")
    while parts and parts[-1] == ":":
        parts.pop()
    return ", ".join(parts), operands


@steps("indexing")
def take_key(p: Program):
    x = p.pick()
    key = _advanced_key(p, x)
    return key and Line(f"{x.name}[{key[0]}]", [x, *key[1]])


@steps("mask reads")
def take_mask(p: Program):
    x = p.pick()
    mask = p.partner(x, lambda v: v.tensor.dtype == torch.bool and v.shape == x.shape[: v.tensor.ndim])
    return mask and Line(f"{x.name}[{mask.name}]", [x, mask])


@steps("indexing")
def take_along(p: Program):
    x = p.pick(lambda v: v.tensor.ndim > 0 and min(v.shape) > 0)
    if x is None:
        return None
    d = p.dim(x)
    kind = p.rng.choice(["index_select", "gather", "take_along_dim", "take"])
    shape = list(x.shape)
    shape[d] = p.rng.randint(1, 4)
    if kind == "take":
        i = p.index([2, 3], x.tensor.numel())
        return i and Line(f"{x.name}.take({i.name})", [x, i])
    i = p.index([shape[d]] if kind == "index_select" else shape, x.shape[d], negative=False)
    arguments = f"{i.name}, {d}" if i and kind == "take_along_dim" else f"{d}, {i.name}" if i else ""
    return i and Line(f"{x.name}.{kind}({arguments})", [x, i])


# Writes ----------------------------------------------------------------------------------------


def _target(p: Program) -> Value:
    """What is written: views more often than what stands alone."""
    views = [v for v in p.values if v.tensor._is_view() and v.tensor.numel()]
    some = p.rng.choice(views) if views and p.rng.random() < 0.6 else p.pick(lambda v: v.tensor.numel() > 0)
    return some or p.values[0]


@steps("writes")
def write_with(p: Program):
    x = _target(p)
    y = p.partner(x)
    if y is None:
        return None
    name = p.rng.choice(["add_", "sub_", "mul_", "copy_", "copy_", "div_"])
    return Line(f"{x.name}.{name}({y.name})", [x, y], 0, rounds=name != "copy_", writes=x) if _holds(x, y) else None


def _holds(x: Value, y: Value) -> bool:
    """Return whether copying a value into another is defined: no NaN, inf or large float becomes an integer."""
    if x.is_float or not y.is_float or x.tensor.dtype == torch.bool:
        return True
    t, bounds = y.tensor.double(), torch.iinfo(x.tensor.dtype)
    return y.exact and bool((t.isfinite() & (t > bounds.min) & (t < bounds.max)).all())


@steps("writes")
def write_number(p: Program):
    x = _target(p)
    name = p.rng.choice(["fill_", "add_", "mul_", "fill_"])
    return Line(f"{x.name}.{name}({p.scalar(x)})", [x], 0, rounds=name != "fill_", writes=x)


@steps("writes")
def write_itself(p: Program):
    x = _target(p)
    name = p.rng.choice(
        ["zero_", "neg_", "abs_", "relu_", "logical_not_", "clamp_(0, 1)", "clamp_(min=-1)", "bitwise_not_", "floor_"]
    )
    text = name if "(" in name else f"{name}()"
    return Line(f"{x.name}.{text}", [x], 0, needs_exact=True, writes=x, zeros=True)


@steps("writes")
def write_smooth(p: Program):
    x = _target(p)
    return Line(
        f"{x.name}.{p.rng.choice(['exp_', 'tanh_', 'sigmoid_', 'sqrt_', 'sin_'])}()", [x], 0, rounds=True, writes=x
    )


@steps("writes")
def write_masked(p: Program):
    x = _target(p)
    mask = p.partner(x, lambda v: v.tensor.dtype == torch.bool)
    if mask is None:
        return None
    text = p.rng.choice(
        [f"{x.name}.masked_fill_({mask.name}, {p.scalar(x)})", f"{x.name}[{mask.name}] = {p.scalar(x)}"]
    )
    return Line(text, [x, mask], 0, writes=x)


@steps("writes")
def write_key(p: Program):
    x = _target(p)
    key = basic_key(p, x)
    try:
        part = Value("", eval(f"x[{key}]", {"x": x.tensor}))
    except (IndexError, ValueError):
        return None
    y = p.partner(part)
    if y is None or not _holds(x, y):
        return None
    if p.rng.random() < 0.3:
        return Line(f"{x.name}[{key}] = {p.scalar(x)}", [x], 0, writes=x)
    how = p.rng.choice(["=", "=", "+=", "*="])
    return Line(f"{x.name}[{key}] {how} {y.name}", [x, y], 0, rounds=how != "=", writes=x)


@steps("writes")
def write_advanced(p: Program):
    x = _target(p)
    adds = p.rng.random() < 0.3
    key = _advanced_key(p, x, distinct=not adds)
    if key is None:
        return None
    try:
        part = Value("", eval(f"x[{key[0]}]", {"x": x.tensor, **{v.name: v.tensor for v in key[1]}}))
    except (IndexError, ValueError):
        return None
    y = p.partner(part, lambda v: not adds or v.tensor.dtype == x.tensor.dtype)
    if y is None or not _holds(x, y):
        return None
    if adds:
        if any(c in key[0] for c in ":N") or "-" in key[0] or any(q.strip().isdigit() for q in key[0].split(",")):
            return None
        return Line(
            f"{x.name}.index_put_(({key[0]},), {y.name}, accumulate=True)", [x, *key[1], y], 0, rounds=True, writes=x
        )
    return Line(f"{x.name}[{key[0]}] = {y.name}", [x, *key[1], y], 0, writes=x)


@steps("writes")
def write_along(p: Program):
    """`index_*_` along a dimension."""
    x = _target(p)
    if not x.tensor.ndim:
        return None
    d, n = p.dim(x), p.rng.randint(1, 3)
    kind = p.rng.choice(["index_add_", "index_copy_", "index_fill_"])
    i = p.index([n], x.shape[d], negative=False) if kind == "index_add_" else p.distinct(min(n, x.shape[d]), x.shape[d])
    if i is None:
        return None
    if kind == "index_fill_":
        return Line(f"{x.name}.index_fill_({d}, {i.name}, {p.scalar(x)})", [x, i], 0, writes=x)
    shape = list(x.shape)
    shape[d] = len(i.tensor)
    y = p.add_input(p.numbers(shape, x.tensor.dtype)) if p.has_room() else None
    return y and Line(f"{x.name}.{kind}({d}, {i.name}, {y.name})", [x, i, y], 0, rounds=kind == "index_add_", writes=x)


@steps("writes")
def write_scatter(p: Program):
    x = _target(p)
    if not x.tensor.ndim or not p.has_room():
        return None
    d = p.dim(x)
    kind = p.rng.choice(["scatter_", "scatter_add_", "scatter_number", "scatter_reduce_"])
    distinct = kind in ("scatter_", "scatter_number")
    shape = list(x.shape)
    shape[d] = p.rng.randint(1, x.shape[d])
    drawn = torch.rand(x.shape, generator=p._numbers).argsort(d).narrow(d, 0, shape[d]).contiguous()
    i = p.add_input(drawn) if distinct else p.index(shape, x.shape[d], negative=False)
    if kind == "scatter_number":
        return Line(f"{x.name}.scatter_({d}, {i.name}, {p.scalar(x)})", [x, i], 0, writes=x)
    y = p.add_input(p.numbers(shape, x.tensor.dtype))
    how = f", '{p.rng.choice(['sum', 'prod', 'amax', 'amin', 'mean'])}'" if kind == "scatter_reduce_" else ""
    return Line(f"{x.name}.{kind}({d}, {i.name}, {y.name}{how})", [x, i, y], 0, rounds=not distinct, writes=x)
