"""Steps of random PyTorch programs (see `tests.torch_programs`): each gives a line for a program, or None."""

from __future__ import annotations

import torch

from tests.torch_programs import FLOATS, INTEGERS, NAMES, Line, Program, Value, steps

_EXACT_UNARY = [
    "neg",
    "abs",
    "sign",
    "floor",
    "ceil",
    "trunc",
    "round",
    "relu",
    "positive",
    "sgn",
    "isnan",
    "isinf",
    "isfinite",
    "signbit",
    "logical_not",
    "nan_to_num",
    "isneginf",
]
_SMOOTH_UNARY = [
    "exp",
    "tanh",
    "sigmoid",
    "sqrt",
    "rsqrt",
    "log1p",
    "sin",
    "cos",
    "erf",
    "reciprocal",
    "expm1",
    "log",
    "atan",
    "square",
    "log2",
    "exp2",
    "sinh",
    "asinh",
    "erfc",
    "deg2rad",
    "cosh",
    "tan",
    "acos",
]
_SMOOTH_FUNCTIONS = [
    "F.gelu",
    "F.silu",
    "F.softplus",
    "F.elu",
    "F.leaky_relu",
    "F.hardswish",
    "F.logsigmoid",
    "F.relu6",
    "F.mish",
]
_EXACT_BINARY = [
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "logical_xor",
    "copysign",
]
_ROUNDING_BINARY = ["add", "sub", "mul", "div", "true_divide", "atan2", "hypot", "rsub", "xlogy", "logaddexp"]
_INTEGER_BINARY = ["&", "|", "^", "+", "-", "*", "//", "%"]


def _has_dims(v: Value) -> bool:
    return v.tensor.ndim > 0


def _is_float(v: Value) -> bool:
    return v.is_float


def _is_number(v: Value) -> bool:
    return v.tensor.dtype != torch.bool


def _is_integer(v: Value) -> bool:
    return v.tensor.dtype in INTEGERS


def _is_exact(v: Value) -> bool:
    return v.exact


# Views -----------------------------------------------------------------------------------------


@steps("views")
def view_permute(p: Program):
    x = p.pick(_has_dims)
    return x and Line(f"{x.name}.permute({p.rng.sample(range(x.tensor.ndim), x.tensor.ndim)})", [x])


@steps("views")
def view_two_dims(p: Program):
    x = p.pick(_has_dims)
    return x and Line(f"{x.name}.{p.rng.choice(['transpose', 'swapaxes', 'movedim'])}({p.dim(x)}, {p.dim(x)})", [x])


def slice_text(p: Program, n: int) -> str:
    start = p.rng.choice(["", str(p.rng.randrange(-n, n)) if n else "0"])
    stop = p.rng.choice(["", str(p.rng.randint(-n, n + 1))])
    return f"{start}:{stop}:{p.rng.choice([1, 1, 2, 3])}"


def basic_key(p: Program, x: Value) -> str:
    """A key of slices, numbers, None and an ellipsis."""
    parts, shape = [], list(x.shape)
    for n in shape[: p.rng.randint(0, len(shape))]:
        kind = p.rng.random()
        parts.append(slice_text(p, n) if kind < 0.5 else ":" if kind < 0.7 or not n else str(p.rng.randrange(-n, n)))
        if p.rng.random() < 0.1:
            parts.append("None")
    if p.rng.random() < 0.3:
        parts.append("...")
        if shape and len([q for q in parts if q not in ("None", "...")]) < len(shape):
            parts.append(slice_text(p, shape[-1]))
    return ", ".join(parts) or "..."


@steps("views")
def view_key(p: Program):
    x = p.pick(_has_dims)
    return x and Line(f"{x.name}[{basic_key(p, x)}]", [x])


@steps("views")
def view_key_again(p: Program):
    return view_key(p)


@steps("views")
def view_narrow(p: Program):
    x = p.pick(lambda v: v.tensor.ndim > 0 and min(v.shape) > 0)
    if x is None:
        return None
    d = p.dim(x)
    start = p.rng.randrange(x.shape[d])
    choice = p.rng.random()
    if choice < 0.5:
        return Line(f"{x.name}.narrow({d}, {start}, {p.rng.randint(1, max(x.shape[d] - start, 1))})", [x])
    return Line(f"{x.name}.select({d}, {start})", [x])


@steps("views")
def view_expand(p: Program):
    x = p.pick()
    shape = [n if n != 1 else p.rng.randint(1, 3) for n in x.shape]
    shape = [p.rng.randint(1, 3)] * p.rng.randint(0, 1) + shape
    return Line(f"{x.name}.expand({shape})", [x])


@steps("views")
def view_reshape(p: Program):
    x = p.pick()
    n = x.tensor.numel()
    options = [[-1], [n, 1], [1, n], [1, *x.shape], [*x.shape, 1], *([k, n // k] for k in (2, 3, 4) if n % k == 0)]
    return Line(f"{x.name}.{p.rng.choice(['reshape', 'reshape', 'view'])}({p.rng.choice(options)})", [x])


@steps("views")
def view_squeeze(p: Program):
    x = p.pick(_has_dims)
    text = x and p.rng.choice([f"squeeze({p.dim(x)})", "squeeze()", f"unsqueeze({p.dim(x)})", "flatten()", "mT", "T"])
    return x and Line(f"{x.name}.{text}", [x])


@steps("views")
def view_parts(p: Program):
    x = p.pick(lambda v: v.tensor.ndim > 0 and v.shape[0] > 1)
    if x is None:
        return None
    d = p.rng.choice([i for i, n in enumerate(x.shape) if n > 1] or [0])
    text = p.rng.choice(
        [f"chunk(2, {d})", f"split({p.rng.randint(1, 2)}, {d})", f"tensor_split(2, {d})", f"unbind({d})"]
    )
    return Line(f"{x.name}.{text}[{p.rng.choice([0, 1, -1])}]", [x])


@steps("strided")
def view_diagonal(p: Program):
    x = p.pick(lambda v: v.tensor.ndim > 1)
    if x is None:
        return None
    a, b = p.rng.sample(range(x.tensor.ndim), 2)
    return Line(f"{x.name}.diagonal({p.rng.randint(-1, 1)}, {a}, {b})", [x])


@steps("strided")
def view_unfold(p: Program):
    x = p.pick(lambda v: v.tensor.ndim > 0 and min(v.shape) > 0)
    if x is None:
        return None
    d = p.dim(x)
    return Line(f"{x.name}.unfold({d}, {p.rng.randint(1, max(x.shape[d], 1))}, {p.rng.randint(1, 2)})", [x])


@steps("strided")
def view_as_strided(p: Program):
    x = p.pick(lambda v: v.tensor.numel() > 3)
    if x is None:
        return None
    stride = p.rng.choice([(1, 2), (2, 1), (1, 1), (0, 1)])
    offset = p.rng.randint(0, 1)
    return Line(f"{x.name}.as_strided((2, 2), {stride}, {x.tensor.storage_offset() + offset})", [x])


@steps("strided")
def trace(p: Program):
    x = p.pick(lambda v: v.tensor.ndim == 2)
    return x and Line(f"{x.name}.{p.rng.choice(['trace()', 'diag()', 'diag(1)'])}", [x], rounds=True)


# Movement --------------------------------------------------------------------------------------


@steps("movement")
def flip(p: Program):
    x = p.pick(_has_dims)
    if x is None:
        return None
    text = p.rng.choice(
        [f"flip({p.dim(x)})", f"roll({p.rng.randint(-3, 3)}, {p.dim(x)})", "roll(1)", "rot90()", "flip(0, -1)"]
    )
    return Line(f"{x.name}.{text}", [x])


@steps("movement")
def repeat(p: Program):
    x = p.pick(_has_dims)
    if x is None:
        return None
    times = [p.rng.randint(1, 2) for _ in x.shape]
    text = p.rng.choice(
        [f"repeat({times})", f"tile({times})", f"repeat_interleave(2, {p.dim(x)})", "clone()", "contiguous()"]
    )
    return Line(f"{x.name}.{text}", [x])


@steps("movement")
def join(p: Program):
    x = p.pick()
    y = p.pick(lambda v: v.tensor.ndim == x.tensor.ndim)
    choice = p.rng.choice(["cat", "stack", "hstack"])
    options = "" if choice == "hstack" else f", {p.rng.randint(-1, max(x.tensor.ndim - 1, 0))}"
    return Line(f"torch.{choice}([{x.name}, {y.name}]{options})", [x, y])


@steps("movement")
def triangle(p: Program):
    x = p.pick(lambda v: v.tensor.ndim > 1)
    return x and Line(f"{x.name}.{p.rng.choice(['tril', 'triu'])}({p.rng.randint(-1, 2)})", [x])


@steps("movement")
def pad(p: Program):
    x = p.pick(_has_dims)
    sizes = [p.rng.randint(-1, 2) for _ in range(2)]
    return x and Line(f"F.pad({x.name}, {sizes}, value={p.scalar(x)})", [x])


@steps("movement")
def cast(p: Program):
    x = p.pick(_is_exact)
    if x is None:
        return None
    dtype = p.rng.choice([*FLOATS, *INTEGERS, torch.bool])
    if x.is_float and dtype in INTEGERS:  # out of range the result is undefined in C++
        bounds, t = torch.iinfo(dtype), x.tensor.double()
        if not bool((t.isfinite() & (t > bounds.min) & (t < bounds.max)).all()):
            return None
    return Line(f"{x.name}.to({NAMES[dtype]})", [x])


@steps("movement")
def cast_float(p: Program):
    x = p.pick(_is_float)
    return x and Line(f"{x.name}.to({p.rng.choice(['f32', 'f64', 'f16', 'bf16'])})", [x])


# Elementwise -----------------------------------------------------------------------------------


@steps("elementwise")
def unary(p: Program):
    x = p.pick(_is_exact)
    return x and Line(f"torch.{p.rng.choice(_EXACT_UNARY)}({x.name})", [x], needs_exact=True, zeros=True)


@steps("elementwise")
def smooth(p: Program):
    x = p.pick(lambda v: v.is_float or v.tensor.dtype in INTEGERS)
    if x is None:
        return None
    name = p.rng.choice(
        _SMOOTH_FUNCTIONS if x.is_float and p.rng.random() < 0.3 else [f"torch.{n}" for n in _SMOOTH_UNARY]
    )
    return Line(f"{name}({x.name})", [x], rounds=True)


@steps("elementwise")
def binary_exact(p: Program):
    x = p.pick(_is_exact)
    y = x and p.partner(x, _is_exact)
    return y and Line(f"torch.{p.rng.choice(_EXACT_BINARY)}({x.name}, {y.name})", [x, y], needs_exact=True, zeros=True)


@steps("elementwise")
def binary_scalar(p: Program):
    x = p.pick(_is_exact)
    if x is None:
        return None
    op = p.rng.choice(["<", "<=", "==", "!=", ">", ">="])
    left, right = (x.name, p.scalar(x)) if p.rng.random() < 0.7 else (p.scalar(x), x.name)
    return Line(f"{left} {op} {right}", [x], needs_exact=True)


@steps("elementwise")
def binary(p: Program):
    x = p.pick()
    y = p.partner(x)
    return y and Line(f"torch.{p.rng.choice(_ROUNDING_BINARY)}({x.name}, {y.name})", [x, y], rounds=True)


@steps("elementwise")
def arithmetic_scalar(p: Program):
    x = p.pick()
    op = p.rng.choice(["+", "-", "*", "/", "**"])
    number = p.rng.choice(["2", "3", "0.5"]) if op == "**" else p.scalar(x)
    left, right = (x.name, number) if p.rng.random() < 0.7 or op == "**" else (number, x.name)
    return Line(f"{left} {op} {right}", [x], rounds=True)


@steps("elementwise")
def integers(p: Program):
    x = p.pick(lambda v: not v.is_float)
    y = x and p.partner(x, lambda v: not v.is_float)
    return y and Line(f"{x.name} {p.rng.choice(_INTEGER_BINARY)} {y.name}", [x, y])


@steps("elementwise")
def divide(p: Program):
    """Division that rounds to an integer, of integers and floats."""
    x = p.pick(_is_exact)
    if x is None:
        return None
    y = p.partner(x, lambda v: v.exact and (v.is_float or bool((v.tensor != 0).all())))
    other = y.name if y is not None and p.rng.random() < 0.6 else p.rng.choice(["2", "-3", "0.75", "7"])
    text = p.rng.choice(["torch.div({}, {}, rounding_mode='floor')", "torch.div({}, {}, rounding_mode='trunc')",
                         "torch.remainder({}, {})", "torch.fmod({}, {})", "torch.floor_divide({}, {})"])  # fmt: skip
    operands = [x] if y is None else [x, y]
    return Line(text.format(x.name, other), operands, rounds=True, needs_exact=True)


@steps("shifts")
def shift(p: Program):
    x = p.pick(_is_integer)
    return x and Line(f"{x.name} {p.rng.choice(['<<', '>>'])} {p.rng.randint(0, 6)}", [x])


@steps("elementwise")
def bitwise(p: Program):
    x = p.pick(lambda v: not v.is_float)
    text = x and p.rng.choice(
        [f"~{x.name}", f"{x.name} & {p.scalar(x)}", f"{x.name} ^ {p.scalar(x)}", f"{p.scalar(x)} | {x.name}"]
    )
    return x and Line(text, [x])


@steps("elementwise")
def where(p: Program):
    x = p.pick()
    mask = p.partner(x, lambda v: v.tensor.dtype == torch.bool)
    y = p.partner(x)
    if mask is None or y is None:
        return None
    other = y.name if p.rng.random() < 0.7 else p.scalar(x)
    text = p.rng.choice(
        [f"torch.where({mask.name}, {x.name}, {other})", f"{x.name}.masked_fill({mask.name}, {p.scalar(x)})"]
    )
    return Line(text, [mask, x, y])


@steps("elementwise")
def clamp(p: Program):
    x = p.pick(_is_exact)
    if x is None:
        return None
    low, high = sorted(p.rng.sample([-3, -1, 0, 0.5, 2], 2))
    y = p.partner(x, _is_exact)
    options = [f"clamp({low}, {high})", f"clamp(min={low})", f"clamp(max={high})"] + (
        [f"clamp(min={y.name})"] if y else []
    )
    return Line(f"{x.name}.{p.rng.choice(options)}", [x] if y is None else [x, y], needs_exact=True, zeros=True)


@steps("elementwise")
def ternary(p: Program):
    x = p.pick(_is_float)
    y = x and p.partner(x, _is_float)
    if y is None:
        return None
    text = p.rng.choice([f"torch.lerp({x.name}, {y.name}, 0.25)", f"torch.addcmul({x.name}, {y.name}, {y.name}, value=0.5)",
                         f"torch.add({x.name}, {y.name}, alpha=2)", f"torch.sub({x.name}, {y.name}, alpha=0.5)"])  # fmt: skip
    return Line(text, [x, y], rounds=True)


# Reductions ------------------------------------------------------------------------------------


def _dims(p: Program, x: Value) -> str:
    kind = p.rng.random()
    if kind < 0.2 or not x.tensor.ndim:
        return ""
    keep = p.rng.choice(["", ", keepdim=True"])
    if kind < 0.8:
        return f"dim={p.dim(x)}{keep}"
    return f"dim={sorted(p.rng.sample(range(x.tensor.ndim), p.rng.randint(1, x.tensor.ndim)))}{keep}"


@steps("reductions")
def reduce_sum(p: Program):
    x = p.pick()
    name = p.rng.choice(["sum", "mean", "std", "var", "nansum", "norm", "sum", "prod"])
    dtype = p.rng.choice(["", "", ", dtype=f32", ", dtype=f64"]) if name in ("sum", "mean", "prod") else ""
    arguments = (_dims(p, x) + dtype).removeprefix(", ")
    return Line(f"{x.name}.{name}({arguments})", [x], rounds=True)


@steps("reductions")
def reduce_exact(p: Program):
    x = p.pick(_is_exact)
    if x is None:
        return None
    name = p.rng.choice(["amax", "amin", "any", "all", "argmax", "argmin", "count_nonzero", "max", "min", "aminmax"])
    text = f"{x.name}.{name}({_dims(p, x)})"
    if name in ("max", "min") and "dim" in text:
        text += p.rng.choice([".values", ".indices"])
    return Line(f"{text}.max" if name == "aminmax" else text, [x], needs_exact=True, zeros=True)


@steps("reductions")
def running(p: Program):
    x = p.pick(_has_dims)
    if x is None:
        return None
    name = p.rng.choice(["cumsum", "cumprod", "cumsum"])
    return Line(f"{x.name}.{name}({p.dim(x)})", [x], rounds=True)


@steps("reductions")
def running_exact(p: Program):
    x = p.pick(lambda v: v.exact and v.tensor.ndim > 0)
    return x and Line(
        f"{x.name}.{p.rng.choice(['cummax', 'cummin'])}({p.dim(x)}).{p.rng.choice(['values', 'indices'])}",
        [x],
        needs_exact=True,
    )


@steps("reductions")
def normalized(p: Program):
    x = p.pick(lambda v: v.is_float and v.tensor.ndim > 0)
    if x is None:
        return None
    name = p.rng.choice(["softmax", "log_softmax", "logsumexp", "logcumsumexp"])
    return Line(f"{x.name}.{name}({p.dim(x)})", [x], rounds=True)


@steps("reductions")
def order(p: Program):
    x = p.pick(lambda v: v.exact and v.tensor.ndim > 0 and min(v.shape) > 0)
    if x is None:
        return None
    d = p.dim(x)
    k = p.rng.randint(1, x.shape[d])
    text = p.rng.choice([
        f"sort({d}, stable=True).{p.rng.choice(['values', 'indices'])}", f"argsort({d}, stable=True, descending=True)",
        f"sort({d}, descending={p.rng.choice([True, False])}).values", f"topk({k}, {d}).values",
        f"topk({k}, {d}, largest=False).values", f"median({d}).values", f"kthvalue({k}, {d}).values", "median()",
        f"nanmedian({d}).values",
    ])  # fmt: skip
    if p.differentiable:  # which of equal values gets the gradient of the others PyTorch does not define
        text = f"sort({d}, stable=True).values"
    return Line(f"{x.name}.{text}", [x], needs_exact=True, zeros=True)


@steps("reductions")
def product(p: Program):
    x = p.pick(lambda v: v.is_float and v.tensor.ndim > 1)
    y = x and p.pick(lambda v: v.tensor.dtype == x.tensor.dtype and v.tensor.ndim > 1)
    return y and Line(
        p.rng.choice([f"{x.name} @ {y.name}", f"{x.name} @ {y.name}.mT", f"{x.name}.mT @ {y.name}"]),
        [x, y],
        rounds=True,
    )
