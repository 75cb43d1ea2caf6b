"""`kpx.plan`: the sharding of a training step for a machine, with its costs, and what else was considered."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kpx.config import Config, resolve
from kpx.errors import ConfigError, InputError, OutOfMemoryError, PlanError
from kpx.hardware.target import Target
from kpx.ir import module as m
from kpx.kernels import mixture_split
from kpx.runtime.build import lower_for
from kpx.sharding import fused, graph, search
from kpx.sharding.constrain import constrain
from kpx.sharding.dims import Dims, Roles, roles_of
from kpx.sharding.exchange import Between, Groups
from kpx.sharding.explain import explained, text
from kpx.sharding.explain import variant as _said
from kpx.sharding.layout import Axes, Layout, Sharding
from kpx.sharding.price import Exchange, Price, Pricing

GOALS = ("time", "memory")
_KEPT = 8  # runners-up


@dataclass(frozen=True)
class Plan:
    """How a step is to lie on a machine, and what that is foreseen to cost.

    Attributes:
        target: the machine.
        mesh: sizes of axes by name, the outermost first.
        shardings: for each argument of the step, a pytree of `NamedSharding`s like it.
        fits: whether a device's memory holds it: by its compiler where that was asked, else as foreseen.
        predicted_seconds: of a step, by a model of the machine: for comparing plans.
        memory_per_device_bytes: the most that a device holds: by its compiler where that was asked, else as foreseen.
        confirmed: whether the compiler was asked.
        collectives: every exchange of a step, as foreseen.
        variant: what was chosen of the step itself (`remat`, `microbatches`), where it can be chosen.
        runners_up: plans that come after it, the best first.
        remarks: what is good to know: dimensions that are not divided, plans that the compiler refused.
    """

    target: Target
    mesh: dict[str, int]
    shardings: tuple[Any, ...]
    specs: tuple[Any, ...] = field(repr=False)
    fits: bool
    predicted_seconds: float
    memory_per_device_bytes: float
    confirmed: bool
    collectives: tuple[Exchange, ...] = field(repr=False)
    variant: Mapping[str, Any]
    runners_up: tuple[Plan, ...] = field(repr=False)
    remarks: tuple[str, ...]
    price: Price = field(repr=False)
    roles: Roles = field(repr=False)
    split: Mapping[tuple[int, int], Axes] = field(repr=False)
    storage: Axes = field(repr=False)
    priorities: tuple[Axes, ...] = field(repr=False)
    given: Mapping[int, Sharding] = field(repr=False)
    state_argnums: tuple[int, ...] = field(repr=False)

    def apply(self, step: Callable, *, config: Config | None = None, donate: bool = True) -> Any:
        """The step, jitted as planned: `kpx.jit` of it, whose module carries the plan.

        Args:
            donate: whether the state's old arrays are given up, as a plan's memory takes it.

        Raises:
            ConfigError: the target is here, and has fewer devices than the plan.
        """
        from kpx.api import jit

        options: dict[str, Any] = {"keep_unused": True}
        if donate:
            options["donate_argnums"] = self.state_argnums
        if self.target.is_present:
            options["in_shardings"] = self.placed()
        varied: Any = step.varied(**self.variant) if hasattr(step, "varied") else step
        if self.mesh.get("pipeline", 1) > 1:
            varied = varied.along(self._mesh_here)
        else:
            varied = self._in_groups(varied) if getattr(varied, "exchange", None) else self._with_experts(varied)
        return jit(varied, target=self.target, config=config, before=self.put_into, **options)

    def _in_groups(self, step: Any) -> Any:
        """The step, whose groups along `data` exchange gradients. Mixtures of experts in a group are the partitioner's."""
        return step.among(Groups(self._mesh_here, jax.tree.map(lambda s: s.spec, self.shardings[0].params)))

    def _with_experts(self, step: Callable) -> Callable:
        """The step, whose mixtures of experts are traced for the mesh."""
        mesh = self._mesh_here
        rows = tuple(a for a in ("data", "fsdp", "expert") if self.mesh.get(a, 1) > 1)
        lead = (rows, ("context",)) if self.mesh.get("context", 1) > 1 else (rows,)
        spread = mixture_split.Spread(mesh, lead, "expert" if "expert" in rows else None)

        @functools.wraps(step, updated=())
        def spread_step(*arguments):
            with mixture_split.spread_over(spread):
                return step(*arguments)

        return spread_step

    def placed(self) -> tuple[Any, ...]:
        """`shardings` on the devices that are here, to put arrays with `jax.device_put`.

        Raises:
            ConfigError: there are fewer devices than the plan has.
        """
        mesh = self.device_mesh
        return jax.tree.map(lambda s: NamedSharding(mesh, s.spec, memory_kind=s.memory_kind), self.shardings)

    @functools.cached_property
    def device_mesh(self) -> Mesh:
        """The mesh of the devices that are here, all processes' together."""
        count = math.prod(self.mesh.values())
        devices = jax.devices("gpu" if self.target.platform in ("cuda", "rocm") else self.target.platform)
        if len(devices) < count:
            raise ConfigError(
                f"The plan is for {count} devices ({text(self)}), and JAX finds {len(devices)} here. Plan for the "
                "devices that there are (`target=None`), or run where there are as many."
            )
        kinds, sizes, names = (AxisType.Auto,) * len(self.mesh), tuple(self.mesh.values()), tuple(self.mesh)
        slices = len({d.slice_index for d in devices[:count]}) if self.target.platform == "tpu" else 1
        if slices > 1 and sizes[0] % slices == 0:  # the outermost axis is along slices
            inside, between = (sizes[0] // slices, *sizes[1:]), (slices, *[1] * (len(sizes) - 1))
            return Mesh(mesh_utils.create_hybrid_device_mesh(inside, between, devices[:count]), names, axis_types=kinds)
        return jax.make_mesh(sizes, names, axis_types=kinds, devices=devices[:count])

    @property
    def _mesh_here(self) -> Mesh | AbstractMesh:
        """Of the devices, where they are here."""
        if self.target.is_present:
            return self.device_mesh
        kinds = (AxisType.Auto,) * len(self.mesh)
        return AbstractMesh(tuple(self.mesh.values()), tuple(self.mesh), axis_types=kinds)

    def put_into(self, module: Any) -> None:
        """Puts the plan into a step's module, in place."""
        if m.mesh_axes(module):
            constrain(module, self.roles, self._layout_on, self.target)

    def _layout_on(self, dims: Dims) -> Layout:
        # In the order of the plan: what comes first has an axis before others do.
        split = {dims.at(place): axes for axes in self.priorities for place, a in self.split.items() if a == axes}
        given = {dims.graph.arguments[place]: sharding for place, sharding in self.given.items()}
        return Layout(dims, self.mesh, split, self.storage, given)

    def explain(self) -> str:
        """In words: what each axis does, which exchanges it costs, and what the next best plans would cost."""
        return explained(self)

    def __str__(self):
        return self.explain()


def plan(
    step: Callable,
    *specs: Any,
    target: str | Target | None = None,
    fixed: Mapping[str, int] | None = None,
    goal: str = "time",
    confirm: int | None = None,
    config: Config | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Plans the sharding of a training step.

    Every argument that the step gives back anew (a result of the same structure, shapes and dtypes) is state, as weights and
    an optimizer's; the others are data, whose first dimension is the batch and whose second may be a sequence.

    Args:
        step: `(*arguments) -> results`, as `(weights, state, batch) -> (weights, state, loss)`; or a `kpx.train.Step`, of which
            rematerialization and microbatches are chosen too.
        *specs: its arguments: arrays or `jax.ShapeDtypeStruct`s. Shardings that they have, over a mesh of the axes below, are
            kept, and so is that mesh.
        target: the machine, as `tpu-v5p:8x8x8`; by default JAX's devices here.
        fixed: sizes of axes that are to be kept: `pipeline` (layers in stages; of a `kpx.train.Step`), `data` (the batch), `fsdp` (the batch, and weights stored in parts), `context`
            (the sequence), `expert`, `tensor` (weights' own dimensions).
        goal: `time`: the fastest that fits; `memory`: what takes the least.
        confirm: how many of the best are compiled by the machine's own compiler, until one fits; by default one where that
            compiler is installed and the machine is not here, else none.
        progress: is told what is being done.

    Raises:
        InputError: no argument is state or data, or `goal` is not one.
        ConfigError: `fixed` has an axis that there is not, or sizes that the devices do not make.
        PlanError: nothing fits; the message says how many devices would hold it.
    """
    config, fixed = resolve(config), dict(fixed or {})
    target = Target.resolve(target, may_be_absent=True)
    if goal not in GOALS:
        raise InputError(f"`goal={goal!r}` is not known. Plans are for {' or '.join(repr(g) for g in GOALS)}.")
    tell = progress or (lambda text: None)
    planner = _Planner(step, specs, target, fixed, goal, config, tell)
    return planner.plan(_how_many(confirm, target))


def _how_many(confirm: int | None, target: Target) -> int:
    if confirm is not None:
        return confirm
    from kpx.hardware import plugins

    return int(not target.is_present and plugins.find(target.platform) is not None)


class _Planner:
    def __init__(self, step, specs, target: Target, fixed: dict[str, int], goal: str, config: Config, tell):
        self.step, self.target, self.goal, self.config, self.tell = step, target, goal, config, tell
        self.given_specs = specs
        self.specs = jax.tree.map(_struct, specs)
        self.given_mesh = _mesh_of(specs)
        self.fixed = {**fixed, **self.given_mesh} if self.given_mesh else fixed
        if self.given_mesh:
            self.fixed = {a: self.fixed.get(a, 1) for a in search.AXES}
        self.devices = target.device_count
        self.exchange = getattr(step, "exchange", None)
        if self.exchange is not None:
            self.fixed = self._with_groups(self.exchange.count)
        self._check_fixed()

    def plan(self, confirm: int) -> Plan:
        found: list[tuple[search.Candidate, Dims]] = []
        for group in self._variants():
            if self._is_enough(found, group[0]):
                break
            for variant in reversed(group):
                candidates, dims = self._candidates(variant)
                found += [(c, dims) for c in candidates]
                if not any(c.fits for c in candidates):
                    break  # those before it take more memory
        if not found:
            raise ConfigError(self._no_mesh())
        found.sort(key=lambda pair: search.order(pair[0], self.goal))
        if not found[0][0].fits:
            raise PlanError(self._nothing_fits(found))
        first: dict[str, tuple[search.Candidate, Dims]] = {}  # of each mesh
        for candidate, dims in found:
            first.setdefault(f"{candidate.mesh} {candidate.variant}", (candidate, dims))
        plans = [self._plan_of(c, dims) for c, dims in list(first.values())[: _KEPT + 1]]
        chosen, refused = self._confirmed(plans, confirm)
        runners = tuple(p for p in plans if p.mesh != chosen.mesh or p.variant != chosen.variant)
        return dataclasses.replace(chosen, runners_up=runners, remarks=(*chosen.remarks, *refused))

    def _candidates(self, variant: Mapping[str, Any]) -> tuple[list[search.Candidate], Dims]:
        """Layouts of the step in one way, the best first."""
        step = self.step if self.exchange is None else self.step.among(Groups())
        self.tell(f"reading the step{_said(variant)}")
        dims = self._dims(step.varied(**variant) if variant else step)
        pricing = Pricing(dims, self.target, self._between())
        self.tell(f"searching layouts{_said(variant)}")
        pipelines = hasattr(self.step, "along") and self.exchange is None
        further = self.fixed, self._given(dims), variant, self.goal, pipelines
        return search.best(pricing, self.target, self.devices, *further), dims

    def _is_enough(self, found: Sequence[tuple[search.Candidate, Dims]], variant: Mapping[str, Any]) -> bool:
        """Whether something fits, and what comes now takes less memory and more time: more microbatches, by which a pipeline alone
        gains, or the host's memory."""
        fitting = [c.variant for c, _ in found if c.fits]
        if self.goal != "time" or not fitting:
            return False
        is_pipeline = self.fixed.get("pipeline", 1) != 1
        return not is_pipeline or all(v.get("offload") != variant.get("offload") for v in fitting)

    def _variants(self) -> list[list[dict[str, Any]]]:
        """Groups of ways that the step may be made in, those that take the most memory, and maybe the least time, first."""
        if not hasattr(self.step, "variants"):
            return [[{}]]
        batch = min((leaf.shape[0] for leaf in jax.tree.leaves(self.specs[-1]) if leaf.shape), default=1)
        return list(self.step.variants(batch))

    def _between(self) -> Between | None:
        """What groups exchange of their gradients by themselves."""
        if self.exchange is None:
            return None
        return Between(self.exchange.sent, tuple(jax.tree.leaves(_numbered(self.specs)[0].params)))

    def _with_groups(self, count: int) -> dict[str, int]:
        """The axes to keep, with that of groups."""
        asked = {"data": count, "pipeline": 1, "expert": 1} | {
            a: n for a, n in self.fixed.items() if a in ("data", "pipeline", "expert")
        }
        if asked != {"data": count, "pipeline": 1, "expert": 1} or self.devices % count:
            told = ", ".join(f"{a}={n}" for a, n in asked.items())
            raise ConfigError(
                f"Gradients go between {count} groups along the axis 'data', and the plan is to have {told} on {self.devices} devices. "
                "Leave these axes to the exchange, and take groups that divide the devices."
            )
        return {**self.fixed, "data": count, "expert": 1}

    def _dims(self, step: Callable) -> Dims:
        # A function of its own, so that JAX does not hand out a module that was rewritten.
        def standing(*arguments):
            with mixture_split.spread_over(mixture_split.PLANNED):
                return step(*arguments)

        own = jax.jit(standing, keep_unused=True)
        plain = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), self.specs)
        with jax.default_device(self.target.device):
            lowered = lower_for(self.target, own, *plain)
        module = lowered.compiler_ir("stablehlo")
        m.inline_calls(module)
        fused.mark(module, self.target, self.config)
        self.roles, self.state_argnums = _roles(step, plain)
        if self.exchange is not None:
            left = _numbered(plain)[0].exchange.get("left", ())
            self.roles = dataclasses.replace(self.roles, groups=tuple(jax.tree.leaves(left)))
        return Dims(graph.read(module), self.roles)

    def _given(self, dims: Dims) -> dict[int, Sharding]:
        found = {}
        for number, leaf in enumerate(jax.tree.leaves(self.given_specs)):
            sharding: Any = getattr(leaf, "sharding", None)
            if isinstance(sharding, NamedSharding) and self.given_mesh:
                spec = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]
                found[dims.graph.arguments[number]] = tuple(
                    () if s is None else (s,) if isinstance(s, str) else tuple(s) for s in spec
                )
        return found

    def _plan_of(self, candidate: search.Candidate, dims: Dims) -> Plan:
        layout, price = candidate.layout, candidate.price
        mesh = AbstractMesh(
            tuple(layout.mesh.values()), tuple(layout.mesh), axis_types=(AxisType.Auto,) * len(layout.mesh)
        )
        leaves, tree = jax.tree.flatten(self.specs)
        shardings = [
            NamedSharding(mesh, PartitionSpec(*(axes or None for axes in layout.of(value))))
            for value in dims.graph.arguments
        ]
        shardings = self._in_host_memory(shardings, tree, candidate.variant)
        structs = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at) for s, at in zip(leaves, shardings, strict=True)]
        # By every place: where the module is read again, experts are apart in what a mixture became.
        split = {
            (place, d): layout.split[c]
            for place, value in enumerate(dims.graph.arguments)
            for d, c in enumerate(dims.classes[value])
            if c in layout.split
        }
        return Plan(
            target=self.target, mesh=candidate.mesh, shardings=jax.tree.unflatten(tree, shardings),
            specs=jax.tree.unflatten(tree, structs), fits=candidate.fits, predicted_seconds=price.seconds,
            memory_per_device_bytes=price.memory_bytes, confirmed=False, collectives=tuple(price.exchanges),
            variant=dict(candidate.variant), runners_up=(), remarks=tuple(self._undivided(layout, dims)), price=price,
            roles=dims.roles, split=split, storage=layout.storage, priorities=tuple(dict.fromkeys(layout.split.values())),
            given={place: layout.of(value) for place, value in enumerate(dims.graph.arguments)}, state_argnums=self.state_argnums,
        )  # fmt: skip

    def _in_host_memory(
        self, shardings: list[NamedSharding], tree: Any, variant: Mapping[str, Any]
    ) -> list[NamedSharding]:
        """Shardings, those of an optimizer's state that is offloaded in the host's memory."""
        if not variant.get("offload"):
            return shardings
        state = _numbered(self.specs)[0].optimizer
        leaves = jax.tree.leaves(self.specs)
        away = {n for n in jax.tree.leaves(state) if leaves[n].shape}  # counts stay
        return [
            NamedSharding(s.mesh, s.spec, memory_kind="pinned_host") if n in away else s
            for n, s in enumerate(shardings)
        ]

    def _undivided(self, layout: Layout, dims: Dims) -> list[str]:
        """What an axis was meant to split and does not divide."""
        found = []
        for (path, leaf), value in zip(
            jax.tree_util.tree_leaves_with_path(self.specs), dims.graph.arguments, strict=True
        ):
            for d, c in enumerate(dims.classes[value]):
                wanted = [a for a in layout.split.get(c, ()) if layout.mesh[a] > 1]
                missing = [a for a in wanted if a not in layout.of(value)[d]]
                if (
                    missing
                    and value not in layout.given
                    and not any(a in axes for axes in layout.of(value) for a in missing)
                ):
                    found.append(
                        f"dimension {d} of argument {jax.tree_util.keystr(path)} {list(leaf.shape)} is repeated along "
                        f"{', '.join(missing)}, which do not divide {leaf.shape[d]}"
                    )
        return found

    def _confirmed(self, plans: Sequence[Plan], confirm: int) -> tuple[Plan, list[str]]:
        """The best plan that its compiler takes, of as many as may be asked; what was refused, in words."""
        from kpx.api import compile

        refused: list[str] = []
        for candidate in plans[:confirm]:
            self.tell(f"compiling the plan {text(candidate)} for {self.target}")
            try:
                jitted = candidate.apply(self.step, config=self.config)
                compiled = compile(jitted, *candidate.specs, target=self.target, config=self.config)
            except OutOfMemoryError as error:
                refused.append(f"{text(candidate)}: its compiler counts {error.used_bytes / 2**30:.1f} GiB")
                continue
            return dataclasses.replace(
                candidate, memory_per_device_bytes=compiled.memory.peak_bytes, confirmed=True, fits=True
            ), refused
        return (plans[min(confirm, len(plans) - 1)] if refused else plans[0]), refused

    # What cannot be -------------------------------------------------------------------------------

    def _check_fixed(self) -> None:
        if unknown := [a for a in self.fixed if a not in search.AXES]:
            raise ConfigError(
                f"`fixed` names the axes {', '.join(map(repr, unknown))}. A plan's axes are {', '.join(map(repr, search.AXES))}."
            )
        given = math.prod(self.fixed.values())
        if min(self.fixed.values(), default=1) < 1 or self.devices % given:
            text = ", ".join(f"{a}={n}" for a, n in self.fixed.items())
            raise ConfigError(
                f"`fixed` has {text}, {given} devices together, and {self.target} has {self.devices}. The sizes' product must "
                "divide that."
            )

    def _no_mesh(self) -> str:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in jax.tree.leaves(self.specs[-1]))
        fixed = f" with {self.fixed}" if self.fixed else ""
        return (
            f"No mesh of {self.devices} devices{fixed} divides the step's data ({shapes}): the batch must be divided by data x "
            "fsdp x expert, and the sequence by context. Take a batch that the devices divide, or fewer devices."
        )

    def _nothing_fits(self, found: Sequence[tuple[search.Candidate, Dims]]) -> str:
        best, dims = min(found, key=lambda pair: pair[0].price.memory_bytes)
        has, needs = search.memory(self.target), best.price.memory_bytes
        least = self._least_devices(dims)
        return (
            f"No plan fits {self.target}: the least takes {needs / 2**30:.1f} GiB a device ({_text(best.mesh)}{_said(best.variant)}), "
            f"of which {best.price.argument_bytes / 2**30:.1f} GiB are arguments, and a device has {has / 2**30:.1f} GiB. "
            + (f"The same step would fit {least} such devices. " if least else "More devices alone would not do. ")
            + "A smaller batch, microbatches, `jax.checkpoint` around layers, or bf16 would take less."
        )

    def _least_devices(self, dims: Dims) -> int | None:
        """The least number of such devices that would hold the step, of the target's times powers of two."""
        if self.target.spec is None:
            return None
        pricing, has = Pricing(dims, self.target), search.HEADROOM * search.memory(self.target)
        for factor in (2, 4, 8, 16, 32, 64):
            for mesh in search.meshes(dims, self.devices * factor, {}):
                if pricing.memory(search.layouts(dims, mesh)) <= has:
                    return self.devices * factor
        return None


def _text(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {n}" for name, n in mesh.items())


def _struct(leaf: Any) -> Any:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    array = np.asarray(leaf)
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))


def _mesh_of(specs: Any) -> dict[str, int]:
    """The mesh of shardings that specs have, by axis; none where they have none."""
    found: dict[str, int] = {}
    for leaf in jax.tree.leaves(specs):
        sharding: Any = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and any(s is not None for s in sharding.spec):
            found |= dict(sharding.mesh.shape)
    return found


def _roles(step: Callable, specs: Sequence[Any]) -> tuple[Roles, tuple[int, ...]]:
    """What each argument's leaves are to a step, and the places of the arguments that are state."""
    out = jax.eval_shape(step, *specs)
    results = list(out) if isinstance(out, (tuple, list)) and not hasattr(out, "_fields") else [out]
    starts = np.cumsum([0, *(len(jax.tree.leaves(r)) for r in results)])
    free = list(range(len(results)))
    state, becomes, batch, argnums, at = [], [], [], [], 0
    for number, spec in enumerate(specs):
        leaves = jax.tree.leaves(spec)
        match = next((j for j in free if leaves and _kind(results[j]) == _kind(spec)), None)
        if match is not None:
            free.remove(match)
            argnums.append(number)
            state += range(at, at + len(leaves))
            becomes += range(int(starts[match]), int(starts[match]) + len(leaves))
        else:
            batch += [at + i for i, leaf in enumerate(leaves) if leaf.shape]
        at += len(leaves)
    if not batch:
        raise InputError(
            f"None of the step's {len(specs)} arguments is data: each comes back as a result of the same shapes. Pass the batch as "
            "an argument of its own."
        )
    return roles_of(state, becomes, batch), tuple(argnums)


def _numbered(specs: Any) -> Any:
    """Specs' places among all arguments, in their structure."""
    leaves, structure = jax.tree.flatten(specs)
    return jax.tree.unflatten(structure, range(len(leaves)))


def _kind(tree: Any) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
