"""Sums of products that go round while they are computed: the numbers of XLA's own, and what NVIDIA's compiler runs beside what."""

import collections
import re

import jax.numpy as jnp
import pytest

import kpx
from bench import llama
from kpx.passes import ring_products, scattered_sums
from kpx.pipeline import stages
from kpx.runtime.build import context_for
from tests.devices import needs_cuda, needs_rocm, on_four
from tests.sharding.steps import llama_step, specs

_CLOSER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.ir.rewrite import Fuel
from kpx.passes import ring_products
from kpx.passes.composites import Device
from tests.reference import assert_closer
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(int(sys.argv[1]))

def drawn(shape, dtype, *axes):
    return jax.device_put(jnp.asarray(4 * rng.standard_normal(shape), dtype), NamedSharding(mesh, P(*axes)))

at = NamedSharding(mesh, P("data"))
one = lambda x, w: jax.lax.with_sharding_constraint(x @ w, at)
two = lambda x, w, y, v: one(x, w) + one(y, v)
three = lambda x, w, y, v, z, u: two(x, w, y, v) + one(z, u)
for dtype in (jnp.float32, jnp.bfloat16, jnp.int32):
    for batch in (2, 4):  # one row a device, or two
        pairs = [a for _ in range(3) for a in (drawn((batch, 6, 32), dtype, "data", None, "tensor"), drawn((32, 24), dtype, "tensor"))]
        for function, given in ((one, pairs[:2]), (two, pairs[:4]), (three, pairs)):
            lowered = jax.jit(function).lower(*given)
            module = lowered.compiler_ir("stablehlo")
            m.inline_calls(module)
            assert ring_products.overlap(module, Device("cpu", "cpu"), 0, Fuel(None)) == 1
            mine = jax.jit(call_module(module), in_shardings=[a.sharding for a in given])
            (found,), other = mine(*given), lowered.compile()(*given)
            assert "collective_permute" in mine.lower(*given).as_text()
            wide = [np.asarray(a, np.float64) for a in given]
            wanted = sum(wide[i] @ wide[i + 1] for i in range(0, len(wide), 2))
            assert_closer(found, other, wanted, relative={jnp.float32: 1e-6, jnp.bfloat16: 2**-8, jnp.int32: 0}[dtype])
print("the same")
"""


@pytest.mark.parametrize("seed", range(2))
def test_a_sum_that_goes_round_is_as_close_as_xlas_own(seed):
    on_four(_CLOSER, str(seed))


_TRAINED = """
import kpx
from kpx.hardware.target import Target
from kpx.passes import ring_products
from tests.sharding.steps import plans_that_train_alike
has = Target.features.fget
Target.features = property(lambda target: has(target) | {"rings"})
ring_products.LEAST = 0
step, (plan,) = plans_that_train_alike({"fsdp": 2, "tensor": 2})
assert "collective-permute" in {e.kind for e in plan.collectives}
assert kpx.compile(plan.apply(step), *plan.specs, target="cpu").fusions["kpx.ring_product"] >= 4
print("the same")
"""


@pytest.mark.slow
def test_plans_train_to_the_losses_of_one_device_with_sums_that_go_round():
    on_four(_TRAINED)


LARGE = llama.Sizes(width=2048, hidden=8192, layers=2, heads=16, kv_heads=16, vocabulary=8192)


def _compiled(batch, target="cuda:h100x8"):
    step, given = llama_step(LARGE, jnp.bfloat16), specs(LARGE, batch, 2048)
    plan = kpx.plan(step, *given, target=target, fixed={"fsdp": 2, "tensor": 4}, confirm=0)
    return plan, kpx.compile(plan.apply(step), *plan.specs, target=target)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("cuda:h100x8", marks=needs_cuda),
        pytest.param("rocm:mi300x8", marks=[needs_rocm, pytest.mark.slow]),
    ],
)
def test_each_exchange_of_a_ring_runs_beside_a_product_as_plans_foresee(target):
    plan, compiled = _compiled(32, target)
    assert compiled.fusions["kpx.ring_product"] == 6  # of attention and MLP: forward, forward again, backward
    bodies = [c for c in re.split(r"\n(?=%|ENTRY)", compiled.hlo) if " collective-permute-start(" in c]
    assert len(bodies) == 6
    for body in bodies:
        beside = body.partition(" collective-permute-start(")[2].partition(" collective-permute-done(")[0]
        assert re.search(r"= \S+ (fusion|custom-call)\(.*(gemm|dot|cublas)", beside), body
    foreseen, real = collections.Counter(), collections.Counter()
    for exchanges, found in ((plan.collectives, foreseen), (compiled.collectives, real)):
        for e in exchanges:
            found[e.kind, tuple(e.axes)] += e.bytes * e.count
    assert foreseen["collective-permute", ("tensor",)] > 0
    for kind, size in real.items():
        if size > 0.01 * sum(real.values()):
            assert foreseen[kind] == pytest.approx(size, rel=0.1), (kind, foreseen, real)


@needs_cuda
def test_what_would_wait_for_each_exchange_is_left_alone():
    plan, compiled = _compiled(2)
    assert "kpx.ring_product" not in compiled.fusions
    assert "collective-permute" not in {e.kind for e in (*plan.collectives, *compiled.collectives)}


@pytest.mark.parametrize("target", ["cuda:h100x8", "tpu-v5e:4x4*2"])
def test_how_sums_are_exchanged_is_left_to_the_compiler_where_that_is_asked_for(target):
    def stages_of(**changes):
        return {stage.name for stage in stages(context_for(kpx.Target(target), kpx.Config(**changes)))}

    own = {"overlap rings", "scatter sums"}
    assert len(stages_of() & own) == 1
    assert not stages_of(disable=(ring_products.NAME, scattered_sums.NAME)) & own
    assert not stages_of(level="none") & own
