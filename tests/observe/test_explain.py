"""Where time would go on a target, and targets side by side."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kpx
from kpx.hardware import chips, links, roofline
from kpx.hardware.target import Target
from kpx.ir.hlo_cost import Collective, Work
from kpx.observe.explain import place
from tests import intel
from tests.optional import torch


def _work(operation="jit(f)/dot_general", flops=0.0, moved=0.0, element="bf16", source=("", ""), **options):
    return Work("w", "fusion", operation, source, flops, flops, element, moved, 1, **options)


@pytest.mark.parametrize("operation, path", [
    ("jit(f)/encoder/layer/0/dot_general", "encoder/layer/0"),
    ("jit(f)/jvp(Net)/Dense_1/dot_general", "Net/Dense_1"),
    ("jit(f)/transpose(jvp(Net))/Dense_1/dot_general", "Net/Dense_1 (backward)"),
    ("jit(f)/transpose(jvp(Net/Block))/Dense_1/dot_general", "Net/Block/Dense_1 (backward)"),
    ("jit(f)/while/body/closed_call/mlp/dot_general", "mlp"),
    ("jit(f)/vmap(head)/checkpoint/rematted_computation/dot_general", "head"),
    ("jit(fn)/kpx_call_module/jit(with_checks)/self_attn/composite/dot_general", "self_attn"),
])  # fmt: skip
def test_an_operations_module_is_its_path_without_what_jax_adds(operation, path):
    assert place(_work(operation)) == (path, "dot_general")


def test_an_operation_without_a_module_belongs_to_its_function():
    assert place(_work("jit(f)/jvp()/mul", source=("Linear.__call__", "linear.py:3"))) == ("Linear.__call__", "mul")
    assert place(_work("")) == ("(the compiler's own)", "fusion")


def test_an_instruction_takes_the_longer_of_computing_and_moving():
    target, h100 = Target("cuda:h100"), chips.chips()["h100"]
    assert roofline.seconds(_work(flops=h100.peaks["bf16"]), target) == pytest.approx(1.0)
    assert roofline.seconds(_work(flops=h100.peaks["bf16"], moved=2 * h100.bandwidth), target) == pytest.approx(2.0)
    assert roofline.bound(_work(flops=1e15, moved=1.0), target) == "compute"
    assert roofline.bound(_work(flops=1.0, moved=1e9), target) == "memory"


@pytest.mark.parametrize("element, name, peak", [
    ("f32", "cuda:h100", "tf32"), ("f32:highest", "cuda:h100", "f32"), ("f8e4m3fn", "cuda:h100", "f8"), ("s8", "cuda:h100", "i8"),
    ("f32", "tpu-v5e", "bf16"), ("f64", "cuda:h100", "f64"), ("f16", "rocm:mi300", "f16"), ("f32", "rocm:mi300", "f32"),
])  # fmt: skip
def test_a_products_unit_is_that_of_its_elements(element, name, peak):
    target = Target(name)
    wanted = target.spec.peaks[peak]
    assert target.spec.peak(roofline.element(_work(element=element), target)) == wanted


def test_prefetches_hide_behind_what_is_bound_by_computing():
    target, chip = Target("tpu-v5e"), chips.chips()["v5e"]
    product = _work(flops=chip.peaks["bf16"], moved=0.25 * chip.bandwidth)
    prefetch = _work(moved=chip.bandwidth, is_prefetch=True)
    assert roofline.total_seconds([product, prefetch], target) == pytest.approx(1.25)


@pytest.mark.parametrize("name, group, bandwidth", [
    ("cuda:h100x8", range(8), "links"), ("cuda:h100:2x8", (0, 8), "network"), ("cuda:h100:2x8", (8, 9), "links"),
    ("tpu-v5e:4x4*2", (0, 16), "network"), ("tpu-v5e:4x4", (0, 1), 2), ("tpu-v5e:4x4", range(16), 4),
    ("tpu-v5p:4x4x4", range(64), 6),
])  # fmt: skip
def test_an_exchange_goes_over_the_links_that_its_devices_share(name, group, bandwidth):
    target = Target(name)
    chip = target.spec
    wanted = {"links": chip.links.bandwidth, "network": chip.network}.get(bandwidth) or bandwidth * chip.links.bandwidth
    sent = Collective("all-gather", 1 << 20, (), tuple(group), 1, "")
    assert links.bandwidth(sent, target) == wanted
    assert links.seconds(sent, target) == pytest.approx((1 << 20) * (len(group) - 1) / len(group) / wanted)
    reduced = Collective("all-reduce", 1 << 20, (), tuple(group), 1, "")
    assert links.seconds(reduced, target) == pytest.approx(2 * links.seconds(sent, target))


def _encoder():
    torch.manual_seed(0)
    return torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(128, 4, 512, batch_first=True), 2).eval()


def test_a_pytorch_models_time_is_told_by_its_modules():
    (report,) = kpx.explain(_encoder(), torch.ones(4, 64, 128), targets=["cuda:h100"]).reports
    paths = {g.path for g in report.groups}
    assert {"layers/0/self_attn", "layers/1/linear1", "layers/1/linear2"} <= paths
    assert sum(g.seconds for g in report.groups) == pytest.approx(report.seconds)
    products = 2 * 4 * 64 * 128 * (4 * 128 + 2 * 512) * 2 + 2 * 2 * 2 * 4 * 64 * 64 * 128
    assert report.flops == pytest.approx(products, rel=0.1)  # and what is not a product
    assert [g.seconds for g in report.groups] == sorted((g.seconds for g in report.groups), reverse=True)


def test_a_flax_models_gradient_is_told_by_its_modules():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(128)(nn.gelu(nn.Dense(256)(x)))

    net = Net()
    weights = net.init(jax.random.key(0), jnp.ones((32, 128)))
    gradient = jax.grad(lambda w, x: jnp.sum(net.apply(w, x) ** 2))
    (report,) = kpx.explain(gradient, weights, jnp.ones((32, 128)), targets="tpu-v5e").reports
    paths = {g.path for g in report.groups}
    assert {"Net/Dense_0", "Net/Dense_0 (backward)", "Net/Dense_1 (backward)"} <= paths


class _Block(nnx.Module):
    def __init__(self, width, rngs):
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


def test_an_nnx_models_time_is_told_by_its_modules_and_the_model_stays_as_it_was():
    blocks = nnx.Sequential(*(_Block(64, nnx.Rngs(i)) for i in range(2)))
    before = [type(module) for _, module in nnx.iter_modules(blocks)]
    (found,) = kpx.explain(blocks, jnp.ones((8, 64)), targets="cuda:h100").reports
    paths = {group.path for group in found.groups}
    assert {f"layers/{i}/{name}" for i in range(2) for name in ("up", "down")} <= paths
    assert [type(module) for _, module in nnx.iter_modules(blocks)] == before


def test_what_would_help_is_what_the_model_says_saves_most():
    x, w = jnp.ones((8, 4096)), jnp.ones((4096, 4096))
    (report,) = kpx.explain(lambda x, w: jnp.dot(x, w, precision="highest"), x, w, targets="cuda:h100").reports
    assert 1 <= len(report.advice) <= 3
    saved = [a.saves_seconds for a in report.advice]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] < report.seconds
    assert any("bf16" in a.change for a in report.advice)
    assert any("batch" in a.change for a in report.advice)


def test_exchanges_are_told_and_advised_on():
    target = Target("cuda:h100:2x8")
    rows = NamedSharding(target.mesh(data=16), P("data"))
    x = jax.ShapeDtypeStruct((1 << 12, 1 << 12), jnp.float32, sharding=rows)
    (report,) = kpx.explain(lambda x: jnp.sum(x @ x.T, axis=0), x, targets=[target]).reports
    assert report.exchange_seconds > 0
    assert {axis for c in report.collectives for axis in c["axes"]} == {"data"}
    assert any("exchanges along `data`" in a.change for a in report.advice)
    assert any(g.bound == "exchange" for g in report.groups)


def test_an_explanation_prints_and_is_json():
    explanation = kpx.explain(_encoder(), torch.ones(4, 64, 128), targets=["cuda:h100", "tpu-v5e"])
    text = str(explanation)
    for words in ("TransformerEncoder on cuda:h100", "tpu-v5e:1x1", "A model, not a measurement", "fits"):
        assert words in text
    found = json.loads(json.dumps(explanation.to_dict()))
    assert [t["target"] for t in found["targets"]] == ["cuda:h100", "tpu-v5e:1x1"]
    assert found["targets"][0]["memory"]["fits"] is True


def test_a_target_that_fails_leaves_the_others_their_reports():
    with intel.hidden():
        good, bad = kpx.explain(jnp.tanh, jnp.ones(8), targets=["tpu-v5e", "xpu:pvc"]).reports
        assert good.seconds > 0
        assert "is not installed" in bad.error
        with pytest.raises(kpx.TargetError, match="is not installed"):
            kpx.explain(jnp.tanh, jnp.ones(8), targets="xpu:pvc")


@pytest.mark.parametrize("targets, says", [([], "`targets` is empty"), (["cpu"], "no figures in the spec table")])
def test_what_cannot_be_predicted_for_is_refused(targets, says):
    with pytest.raises(kpx.InputError, match=says):
        kpx.explain(jnp.tanh, jnp.ones(8), targets=targets)


def test_targets_are_compared_by_time_memory_and_dollars(tmp_path, monkeypatch):
    prices = tmp_path / "prices.toml"
    prices.write_text(
        'date = 2026-11-01\n[devices]\nh100 = { price = 3.6, source = "ours" }\nv5e = { price = 36, source = "ours" }\n'
    )
    monkeypatch.setenv("KPX_PRICES", str(prices))
    x = jnp.ones((64, 1024))
    found = kpx.compare(lambda x: x @ x.T, x, targets=["tpu-v5e", "cuda:h100", "tpu-v7x"], sort="dollars")
    assert found.samples == 64
    rows = {r.target: r for r in found.rows}
    assert [r.target for r in found.rows] == ["cuda:h100", "tpu-v5e:1x1", "tpu-v7x:1x1x1"]
    assert rows["cuda:h100"].dollars_per_million == pytest.approx(3.6 / 3600 * rows["cuda:h100"].seconds / 64 * 1e6)
    assert rows["tpu-v7x:1x1x1"].dollars_per_million is None
    assert "2026-11-01" in rows["cuda:h100"].price
    assert "$ a million samples" in str(found)
    by_time = kpx.compare(lambda x: x @ x.T, x, targets=["tpu-v5e", "cuda:h100"])
    assert [r.seconds for r in by_time.rows] == sorted(r.seconds for r in by_time.rows)


@pytest.mark.parametrize(
    "options, says", [({"sort": "name"}, "sort='name'"), ({"samples": 0}, "samples=0"), ({"samples": 1.5}, "1.5")]
)
def test_a_comparison_by_something_else_is_refused(options, says):
    with pytest.raises(kpx.InputError, match=says):
        kpx.compare(jnp.tanh, jnp.ones(8), targets=["tpu-v5e"], **options)
