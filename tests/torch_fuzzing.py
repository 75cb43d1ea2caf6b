"""Comparison of random PyTorch programs with eager PyTorch, and their reduction to few lines."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kpx
from kpx.errors import CaptureError, UnsupportedError
from tests import torch_steps, torch_writes  # noqa: F401  (they register the steps)
from tests.torch_programs import Program, as_module, source

CONFIG = kpx.Config(measure_seconds=0)
_ULPS = 64  # of the largest value: how far two ways of rounding a dozen steps may lie apart
# Rows of the documentation's table of differences, `docs/differences.md`: cases as it names them.
CHOSEN_ZERO = "The sign of a zero from `relu`, `maximum`, `minimum`, `clamp`"
SUMMED_ZERO = "The sum of negative zeros"  # XLA also takes x + 0.0 for x
PLANNED_STRIDES = "Strides of a result where PyTorch's FakeTensor has others than its kernels"


@dataclass
class Case:
    """A program as it is compared: what is left of it, and how it is run.

    Attributes:
        door: "optimize", "compile" (`torch.compile`) or "gradient" (the same, with gradients of inputs).
        lines, returned: the body and the names of what it gives.
    """

    program: Program
    door: str
    lines: list[str]
    returned: list[str]

    @property
    def source(self) -> str:
        return source(self.lines, self.returned, len(self.program.inputs))


@dataclass
class Outcome:
    """How a program compared.

    Attributes:
        kind: "right"; "explained", where all that differs is in the documentation's table; "refused", "wrong", "crashed";
            "unstable", where another run of the same program was right; "invalid", where PyTorch cannot run it itself.
        what: the differences, the refusal, or the rows of the table.
    """

    kind: str
    what: list[str] = field(default_factory=list)

    @property
    def is_reason_to_look(self) -> bool:
        return self.kind in ("wrong", "refused", "crashed", "unstable")


def door_of(seed: int) -> str:
    """Return the door that a seed's program goes through: one in five `torch.compile`, one in ten with gradients."""
    return {1: "gradient", 3: "compile", 8: "compile"}.get(seed % 10, "optimize")


def case_of(seed: int, without: Collection[str] = (), door: str | None = None) -> Case:
    """Return a seed's program, as it is to be compared."""
    door = door or door_of(seed)
    program = Program(seed, differentiable=door == "gradient", without=without)
    case = Case(program, door, program.all_lines, program.returned)
    return _without_writes_of_saved(case) if door == "gradient" else case


def _without_writes_of_saved(case: Case) -> Case:
    """A program less its last writes, up to where eager PyTorch gives gradients: what they need may not be written."""
    writes = [i for i, line in enumerate(case.lines) if not re.match(r"\w+ = ", line)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in reversed(writes):
            try:
                _run(case, lambda module: module)
                break
            except RuntimeError:
                case.lines = case.lines[:i] + case.lines[i + 1 :]
    return case


def check(seed: int, without: Collection[str] = (), door: str | None = None) -> Outcome:
    """Compare a seed's program with eager PyTorch."""
    return run(case_of(seed, without, door))


# Running ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A difference from eager PyTorch, and the row of the documentation's table that explains it, or None."""

    text: str
    row: str | None = None


@dataclass
class _Results:
    outputs: list[torch.Tensor]
    inputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None]


def run(case: Case) -> Outcome:
    """Compare a program with eager PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wanted = _run(case, lambda module: module)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
            NameError,
            NotImplementedError,
            ZeroDivisionError,
        ) as error:
            return Outcome("invalid", [str(error)])
        torch._dynamo.reset()
        try:
            got = _run(case, functools.partial(_optimized, door=case.door))
        except Exception as error:  # whatever is raised is a difference, or a refusal
            return _raised(case, error)
        reference = functools.cache(lambda: _in_f64(case))
        differences = _differences(case, got, wanted, reference)
        wrong = [d for d in differences if d.row is None]
        if not wrong:
            return Outcome("explained" if differences else "right", sorted({d.row for d in differences if d.row}))
        return _judged(case, wrong, wanted, reference)


def _judged(case: Case, wrong: list[Difference], wanted: _Results, reference: Callable[[], _Results | None]) -> Outcome:
    """The outcome of a program that differs: PyTorch's own capture may differ too, or another run may not."""
    what = [d.text for d in wrong]
    own = _pytorchs_own(case)
    if own is not None and _places(wrong) <= _places(_differences(case, own, wanted, reference)):
        return Outcome("invalid", [f"PyTorch's own, with aot_eager too: {what[0]}"])
    torch._dynamo.reset()
    again = _differences(case, _run(case, functools.partial(_optimized, door=case.door)), wanted, reference)
    return Outcome("wrong" if any(d.row is None for d in again) else "unstable", what)


def _places(differences: Sequence[Difference]) -> set[str]:
    return {difference.text.partition(":")[0] for difference in differences}


def _raised(case: Case, error: Exception) -> Outcome:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (UnsupportedError, CaptureError)):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return Outcome("refused", [_first_lines(cause)])
    if _pytorchs_own(case) is None:
        return Outcome("invalid", [f"PyTorch's own, with aot_eager too: {_first_lines(error)}"])
    return Outcome("crashed", [_first_lines(error)])


def _pytorchs_own(case: Case) -> _Results | None:
    """The results by PyTorch's own capture, functionalization and derivatives, run in eager; None where those fail."""
    torch._dynamo.reset()
    try:
        return _run(case, lambda module: torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False))
    except Exception:  # of many types: what matters is that PyTorch cannot
        return None


def _in_f64(case: Case) -> _Results | None:
    """The results in f64; None where a program is written for the dtypes that it has."""
    try:
        return _run(case, lambda module: module, wide=True)
    except RuntimeError:
        return None


def _planned(case: Case, name: str) -> torch.Tensor | None:
    """One result as a fake tensor, from which `torch.compile` plans; None where PyTorch cannot tell its shape."""
    needed, lines = {name}, []
    for line in reversed(case.lines):
        defined = re.match(r"(v\d+) = ", line)
        names = set(re.findall(r"\bv\d+\b", line))
        if defined[1] in needed if defined else names & needed:
            lines.insert(0, line)
            needed |= names
    mode = FakeTensorMode()

    def fake(module: torch.nn.Module) -> Callable:
        def call(*inputs):
            with mode:
                return module(*map(mode.from_tensor, inputs))

        return call

    try:
        return _run(Case(case.program, "optimize", lines, [name]), fake).outputs[0]
    except Exception:  # of many types: values that shapes depend on, gradients with real cotangents
        return None


def _first_lines(error: BaseException) -> str:
    return f"{type(error).__name__}: " + " | ".join(line.strip() for line in str(error).splitlines()[:3])[:400]


def _optimized(module: torch.nn.Module, door: str) -> Callable:
    if door == "optimize":
        return kpx.optimize(module, config=CONFIG)
    return torch.compile(module, backend="kpx", fullgraph=True, dynamic=False, options={"config": CONFIG})


def _run(case: Case, wrap: Callable, wide: bool = False) -> _Results:
    inputs = case.program.make_inputs(wide)
    leaves = [inputs[i] for i in case.program.leaves()]
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = list(wrap(as_module(case.source, wide))(*inputs))
    gradients: list[torch.Tensor | None] = []
    if leaves:
        generator = torch.Generator().manual_seed(0)
        pairs = [(o, torch.randint(-8, 9, o.shape, generator=generator) / 4) for o in outputs]
        pairs = [(o, c.to(o.dtype)) for o, c in pairs if o.requires_grad]
        if pairs:
            given, cotangents = map(list, zip(*pairs, strict=True))
            gradients = list(torch.autograd.grad(given, leaves, cotangents, allow_unused=True))
    return _Results([o.detach() for o in outputs], [i.detach() for i in inputs], gradients)


# Comparing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    """What is asked of a value: its relative error, 0 for bit for bit, and whether its zeros have no defined sign."""

    error: float
    unsigned: bool
    reference: Callable[[], Any]


def _differences(
    case: Case, got: _Results, wanted: _Results, reference: Callable[[], _Results | None]
) -> list[Difference]:
    errors, unsigned = case.program.errors(), case.program.unsigned()
    found: list[Difference] = []
    for i, name in enumerate(case.returned):
        pair = got.outputs[i], wanted.outputs[i]
        limits = _Limits(errors.get(name, 0.0), name in unsigned, lambda i=i: (r := reference()) and r.outputs[i])
        found += _difference(f"output {name}", *pair, limits)
        if difference := _stride_difference(*pair):
            planned = _planned(case, name)
            is_planned = planned is not None and _stride_difference(pair[0], planned) is None
            found.append(Difference(f"output {name}: {difference}", PLANNED_STRIDES if is_planned else None))
    for i, (g, w) in enumerate(zip(got.inputs, wanted.inputs, strict=True)):
        limits = _Limits(errors.get(f"a{i}", 0.0), f"a{i}" in unsigned, lambda i=i: (r := reference()) and r.inputs[i])
        found += _difference(f"input a{i} afterwards", g, w, limits)
    for i, (g, w) in enumerate(zip(got.gradients, wanted.gradients, strict=True)):
        if (g is None) != (w is None):
            zero = (g if w is None else w) == 0  # PyTorch's None and zeros mean the same
            found += [] if bool(zero.all()) else [Difference(f"gradient {i}: {g} where eager gives {w}")]
        elif g is not None:
            limits = _Limits(max(errors.values()), True, lambda i=i: (r := reference()) and r.gradients[i])
            found += _difference(f"gradient {i}", g, w, limits)
    return found


def _stride_difference(g: torch.Tensor, w: torch.Tensor) -> str | None:
    if not w.numel() or g.shape != w.shape:
        return None
    strides = [(a, b) for n, a, b in zip(w.shape, g.stride(), w.stride(), strict=True) if n > 1]
    return f"strides {g.stride()} where eager gives {w.stride()}" if any(a != b for a, b in strides) else None


def _difference(what: str, g: torch.Tensor, w: torch.Tensor, limits: _Limits) -> list[Difference]:
    if (g.dtype, g.shape) != (w.dtype, w.shape):
        return [Difference(f"{what}: {g.dtype}{list(g.shape)} where eager gives {w.dtype}{list(w.shape)}")]
    if not w.is_floating_point():
        return [] if torch.equal(g, w) else [_shown(what, g, w, g != w)]
    wrong = ~(g.isnan() & w.isnan()) & (g != w)
    zeros = (g == 0) & (w == 0) & (g.signbit() != w.signbit())
    if limits.error and bool(wrong.any()):
        error = max(limits.error, torch.finfo(w.dtype).eps)
        wrong &= ~_is_near(g, w, error)
        r = limits.reference() if bool(wrong.any()) else None
        if r is not None and r.shape == w.shape:
            wrong &= ~_is_closer(g, w, r.double(), error)
    if bool(wrong.any()):
        return [_shown(what, g, w, wrong)]
    row = (SUMMED_ZERO if limits.error else CHOSEN_ZERO) if limits.unsigned else None
    return [_shown(what, g, w, zeros, row)] if bool(zeros.any()) else []


def _is_near(g: torch.Tensor, w: torch.Tensor, error: float) -> torch.Tensor:
    finite = w.double().abs().nan_to_num(posinf=0)
    scale = finite.max().clamp(max=1e6) if w.numel() else finite
    return (g.double() - w.double()).abs() <= _ULPS * error * torch.maximum(finite, scale)


def _is_closer(g: torch.Tensor, w: torch.Tensor, r: torch.Tensor, error: float) -> torch.Tensor:
    """Return whether a value is no farther from the f64 reference than eager's, or within its own rounding of it."""
    own = _ULPS * error * r.abs()
    return (g.double() - r).abs() <= torch.maximum(1.1 * (w.double() - r).abs(), own)


def _shown(what: str, g: torch.Tensor, w: torch.Tensor, wrong: torch.Tensor, row: str | None = None) -> Difference:
    i = tuple(int(n) for n in wrong.nonzero()[0])
    count = int(wrong.sum())
    dtype = str(w.dtype).removeprefix("torch.")
    text = f"{what}: {count} of {w.numel()} {dtype} differ, at {i} {g[i].item()!r} where eager gives {w[i].item()!r}"
    return Difference(text, row)


# Reducing --------------------------------------------------------------------------------------


def shrink(case: Case, outcome: Outcome, most: int = 60) -> tuple[Case, Outcome]:
    """Return the smallest case found that is still wrong (or refused) in the same way, and its outcome."""
    kind, tries = outcome.kind, 0

    def attempt(lines: Sequence[str], returned: Sequence[str]) -> bool:
        nonlocal case, outcome, tries
        tries += 1
        smaller = Case(case.program, case.door, list(lines), list(returned))
        result = run(smaller) if tries <= most else Outcome("invalid")
        if result.kind == kind and (kind == "wrong" or _same(result, outcome)):
            case, outcome = smaller, result
            return True
        return False

    for name in list(case.returned):
        if len(case.returned) > 1:
            attempt(case.lines, [n for n in case.returned if n != name])
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(case.lines))):
            if i < len(case.lines) and not _is_needed(case, i):
                changed |= attempt(case.lines[:i] + case.lines[i + 1 :], case.returned)
    return case, outcome


def _same(a: Outcome, b: Outcome) -> bool:
    return a.what[0][:60] == b.what[0][:60]


def _is_needed(case: Case, i: int) -> bool:
    """Return whether a line defines what is used later."""
    defined = re.match(r"(v\d+) = ", case.lines[i])
    later = " ".join([*case.lines[i + 1 :], *case.returned])
    return bool(defined and re.search(rf"\b{defined[1]}\b", later))
