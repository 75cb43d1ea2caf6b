"""One op of PyTorch's op database, checked: values, dtypes, shapes and gradients against PyTorch's own."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree as pytree

import kpx
from bench.opinfo import CHUNK
from bench.opinfo_views import Viewed, without_view

TORCH_DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "bool": torch.bool,
    "complex64": torch.complex64,
}
# Relative to the largest value of a result: what is allowed beyond twice PyTorch's own distance from f64.
TOLERANCE = {torch.float32: 2e-5, torch.complex64: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

ABSOLUTE = 1e-5  # that of torch.testing.assert_close: what is left where values cancel

# What cannot be compared, and why. The table of results lists them.
DATA_DEPENDENT = "the shape of its output depends on values"
LEFT_OUT = {
    "nonzero": DATA_DEPENDENT,
    "argwhere": DATA_DEPENDENT,
    "masked_select": DATA_DEPENDENT,
    "unique": DATA_DEPENDENT,
    "unique_consecutive": DATA_DEPENDENT,
    "combinations": DATA_DEPENDENT,
    "bincount": DATA_DEPENDENT,
    "to_sparse": "its output is sparse",
    "sparse.mm": "its input is sparse",
    "sparse.sampled_addmm": "its input is sparse",
    "resize_": "it changes its input's size in place",
    "resize_as_": "it changes its input's size in place",
    "equal": "its output is a Python bool",
    "item": "its output is a Python number",
    "is_pinned": "its output is a Python bool",
    "as_strided.variant:partial_views": "it reads memory outside its input",
}
LEFT_OUT_PREFIX = {"sparse": "it works on sparse tensors", "jiterator": "it exists on CUDA alone"}
# Memory is not initialised: only shapes and dtypes can agree.
UNINITIALISED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
RANDOM = {
    "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "uniform", "rand_like",
    "randint", "randint_like", "randn", "randn_like", "nn.functional.alpha_dropout", "nn.functional.dropout",
    "nn.functional.dropout2d", "nn.functional.dropout3d", "nn.functional.feature_alpha_dropout",
    "nn.functional.rrelu", "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d",
}  # fmt: skip
# One draw decides several values (a channel is dropped whole).
TOGETHER = {
    "nn.functional.dropout2d", "nn.functional.dropout3d", "nn.functional.feature_alpha_dropout",
    "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d", "multinomial",
    "nn.functional.multi_head_attention_forward", "nn.functional.scaled_dot_product_attention",
}  # fmt: skip


def op_name(op: Any) -> str:
    """An entry's name in our tables."""
    return op.name + (f".variant:{op.variant_test_name}" if op.variant_test_name else "")


@functools.cache
def _database() -> dict[str, Any]:
    from torch.testing._internal import common_methods_invocations as database

    # The database seeds PyTorch before each draw, for its own comparisons; ours are of distributions.
    database.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    op_db = database.op_db
    return {op_name(op): op for op in op_db}


_HOLE = object()


class Calls(torch.nn.Module):
    """Many calls of one op in one model: tensors are inputs, all else is constant."""

    def __init__(self, function: Callable, samples: Sequence[Any]):
        super().__init__()
        self.function = function
        self.calls = []
        self.tensors: list[torch.Tensor] = []
        for sample in samples:
            leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
            self.tensors += [x for x in leaves if isinstance(x, torch.Tensor)]
            self.calls.append(([_HOLE if isinstance(x, torch.Tensor) else x for x in leaves], spec))

    def forward(self, *tensors):
        left = iter(tensors)
        results = []
        for constants, spec in self.calls:
            args, kwargs = pytree.tree_unflatten([next(left) if c is _HOLE else c for c in constants], spec)
            results.append(tensors_of(self.function(*args, **kwargs)))
        return results


def tensors_of(result: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def eager(op: Any, sample: Any) -> list[torch.Tensor]:
    return tensors_of(op(sample.input, *sample.args, **sample.kwargs))


def in_double(sample: Any) -> Any:
    """A sample in double precision."""
    wide = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.complex64: torch.complex128}

    def widened(x):
        if isinstance(x, torch.Tensor):
            return x.detach().to(wide.get(x.dtype, x.dtype))
        return wide.get(x, x) if isinstance(x, torch.dtype) else x

    return sample.transform(widened)


def reference(op: Any, sample: Any, wanted: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The results in double precision, or PyTorch's own where it has none."""
    try:
        found = eager(op, in_double(sample))
    except (RuntimeError, TypeError, ValueError):
        return wanted
    same = len(found) == len(wanted) and all(f.shape == w.shape for f, w in zip(found, wanted, strict=True))
    return found if same else wanted


def disagreement(got: torch.Tensor, wanted: torch.Tensor, exact: torch.Tensor) -> str | None:
    """What is wrong with a result, or None. `exact` is PyTorch's in double precision."""
    if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
        return f"{got.dtype}{list(got.shape)} where PyTorch gives {wanted.dtype}{list(wanted.shape)}"
    got, wanted = (x.detach().resolve_conj().resolve_neg() for x in (got, wanted))
    if wanted.dtype not in TOLERANCE and wanted.dtype not in (torch.float64, torch.complex128):
        different = int((got != wanted).sum())
        return f"{different} of {wanted.numel()} values differ" if different else None
    tolerance = TOLERANCE.get(wanted.dtype, 2e-5)
    g, w, e = (_as_real(x) for x in (got, wanted, exact.detach().resolve_conj().resolve_neg()))
    # A finite result is right, too, where PyTorch's own overflows and double precision does not.
    w = np.where(
        ~np.isfinite(w) & np.isfinite(e) & np.isfinite(g) & (np.abs(g - e) <= 10 * tolerance * np.abs(e)), g, w
    )
    odd = ~np.isfinite(w)
    if not np.array_equal(g[odd], w[odd], equal_nan=True):
        return "NaN or infinity differs"
    g, w, e = g[~odd], w[~odd], e[~odd]
    e = np.where(np.isfinite(e), e, w)
    if not g.size:
        return None
    if not np.isfinite(g).all():
        return "NaN or infinity where PyTorch has a number"
    scale = np.sqrt(np.mean(np.square(np.minimum(np.abs(e), 1e30))))
    allowed = 2 * np.abs(w - e) + tolerance * (5 * np.abs(e) + scale) + np.abs(w - e).max() + ABSOLUTE
    excess = np.abs(g - e) - allowed
    if excess.max() > 0:
        i = int(excess.argmax())
        return f"{g[i]:.7g} where PyTorch gives {w[i]:.7g} (double: {e[i]:.7g})"
    return None


def _as_real(x: torch.Tensor) -> np.ndarray:
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.to(torch.float64).numpy().reshape(-1)


def _reconstructed(name: str, results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a decomposition that is unique up to sign or order alone, what is unique."""
    base = name.partition(".variant:")[0]
    if base in ("svd", "linalg.svd") and len(results) == 3:
        u, s, v = results
        vh = v.mH if base == "svd" else v
        k = s.shape[-1]
        gram = [u.mH @ u, vh @ vh.mH]
        return [(u[..., :k] * s.unsqueeze(-2).to(u.dtype)) @ vh[..., :k, :], s, *gram]
    if base in ("svd_lowrank", "pca_lowrank"):
        u, s, v = results
        return [(u * s.unsqueeze(-2).to(u.dtype)) @ v.mH, s]
    if base == "linalg.eigh":
        values, vectors = results
        return [values, (vectors * values.unsqueeze(-2).to(vectors.dtype)) @ vectors.mH]
    if base == "linalg.eig":
        values, vectors = results
        rebuilt = vectors @ torch.diag_embed(values) @ torch.linalg.inv(vectors) if values.numel() else vectors
        return [*_reconstructed("linalg.eigvals", [values]), rebuilt]
    if base == "linalg.eigvals":
        v = results[0]
        powers = [(v**k).sum(-1) for k in (1, 2, 3)]  # symmetric functions do not depend on the order
        return powers
    return results


# Where values are equal, which index comes first is not defined: what the indices point at is compared.
ORDERINGS = {"sort", "argsort", "topk", "kthvalue", "mode"}


def _values_at(name: str, sample: Any, results: list[torch.Tensor]) -> list[torch.Tensor]:
    *values, index = results
    sample = without_view(sample)
    x = sample.input.detach()
    if not x.ndim:
        return [*values, index]
    at_front = {"kthvalue": 1, "topk": 1}.get(name, 0)
    dim = sample.kwargs.get("dim", next(iter([a for a in sample.args[at_front:] if type(a) is int]), -1))
    keeps = index.ndim == x.ndim
    found = x.gather(dim, index if keeps else index.unsqueeze(dim))
    orders = [index.sort(dim).values] if name in ("sort", "argsort") else []
    return [*values, found, *orders]


RECONSTRUCTED = {"svd", "svd_lowrank", "pca_lowrank", "linalg.svd", "linalg.eigh", "linalg.eig", "linalg.eigvals"}


def compare(op: Any, name: str, sample: Any, got: Sequence[torch.Tensor], wanted: list[torch.Tensor]) -> str | None:
    """What is wrong with an op's results, or None."""
    if len(got) != len(wanted):
        return f"{len(got)} results where PyTorch gives {len(wanted)}"
    for g, w in zip(got, wanted, strict=True):
        if (g.dtype, g.shape) != (w.dtype, w.shape):
            return f"{g.dtype}{list(g.shape)} where PyTorch gives {w.dtype}{list(w.shape)}"
    if op.name in UNINITIALISED:
        return None
    exact = reference(op, sample, wanted)
    if op.name in ORDERINGS:
        got, wanted, exact = (_values_at(op.name, sample, list(x)) for x in (got, wanted, exact))
    if op.name in RECONSTRUCTED:
        got, wanted, exact = (_reconstructed(name, list(x)) for x in (got, wanted, exact))
    reasons = [disagreement(g, w, e) for g, w, e in zip(got, wanted, exact, strict=True)]
    if any(reasons) and op.name in SKETCHED and _is_a_draw(op, name, sample, got, exact):
        return None
    return next(filter(None, reasons), None)


# Of more than the rank asked for, these give an approximation that is drawn.
SKETCHED = {"svd_lowrank", "pca_lowrank"}


def _is_a_draw(op: Any, name: str, sample: Any, got: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> bool:
    """Whether results are no farther from the double precision's than PyTorch's own draws are, three times over."""
    draws = [_reconstructed(name, eager(op, sample)) for _ in range(32)]
    spread = [max(float((d[i] - e).abs().max()) for d in draws) for i, e in enumerate(exact)]
    return all(float((g - e).abs().max()) <= 3 * s for g, e, s in zip(got, exact, spread, strict=True))


def _drawn(op: Any, sample: Any, run: Callable, draws: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """For each result, many draws of ours and of PyTorch's."""
    ours, theirs = [], []
    for _ in range(draws):
        ours += [[x.clone() for x in tensors_of(run())]]
        theirs += [[x.clone() for x in eager(op, sample)]]  # an in-place op gives the same tensor each time
    return [(list(g), list(w)) for g, w in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)]


def _values(draws: list[torch.Tensor], seed: int) -> np.ndarray:
    """Draws as rows of real numbers."""
    rows = np.nan_to_num(np.stack([_as_real(x.detach()).reshape(-1) for x in draws]))
    if draws[0].is_floating_point():  # where few values can come, two roundings of one must not count as two
        width = 0.02 if draws[0].dtype == torch.bfloat16 else 1e-3
        rows = rows * (1 + width * np.random.default_rng(seed).random(rows.shape))
    return rows


def differs_in_distribution(op: Any, sample: Any, run: Callable, draws: int = 60) -> str | None:
    """Compares many draws with PyTorch's, by the two-sample Kolmogorov-Smirnov test."""
    from scipy.stats import ks_2samp

    suspected = False
    for g, w in _drawn(op, sample, run, draws):
        if (g[0].dtype, g[0].shape) != (w[0].dtype, w[0].shape):
            return f"{g[0].dtype}{list(g[0].shape)} where PyTorch gives {w[0].dtype}{list(w[0].shape)}"
        a, b = _values(g, 0), _values(w, 1)
        suspected |= bool(a.size) and ks_2samp(a.reshape(-1), b.reshape(-1)).pvalue < 1e-7
    if not suspected:
        return None
    if op.name not in TOGETHER:
        return "another distribution than PyTorch's"
    # Counted as draws of their own, values that hang together look unlikelier than they are: place by place, then.
    for g, w in _drawn(op, sample, run, 10 * draws):
        a, b = _values(g, 0), _values(w, 1)
        places = range(0, a.shape[1], max(1, a.shape[1] // 32))
        if any(ks_2samp(a[:, i], b[:, i]).pvalue < 1e-7 for i in places):
            return "another distribution than PyTorch's"
    return None


def left_out(op: Any, dtype: torch.dtype) -> str | None:
    """Why an op is not compared, or None."""
    if op_name(op) in LEFT_OUT or op.name in LEFT_OUT:
        return LEFT_OUT.get(op_name(op)) or LEFT_OUT[op.name]
    for prefix, reason in LEFT_OUT_PREFIX.items():
        if op.name.startswith(prefix):
            return reason
    return None if dtype in op.supported_dtypes("cpu") else "PyTorch has no such dtype for it on the CPU"


def samples_of(op: Any, dtype: torch.dtype, limit: int | None, *, gradients: bool = False) -> list[Any]:
    """An op's samples that PyTorch itself runs, with dense tensors in and out."""
    torch.manual_seed(0)
    found = list(op.sample_inputs("cpu", dtype, requires_grad=gradients))
    if isinstance(op, Viewed):
        found = list(op.samples(found, limit))
    elif limit and len(found) > limit:
        found = [found[i * len(found) // limit] for i in range(limit)]
    kept = []
    for sample in found:
        try:
            results = eager(op, sample)
        except Exception:  # whatever PyTorch refuses
            continue
        inputs = [x for x in pytree.tree_leaves((sample.input, sample.args, sample.kwargs)) if _is_tensor(x)]
        if results and all(x.layout is torch.strided and not x.is_quantized for x in [*inputs, *results]):
            kept.append(sample)
    return kept


def without_paths(text: str) -> str:
    """A message without the folders of this machine."""
    for folder in (os.path.dirname(os.path.dirname(str(torch.__file__))), sys.prefix, os.getcwd()):
        text = text.replace(folder + os.sep, "")
    return text


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


# Ours, and what PyTorch's own tracing says where a shape or a decision depends on values.
REFUSALS = (kpx.KpxError, DynamicOutputShapeException, DataDependentOutputException)


class Tally:
    """The verdicts on one op's samples."""

    def __init__(self):
        self.passed, self.unsupported, self.wrong = 0, [], []

    def hopeless(self) -> bool:
        return len(self.unsupported) >= 4 and not self.passed

    def verdict(self, count: int) -> dict[str, Any]:
        if not count:
            return {"verdict": "left out", "reason": "no sample of it is dense in and out"}
        if not (self.passed or self.unsupported or self.wrong):
            return {"verdict": "left out", "reason": "nothing to compare: what it gives is drawn, or has no gradient"}
        kind = "wrong" if self.wrong else "unsupported" if self.unsupported else "pass"
        found = {"verdict": kind, "samples": count, "passed": self.passed}
        if kind != "pass":
            found |= {"unsupported": len(self.unsupported), "wrong": len(self.wrong)}
            found["reason"] = (self.wrong or self.unsupported)[0]
        return found


def check(name: str, dtype: str, limit: int | None, gradients: bool, views: bool = False) -> dict[str, Any]:
    """An op's verdicts in one dtype: `{forward: {...}}`, with `gradient` where asked and PyTorch has one.

    Args:
        views: each tensor of a sample is a view that the graph takes, of each kind in turn.
    """
    op, torch_dtype = _database()[name], TORCH_DTYPES[dtype]
    op = Viewed(op) if views else op
    if reason := left_out(op, torch_dtype):
        return {"forward": {"verdict": "left out", "reason": reason}}
    found = {"forward": _verdict(op, name, samples_of(op, torch_dtype, limit), forward_of_chunk)}
    if gradients and op.supports_autograd and found["forward"]["verdict"] == "pass":
        from bench.opinfo_gradient import gradient_of_chunk

        found["gradient"] = _verdict(op, name, samples_of(op, torch_dtype, limit, gradients=True), gradient_of_chunk)
    return found


def _verdict(op: Any, name: str, samples: list[Any], run_chunk: Callable) -> dict[str, Any]:
    tally = Tally()
    for start in range(0, len(samples), CHUNK):
        if tally.hopeless():
            break
        _settle(op, name, samples[start : start + CHUNK], tally, run_chunk)
    return tally.verdict(len(samples))


def _settle(op: Any, name: str, samples: list[Any], tally: Tally, run_chunk: Callable) -> None:
    """Runs samples in one model; where it is refused, in halves."""
    if tally.hopeless():
        return
    try:
        for why in run_chunk(op, name, samples):
            if why is None:
                tally.passed += 1
            else:
                tally.wrong.append(why)
        return
    except Exception as error:  # any error counts: refusals as unsupported, others as wrong
        if len(samples) == 1:
            kind = tally.unsupported if isinstance(error, REFUSALS) else tally.wrong
            kind.append(f"{type(error).__name__}: {without_paths(str(error))}"[:1500])
            return
    middle = len(samples) // 2
    _settle(op, name, samples[:middle], tally, run_chunk)
    _settle(op, name, samples[middle:], tally, run_chunk)


def is_random(op: Any, name: str, sample: Any) -> bool:
    sample = without_view(sample)
    if op.name == "nn.functional.multi_head_attention_forward":
        given = inspect.signature(torch.nn.functional.multi_head_attention_forward).bind(
            sample.input, *sample.args, **sample.kwargs
        )
        return given.arguments.get("training", True) and given.arguments["dropout_p"] > 0
    return name in RANDOM or op.name in RANDOM or bool(sample.kwargs.get("dropout_p", 0))


def forward_of_chunk(op: Any, name: str, samples: list[Any]) -> list[str | None]:
    """What is wrong with each sample's results, or None."""
    found: list[str | None] = []
    for sample in [s for s in samples if is_random(op, name, s)]:
        model = Calls(op.op, [sample])
        optimized = kpx.compile(model, *model.tensors)
        found.append(differs_in_distribution(op, sample, lambda f=optimized, m=model: f(*m.tensors)))
    fixed = [s for s in samples if not is_random(op, name, s)]
    if fixed:
        model = Calls(op.op, fixed)
        got = kpx.compile(model, *model.tensors)(*model.tensors)
        found += [compare(op, name, s, g, eager(op, s)) for s, g in zip(fixed, got, strict=True)]
    return found
