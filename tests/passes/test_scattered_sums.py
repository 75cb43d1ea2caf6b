"""Sums that are scattered: the numbers of XLA's own, and in what libtpu compiles the exchanges that plans foresee."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kpx
from bench import llama
from bench.sharding import SIZES, step
from bench.sharding import specs as specs_of
from kpx.ir.rewrite import Fuel
from kpx.passes import scattered_sums
from kpx.passes.composites import Device
from tests.devices import needs_tpu, on_four
from tests.sharding.steps import llama_step, specs

_TRAINED = """
import kpx
from kpx.hardware.target import Target
from tests.sharding.steps import plans_that_train_alike
has = Target.features.fget
Target.features = property(lambda target: has(target) | {"scatters"})
step, plans = plans_that_train_alike({"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2})
for plan in plans:
    assert kpx.compile(plan.apply(step), *plan.specs, target="cpu").fusions["kpx.scattered_sum"] >= 8
print("the same")
"""


@pytest.mark.slow
def test_plans_train_to_the_losses_of_one_device_with_sums_that_are_scattered():
    on_four(_TRAINED)


_CLOSER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.ir.rewrite import Fuel
from kpx.passes import scattered_sums
from kpx.passes.composites import Device
from tests.reference import assert_closer
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rows = NamedSharding(mesh, P(("data", "fsdp")))
rng = np.random.default_rng(int(sys.argv[1]))
x, y = (jax.device_put(jnp.asarray(rng.standard_normal((64, n)), jnp.bfloat16), rows) for n in (24, 40))
ids = jax.device_put(rng.integers(0, 32, (64,)), rows)  # some are no row of the table

def product(x, y):
    return jax.lax.with_sharding_constraint(jax.lax.dot_general(x, y, (((0,), (0,)), ((), ()))), NamedSharding(mesh, P(None, "fsdp")))

def table(ids, x):
    dims = jax.lax.ScatterDimensionNumbers((1,), (0,), (0,))
    made = jax.lax.scatter_add(jnp.zeros((28, 24), x.dtype), ids[:, None], x, dims, mode="drop")
    return jax.lax.with_sharding_constraint(made, NamedSharding(mesh, P("fsdp")))

for function, given in ((product, (x, y)), (table, (ids, x))):
    lowered = jax.jit(function).lower(*given)
    module = lowered.compiler_ir("stablehlo")
    m.inline_calls(module)
    assert scattered_sums.scatter(module, Device("cpu", "cpu"), Fuel(None)) == 1
    mine = jax.jit(call_module(module), in_shardings=rows)
    (found,), other = mine(*given), lowered.compile()(*given)
    text = mine.lower(*given).as_text()
    assert "reduce_scatter" in text and "all_reduce" in text
    wide = [np.asarray(a, np.float64) if a.dtype == jnp.bfloat16 else np.asarray(a) for a in given]
    if function is product:
        wanted = wide[0].T @ wide[1]
    else:
        wanted = np.zeros((28, 24))
        for i, row in zip(wide[0], wide[1]):
            if i < 28:
                wanted[i] += row
    assert_closer(found, other, wanted, relative=2**-8)
print("the same")
"""


@pytest.mark.parametrize("seed", range(2))
def test_a_scattered_sum_is_as_close_as_xlas_own(seed):
    on_four(_CLOSER, str(seed))


def test_a_sum_that_is_not_split_is_left_alone():
    mesh = kpx.Target("cuda:h100x4").mesh(data=2, fsdp=2)
    spec = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    def product(wanted, x):
        return jax.lax.with_sharding_constraint(jax.lax.dot_general(x, x, (((0,), (0,)), ((), ()))), wanted)

    for sharding, count in ((P(), 0), (P("fsdp"), 1), (P("data"), 1), (P("data", "fsdp"), 0)):
        jitted = jax.jit(functools.partial(product, NamedSharding(mesh, sharding)))
        module = jitted.trace(spec).lower(lowering_platforms=("cpu",)).compiler_ir("stablehlo")
        assert scattered_sums.scatter(module, Device("cpu", "cpu"), Fuel(0)) == 0
        assert scattered_sums.scatter(module, Device("cpu", "cpu"), Fuel(None)) == count, sharding


@pytest.mark.parametrize("seed", range(20))
def test_a_part_keeps_its_elements_in_rows_that_libtpu_scatters(seed):
    rng = np.random.default_rng(seed)
    shape = (int(rng.choice([8, 16, 56, 64, 501])), 128 * int(rng.integers(1, 300)))
    whole = math.prod(shape)
    found = scattered_sums.kept(shape)
    assert math.prod(found) == whole
    might = [(n, whole // n) for n in range(64, 1024, 8) if whole % n == 0]
    assert _stays(*found) or (found == shape and not any(_stays(*other) for other in might))


def _stays(rows, size):
    return rows >= 64 and rows % 8 == 0 and math.ceil(size / 128) % 2 == 0


SIZED = llama.Sizes(width=1024, hidden=2048, layers=2, heads=8, kv_heads=8, vocabulary=8192)


def _compiled(target, fixed):
    given = specs(SIZED, 64, 512)
    trained = llama_step(SIZED, jnp.bfloat16)
    plan = kpx.plan(trained, *given, target=target, fixed=fixed, confirm=0)
    return plan, kpx.compile(plan.apply(trained), *plan.specs, target=target)


def _told(exchanges):
    found = collections.Counter()
    for e in exchanges:
        found[e.kind, tuple(e.axes)] += e.bytes * e.count
    return found


def _assert_as_foreseen(plan, compiled):
    foreseen, real = _told(plan.collectives), _told(compiled.collectives)
    least = 0.001 * sum(real.values())
    for kind in {*foreseen, *real}:
        if max(foreseen[kind], real[kind]) > least:
            assert foreseen[kind] == pytest.approx(real[kind], rel=0.1), (kind, foreseen, real)


@needs_tpu
@pytest.mark.parametrize(
    "fixed",
    [{"data": 2, "fsdp": 16}, pytest.param({"data": 2, "fsdp": 4, "tensor": 4}, marks=pytest.mark.slow)],
    ids=lambda fixed: "-".join(f"{a}{n}" for a, n in fixed.items()),
)
def test_slices_exchange_what_plans_foresee_by_kind_axes_and_bytes(fixed):
    plan, compiled = _compiled("tpu-v5e:4x4*2", fixed)
    assert plan.mesh == fixed
    assert compiled.fusions["kpx.scattered_sum"] >= 8
    _assert_as_foreseen(plan, compiled)


@needs_tpu
@pytest.mark.parametrize("target", ["tpu-v5e:8x8", pytest.param("tpu-v5p:4x4x4", marks=pytest.mark.slow)])
def test_one_slice_sums_all_of_much_as_is_foreseen(target):
    plan, compiled = _compiled(target, {"fsdp": 64})
    assert "kpx.scattered_sum" not in compiled.fusions
    assert "reduce-scatter" not in {e.kind for e in plan.collectives}
    _assert_as_foreseen(plan, compiled)


@needs_tpu
@pytest.mark.slow
def test_llama_3_8b_on_two_slices_of_256_exchanges_what_is_foreseen():
    sizes = SIZES["Llama-3-8B"]
    trained, given = step(sizes), specs_of(sizes, 512, 4096)
    plan = kpx.plan(trained, *given, target="tpu-v5e:16x16*2", confirm=0)
    _assert_as_foreseen(plan, kpx.compile(plan.apply(trained), *plan.specs, target="tpu-v5e:16x16*2"))
