"""The gate: what is optional is measured against the module without it, and kept or taken back.

Optional is every rewrite that is not exact, by family, and every kernel. All ways are run in turn on the arrays of the
first call; one replaces another where it is faster by more than the measurements scatter, pair by pair. A way whose
results are far from those of the module without anything optional is wrong, and is dropped whatever its speed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx._version import __version__
from kpx.config import Config
from kpx.errors import KpxError, RewriteWarning
from kpx.hardware.target import Target
from kpx.ir import module as m
from kpx.ir.module import stablehlo
from kpx.ir.rewrite import REWRITES, is_pure
from kpx.kernels import registry
from kpx.kernels.pattern_check import root_mean_square
from kpx.kernels.selection import PLAIN
from kpx.passes import rolled
from kpx.pipeline import Context
from kpx.runtime import choices
from kpx.runtime.choices import Choice

KERNELS = "kernels"
LAYERS = "layers"
_PAIRS = 5  # of runs, at least, before one way replaces another
_MOST_PAIRS = 25
_LEAST_GAIN = 0.02
_LONG = 60.0  # seconds that level="aggressive" may measure


@dataclass
class Way:
    """One way to run a module, compiled.

    Attributes:
        run: runs it on the arrays to measure with, and gives what it computes, ready.
        seconds: how long making it took.
        made: what its maker wants back.
    """

    config: Config
    options: Mapping[str, str]
    context: Context
    run: Callable[[], Sequence[Any]]
    seconds: float
    made: Any = None


class Decision:
    """What is known of how a module is run fastest, before it is rewritten; and, where nothing is, what is measured.

    Attributes:
        config, options: what to compile it with.
        is_open: whether it is to be measured.
    """

    def __init__(self, module: Any, target: Target, config: Config, environment: Mapping[str, str]):
        self.config, self.options, self.is_open = config, {}, False
        self._known: Choice | None = None
        measures = config.measure_seconds > 0 or config.level == "aggressive"
        if not config.may_be_inexact or not (measures or config.choices) or not _is_measurable(module, target):
            return
        if jax.process_count() > 1:
            return  # each process would measure and choose for itself, and all must run one program
        self._given, self._environment = config, environment
        self._key = _key(module, target, config)
        self._known = choices.find(self._key, environment, config.choices, OPTIONS)
        self.is_open = self._known is None and measures
        if self._known is not None:
            self.config, self.options = without(config, self._known.dropped, {}), self._known.options

    def tell(self, context: Context) -> None:
        """Puts what was known into a context's report."""
        if self._known is not None:
            report(context, self._known, anew=False)

    def measured(self, first: Way, make: Callable[[Config, Mapping[str, str]], Way]) -> Any:
        """What the maker of the fastest way made; the choice is remembered."""
        self.is_open = False
        best, choice = choose(first, make, budget(self._given, first.seconds))
        report(best.context, choice)
        if "all" in choice.notes or not choice.notes:  # else there was no time: another process may have more
            choices.remember(self._key, choice, self._environment, time.strftime("%Y-%m-%d"))
        return best.made


def _is_measurable(module: Any, target: Target) -> bool:
    """Whether a module may be run more than once, here, and by this process alone."""
    effects = any(not is_pure(op.operation) and op.operation.name.startswith("stablehlo.") and not _ends(op)
                  for op in m.walk(module.operation))  # fmt: skip
    return (
        target.is_present
        and target.isa is None
        and m.partitions(module) == 1
        and jax.process_count() == 1
        and not effects
    )


def _ends(op: Any) -> bool:
    return isinstance(op, stablehlo.ReturnOp) or len(op.operation.regions) > 0


def _key(module: Any, target: Target, config: Config) -> str:
    """A module, what it is for and what may be done to it, as one word."""
    rest = dataclasses.replace(config, measure_seconds=0.0, choices=None, cache_dir=None, compile_seconds=1.0)
    parts = [m.text(module, large_constants=True), target.text, repr(rest), *sorted(target.features), __version__]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


# The compiler's options that level="aggressive" tries: what XLA:CPU hands to its library, how wide vectors are, and
# whether several threads share one op.
OPTIONS: dict[str, tuple[str, ...]] = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
        "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_ELTWISE,LIBRARY_FUSION_TYPE_REDUCE",
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
    ),
    "xla_cpu_prefer_vector_width": ("256", "512"),
    "xla_cpu_multi_thread_eigen": ("false",),
}


def groups(context: Context) -> dict[str, tuple[str, ...]]:
    """The optional parts of what was done to a module: families of rewrites with their names, kernels with the ops', and
    that layers are a loop."""
    found: dict[str, list[str]] = {}
    for name in context.report.counts:
        rule = REWRITES.get(name)
        if rule is not None and not rule.exact:
            found.setdefault(rule.family, []).append(name)
    kernels = [op.partition(" ")[0] for op, runs in context.kernels.items() if not runs.startswith("decomposition")]
    fusions = [name for name in context.fusions if name not in kernels and not name.startswith("kpx.")]
    if kernels or fusions:
        found[KERNELS] = [*kernels, *fusions]
    if rolled.LOOP in context.layers.values():
        found[LAYERS] = []
    return {name: tuple(sorted(set(members))) for name, members in found.items()}


def without(config: Config, dropped: Mapping[str, str], families: Mapping[str, Sequence[str]]) -> Config:
    """A config that leaves groups out."""
    disabled, kernels = list(config.disable), dict(config.kernels)
    for group in dropped:
        members = families.get(group) or _all_of(group)
        for name in members:
            if group == KERNELS and name.startswith("kpx."):
                kernels.setdefault(name, PLAIN)
            else:
                disabled.append(name)
    layers = "unrolled" if LAYERS in dropped else config.layers
    return dataclasses.replace(config, disable=tuple(dict.fromkeys(disabled)), kernels=kernels, layers=layers)


def _all_of(group: str) -> list[str]:
    """Everything that may be in a group, where it is not known what was."""
    if group == KERNELS:
        return [kernel.name for kernel in registry.kernels()]
    return [r.name for r in REWRITES.values() if r.family == group and not r.exact]


def budget(config: Config, compile_seconds: float) -> float:
    """How many seconds may be spent on measuring a module that took so long to compile."""
    if config.level == "aggressive":
        return max(config.measure_seconds, _LONG)
    return min(config.measure_seconds, 3 * compile_seconds)


def choose(first: Way, make: Callable[[Config, Mapping[str, str]], Way], seconds: float) -> tuple[Way, Choice]:
    """The fastest right way that could be found within some seconds, and what is to be remembered of that.

    Args:
        first: everything on, which rules choose.
        make: makes a way of a config and options of the compiler.
    """
    families = groups(first.context)
    if not families:
        return first, Choice()
    search = _Search(first, make, families, time.perf_counter() + seconds)
    search.run()
    return search.best, Choice(search.dropped, dict(search.best.options), search.notes)


class _Search:
    def __init__(self, first: Way, make: Callable, families: Mapping[str, Sequence[str]], end: float):
        self.best, self.make, self.families, self.end = first, make, families, end
        self.first = first
        self.dropped: dict[str, str] = {}
        self.notes: dict[str, str] = {}

    def run(self) -> None:
        """Everything against nothing; then without each group; then other options, where there is time."""
        config = self.first.config
        nothing = self._made(dict.fromkeys(self.families, "off"), "nothing optional")
        if nothing is None:
            return
        wanted, given = nothing.run(), self.first.run()
        far = _far(given, wanted, config)
        ratio = self._ratio(self.first, nothing)
        self.notes["all"] = f"{ratio.text} of the time with nothing optional"
        if far or ratio.is_slower:
            self._replace(nothing, dict.fromkeys(self.families, far or f"slower together: {ratio.text} of the time"))
            self._add_what_helps(wanted)
        elif len(self.families) > 1:
            self._drop_what_harms()
        if config.level == "aggressive" and self.first.context.device.platform == "cpu":
            self._try_options(wanted)

    def _add_what_helps(self, wanted: Sequence[Any]) -> None:
        """From nothing on, each group that is right and does not harm."""
        for group in self.families:
            rest = {g: why for g, why in self.dropped.items() if g != group}
            way = self._made(rest, group)
            if way is None:
                continue
            if far := _far(way.run(), wanted, self.first.config):
                self._drop(group, far)
                continue
            ratio = self._ratio(way, self.best)
            if ratio.is_faster:
                self.notes[group] = f"{ratio.text} of the time without"
                self._replace(way, rest)
            else:
                self._drop(group, f"{ratio.text} of the time without it")

    def _drop_what_harms(self) -> None:
        for group in self.families:
            rest = {**self.dropped, group: ""}
            way = self._made(rest, group)
            if way is None:
                continue
            ratio = self._ratio(self.best, way)
            if ratio.is_slower:
                self._replace(way, {**self.dropped, group: f"{ratio.text} of the time without it"})
            else:
                self.notes[group] = f"{ratio.text} of the time without"

    def _try_options(self, wanted: Sequence[Any]) -> None:
        for name, values in OPTIONS.items():
            for value in values:
                options = {**self.best.options, name: value}
                way = self._made(self.dropped, f"{name}={value}", options)
                if way is None or _far(way.run(), wanted, self.first.config):
                    continue
                ratio = self._ratio(way, self.best)
                self.notes[f"{name}={value}"] = f"{ratio.text} of the time without"
                if ratio.is_faster:
                    self.best = way

    def _made(self, dropped: Mapping[str, str], what: str, options: Mapping[str, str] | None = None) -> Way | None:
        """A way, or None where there is no time for it, or it cannot be made."""
        needed = self.first.seconds + 2 * (_PAIRS + 1) * self._once(self.best)
        if time.perf_counter() + needed > self.end:
            self.notes[what] = f"not measured: it would take more than the {max(needed, 0):.1f} s that are left"
            return None
        try:
            config = without(self.first.config, dropped, self.families)
            return self.make(config, self.best.options if options is None else options)
        except (KpxError, RuntimeError) as error:
            self.notes[what] = f"not measured: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            return None

    def _once(self, way: Way) -> float:
        if "call" not in self.__dict__:
            start = time.perf_counter()
            way.run()
            self.call = max(time.perf_counter() - start, 0.0)
        return self.call

    def _ratio(self, a: Way, b: Way) -> _Ratio:
        """How long one way takes over another, in pairs of runs until that is clear or this comparison's time is up."""
        for way in (a, b):
            way.run()
        found: list[float] = []
        # A short call is repeated, so that one measurement is no shorter than a millisecond.
        repeat = max(1, min(100, int(1e-3 / max(self._once(a), 1e-6))))
        share = (self.end - time.perf_counter()) / (len(self.families) + 1)
        until = time.perf_counter() + share
        while len(found) < _PAIRS or (
            len(found) < _MOST_PAIRS and time.perf_counter() < until and not _Ratio.of(found).is_clear
        ):
            taken = [_seconds(way.run, repeat) for way in ((a, b) if len(found) % 2 else (b, a))]
            seconds_a, seconds_b = taken if len(found) % 2 else taken[::-1]
            found.append(seconds_a / seconds_b if seconds_a > 0 and seconds_b > 0 else 1.0)  # a clock may jump
        return _Ratio.of(found)

    def _drop(self, group: str, why: str) -> None:
        self.dropped[group] = why

    def _replace(self, way: Way, dropped: dict[str, str]) -> None:
        self.best, self.dropped = way, dropped


@dataclass(frozen=True)
class _Ratio:
    """A ratio of times, and how far it scatters."""

    median: float
    noise: float

    @classmethod
    def of(cls, found: Sequence[float]) -> _Ratio:
        median = statistics.median(found)
        spread = statistics.median(abs(r - median) for r in found)
        return cls(median, max(_LEAST_GAIN, 2 * 1.4826 * spread / len(found) ** 0.5))

    @property
    def is_faster(self) -> bool:
        return self.median < 1 - self.noise

    @property
    def is_slower(self) -> bool:
        return self.median > 1 + self.noise

    @property
    def is_clear(self) -> bool:
        return self.noise <= _LEAST_GAIN or abs(self.median - 1) > 3 * self.noise

    @property
    def text(self) -> str:
        return f"{self.median:.2f} (± {self.noise:.2f})"


def _seconds(run: Callable[[], Any], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat


_ROUNDED = (
    0.1  # how far results may be where factors are rounded to few bits: a sum in another order rounds some otherwise
)
_ROUNDED_TO_FOUR_BITS = 0.3


def _far(given: Sequence[Any], wanted: Sequence[Any], config: Config) -> str:
    """How results are wrong, in words; "" where they differ by no more than another order of sums makes them.

    Of floating arrays alone: an integer may be the place of one of two numbers that are nearly equal.
    """
    least = 0.0 if config.precision is None else _ROUNDED_TO_FOUR_BITS if "fp4" in repr(config.precision) else _ROUNDED
    for i, (ours, theirs) in enumerate(zip(given, wanted, strict=True)):
        if not jnp.issubdtype(theirs.dtype, jnp.inexact) or not theirs.size:
            continue
        limit = max(least, min(0.1, 64 * float(jnp.finfo(theirs.dtype).eps) ** 0.75))
        wide = np.complex128 if jnp.issubdtype(theirs.dtype, jnp.complexfloating) else np.float64
        a, b = np.asarray(ours).astype(wide), np.asarray(theirs).astype(wide)
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
            return f"wrong: infinities or NaN of output {i} are not where they were"
        scale = root_mean_square(np.abs(b[finite])) or 1.0
        if (found := root_mean_square(np.abs(a[finite] - b[finite])) / scale) > limit:
            return f"wrong: output {i} is {found:.1g} from that of the module without it, where {limit:.1g} may be"
    return ""


def report(context: Context, choice: Choice, *, anew: bool = True) -> None:
    """Puts what was dropped into a context's report; what was found wrong just now, with a warning too."""
    for group, why in choice.dropped.items():
        context.report.reverted[group] = f"measured: {why}"
        if why.startswith("wrong") and anew:
            warnings.warn(
                f"The rewrites of `{group}` were reverted for this module: {why}. It runs without them; please report "
                "this. `python -m kpx bisect` finds the one.",
                RewriteWarning,
                stacklevel=3,
            )
    context.measured.update(choice.notes)
