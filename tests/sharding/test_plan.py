"""Plans: what is split, what that is foreseen to exchange, and that numbers stay the same."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kpx
from bench import llama
from kpx.ir import module as m
from kpx.sharding import graph
from kpx.sharding.dims import Dims, roles_of
from kpx.sharding.fabric import Fabric
from tests.devices import needs_cuda, on_four
from tests.sharding.steps import SMALL, llama_step, specs

MEDIUM = llama.Sizes(width=512, hidden=1024, layers=4, heads=8, kv_heads=8, vocabulary=4096)


def _dims():
    given = specs()
    module = jax.jit(llama_step(), keep_unused=True).lower(*given).compiler_ir("stablehlo")
    m.inline_calls(module)
    count = len(jax.tree.leaves(given[:2]))
    return Dims(graph.read(module), roles_of(range(count), range(count), [count])), given


def test_dimensions_that_go_together_are_found():
    dims, given = _dims()
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(given)]
    classes = {name: dims.classes[v] for name, v in zip(names, dims.graph.arguments, strict=True)}
    layers = "[0]['layers']"
    width, hidden = classes[f"{layers}['gate']"][1:]
    heads = classes[f"{layers}['q']"][2]
    assert classes[f"{layers}['down']"][1:] == [hidden, width]
    assert classes[f"{layers}['o']"][1:] == [heads, width]
    assert classes[f"{layers}['k']"][2] == heads  # of grouped queries, by their groups
    assert len({width, hidden, heads, classes["[0]['embedding']"][0]}) == 4
    assert set(dims.rows) == {classes["[2]"][0]}
    assert set(dims.columns) == {classes["[2]"][1]}
    assert {classes[f"{layers}['{n}']"][0] for n in "qkvo"} <= dims.stacked


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_graph_counts_the_flops_of_every_round_of_a_loop(platform):
    lowered = jax.jit(llama_step()).trace(*specs()).lower(lowering_platforms=(platform,))
    module = lowered.compiler_ir("stablehlo")
    m.inline_calls(module)
    found = graph.read(module)
    assert sum(op.flops * found.counts[op.region] for op in found.ops) == llama.step_flops(SMALL, 16, 32)


def test_axes_that_divide_a_torus_have_its_rings():
    fabric = Fabric(kpx.Target("tpu-v5e:16x16"), {"fsdp": 16, "tensor": 16})
    link = kpx.Target("tpu-v5e:16x16").spec.links.bandwidth
    whole = 1e9 * 15 / 16 / (2 * link)
    assert fabric.seconds("all-gather", 1e9, ["tensor"]) == pytest.approx(whole, rel=0.1)
    part = Fabric(kpx.Target("tpu-v5e:16x16"), {"fsdp": 64, "tensor": 4})
    assert part.seconds("all-gather", 1e9, ["tensor"]) == pytest.approx(1e9 * 3 / 4 / link, rel=0.1)  # a line


def test_beyond_a_host_parts_alone_are_exchanged():
    fabric = Fabric(kpx.Target("cuda:h100:4x8"), {"data": 4, "fsdp": 8})
    chip = kpx.Target("cuda:h100:4x8").spec
    together = fabric.seconds("all-gather", 1e9, ["data", "fsdp"])
    assert together == pytest.approx(1e9 * 7 / 8 / chip.links.bandwidth + 1e9 / 8 * 3 / 4 / chip.network, rel=0.05)


_SAME = """
from tests.sharding.steps import plans_that_train_alike
plans_that_train_alike({"data": 4}, {"fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}, count=4)
print("the same")
"""


def test_each_kind_of_plan_trains_to_the_losses_of_one_device():
    on_four(_SAME)


@needs_cuda
@pytest.mark.parametrize(
    "fixed",
    [
        {"data": 2, "fsdp": 2, "context": 2, "tensor": 2},
        *(
            pytest.param(fixed, marks=pytest.mark.slow)
            for fixed in ({"fsdp": 16}, {"fsdp": 8, "tensor": 2}, {"data": 4, "fsdp": 4}, {"context": 16})
        ),
    ],
    ids=lambda fixed: "-".join(f"{a}{n}" for a, n in fixed.items()),
)
def test_a_compiled_plans_exchanges_are_those_foreseen(fixed):
    step, given = llama_step(MEDIUM, jnp.bfloat16), specs(MEDIUM, 32, 512)
    # Of the ways over a split sequence plans foresee the ring.
    config = kpx.Config(kernels={"kpx.attention": "ring"} if "context" in fixed else {})
    plan = kpx.plan(step, *given, target="cuda:h100:2x8", fixed=fixed, confirm=0, config=config)
    compiled = kpx.compile(plan.apply(step, config=config), *plan.specs, target="cuda:h100:2x8", config=config)
    foreseen, real = collections.Counter(), collections.Counter()
    for e in plan.collectives:
        foreseen[e.kind] += e.bytes * e.count
    for c in compiled.collectives:
        real[c.kind] += c.bytes * c.count
    least = 0.02 * sum(real.values())
    for kind in {*foreseen, *real}:
        if max(foreseen[kind], real[kind]) > least:
            assert foreseen[kind] == pytest.approx(real[kind], rel=0.1), (kind, foreseen, real)


def test_between_slices_gradients_alone_are_exchanged_in_parts():
    step, given = llama_step(MEDIUM, jnp.bfloat16), specs(MEDIUM, 512, 512)
    flat, plan = (
        kpx.plan(step, *given, target="tpu-v5e:16x16*2", fixed=fixed, confirm=0)
        for fixed in ({"data": 512}, {"data": 2})
    )
    whole, parts = (
        sum(e.bytes * e.count for e in p.collectives if "data" in e.axes and e.bytes > 1000) for p in (flat, plan)
    )
    assert plan.mesh == {"data": 2, "fsdp": 256}
    assert {e.kind for e in plan.collectives if e.axes == ("data",)} == {"all-reduce"}
    assert parts <= whole / 64  # hosts of a slice
    free = kpx.plan(step, *given, target="tpu-v5e:16x16*2", confirm=0)
    assert next(iter(free.mesh)) == "data"


def test_shardings_that_arguments_have_are_kept():
    mesh = kpx.Target("tpu-v5e:4x4").mesh(fsdp=8, tensor=2)
    weights, state, tokens = specs()
    tokens = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=NamedSharding(mesh, P("fsdp")))
    held = NamedSharding(mesh, P("tensor", None))
    table = jax.ShapeDtypeStruct(weights["embedding"].shape, jnp.float32, sharding=held)
    plan = kpx.plan(llama_step(), weights | {"embedding": table}, state, tokens, target="tpu-v5e:4x4", confirm=0)
    assert {a: n for a, n in plan.mesh.items() if n > 1} == {"fsdp": 8, "tensor": 2}
    assert plan.shardings[0]["embedding"].spec == P("tensor", None)


def test_a_plan_for_memory_takes_no_more_than_one_for_time():
    given = specs(MEDIUM, 32, 512)
    fast, small = (
        kpx.plan(llama_step(MEDIUM), *given, target="tpu-v5e:4x4", goal=goal, confirm=0) for goal in ("time", "memory")
    )
    assert small.memory_per_device_bytes <= fast.memory_per_device_bytes
    assert fast.predicted_seconds <= small.predicted_seconds


def test_it_says_what_each_axis_does_and_what_else_there_was():
    plan = kpx.plan(llama_step(), *specs(), target="tpu-v5e:2x2", fixed={"tensor": 2}, confirm=0)
    text = plan.explain()
    assert "tensor 2: splits weights' own dimensions" in text
    assert "all-reduce along tensor" in text
    assert "What else there was:" in text
    assert all(r.predicted_seconds >= plan.predicted_seconds for r in plan.runners_up)


def test_a_dimension_that_an_axis_does_not_divide_is_named():
    odd = llama.Sizes(width=64, hidden=129, layers=2, heads=8, kv_heads=4, vocabulary=256)
    plan = kpx.plan(llama_step(odd), *specs(odd), target="tpu-v5e:2x2", fixed={"tensor": 4}, confirm=0)
    assert any("['gate'] [2, 64, 129] is repeated along tensor, which do not divide 129" in r for r in plan.remarks)


@pytest.mark.parametrize(
    ("fixed", "says"),
    [
        ({"model": 2}, "'model'.*axes are 'pipeline', 'data', 'fsdp'"),
        ({"data": 3}, "3 devices together.*has 16"),
        ({"data": 16, "fsdp": 2}, "32 devices together"),
    ],
)
def test_axes_that_cannot_be_are_refused(fixed, says):
    with pytest.raises(kpx.ConfigError, match=says):
        kpx.plan(llama_step(), *specs(), target="tpu-v5e:4x4", fixed=fixed, confirm=0)


def test_a_batch_that_no_mesh_divides_is_an_error_that_says_so():
    with pytest.raises(kpx.ConfigError, match=r"No mesh of 16 devices.*\[7, 33\]"):
        kpx.plan(llama_step(), *specs(batch=7, length=33), target="tpu-v5e:4x4", fixed={"tensor": 1}, confirm=0)


def test_what_fits_nowhere_says_how_many_devices_would_hold_it():
    large = llama.Sizes(width=4096, hidden=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256)
    with pytest.raises(kpx.PlanError, match=r"No plan fits tpu-v5e:2x2.*would fit \d+ such devices"):
        kpx.plan(llama_step(large, jnp.bfloat16), *specs(large, 256, 2048), target="tpu-v5e:2x2", confirm=0)


def test_a_step_without_data_is_an_error():
    with pytest.raises(kpx.InputError, match="None of the step's 1 arguments is data"):
        kpx.plan(lambda x: x + 1, jax.ShapeDtypeStruct((8,), np.float32), target="tpu-v5e:2x2", confirm=0)


def test_a_goal_that_there_is_not_is_an_error():
    with pytest.raises(kpx.InputError, match=r"goal='speed'.*'time' or 'memory'"):
        kpx.plan(llama_step(), *specs(), target="tpu-v5e:2x2", goal="speed")
