"""Rewrites: one function, one fact, and the driver that applies them.

    @rewrite(stablehlo.TransposeOp, exact=True)
    def transpose_of_transpose(op):
        '''Two transposes are one.

        Before:
            func.func @main(...) ...
        After:
            func.func @main(...) ...
        Unchanged:
            func.func @main(...) ...
        '''

The function looks at one op and gives None, or the value (or values) to put in place of its results,
built before the op. The docstring is the rewrite's test (tests/ir/test_rewrites.py).
"""

from __future__ import annotations

import collections
import contextlib
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kpx.errors import ConfigError, KpxError, RewriteError, RewriteWarning
from kpx.ir import module as m
from kpx.ir.module import Value, func, ir, stablehlo


@dataclass(frozen=True)
class Rewrite:
    """A rewrite rule.

    Attributes:
        name: the function's name, which states the fact it uses.
        ops: the op classes it looks at.
        apply: op -> None, or its replacement value(s).
        exact: results are equal bit for bit. Otherwise `bound` says how far they may be.
        bound: the error bound in words, where not exact.
        lacks: what is missing on this machine for the rule to fire, or None.
    """

    name: str
    ops: tuple[type, ...]
    apply: Callable[[Any], Value | Sequence[Value] | None]
    exact: bool
    bound: str
    doc: str
    lacks: Callable[[], str | None] = lambda: None

    @property
    def family(self) -> str:
        """The module that it is written in, by its last name: rules of one are measured together."""
        return self.apply.__module__.rpartition(".")[2]

    def example(self, section: str) -> list[str]:
        """The docstring's StableHLO under `Before:`, `After:` or `Unchanged:`; several if repeated."""
        blocks, current = [], None
        for line in textwrap.dedent("    " + self.doc).splitlines():
            head = line.strip()
            if head in ("Before:", "After:", "Unchanged:"):
                current = [] if head == f"{section}:" else None
                if current is not None:
                    blocks.append(current)
            elif current is not None:
                current.append(line)
        return ["\n".join(block) for block in blocks]


REWRITES: dict[str, Rewrite] = {}


def rewrite(
    *ops: type, exact: bool, bound: str = "", lacks: Callable[[], str | None] = lambda: None
) -> Callable[[Callable], Rewrite]:
    """Registers a rewrite over op classes.

    Args:
        exact: whether outputs stay equal bit for bit.
        bound: needed where not exact: how far outputs may move.
        lacks: (where it needs more than the module) what is missing on this machine for it to fire, or None.

    Raises:
        KpxError: the name is taken, or an inexact rewrite states no bound.
    """

    def register(function: Callable) -> Rewrite:
        if function.__name__ in REWRITES:
            raise KpxError(f"A rewrite named `{function.__name__}` exists. Choose another name.")
        if not exact and not bound:
            raise KpxError(f"The rewrite `{function.__name__}` is not exact: state its error `bound`.")
        rule = Rewrite(function.__name__, ops, function, exact, bound, function.__doc__ or "", lacks)
        REWRITES[rule.name] = rule
        return rule

    return register


@dataclass(frozen=True)
class Burnt:
    """A rewrite that the last unit of fuel was taken for.

    Attributes:
        name: the rewrite's, or the fusion pattern's.
        op: the op that it replaced, as text.
        where: the path in the model that the op came from.
    """

    name: str
    op: str
    where: str


_NOTED: list[Burnt] | None = None  # of all threads: PyTorch's backward pass is compiled by another


@contextlib.contextmanager
def last_burnt() -> Iterator[list[Burnt]]:
    """What the last unit of fuel was taken for, in each module that is compiled inside."""
    global _NOTED
    before, _NOTED = _NOTED, []
    try:
        yield _NOTED
    finally:
        _NOTED = before


class Fuel:
    """How many rewrites may still be applied, so that a miscompile is bisected to one of them.

    `KPX_FUEL=n` stops after n rewrites of a compilation; unset, there is no limit.
    """

    def __init__(self, limit: int | None):
        self.limit = self.left = limit

    @classmethod
    def from_environment(cls) -> Fuel:
        """Raises `ConfigError` where KPX_FUEL is not a whole number, zero or more."""
        given = os.environ.get("KPX_FUEL")
        if given is None or given == "":
            return cls(None)
        if not given.isdecimal():
            raise ConfigError(
                f"KPX_FUEL={given!r} is not a count of rewrites. "
                "Set it to a whole number, zero or more, or unset it for no limit."
            )
        return cls(int(given))

    def burn(self, name: str = "", op: Any = None) -> bool:
        """Takes one unit, for a rewrite of an op; False where none is left. The last one is noted (see `last_burnt`)."""
        if self.left is None:
            return True
        if self.left == 0:
            return False
        if self.left == 1 and _NOTED is not None:
            path = "" if op is None else m.source_path(op)
            _NOTED.append(Burnt(name, "" if op is None else " ".join(str(op).split())[:300], path))
        self.left -= 1
        return True


@dataclass
class Report:
    """What a compilation's rewrites did: name to count, and those that were reverted and why."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    reverted: dict[str, str] = field(default_factory=dict)

    def revert(self, name: str, why: str) -> None:
        self.reverted[name] = why
        warnings.warn(
            f"The rewrite `{name}` was reverted and is off for this compilation: {why} "
            "The model runs without it; please report this.",
            RewriteWarning,
            stacklevel=2,
        )


def apply_rewrites(
    module: ir.Module,
    rules: Iterable[Rewrite],
    fuel: Fuel,
    report: Report,
    *,
    verify_each: bool = False,
    callees: bool = False,
    around: Sequence[Rewrite] | None = None,
) -> int:
    """Applies rules until none fires, in place; verifies, and reverts a rule that breaks the module.

    Args:
        verify_each: verify the module after every single rewrite, not once at the end.
        callees: leave the ops of `main` alone.
        around: begin with the ops that these of the rules look at, and visit others only where something changes:
            enough where the other rules have been applied before.

    Returns:
        How many rewrites were applied.
    """
    rules = [r for r in rules if r.name not in report.reverted]
    before, left = m.copy(module), fuel.left
    driver = _Driver(module, rules, fuel, report, verify_each, callees, around)
    try:
        counts = driver.run()
        m.verify(module)
    except RewriteError:
        m.replace_body(module, before)
        fuel.left = left
        culprit, why = _first_to_break(module, rules, left, callees, around)
        report.revert(culprit, why)
        return apply_rewrites(module, rules, fuel, report, verify_each=verify_each, callees=callees, around=around)
    report.counts.update(counts)
    return sum(counts.values())


def erase_dead(module: ir.Module) -> None:
    """Erases every op of the functions' own blocks that nothing uses and that has no effect, in place."""
    for function in m.functions(module).values():
        for op in reversed(list(m.entry_block(function).operations)):
            if len(op.results) and not _is_used(op) and is_pure(op.operation):
                op.operation.erase()


def _is_used(op: Any) -> bool:
    return any(next(iter(r.uses), None) is not None for r in op.results)


def _first_to_break(
    module: ir.Module,
    rules: list[Rewrite],
    fuel: int | None,
    callees: bool,
    around: Sequence[Rewrite] | None,
) -> tuple[str, str]:
    """The rule whose application first leaves an invalid module (on a copy, verified at each step)."""
    trial = m.copy(module)
    driver = _Driver(trial, rules, Fuel(fuel), Report(), True, callees, around)
    try:
        driver.run()
        m.verify(trial)
    except RewriteError as error:
        return driver.last, str(error)
    raise RewriteError("A stage of rewrites left an invalid module, and no single rewrite was found to.")


class _Driver:
    """A worklist over every op of a module: a change puts its neighbours back on the list."""

    def __init__(self, module, rules, fuel, report, verify_each: bool, callees: bool, around):
        self.module, self.fuel, self.report, self.verify_each = module, fuel, report, verify_each
        self.roots = [f for name, f in m.functions(module).items() if not (callees and name == "main")]
        self.by_op: dict[str, list[Rewrite]] = collections.defaultdict(list)
        for rule in rules:
            for op in rule.ops:
                self.by_op[op.OPERATION_NAME].append(rule)
        self.first = self.by_op.keys() if around is None else {op.OPERATION_NAME for r in around for op in r.ops}
        self.counts: collections.Counter[str] = collections.Counter()
        self.last = ""
        # A dict is the stack: an erased op leaves it at once, since a new op may get its address.
        self.pending: dict[int, Any] = {}
        self.alive: set[int] = set()

    def run(self) -> collections.Counter[str]:
        with self.module.context, ir.Location.unknown():
            for op in reversed([op for root in self.roots for op in m.walk(root)]):
                self.alive.add(_key(op))
                if op.operation.name in self.first:
                    self._push(op.operation)
            while self.pending:
                _, operation = self.pending.popitem()
                if not self._erase_if_dead(operation) and not self._visit(operation):
                    break
        return self.counts

    def _push(self, operation: Any) -> None:
        if len(operation.results):
            self.pending[_key(operation)] = operation

    def _visit(self, operation: Any) -> bool:
        """Tries the rules on one op; False where the fuel is spent."""
        rules = self.by_op.get(operation.name)
        if not rules:
            return True
        op = operation.opview
        with ir.InsertionPoint(operation), operation.location:
            for rule in rules:
                if rule.name in self.report.reverted or (results := self._try(rule, op)) is None:
                    continue
                if not self.fuel.burn(rule.name, op):
                    return False
                break
            else:
                return True
        self._replace(operation, results)
        self.counts[rule.name] += 1
        self.last = rule.name
        if self.verify_each:
            m.verify(self.module)
        return True

    def _try(self, rule: Rewrite, op: Any) -> list[Value] | None:
        """A rule's replacement for an op, once its types are checked; what fails is switched off."""
        try:
            replacement = rule.apply(op)
        except Exception as error:  # a rule may come from anyone, and must not stop the model
            self._blame(rule, error)
            return None
        if replacement is None:
            return None
        results = list(replacement) if isinstance(replacement, (list, tuple)) else [replacement]
        results = [r if isinstance(r, Value) else r.result for r in results]
        wanted = [r.type for r in op.results]
        if [r.type for r in results] != wanted:
            got = ", ".join(str(r.type) for r in results)
            self.report.revert(
                rule.name, f"it gave {got} in place of {', '.join(map(str, wanted))} for {op.operation.name}."
            )
            return None
        return results

    def _blame(self, rule: Rewrite, error: Exception) -> None:
        """Switches off a rule that raised, unless it stumbled over what another had broken."""
        try:
            m.verify(self.module)
        except RewriteError:
            if self.verify_each:  # the module was valid before this rule
                self.last = rule.name
            raise
        self.report.revert(rule.name, f"it raised {type(error).__name__}: {error}.")

    def _replace(self, operation: Any, results: list[Value]) -> None:
        for new in results:
            self._adopt(new)
        for old, new in zip(operation.results, results, strict=True):
            for user in m.users(old):
                self._push(user.operation)
            old.replace_all_uses_with(new)
        self._erase_if_dead(operation)

    def _adopt(self, value: Value) -> None:
        """Puts the new ops that a value depends on, and the op itself, on the list."""
        op = m.producer(value)
        if op is None:
            return
        known = _key(op) in self.alive
        self._push(op.operation)
        if known:
            return
        self.alive.add(_key(op))
        for operand in op.operands:
            self._adopt(operand)
        for inner in m.walk(op):
            self.alive.add(_key(inner))
            self._push(inner.operation)

    def _erase_if_dead(self, operation: Any) -> bool:
        """Erases an op that nothing uses and that has no effect, then what fed only it."""
        if _is_used(operation) or not is_pure(operation):
            return False
        feeding = _producers(operation)
        for inner in m.walk(operation):
            feeding |= _producers(inner)
            self._forget(inner)
        self._forget(operation)
        operation.erase()
        for key, op in feeding.items():
            if key in self.alive:
                self._push(op)
        return True

    def _forget(self, op: Any) -> None:
        self.alive.discard(_key(op))
        self.pending.pop(_key(op), None)


def _producers(op: Any) -> dict[int, Any]:
    return {_key(p): p.operation for o in op.operands if (p := m.producer(o)) is not None}


def _key(op: Any) -> int:
    """An op's identity. Not its own hash, which MLIR makes of its operands, and those change."""
    return hash(op.results[0]) if len(op.results) else 0


_EFFECTS = {
    "func.func", "func.return", "func.call", "stablehlo.return", "stablehlo.send",
    "stablehlo.recv", "stablehlo.infeed", "stablehlo.outfeed", "stablehlo.while",
    "stablehlo.rng", "stablehlo.create_token", "stablehlo.after_all", "builtin.module",
}  # fmt: skip


def is_pure(operation: Any) -> bool:
    """Whether an op may be erased when nothing uses it: StableHLO, CHLO, and no effect."""
    name = operation.name
    if name in _EFFECTS or not name.startswith(("stablehlo.", "chlo.")):
        return False
    if name == "stablehlo.custom_call":
        stated = operation.attributes
        return "has_side_effect" not in stated or not ir.BoolAttr(stated["has_side_effect"]).value
    return not len(operation.regions) or all(is_pure(op.operation) or _ends(op) for op in m.walk(operation))


def _ends(op: Any) -> bool:
    return isinstance(op, (stablehlo.ReturnOp, func.ReturnOp))
