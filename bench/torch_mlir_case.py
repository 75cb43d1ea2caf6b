"""One end-to-end case of torch-mlir's suite: load the suite from a checkout, run a case by eager PyTorch and by kpx, compare.

The suite's own framework and registry are imported from the checkout. Stand-ins provide what they import and a checkout does not
build: the package `multiprocess`, torch-mlir's compiled extensions, and torchvision where it is not installed.
"""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

SUITE = "torch_mlir_e2e_test.test_suite"
# The suite's own test of its time limit loops for ever in eager PyTorch too.
EXCLUDED = {"TimeOutModule_basic"}
_RTOL, _ATOL = 1e-3, 1e-6  # torch-mlir's own tolerance is 1e-3 and 1e-7
_SEEDS = 8


@dataclass
class Call:
    """One call of the program under test: its inputs as they were before, its output, and its inputs afterwards."""

    symbol: str
    inputs: tuple
    keywords: dict[str, Any]
    output: Any = None
    inputs_after: tuple = ()


@dataclass
class Verdict:
    """The outcome of a case.

    Attributes:
        verdict: `right`, `broken` (right, with graph breaks), `wrong`, `refused` (a KpxError), `crash` (another exception),
            `died`, `timeout`, or `eager fails`.
        reason: the error's message, or the first difference.
        strides: which outputs have other strides than eager's, as text.
    """

    verdict: str
    reason: str = ""
    strides: str = ""
    breaks: list[str] = field(default_factory=list)


class _Absent(types.ModuleType):
    """A package that is not installed; its use raises."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(f"`{self.__name__}.{name}`: {self.__name__} is not installed")


def suite_folder(checkout: str) -> pathlib.Path:
    """Return the folder of the suite's Python files in a checkout of torch-mlir."""
    return pathlib.Path(checkout) / "projects" / "pt1" / "python"


def load(checkout: str) -> dict[str, Any]:
    """Import the suite; return its cases by name."""
    folder = suite_folder(checkout)
    sys.path.insert(0, str(folder))
    _provide_modules()
    for file in sorted((folder / SUITE.replace(".", "/")).glob("*.py")):
        # The example of a custom op needs a library that only a build has.
        if file.stem not in ("__init__", "custom_op_example"):
            importlib.import_module(f"{SUITE}.{file.stem}")
    registry = importlib.import_module("torch_mlir_e2e_test.registry")
    return {t.unique_name: t for t in registry.GLOBAL_TEST_REGISTRY if t.unique_name not in EXCLUDED}


def _provide_modules() -> None:
    multiprocess: Any = types.ModuleType("multiprocess")
    multiprocess.set_start_method = lambda *args: None
    sys.modules.setdefault("multiprocess", multiprocess)
    # The package's own __init__ imports its build: run none, but find its submodules.
    package = types.ModuleType(SUITE)
    package.__path__ = [str(pathlib.Path(sys.path[0]) / SUITE.replace(".", "/"))]
    sys.modules[SUITE] = package
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        names = ("torchvision", "torchvision.models", "torchvision.ops")
        sys.modules.update({name: _Absent(name) for name in names})
        for name in names[1:]:
            setattr(sys.modules["torchvision"], name.rpartition(".")[2], sys.modules[name])


# Running ----------------------------------------------------------------------------------------


class _Recorder:
    """The program under test, as an invoker sees it: attributes by name, calls recorded."""

    def __init__(self, program: Any, path: tuple[str, ...], record: Callable[[Call], Any]):
        self._program, self._path, self._record = program, path, record

    def __getattr__(self, name: str) -> Any:
        return _Recorder(getattr(self._program, name), (*self._path, name), self._record)

    def __call__(self, *args, **kwargs):
        return self._record(Call(".".join(self._path), args, kwargs))


def _copied(value: Any) -> Any:
    """Copy tensors with their strides, overlapping ones too."""

    def copy(t: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(0, dtype=t.dtype).set_(t.detach().untyped_storage().clone())
        made = whole.as_strided(t.shape, t.stride(), t.storage_offset())
        return made.requires_grad_(t.requires_grad) if t.is_leaf else made

    return pytree.tree_map_only(torch.Tensor, copy, value)


def traced_by_eager(case: Any) -> list[Call]:
    """Run the case's own calls in eager PyTorch; return them with outputs."""
    utilities = importlib.import_module("torch_mlir_e2e_test.framework").TestUtils()
    program, calls = case.program_factory(), []

    def record(call: Call) -> Any:
        inputs, keywords = _copied((call.inputs, call.keywords))
        output = _resolved(program, call.symbol)(*call.inputs, **call.keywords)
        calls.append(Call(call.symbol, inputs, keywords, _copied(output), _copied(call.inputs)))
        return output

    case.program_invoker(_Recorder(program, (), record), utilities)
    return calls


def replayed(program: Any, calls: list[Call]) -> list[Call]:
    """Call a program in the same way on equal inputs."""
    results = []
    for call in calls:
        inputs, keywords = _copied((call.inputs, call.keywords))
        output = _resolved(program, call.symbol)(*inputs, **keywords)
        results.append(Call(call.symbol, call.inputs, call.keywords, _copied(output), _copied(inputs)))
    return results


def _resolved(program: Any, symbol: str) -> Any:
    for name in filter(None, symbol.split(".")):
        program = getattr(program, name)
    return program


def run(case: Any) -> Verdict:
    """Return the verdict on a case. Autograd is off, as in torch-mlir's own runs."""
    import kpx

    try:
        with torch.no_grad(), _quiet():
            golden = traced_by_eager(case)
    except Exception as error:  # whatever eager PyTorch cannot run has nothing to be compared with
        return Verdict("eager fails", _described(error))
    breaks: list[str] = []
    try:
        with torch.no_grad(), _collected_breaks(breaks):
            torch.manual_seed(0)
            program = kpx.optimize(case.program_factory(), config=kpx.Config(measure_seconds=0))
            results = replayed(program, golden)
    except kpx.KpxError as error:
        return Verdict("refused", _described(error), breaks=breaks)
    except Exception as error:  # a bench of whatever may go wrong
        return Verdict("crash", _described(error), breaks=breaks)
    difference = compared(results, golden)
    if difference:
        if (other := _drawn_anew(case, golden)) is not None:
            difference = _unlike(results, [golden, *other])
        elif _is_closer(case, results, golden):
            difference = ""
    if difference:
        return Verdict("wrong", difference, breaks=breaks)
    return Verdict("broken" if breaks else "right", "; ".join(breaks), _other_strides(results, golden), breaks)


def _is_closer(case: Any, results: list[Call], golden: list[Call]) -> bool:
    """Return whether results are no farther than eager PyTorch's from its own results in f64."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    if any(_difference(r.inputs_after, g.inputs_after) for r, g in zip(results, golden, strict=True)):
        return False
    try:
        with torch.no_grad(), _quiet():
            program, exact = case.program_factory().double(), []
            for call in golden:
                inputs, keywords = pytree.tree_map(wide, (call.inputs, call.keywords))
                exact.append(_resolved(program, call.symbol)(*inputs, **keywords))
    except Exception:  # a program that is written for one dtype
        return False
    leaves = (
        pytree.tree_leaves(outputs) for outputs in ([c.output for c in results], [c.output for c in golden], exact)
    )
    return all(map(_no_farther, *leaves))


def _no_farther(value: Any, golden: Any, exact: Any) -> bool:
    if not _difference(value, golden):
        return True
    if not (isinstance(exact, torch.Tensor) and exact.dtype == torch.float64 and golden.is_floating_point()):
        return False
    if not (value.shape == exact.shape and bool(value.isfinite().all()) and bool(exact.isfinite().all())):
        return False
    return float((value.double() - exact).norm()) <= 1.1 * float((golden.double() - exact).norm())


def _drawn_anew(case: Any, golden: list[Call]) -> list[list[Call]] | None:
    """Replay a random case with other seeds; None where every seed gives the same."""
    runs = []
    with torch.no_grad(), _quiet():
        for seed in range(1, _SEEDS):
            program = case.program_factory()
            torch.manual_seed(1000 + seed)
            runs.append(replayed(program, golden))
            if seed == 1 and _identical(runs[0], golden):
                return None
    return runs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _collected_breaks(breaks: list[str]) -> Iterator[None]:
    from kpx.errors import GraphBreakWarning

    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", GraphBreakWarning)
        try:
            yield
        finally:
            breaks += [str(w.message) for w in issued if issubclass(w.category, GraphBreakWarning)]


def _described(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" [{pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}]" if frames else ""
    return text[:1500] + where


# Comparing --------------------------------------------------------------------------------------


def compared(results: list[Call], golden: list[Call]) -> str:
    """Describe the first difference of two traces; '' where there is none."""
    for number, (a, b) in enumerate(zip(results, golden, strict=True)):
        for part in ("output", "inputs_after"):
            if text := _difference(getattr(a, part), getattr(b, part)):
                return f"call {number}, {part.replace('_', ' ')}: {text}"
    return ""


def _identical(results: list[Call], golden: list[Call]) -> bool:
    pairs = zip(
        *(pytree.tree_leaves([(c.output, c.inputs_after) for c in calls]) for calls in (results, golden)), strict=True
    )
    return all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) if isinstance(a, torch.Tensor) else a == b
        for a, b in pairs
    )


def _difference(value: Any, golden: Any) -> str:
    values, structure = pytree.tree_flatten(value)
    goldens, expected = pytree.tree_flatten(golden)
    if structure != expected:
        return f"structure {structure} instead of {expected}"
    for position, (a, b) in enumerate(zip(values, goldens, strict=True)):
        if type(a) is not type(b):
            return f"{position}: a {type(a).__name__} instead of a {type(b).__name__}"
        if not isinstance(b, torch.Tensor):
            if a != b and not ((isinstance(b, float) and abs(a - b) <= 1e-5 * abs(b)) or (a != a and b != b)):
                return f"{position}: {a!r} instead of {b!r}"
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{position}: {a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}"
        elif text := _unequal(a, b):
            return f"{position}: {text}"
    return ""


def _unequal(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.is_quantized:
        a, b = a.int_repr(), b.int_repr()
    if a.dtype.is_floating_point or a.dtype.is_complex:
        wide = torch.complex128 if a.dtype.is_complex else torch.float64
        rtol = max(_RTOL, 2 * torch.finfo(a.dtype).eps)
        same = torch.isclose(a.to(wide), b.to(wide), rtol=rtol, atol=_ATOL, equal_nan=True)
    else:
        same = a == b
    if bool(same.all()):
        return ""
    place = tuple((~same).nonzero()[0].tolist())
    return f"{int((~same).sum())} of {same.numel()} values differ, at {place}: {a[place]} instead of {b[place]}"


def _unlike(results: list[Call], runs: list[list[Call]]) -> str:
    """Compare a random case with eager's of several seeds: shapes and dtypes, and each value's distribution."""
    for number, call in enumerate(results):
        values = pytree.tree_leaves((call.output, call.inputs_after))
        others = [pytree.tree_leaves((r[number].output, r[number].inputs_after)) for r in runs]
        for position, (value, *drawn) in enumerate(zip(values, *others, strict=True)):
            if isinstance(value, torch.Tensor) and (text := _improbable(value, drawn)):
                return f"call {number}, {position}: {text}"
    return ""


def _improbable(value: torch.Tensor, drawn: list[torch.Tensor]) -> str:
    if any((value.shape, value.dtype) != (d.shape, d.dtype) for d in drawn):
        return f"{value.dtype}{list(value.shape)} instead of {drawn[0].dtype}{list(drawn[0].shape)}"
    if not value.numel() or value.dtype.is_complex:
        return ""
    moments = [_moments(d) for d in drawn]
    for name, got, several in zip(("mean", "spread"), _moments(value), zip(*moments, strict=True), strict=True):
        expected = torch.tensor(several)
        # A few draws say little of the distribution's tails: ten deviations, or a hundredth.
        allowed = max(10 * float(expected.std()), 0.01 * float(expected.abs().max()), 1e-6)
        if abs(got - float(expected.mean())) > allowed:
            return f"random values have {name} {got:.4g} instead of {float(expected.mean()):.4g}"
    return ""


def _moments(value: torch.Tensor) -> tuple[float, float]:
    wide = value.double()
    return float(wide.mean()), float(wide.std(correction=0))


def _other_strides(results: list[Call], golden: list[Call]) -> str:
    texts = []
    for a, b in zip(results, golden, strict=True):
        for x, y in zip(pytree.tree_leaves(a.output), pytree.tree_leaves(b.output), strict=True):
            if isinstance(x, torch.Tensor) and _strides(x) != _strides(y):
                texts.append(f"{list(x.shape)}: {x.stride()} instead of {y.stride()}")
    return "; ".join(texts)


def _strides(t: torch.Tensor) -> list[int]:
    """Strides of the dimensions where they matter."""
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] if t.numel() else []
