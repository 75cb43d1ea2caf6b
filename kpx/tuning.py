"""`kpx.tune`: which of a kernel's implementations is the fastest on this machine, measured once and kept in a file."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Group
from rich.text import Text

from kpx.api import compile as compile_for
from kpx.api import jit
from kpx.config import Config, resolve
from kpx.errors import ConfigError, TargetError
from kpx.hardware.target import Target
from kpx.kernels import registry, selection
from kpx.kernels.pattern_check import distance, epsilon, root_mean_square
from kpx.kernels.selection import PLAIN, Case
from kpx.learned import Ranking
from kpx.runtime.build import environment

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 50
_LEAST_GAIN = 0.03  # of its time, or more where measurements scatter, before another than rules' choice is taken


@dataclass(frozen=True)
class Measured:
    """One case, and how its implementations did.

    Attributes:
        case: what was computed, in words.
        fastest: the implementation that is used from now on, or `xla` for plain XLA.
        rules: the one that is used without measurements.
        seconds: of one call, by implementation; medians of rounds in which all ran in turn.
        distances: from a reference in wider numbers, root mean square, relative.
        refused: what was not measured, or is not as near as plain XLA, with the reason.
        order: in which implementations were tried; `learned`, whether earlier measurements said so.
    """

    case: str
    fastest: str
    rules: str
    seconds: dict[str, float]
    distances: dict[str, float]
    refused: dict[str, str]
    order: tuple[str, ...] = ()
    learned: bool = False


@dataclass(frozen=True)
class Tuned:
    """What `tune` found, and where it is kept."""

    path: str
    environment: dict[str, str]
    measured: tuple[Measured, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    def __rich__(self) -> Group:
        if not self.measured:
            return Group(Text("It has no fused op of which there is more than one implementation here."))
        count = f"{len(self.measured)} case{'s' * (len(self.measured) > 1)} of fused ops"
        lines = [f"{count}, measured on {self.environment['device']}; in {self.path}"]
        for found in self.measured:
            lines.append(found.case)
            base = found.seconds.get(found.rules)
            for name in sorted(found.seconds, key=found.seconds.__getitem__):
                marks = ", chosen" * (name == found.fastest) + ", by rules" * (name == found.rules)
                ratio = f"{found.seconds[name] / base:.2f} of rules' time" if base else "measured"
                lines.append(f"  {name}: {ratio}, {found.distances[name]:.1e} from a reference{marks}")
            lines += [f"  {name}: not measured; {reason}" for name, reason in found.refused.items()]
        return Group(*map(Text, lines))


def tune(
    fun_or_model: Any,
    *specs,
    cache: str | os.PathLike,
    config: Config | None = None,
    seconds: float = 2.0,
    tries: int | None = None,
    history: Sequence[str | os.PathLike] = (),
    progress: Callable[[str], None] | None = None,
    **named_specs,
) -> Tuned:
    """Measures every implementation of the fused ops in a function or model on this machine, and keeps what is fastest.

    Each implementation is first compared with a reference in wider numbers, gradients included where the model has them,
    and left out where it is farther from it than plain XLA is. What wins by less than the noise does not replace what rules
    choose. From then on `Config(kernel_cache=...)` chooses by the file, the same way every time; on another device, or with
    other versions, it is not read, and says so.

    Args:
        fun_or_model, *specs, **named_specs: what `kpx.compile` takes; the arrays' values are not used.
        cache: the file, made or added to.
        config: what else may be done.
        seconds: how long one case is measured.
        tries: how many implementations of a case are measured, plain XLA beside them; by default all. Which, is learned
            from `cache` and `history` (see `kpx.learned`), and says rules' order where nothing is known.
        history: further files that `tune` wrote, of this or other machines.
        progress: called with each case before it is measured.

    Raises:
        ConfigError: the file cannot be written, or `tries` is no positive number.
        InputError, CaptureError, UnsupportedError, CompileError: as `kpx.compile`.
    """
    config = dataclasses.replace(resolve(config), kernel_cache=None)
    if tries is not None and (isinstance(tries, bool) or not isinstance(tries, int) or tries < 1):
        raise ConfigError(f"`tries={tries!r}` is no number of implementations. Give a positive one, or None for all.")
    ranking = Ranking.of_files([cache, *history])
    with selection.recording() as cases:
        compiled = compile_for(fun_or_model, *specs, config=config, **named_specs)
    target = compiled.target
    if not target.is_present:
        raise TargetError(f"{target} is not on this machine, and nothing can be measured there.")
    found = []
    for case in cases:
        if case.kernel in dict(config.kernels):
            continue  # asked for by name
        if (kernel := registry.find(case.kernel)) is None or not kernel.on_target(target.platform):
            continue  # there is nothing to choose
        if progress is not None:
            progress(case.text)
        found.append(_measure(kernel, case, target, config, seconds, ranking, tries))
    kept = {m.case: {"fastest": m.fastest, "rules": m.rules, "seconds": m.seconds} for m in found}
    here = environment(target)
    selection.write(cache, here, kept, time.strftime("%Y-%m-%d"))
    return Tuned(os.fspath(cache), here, tuple(found))


def _measure(
    kernel: registry.Kernel,
    case: Case,
    target: Target,
    config: Config,
    seconds: float,
    ranking: Ranking,
    tries: int | None,
) -> Measured:
    attributes = dict(case.attributes)
    options = {"differentiated": case.differentiated, "kind": target.device_kind}
    rules = kernel.choose(target.platform, case.structs, attributes, **options)[0]
    chosen = PLAIN if rules is None else rules.name
    refused: dict[str, str] = {}
    forms: dict[str, Callable] = {PLAIN: kernel.decomposition}
    for implementation in kernel.on_target(target.platform):
        reason = implementation.refuses(case.structs, attributes, case.differentiated)
        if reason is None:
            forms[implementation.name] = implementation.function
        else:
            refused[implementation.name] = reason
    # Rules' choice first, then in the order of preference, unless more is known.
    names = sorted((n for n in forms if n != PLAIN), key=lambda n: n != chosen)
    order, learned = ranking.order(case.text, environment(target), [*names, PLAIN])
    left = [n for n in order if n != PLAIN][slice(tries, None) if tries is not None else slice(0)]
    for name in left:
        del forms[name]
        refused[name] = f"{tries} others were expected to be faster" if learned else f"{tries} come before it"
    arrays = _arrays(kernel, case)
    runs = _ready(kernel, case, forms, arrays, target, config, refused)
    distances = _compared(kernel, case, runs, arrays, refused)
    taken = _timed({name: runs[name] for name in distances}, arrays, seconds)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return Measured(case.text, _fastest(taken, chosen), chosen, medians, distances, refused, tuple(order), learned)


def _arrays(kernel: registry.Kernel, case: Case) -> list[Any]:
    rng = np.random.default_rng(0)
    if kernel.sample is not None:
        return list(map(jnp.asarray, kernel.sample(rng, case.structs, dict(case.attributes))))

    def drawn(struct: jax.ShapeDtypeStruct) -> Any:
        if jnp.issubdtype(struct.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(struct.shape), struct.dtype)
        return jnp.ones(struct.shape, bool) if struct.dtype == bool else jnp.zeros(struct.shape, struct.dtype)

    return list(map(drawn, case.structs))


def _run(kernel: registry.Kernel, case: Case, function: Callable) -> Callable:
    """The result of an implementation; and its gradients, where the case has them."""
    attributes = dict(case.attributes)
    fixed = kernel.fixed(attributes)

    def run(*arrays):
        whole = functools.partial(function, **attributes)
        if not case.differentiated:
            return whole(*arrays)
        places = [i for i, a in enumerate(arrays) if i not in fixed and jnp.issubdtype(a.dtype, jnp.floating)]

        def of_variable(*given):
            rest = dict(zip(places, given, strict=True))
            return whole(*(rest.get(i, a) for i, a in enumerate(arrays)))

        out, pull = jax.vjp(of_variable, *(arrays[i] for i in places))
        return out, pull(jax.tree.map(_cotangent, out))

    return run


def _cotangent(out: Any) -> Any:
    waves = np.sin(np.arange(out.shape[-1] if out.ndim else 1)).astype(jnp.bfloat16)  # that every dtype holds alike
    return jnp.broadcast_to(jnp.asarray(waves).astype(out.dtype), out.shape) if out.ndim else jnp.ones((), out.dtype)


def _ready(
    kernel, case: Case, forms: Mapping[str, Callable], arrays, target: Target, config: Config, refused
) -> dict[str, Any]:
    """The forms, compiled as they would be in a model; what raises is refused."""
    plain = dataclasses.replace(config, kernels=tuple({**dict(config.kernels), kernel.name: PLAIN}.items()))
    ready = {}
    for name, form in forms.items():
        jitted = jit(_run(kernel, case, form), target=target, config=plain)
        try:
            jax.block_until_ready(jitted(*arrays))
        except Exception as error:  # a kernel may be anyone's, and may want more memory than there is
            said = (str(error).splitlines() or ["nothing more"])[0][:200]
            refused[name] = f"it raised {type(error).__name__}: {said}"
            continue
        ready[name] = jitted
    return ready


def _compared(
    kernel, case: Case, runs: Mapping[str, Callable], arrays: Sequence[Any], refused: dict[str, str]
) -> dict[str, float]:
    """The distances from a reference in wider numbers; what is farther than plain XLA is refused."""
    wide = any(a.dtype in (jnp.float32, jnp.float64) for a in arrays)
    try:
        with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
            given = [_wider(a, wide) for a in arrays]
            exact = [
                np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(_run(kernel, case, kernel.decomposition))(*given))
            ]
    except Exception as error:  # memory, above all: what cannot be compared is not used
        refused |= dict.fromkeys(runs, f"no reference could be computed ({type(error).__name__})")
        return {}
    found: dict[str, float] = {}
    each = {name: jax.tree.leaves(run(*arrays)) for name, run in runs.items()}
    allowed = [4 * epsilon(leaf) for leaf in next(iter(each.values()), [])]
    for name in sorted(each, key=lambda n: n != PLAIN):
        scales = [root_mean_square(e) or 1.0 for e in exact]
        far = [distance(np.asarray(v), e, s) for v, e, s in zip(each[name], exact, scales, strict=True)]
        if name == PLAIN:
            allowed = [max(1.5 * d, a) for d, a in zip(far, allowed, strict=True)]
        elif not all(d <= a for d, a in zip(far, allowed, strict=True)):
            refused[name] = f"it is {max(far):.1e} from a reference, and plain XLA {found.get(PLAIN, 0):.1e}"
            continue
        found[name] = max(far)
    return found


def _wider(array: Any, wide: bool) -> Any:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return np.asarray(array).astype(np.float64 if wide else np.float32)


def _timed(runs: Mapping[str, Callable], arrays: Sequence[Any], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, in rounds in which all run in turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for count in range(_MOST_ROUNDS if len(runs) > 1 else 1):
        if count >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            taken[name].append(time.perf_counter() - start)
    return taken


def _fastest(taken: Mapping[str, Sequence[float]], rules: str) -> str:
    """The fastest by medians; rules' choice where that is slower by less than the noise."""
    if not taken:
        return rules
    best = min(taken, key=lambda name: statistics.median(taken[name]))
    if rules not in taken or best == rules:
        return best
    ratios = [a / b for a, b in zip(taken[best], taken[rules], strict=True)]
    middle = statistics.median(ratios)
    scatter = statistics.median(abs(r - middle) for r in ratios)
    return best if middle < 1 - max(_LEAST_GAIN, 2 * scatter) else rules
