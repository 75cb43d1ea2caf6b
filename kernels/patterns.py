"""Fusion patterns: a computation as a JAX function, and what to compute it by, another one.

`kpx.passes.fusion` looks for each in a module, in the forward and the backward pass alike, and holds what it finds as a
composite whose decomposition is the ops that were there: where nothing better takes it, nothing has changed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import jax
import jax.numpy as jnp

from kpx.errors import InputError

PREFIX = "kpx.fused."


@dataclass(frozen=True, eq=False)
class Pattern:
    """A computation to look for, and what computes it better.

    Attributes:
        name: what it is called; forms of one op, told apart after a dot (`attention.causal`), are reported as that op.
        searches: spellings of the computation, `search(*arrays, **numbers)`, in plain JAX. Those of one inner tuple differ
            in conversions, broadcasts, reshapes and transposes alone.
        replace: `(*arrays, **numbers)`, results of the same types; calls of kpx's kernels in it are chosen by target.
        example: shapes and dtypes that the searches can be traced at.
        numbers: keywords that are constants in a module, with an example of each.
        supports: `(*structs, **numbers)` gives the reason why a case is left alone, or None.
        fixed_ranks: whether arrays have the ranks that they have in the example.
        stacked: the places of arrays that may have a first dimension of size 1 more, as a slice of a stack has.
        constant: the places of arrays that no gradient is looked for by (masks).
        checked: whether it need not be compared with what it replaces before it is first used.
        differentiated: further spellings, which only their gradients tell apart from those of `searches`.
        parallel: for each array, and for the result, a letter a dimension; along dimensions of one letter results are
            independent, and devices may each compute a part. Not along those of "."; and of arrays with "*" each device
            needs the whole. Empty where nothing is independent.
        alike: what patterns have in common whose searches differ, group for group, in what is left out of skeletons alone
            (conversions, broadcasts, reshapes, transposes): they are looked for together. Empty for none.
        carries: the replacement that gives the first array too, as it is: for a module that uses that beside the result (a
            residual), whose further gradient the kernel then adds.
        among: operations, one of which every spelling has (`exponential`): modules without are not searched. Empty for any.
        types: element types, as MLIR writes them (`i8`), that something is converted to in every module that has it.
        platforms: where it is looked for; empty for wherever its kernels are.
        mask: the place of an array that hides scores, `[..., length, kv_length]`, or None. Where no input decides it,
            `replace` is told what it is by one keyword more, `visible` (see `kernels.visible`).
        with_gradient_alone: whether it is looked for with its gradient alone, since forward a compiler does as well.
        positive: the places of arrays that are never negative (variances), which the check draws so.
        inference_alone: whether it is left alone in modules that are differentiated, unless it is asked for.
        shared: the places of two arrays of which parts may be repeated (keys and values, for heads that share them): forward,
            `replace` is given what is repeated.
        gradient_of: the pattern that this is the forward and backward pass of: `(*arrays, cotangent)` gives the result
            and the gradients by every array that is not constant. The cotangent may be a scalar, alike everywhere. With
            `carried`, after it comes what is added to the gradient by the first array.
    """

    name: str
    searches: tuple[tuple[Callable, ...], ...]
    replace: Callable
    example: tuple[jax.ShapeDtypeStruct, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)
    supports: Callable[..., str | None] | None = None
    fixed_ranks: bool = False
    checked: bool = False
    differentiated: tuple[tuple[Callable, ...], ...] = ()
    gradient_of: Pattern | None = None
    constant: tuple[int, ...] = ()
    alike: str = ""
    parallel: tuple[str, ...] = ()
    carries: Callable | None = None
    with_gradient_alone: bool = False
    carried: bool = False
    stacked: tuple[int, ...] = ()
    among: tuple[str, ...] = ()
    types: frozenset[str] = frozenset()
    platforms: tuple[str, ...] = ()
    mask: int | None = None
    inference_alone: bool = False
    positive: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()

    def spellings(self) -> Iterator[Callable]:
        """Every search."""
        return itertools.chain.from_iterable((*self.searches, *self.differentiated))

    @property
    def label(self) -> str:
        """What reports count it as."""
        return f"kpx.{self.name.partition('.')[0]}" + (" and its gradient" if self.gradient_of else "")


_PATTERNS: dict[str, Pattern] = {}


def register(pattern: Pattern) -> Pattern:
    """Has a pattern looked for from now on.

    Raises:
        InputError: the name is taken; a search cannot be traced at the example; or the replacement's results are of
            other types than a search's.
    """
    if pattern.name in _PATTERNS:
        raise InputError(f"A pattern named `{pattern.name}` is registered already. Choose another name.")
    if not pattern.checked:  # kpx's own are, and there are many
        check_types(pattern)
    _PATTERNS[pattern.name] = pattern
    return pattern


def check_types(pattern: Pattern) -> None:
    """Raises InputError where a search cannot be traced at the example, or gives other types than the replacement."""
    for search in pattern.spellings():
        wanted, found = (_results(f, pattern) for f in (search, pattern.replace))
        if wanted != found:
            raise InputError(
                f"The pattern `{pattern.name}` gives {_types(wanted)}, and its replacement {_types(found)}: they must have "
                "the same structure, shapes and dtypes."
            )


def unregister(name: str) -> None:
    """Has a pattern looked for no longer."""
    _PATTERNS.pop(name, None)


def patterns() -> list[Pattern]:
    """Every pattern that is registered, those of installed packages included.

    A package names functions in the entry point group `kpx.patterns`: each registers its own when it is called.
    """
    _load_packages()
    return list(_PATTERNS.values())


@functools.cache
def _load_packages() -> None:
    for entry in entry_points(group="kpx.patterns"):
        entry.load()()


def with_gradient(pattern: Pattern) -> list[Pattern]:
    """A pattern's forward and backward pass as one pattern, and where the first array is carried on, as another; none where
    it has several results, or gradients by integers."""
    kinds = [""]
    if pattern.carries is not None:  # sums of gradients are ordered otherwise where no conversion is between
        kinds += ["carried", "carried in f32"]
    return [p for kind in kinds if (p := _with_gradient(pattern, kind)) is not None]


@functools.cache
def _with_gradient(pattern: Pattern, kind: str) -> Pattern | None:
    results = _results(pattern.replace, pattern)
    variable = [s for place, s in enumerate(pattern.example) if place not in pattern.constant]
    if len(results) != 1 or not all(jnp.issubdtype(s.dtype, jnp.floating) for s in variable):
        return None
    ((shape, dtype),) = results
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    differentiated = functools.partial(_differentiated, constant=pattern.constant, carried=bool(kind))
    example = [*pattern.example, jax.ShapeDtypeStruct(shape, dtype), *([pattern.example[0]] if kind else [])]
    if kind.endswith("f32"):
        example = [jax.ShapeDtypeStruct(s.shape, jnp.float32) for s in example]
    ending = f"{kind.replace(' ', '_')}{'.' if kind else ''}gradient"
    return Pattern(
        name=f"{pattern.name}.{ending}",
        searches=tuple(tuple(map(differentiated, group)) for group in (*pattern.searches, *pattern.differentiated)),
        replace=differentiated(pattern.replace),
        example=tuple(example),
        numbers=pattern.numbers,
        supports=None if pattern.supports is None else functools.partial(_supports_arrays, pattern),
        fixed_ranks=pattern.fixed_ranks,
        checked=pattern.checked,
        gradient_of=pattern,
        carried=bool(kind),
        alike=pattern.alike and f"{pattern.alike}.{ending}",
        stacked=pattern.stacked,
    )


def _differentiated(function: Callable, constant: tuple[int, ...], carried: bool) -> Callable:
    def both(*given, **numbers):
        *arrays, cotangent = given[:-1] if carried else given
        variable, whole = hold(functools.partial(function, **numbers), constant, arrays)
        if carried:
            (out, _), pull = jax.vjp(lambda *a: (whole(*a), a[0]), *variable)
            return out, *pull((jnp.broadcast_to(cotangent, out.shape), given[-1]))
        out, pull = jax.vjp(whole, *variable)
        return out, *pull(jnp.broadcast_to(cotangent, out.shape))

    return both


def hold(function: Callable, constant: tuple[int, ...], arrays: Sequence[Any]) -> tuple[list[Any], Callable]:
    """The arrays that are not constant, and a function's result as one of those alone."""

    def of_variable(*given):
        rest = iter(given)
        return function(*(a if place in constant else next(rest) for place, a in enumerate(arrays)))

    return [a for place, a in enumerate(arrays) if place not in constant], of_variable


def _supports_arrays(pattern: Pattern, *structs, **numbers) -> str | None:
    assert pattern.supports is not None  # it is called where there is one
    return pattern.supports(*structs[: len(pattern.example)], **numbers)


def find(composite: str) -> Pattern | None:
    """The pattern behind a composite's name, or None where it is somebody else's."""
    return _PATTERNS.get(composite.removeprefix(PREFIX)) if composite.startswith(PREFIX) else None


def builtin(
    name: str,
    searches: Sequence[Callable | tuple[Callable, ...]],
    replace: Callable,
    example: Sequence[tuple[tuple[int, ...], Any]],
    supports: Callable[..., str | None] | None = None,
    *,
    fixed_ranks: bool = False,
    differentiated: Sequence[tuple[Callable, ...]] = (),
    constant: tuple[int, ...] = (),
    alike: str = "",
    parallel: tuple[str, ...] = (),
    carries: Callable | None = None,
    with_gradient_alone: bool = False,
    stacked: tuple[int, ...] = (),
    among: tuple[str, ...] = (),
    types: tuple[str, ...] = (),
    platforms: tuple[str, ...] = (),
    mask: int | None = None,
    inference_alone: bool = False,
    positive: tuple[int, ...] = (),
    shared: tuple[int, ...] = (),
    **numbers: float,
) -> Pattern:
    """Registers a pattern of kpx's own, which the tests check."""
    structs = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in example)
    groups = tuple(group if isinstance(group, tuple) else (group,) for group in searches)
    return register(
        Pattern(
            name,
            groups,
            replace,
            structs,
            numbers,
            supports,
            fixed_ranks,
            True,
            tuple(differentiated),
            None,
            constant,
            alike,
            parallel,
            carries,
            with_gradient_alone,
            stacked=stacked,
            among=among,
            types=frozenset(types),
            platforms=platforms,
            mask=mask,
            inference_alone=inference_alone,
            positive=positive,
            shared=shared,
        )
    )


def _results(function: Callable, pattern: Pattern) -> list[tuple[tuple[int, ...], str]]:
    try:
        found = jax.eval_shape(lambda *arrays: function(*arrays, **pattern.numbers), *pattern.example)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{s.dtype}{list(s.shape)}" for s in pattern.example)
        where = getattr(inspect.unwrap(function), "__qualname__", repr(function))
        raise InputError(
            f"`{where}`, of the pattern `{pattern.name}`, cannot be traced at its example ({given}): {error}"
        ) from error
    return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(found)]


def _types(results: Sequence[tuple[tuple[int, ...], str]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in results) or "nothing"
