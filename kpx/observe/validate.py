"""`kpx.validate` and `kpx.bisect`: is what was optimized right, and if not, which rewrite is it?"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kpx.api import _Jit, jit
from kpx.bridges import registry
from kpx.config import Config, resolve
from kpx.errors import ConfigError, InputError, RewriteWarning
from kpx.ir.rewrite import Burnt, last_burnt
from kpx.kernels.pattern_check import root_mean_square

Arrays = dict[str, tuple[str, np.ndarray]]
_SLACK = 1.1  # two ways of rounding differ by chance
_ULPS = 8.0  # of the dtype, which is right whatever the reference's distance
_MOST_FUEL = 1 << 20


class Reference(Protocol):
    """A model or function, and inputs to try it with."""

    inputs: tuple

    def values(self, call: Callable, inputs: Sequence[Any]) -> Arrays:
        """The outputs of a call: by name, the dtype, and the numbers in f64 (integers as they are)."""
        ...

    def gradients(self, call: Callable, inputs: Sequence[Any]) -> Arrays | None:
        """The gradients of the outputs, each weighed differently, by all that is floating; None where there are none."""
        ...

    def reference(self) -> Callable:
        """The model itself."""
        ...

    def wide(self) -> tuple[Callable, tuple]:
        """The model computed in f64, and the inputs."""
        ...

    def optimized(self, config: Config, *, gradients: bool) -> Callable:
        """The model, optimized anew, with its gradient or without."""
        ...

    def planted(self, number: float) -> list[tuple[str, tuple]]:
        """The inputs with one number changed in each floating one, and what it is called."""
        ...


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        what: an output, a gradient, or what was planted where.
        dtype: the candidate's.
        distance: from f64, root mean square, relative; of the reference in its own numbers, `reference_distance`.
        allowed: how far it may be.
        why: what is wrong, or "".
    """

    what: str
    dtype: str
    distance: float
    reference_distance: float
    allowed: float
    why: str


@dataclass(frozen=True)
class Bisection:
    """The first rewrite with which results are wrong.

    Attributes:
        count: how many rewrites are applied when results are first wrong: `KPX_FUEL=count`.
        rewrites: what the last of them was, in each module that was compiled (a backward pass has its own).
        why: what is wrong then.
    """

    count: int
    rewrites: tuple[Burnt, ...]
    why: str

    def __rich__(self) -> Text:
        lines = [f"Results are first wrong after {self.count} rewrites (KPX_FUEL={self.count}): {self.why}"]
        for burnt in self.rewrites:
            lines += [f"The last of them is `{burnt.name}`. The op that diverges first:", f"  {burnt.op}"]
            lines += [f"  which comes from {burnt.where}"] if burnt.where else []
            lines.append(f"To go on without it: Config(disable=({burnt.name!r},))")
        return Text("\n".join(lines))


@dataclass(frozen=True)
class Validation:
    """What `validate` found; true where everything is right."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    bisection: Bisection | None = None

    @property
    def ok(self) -> bool:
        return not any(f.why for f in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __rich__(self) -> Group:
        table = Table("what", "dtype", "from f64", "the reference", "may be", "")
        worst = sorted(self.findings, key=lambda f: (not f.why, -f.distance))
        for f in worst[:20]:
            verdict = f"[red]{f.why}[/red]" if f.why else "right"
            numbers = (f.distance, f.reference_distance, f.allowed)
            table.add_row(f.what, f.dtype, *(f"{n:.2g}" for n in numbers), verdict)
        wrong = sum(bool(f.why) for f in self.findings)
        told = f"{wrong} of {len(self.findings)} comparisons are wrong." if wrong else "Everything is right."
        rest = [f"({len(worst) - 20} more)"] * (len(worst) > 20)
        found: list[Any] = [table, Text("\n".join([*rest, told, *self.notes]))]
        return Group(*found, *([self.bisection] if self.bisection else []))


class _Function:
    """A JAX function as a `Reference`."""

    def __init__(self, fun: Callable, inputs: Sequence[Any]):
        self._fun = fun.__wrapped__ if isinstance(fun, _Jit) else fun
        self.inputs = tuple(jax.tree.map(_array_like, tuple(inputs)))

    def values(self, call: Callable, inputs: Sequence[Any]) -> Arrays:
        with jax.enable_x64(jax.config.jax_enable_x64 or _is_wide(inputs)):
            leaves = jax.tree.leaves(call(*inputs))
        return {f"output {i}": _entry(leaf) for i, leaf in enumerate(leaves)}

    def gradients(self, call: Callable, inputs: Sequence[Any]) -> Arrays | None:
        leaves, tree = jax.tree.flatten(tuple(inputs))
        places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
        if not places:
            return None
        plain = call.__wrapped__ if isinstance(call, _Jit) else call
        compiler = _compiler_of(call)

        def gradient(floating):
            def total(floating):
                given = list(leaves)
                for place, array in zip(places, floating, strict=True):
                    given[place] = array
                outputs = jax.tree.leaves(plain(*jax.tree.unflatten(tree, given)))
                return sum(jnp.sum(_weights(o) * o) for o in outputs if jnp.issubdtype(o.dtype, jnp.floating))

            return jax.grad(total)(floating)

        with jax.enable_x64(jax.config.jax_enable_x64 or _is_wide(inputs)):
            try:
                found = compiler(gradient)([leaves[i] for i in places])
            except TypeError:  # nothing that it gives is floating
                return None
        return {f"gradient by input {i}": _entry(leaf) for i, leaf in zip(places, found, strict=True)}

    def reference(self) -> Callable:
        return jax.jit(self._fun)

    def wide(self) -> tuple[Callable, tuple]:
        return jax.jit(self._fun), jax.tree.map(_widened, self.inputs)

    def optimized(self, config: Config, *, gradients: bool) -> Callable:
        return jit(lambda *inputs: self._fun(*inputs), config=config)

    def planted(self, number: float) -> list[tuple[str, tuple]]:
        leaves, tree = jax.tree.flatten(self.inputs)
        found = []
        for i, leaf in enumerate(leaves):
            if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating):
                changed = np.array(leaf)
                changed.reshape(-1)[leaf.size // 2] = number
                found.append((f"input {i}", jax.tree.unflatten(tree, [*leaves[:i], changed, *leaves[i + 1 :]])))
        return found


def _compiler_of(call: Any) -> Callable:
    """What compiles the gradient of a call: kpx where the call is kpx's."""
    return (lambda fun: jit(fun, config=call._config)) if isinstance(call, _Jit) else jax.jit


def validate(
    reference: Any,
    candidate: Any = None,
    *inputs: Any,
    gradients: bool = True,
    bisects: bool = True,
    config: Config | None = None,
) -> Validation:
    """Compares a candidate with the model or function that it was made of, and both with the model computed in f64.

    An output or gradient is right where it is no farther from f64 than the reference is in its own numbers (a tenth more,
    since two ways of rounding differ by chance), or within 8 ulps; where its shape and dtype are the reference's; and where
    NaN and infinities are where the reference has them, also where one is put into each floating input.

    Args:
        reference: a `torch.nn.Module` or a function of JAX arrays.
        candidate: what is to be right: what `kpx.optimize`, `kpx.jit` or anything else made of it; by default
            `kpx.optimize(reference)`, for PyTorch with its gradients apart.
        *inputs: arrays or tensors; a `jax.ShapeDtypeStruct` becomes random numbers.
        gradients: compare them too, by the floating inputs and a module's parameters, where the candidate has them.
        bisects: where kpx made the candidate and something is wrong, find the rewrite (see `bisect`).
        config: what the candidate is made with, where there is none, and what is bisected.

    Raises:
        InputError: this is no model or function, or an input is not one.
    """
    config = dataclasses.replace(resolve(config), measure_seconds=0.0, choices=None)
    subject = _subject(reference, inputs)
    is_ours = candidate is None or _made_by_kpx(candidate)
    with _unfuelled():
        calls = _calls(subject, candidate, config, gradients)
        findings, notes = _compare(subject, *calls)
    found = Validation(tuple(findings), tuple(notes))
    if found.ok or not bisects or not is_ours:
        return found
    wrong = next(f for f in found.findings if f.why)
    bisection = _bisect(subject, config, gradients and wrong.what.startswith("gradient"))
    return dataclasses.replace(found, bisection=bisection)


def bisect(reference: Any, *inputs: Any, gradients: bool = False, config: Config | None = None) -> Bisection | None:
    """The first of the rewrites with which a model's results, or its gradients, are wrong; None where they are right.

    It compiles about twice as often as the logarithm of the number of rewrites, with `KPX_FUEL` of its own.

    Args:
        reference, *inputs, config: as for `validate`.
        gradients: whether it is gradients that are wrong.
    """
    config = dataclasses.replace(resolve(config), measure_seconds=0.0, choices=None)
    return _bisect(_subject(reference, inputs), config, gradients)


def _subject(reference: Any, inputs: Sequence[Any]) -> Reference:
    bridge = registry.find(reference)
    if bridge is not None and hasattr(bridge, "reference"):
        return bridge.reference(reference, inputs)
    if not callable(reference):
        raise InputError(
            f"`{type(reference).__qualname__}` cannot be validated. Pass a torch.nn.Module or a function of JAX arrays."
        )
    return _Function(reference, inputs)


def _made_by_kpx(candidate: Any) -> bool:
    return isinstance(candidate, _Jit) or type(candidate).__module__.startswith("kpx.")


def _calls(subject: Reference, candidate: Any, config: Config, gradients: bool) -> tuple[Callable, Callable | None]:
    """What gives the values to compare, and what gives the gradients."""
    if candidate is not None:
        return candidate, candidate if gradients else None
    call = subject.optimized(config, gradients=False)
    return call, subject.optimized(config, gradients=True) if gradients else None


def _compare(subject: Reference, call: Callable, differentiable: Callable | None) -> tuple[list[Finding], list[str]]:
    plain, (wide, wide_inputs) = subject.reference(), subject.wide()
    wanted = subject.values(wide, wide_inputs)
    findings = _findings(subject.values(call, subject.inputs), subject.values(plain, subject.inputs), wanted)
    notes = []
    for number in (np.nan, np.inf):
        for where, given in subject.planted(number):
            ours, theirs = subject.values(call, given), subject.values(plain, given)
            findings += _spread(ours, theirs, f"{number} in {where}")
    if differentiable is not None:
        ours = _gradients(subject, differentiable)
        if ours is None:
            notes.append("Gradients were not compared: the candidate computes none.")
        else:
            exact = subject.gradients(wide, wide_inputs)
            findings += _findings(ours, subject.gradients(plain, subject.inputs) or {}, exact or {})
    return findings, notes


def _gradients(subject: Reference, call: Callable) -> Arrays | None:
    try:
        return subject.gradients(call, subject.inputs)
    except InputError:  # a model optimized for inference refuses inputs that want a gradient
        return None


def _findings(ours: Arrays, theirs: Arrays, wanted: Arrays) -> list[Finding]:
    found = []
    for name in {**theirs, **ours}:
        if name not in ours or name not in theirs:
            found.append(
                Finding(
                    name, "", np.inf, 0.0, 0.0, f"{'the candidate' if name not in ours else 'the reference'} has none"
                )
            )
            continue
        (dtype, a), (dtype_wanted, b) = ours[name], theirs[name]
        exact = wanted[name][1] if name in wanted else b
        why, far, near, allowed = "", 0.0, 0.0, 0.0
        if a.shape != b.shape or dtype != dtype_wanted:
            why = f"it is {dtype}{list(a.shape)}, and the reference's is {dtype_wanted}{list(b.shape)}"
        elif a.dtype.kind not in "fc":
            why = "" if np.array_equal(a, b) else f"{int((a != b).sum())} of {a.size} are others"
        elif (where := _other_places(a, b)) is not None:
            why = where
        else:
            finite = np.isfinite(a) & np.isfinite(exact)
            scale = root_mean_square(exact[finite]) or 1.0
            far, near = (root_mean_square(x[finite] - exact[finite]) / scale for x in (a, b))
            allowed = max(_SLACK * near, _ULPS * float(jnp.finfo(dtype).eps))
            why = "" if far <= allowed else "farther from f64 than it may be"
        found.append(Finding(name, dtype, far, near, allowed, why))
    return found


def _spread(ours: Arrays, theirs: Arrays, planted: str) -> list[Finding]:
    """Whether what was planted shows in the same places."""
    found = []
    for name in ours.keys() & theirs.keys():
        (dtype, a), (_, b) = ours[name], theirs[name]
        if a.dtype.kind in "fc" and a.shape == b.shape:
            same = np.array_equal(np.isnan(a), np.isnan(b))
            why = (
                ""
                if same
                else f"NaN in {int(np.isnan(a).sum())} places, and in the reference's in {int(np.isnan(b).sum())}"
            )
            found.append(Finding(f"{name}, {planted}", dtype, 0.0, 0.0, 0.0, why))
    return found


def _other_places(a: np.ndarray, b: np.ndarray) -> str | None:
    for what, test in (("NaN", np.isnan), ("infinities", np.isinf)):
        if not np.array_equal(test(a), test(b)):
            return f"{what} in {int(test(a).sum())} places, and in the reference's in {int(test(b).sum())}"
    return None


# Bisection ---------------------------------------------------------------------------------------------


def _bisect(subject: Reference, config: Config, gradients: bool) -> Bisection | None:
    plain, (wide, wide_inputs) = subject.reference(), subject.wide()
    look = subject.gradients if gradients else subject.values
    theirs, wanted = look(plain, subject.inputs) or {}, look(wide, wide_inputs) or {}

    def wrong(fuel: int) -> tuple[str, list[Burnt]]:
        with _fuelled(fuel), last_burnt() as burnt:
            ours = look(subject.optimized(config, gradients=gradients), subject.inputs) or {}
        return next((f"{f.what}: {f.why}" for f in _findings(ours, theirs, wanted) if f.why), ""), burnt

    if wrong(0)[0]:
        return Bisection(0, (), f"{wrong(0)[0]}, with no rewrite at all: it is not a rewrite")
    right, bad = 0, 1
    while not wrong(bad)[0]:
        right, bad = bad, 4 * bad
        if bad > _MOST_FUEL:
            return None
    while bad - right > 1:
        middle = (right + bad) // 2
        if wrong(middle)[0]:
            bad = middle
        else:
            right = middle
    why, burnt = wrong(bad)
    return Bisection(bad, tuple(dict.fromkeys(burnt)), why)


@contextlib.contextmanager
def _fuelled(fuel: int) -> Iterator[None]:
    before = os.environ.get("KPX_FUEL")
    os.environ["KPX_FUEL"] = str(fuel)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RewriteWarning)
            yield
    finally:
        _restore(before)


@contextlib.contextmanager
def _unfuelled() -> Iterator[None]:
    if os.environ.get("KPX_FUEL"):
        raise ConfigError(
            "KPX_FUEL is set, and decides how much is rewritten. Unset it: validate and bisect set their own."
        )
    yield


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop("KPX_FUEL", None)
    else:
        os.environ["KPX_FUEL"] = before


# Arrays ------------------------------------------------------------------------------------------------


def _array_like(given: Any) -> Any:
    """An array; random numbers, by a seed, for a struct."""
    if isinstance(given, jax.ShapeDtypeStruct):
        rng = np.random.default_rng(0)
        if jnp.issubdtype(given.dtype, jnp.floating):
            return rng.standard_normal(given.shape).astype(given.dtype)
        return rng.integers(0, 2, given.shape).astype(given.dtype)
    if not hasattr(given, "dtype"):
        given = np.asarray(given)
    if np.asarray(given).dtype.kind in "OSUMm":
        raise InputError(
            f"An input is `{type(given).__qualname__}`, and no array. Pass arrays, or structs that describe them."
        )
    return given


def _widened(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _is_wide(inputs: Any) -> bool:
    return any(getattr(leaf, "dtype", None) == np.float64 for leaf in jax.tree.leaves(inputs))


def _entry(leaf: Any) -> tuple[str, np.ndarray]:
    array = np.asarray(leaf)
    return array.dtype.name, _widened(array)


def _weights(leaf: Any) -> np.ndarray:
    return np.sin(np.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)
