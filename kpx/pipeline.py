"""The pipeline: which stages a module goes through for a target, in order."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kpx.config import Config
from kpx.hardware import cpu
from kpx.ir import module as m
from kpx.ir.module import ir, stablehlo
from kpx.ir.rewrite import Fuel, Report, Rewrite, apply_rewrites
from kpx.ir.split import weights
from kpx.kernels import own  # noqa: F401  (its patterns are registered)
from kpx.passes import (
    canonicalize,
    composites,
    convolution,
    epilogue,
    fusion,
    grouped,
    known_masks,
    layers,
    layout,
    library,
    loops,
    lowered_precision,
    packed,
    precision,
    repeated,
    ring_products,
    rolled,
    scattered_sums,
)
from kpx.passes.composites import Device
from kpx.passes.shardings import drop_open
from kpx.precision import Budget, Policy, policy


@dataclass
class Context:
    """What stages know and tell: the target's device and features, the config, the fuel, and the report.

    Attributes:
        measured: what was measured of groups of rewrites and kernels, in words (see `kpx.runtime.gate`).
        precisions: how many products, convolutions and attentions are computed in which precision, where one was asked for.
        emulated: precisions that the target has no units for, and what is done instead.
        layers: what became of layers that are alike, in words (see `kpx.passes.rolled`).
        stacks: such layers, while they are apart from the module.
        repeats: how often the module that a stage is given stands in the model.
    """

    device: Device
    features: frozenset[str]
    config: Config
    fuel: Fuel
    report: Report = field(default_factory=Report)
    kernels: dict[str, str] = field(default_factory=dict)
    fusions: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    measured: dict[str, str] = field(default_factory=dict)
    precisions: dict[str, int] = field(default_factory=dict)
    emulated: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    stacks: list[layers.Stack] = field(default_factory=list)
    repeats: int = 1


@dataclass(frozen=True)
class Stage:
    """A named step over a module, in place."""

    name: str
    run: Callable[[ir.Module, Context], None]


def rewriting(
    rules: list[Rewrite], *, callees: bool = False, around: list[Rewrite] | None = None
) -> Callable[[ir.Module, Context], None]:
    """A stage's body that applies rewrites, as far as the config allows them (see `apply_rewrites`)."""

    def run(module: ir.Module, context: Context) -> None:
        config = context.config
        allowed = [
            r
            for r in rules
            if r.name not in config.disable and (r.exact or config.may_be_inexact) and config.level != "none"
        ]
        options = {"verify_each": config.verify_each, "callees": callees, "around": around}
        if allowed:
            apply_rewrites(module, allowed, context.fuel, context.report, **options)

    return run


def mlir(passes: str) -> Callable[[ir.Module, Context], None]:
    """A stage's body that runs MLIR's own passes."""
    return lambda module, context: m.run_passes(module, passes)


def inline(module: ir.Module, context: Context) -> None:
    """A stage's body that takes calls apart, and what would stand between a partitioned module's operations."""
    m.inline_calls(module)
    if m.partitions(module) > 1:
        drop_open(module)


def choose_products(module: ir.Module, context: Context) -> None:
    """A stage's body that chooses how the CPU computes products: in which precision, and by whom."""
    bf16_tiles = "bf16_tiles" in context.features
    # XLA cannot partition a call: over several devices it would gather the operands of each on all of them.
    mkl = "mkl" in context.features and m.partitions(module) == 1
    rules = [precision.bf16_dot_yields_f32]
    if context.config.matmul_precision == "high" and bf16_tiles:
        rules.append(library.mkl_product_in_three_bf16 if mkl else precision.f32_dot_as_three_bf16)
    if mkl:
        rules += [library.mkl_product_writes_transposed, library.mkl_product, epilogue.relu_into_product]
    if mkl and bf16_tiles:
        rules.append(library.mkl_product_of_bf16)
    rewriting(rules)(module, context)
    refused = [precision.bf16_dot_that_xla_refuses, precision.transposed_bf16_dot_that_xla_refuses]
    rewriting(refused)(module, context)  # what no library took


def pack(module: ir.Module, context: Context) -> None:
    """A stage's body that has oneDNN compute products and convolutions by weights, and what follows them."""
    if _has_onednn(module, context):
        if weights(module):  # else they would be packed at each call
            rewriting(packed.PRODUCTS)(module, context)
        rewriting([packed.sum_into_packed])(module, context)  # an activation's root is not beside what changes here
        rewriting([*packed.STEPS, *packed.ATTENTION])(module, context)


def _has_onednn(module: ir.Module, context: Context) -> bool:
    return "onednn" in context.features and m.partitions(module) == 1


def decompose(module: ir.Module, context: Context) -> None:
    """A stage's body that turns the composites that no kernel takes into their decompositions."""
    if (device := _kernels_for(module, context)) is not None:
        repeated.take_once(module)
    context.kernels |= composites.decompose_unsupported(module, device)


def know_masks(module: ir.Module, context: Context) -> None:
    """A stage's body that computes the masks that no input decides, and has loops compute what is constant."""
    if _may_spread(module, context):
        known_masks.simplify(module)
        loops.sink_constants(module)


def _may_spread(module: ir.Module, context: Context) -> bool:
    """Whether attention over masks that no input decides may become a kernel: off the CPU, or over several devices."""
    elsewhere = context.device.platform != "cpu" or m.partitions(module) > 1
    return elsewhere and _kernels_for(module, context, spread=True) is not None


def fuse(module: ir.Module, context: Context) -> None:
    """A stage's body that holds what fusion patterns recognise as composites, beside those that came as such."""
    found: dict[str, int] = {}
    if _kernels_for(module, context) is not None:
        grouped.raise_products(module)
    if (device := _kernels_for(module, context, spread=True)) is not None:
        if _may_spread(module, context):  # masks that took canonicalizing to be known
            loops.sink_constants(module)
        disabled = frozenset(context.config.disable)
        given = context.fuel, context.report, disabled, context.kernels
        found |= fusion.fuse(module, device, *given)
    if context.device.platform == "cpu" and m.partitions(module) > 1:
        rewriting(canonicalize.RULES)(module, context)
    found |= composites.count(module)
    for name, count in found.items():
        context.fusions[name] = context.fusions.get(name, 0) + count * context.repeats


def lower_convolutions(module: ir.Module, context: Context) -> None:
    """A stage's body that computes convolutions in the precision that was asked for."""
    _lower(module, context, convolutions=True)


def lower_precision(module: ir.Module, context: Context) -> None:
    """A stage's body that computes products and attention in the precision that was asked for."""
    _lower(module, context, convolutions=False)
    rules = canonicalize.RULES if context.device.platform == "cpu" else canonicalize.FOR_FUSION
    rewriting([*precision.MOVED, *rules], around=precision.MOVED)(module, context)


def _lower(module: ir.Module, context: Context, *, convolutions: bool) -> None:
    asked = context.config.precision
    assert asked is not None  # else there is no such stage
    assert not isinstance(asked, Budget)  # which became a policy at the front door
    is_exact = _has_onednn(module, context) and cpu.has_int8_products()
    features = context.features if is_exact else context.features - {"onednn"}
    given = policy(asked), context.device, features, context.fuel
    counts, emulated = lowered_precision.lower(module, *given, convolutions=convolutions)
    context.emulated |= emulated
    for name, count in counts.items():
        context.precisions[name] = context.precisions.get(name, 0) + count * context.repeats


def choose_kernels(module: ir.Module, context: Context) -> None:
    """A stage's body that turns composites into kernels, or into what they were."""
    context.kernels |= composites.lower_composites(module, _kernels_for(module, context))


def _kernels_for(module: ir.Module, context: Context, *, spread: bool = False) -> Device | None:
    """The device whose kernels may be used, those that are spread over devices too or not; None where none may."""
    # A kernel is not the same to the last bit; and XLA cannot partition one, but would gather its operands.
    one = m.partitions(module) == 1
    return context.device if context.config.may_be_inexact and context.device.is_known and (one or spread) else None


def _exchanges(context: Context, rewrite: Any) -> bool:
    """Whether a rewrite of how devices exchange sums is for a target, and wanted."""
    config = context.config
    return rewrite.FEATURE in context.features and rewrite.NAME not in config.disable and config.may_be_inexact


def scatter_sums(module: ir.Module, context: Context) -> None:
    """A stage's body that has sums exchange their parts themselves, for a compiler that would not as planned."""
    if count := scattered_sums.scatter(module, context.device, context.fuel):
        context.fusions[scattered_sums.NAME] = count


def overlap_rings(module: ir.Module, context: Context) -> None:
    """A stage's body that has products' sums along the tensor axis go round while they are computed."""
    if count := ring_products.overlap(module, context.device, ring_products.LEAST, context.fuel):
        context.fusions[ring_products.NAME] = count


def find_layers(module: ir.Module, context: Context) -> None:
    """A stage's body that holds layers that are alike apart from the module, where they may become a loop."""
    config = context.config
    if config.level == "none" or config.layers == "unrolled" or m.partitions(module) > 1 or not weights(module):
        return
    if isinstance(config.precision, Policy) and not config.precision.is_the_same_everywhere:
        return  # a layer may be computed otherwise than the next
    # Elsewhere, whether a loop over stacked weights slows the run has not been measured.
    if config.layers == "loop":
        context.stacks = layers.take_out(module)
    elif _has_onednn(module, context):
        context.stacks = layers.take_out(module, layers.WORTHWHILE)


def roll_layers(module: ir.Module, context: Context) -> None:
    """A stage's body that has a loop run layers that are alike, or puts their ops back."""
    stacks, context.stacks = context.stacks, []
    context.layers |= rolled.put_back(module, stacks, context.config.layers)


def canonicalize_and_lay_out(module: ir.Module, context: Context) -> None:
    """A stage's body that canonicalizes, and gives the CPU its convolutions' layout and forms."""
    convolutions = any(isinstance(op, stablehlo.ConvolutionOp) for op in m.walk(module.operation))
    if convolutions and context.device.platform == "cpu":
        rewriting([*layout.RULES, *convolution.LAYOUT, *canonicalize.RULES])(module, context)
        if _has_onednn(module, context) and weights(module):
            rewriting(packed.CONVOLUTIONS)(module, context)
        rewriting([*convolution.FORMS, *canonicalize.RULES], around=convolution.FORMS)(module, context)
    elif context.device.platform == "cpu" and m.partitions(module) == 1:
        rewriting(canonicalize.RULES)(module, context)
    else:  # on CPUs too, for what may be split along a sequence
        rewriting([*canonicalize.FOR_FUSION, *precision.OFF_CPU])(module, context)


def stages(context: Context) -> list[Stage]:
    """The stages for a target, in order."""
    on_cpu = context.device.platform == "cpu"
    lowers = context.config.precision is not None and lowered_precision.NAME not in context.config.disable
    last = (
        Stage("choose products", choose_products) if on_cpu else Stage("fold transposes", rewriting(canonicalize.LAST))
    )
    return [
        Stage("inline", inline),
        Stage("find layers", find_layers),
        # A decomposition that many ops share is canonicalized once, before it takes the place of each.
        Stage(
            "canonicalize decompositions",
            rewriting(canonicalize.RULES if on_cpu else canonicalize.FOR_FUSION, callees=True),
        ),
        Stage("know masks", know_masks),
        Stage("decompose", decompose),
        Stage("clean up", mlir("cse,symbol-dce")),
        *([Stage("lower convolutions", lower_convolutions)] if lowers else []),
        Stage("canonicalize, lay out", canonicalize_and_lay_out),
        Stage("fuse", fuse),
        *([Stage("lower precision", lower_precision)] if lowers else []),
        Stage("choose kernels", choose_kernels),
        *([Stage("pack weights", pack)] if on_cpu else []),
        last,
        *([Stage("overlap rings", overlap_rings)] if _exchanges(context, ring_products) else []),
        *([Stage("scatter sums", scatter_sums)] if _exchanges(context, scattered_sums) else []),
        Stage("roll layers", roll_layers),
        Stage("finish", mlir("cse,symbol-dce")),
    ]


def optimize_module(module: ir.Module, context: Context, before: str | None = None) -> None:
    """Runs the stages over a module in place, all or those before a named one; the module is valid after each."""
    with no_collections():
        for stage in stages(context):
            if stage.name == before:
                break
            start = time.perf_counter()
            for stack in context.stacks if stage.run is not roll_layers else ():
                context.repeats = stack.count
                stage.run(stack.layer, context)
            context.repeats = 1
            stage.run(module, context)
            context.seconds[stage.name] = time.perf_counter() - start


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Holds Python's cycle collector back: passes make many short-lived objects and no cycles, and a full
    collection beside a loaded framework takes as long as they do."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
