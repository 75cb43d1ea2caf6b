"""Compiling for machines that are not here, by their vendors' own compilers."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kpx
from bench.cases import CASES
from kpx.hardware import worker
from tests.optional import torch

TARGETS = ["tpu-v5e:2x2", "tpu-v6e:2x2", "tpu-v5p:2x2x1", "tpu-v7x:2x2x1", "cuda:h100", "cuda:h200x8", "cuda:b200",
           "rocm:mi300x8", "cpu:avx2"]  # fmt: skip
ONE_EACH = ["tpu-v5e:2x2", "cuda:h200x8", "rocm:mi300x8"]


def loss(w, x):
    def layer(h, w):
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(layer, x, w)
    return jnp.mean(h.astype(jnp.float32) ** 2)


def _specs(target: kpx.Target):
    w, x = (6, 128, 128), (64, 128)
    if target.device_count == 1:
        return jax.ShapeDtypeStruct(w, jnp.bfloat16), jax.ShapeDtypeStruct(x, jnp.bfloat16)
    mesh = target.mesh(data=-1, model=2)
    return (
        jax.ShapeDtypeStruct(w, jnp.bfloat16, sharding=NamedSharding(mesh, P(None, None, "model"))),
        jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=NamedSharding(mesh, P("data"))),
    )


@pytest.mark.parametrize("name", TARGETS)
def test_a_training_steps_gradient_compiles_for(name):
    target = kpx.Target(name)
    compiled = kpx.compile(jax.grad(loss), *_specs(target), target=target)
    assert "while" in compiled.hlo
    assert compiled.memory.peak_bytes >= compiled.memory.argument_bytes > 0
    assert compiled.memory.fits is (None if target.platform == "cpu" else True)
    assert compiled.compile_seconds["compile"] > 0


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_sharded_steps_arguments_are_a_devices_share(name):
    target = kpx.Target(name)
    compiled = kpx.compile(jax.grad(loss), *_specs(target), target=target)
    data = target.device_count // 2
    assert compiled.memory.argument_bytes == 2 * (6 * 128 * 128 // 2 + 64 * 128 // data)
    assert re.search(r"all-reduce|reduce-scatter", compiled.hlo)


@pytest.mark.parametrize("name", [t for t in TARGETS if not t.startswith("cpu")])
def test_a_loops_products_count_as_often_as_it_runs(name):
    target = kpx.Target(name)
    cost = kpx.compile(jax.grad(loss), *_specs(target), target=target).cost
    # The gradient by the weights alone: the first layer's input needs none.
    assert cost.product_flops * target.device_count == pytest.approx(2 * 64 * 128 * 128 * (6 + 6 + 6), rel=0.02)
    assert cost.predicted_seconds > cost.exchange_seconds >= 0
    assert (cost.exchange_seconds > 0) == (target.device_count > 1)


@pytest.mark.parametrize("name", ["tpu-v5e:2x2", "tpu-v7x:2x2x1", "cuda:h200x8", "rocm:mi300x8"])
def test_collectives_are_told_with_axes_and_counts(name):
    target = kpx.Target(name)
    compiled = kpx.compile(jax.grad(loss), *_specs(target), target=target)
    found = {(c.kind, c.axes, c.count) for c in compiled.collectives}
    assert any("model" in axes and count == 6 for _, axes, count in found)
    assert any("data" in axes for _, axes, _ in found)
    assert all(c.operation.startswith("jit(loss)/") for c in compiled.collectives if c.operation)


def _transformer_flops(case: str, config, batch: int, length: int) -> int:
    """The products of a forward pass, by hand: projections, attention over every pair, and the head or pooler."""
    h, i, tokens = config.hidden_size, config.intermediate_size, batch * length
    attention = 2 * 2 * batch * length * length * h
    if case == "bert":
        return config.num_hidden_layers * (2 * tokens * (4 * h * h + 2 * h * i) + attention) + 2 * batch * h * h
    kv = h * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * tokens * (2 * h * h + 2 * h * kv + 3 * h * i) + attention
    return config.num_hidden_layers * layer + 2 * tokens * h * config.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bert", "llama"])
@pytest.mark.models
def test_a_models_products_are_those_counted_by_hand(case):
    model, inputs = CASES[case].make()
    wanted = _transformer_flops(case, model.config, *inputs["input_ids"].shape)
    for name in ("tpu-v5e", "cuda:h100", "rocm:mi300"):
        cost = kpx.compile(model, target=name, **inputs).cost
        assert cost.product_flops == pytest.approx(wanted, rel=0.02), name


@pytest.mark.parametrize("name", ["tpu-v5e", "cuda:h100", "rocm:mi300"])
def test_a_module_without_shardings_is_compiled_for_one_device(name):
    target = kpx.Target(name)
    compiled = kpx.compile(jax.grad(loss), *_specs(target), target=name)
    assert compiled.memory.argument_bytes == 2 * (6 * 128 * 128 + 64 * 128)
    assert not re.search(r"all-reduce|all-gather", compiled.hlo)


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_vendors_executable_is_saved(name, tmp_path):
    target = kpx.Target(name)
    compiled = kpx.compile(loss, *_specs(target), target=target)
    assert compiled.save(tmp_path / "executable") == (tmp_path / "executable").stat().st_size > 1000


def test_an_executable_that_its_worker_gave_up_is_compiled_again_to_be_saved(tmp_path):
    compiled = [kpx.compile(lambda x, n=n: x * n, jnp.ones(8), target="cpu:avx2") for n in range(2, 8)]
    assert compiled[0].save(tmp_path / "first") > 1000


def test_a_program_whose_worker_has_ended_is_compiled_again_to_be_read():
    compiled = kpx.compile(lambda x: x * 3, jnp.ones(8), target="cpu:avx2")
    worker.worker(compiled.target).stop()
    assert "HloModule" in compiled.hlo
    assert "multiply" in compiled.hlo


@pytest.mark.parametrize("name", ["tpu-v5e", "cuda:h100", "rocm:mi300"])
def test_a_pytorch_model_compiles_for(name):
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.LayerNorm(128), torch.nn.Linear(128, 8)
    )
    compiled = kpx.compile(model, torch.ones(4, 64), target=name)
    assert compiled.memory.fits
    with pytest.raises(kpx.TargetError, match=f"compiled for {compiled.target}, which is not on this machine"):
        compiled(torch.ones(4, 64))


def test_a_product_that_cannot_be_tiled_is_left_to_the_library_and_said():
    model, inputs = CASES["vit"].make(small=True)
    compiled = kpx.compile(model, target="rocm:mi300", **inputs)
    assert "__cublas$" in compiled.hlo  # XLA's name for any vendor's
    assert "xla_gpu_enable_triton_gemm=False" in compiled.remarks[0]


def test_an_absent_targets_function_compiles_and_does_not_run():
    jitted = kpx.jit(loss, target="tpu-v5e")
    with pytest.raises(kpx.TargetError, match=r"is not on this machine.*kpx\.compile"):
        jitted(jnp.ones((2, 4, 4)), jnp.ones((2, 4)))
    compiled = kpx.compile(jitted, jnp.ones((2, 4, 4)), jnp.ones((2, 4)))
    with pytest.raises(kpx.TargetError, match="it can be looked at, and not called"):
        compiled(jnp.ones((2, 4, 4)), jnp.ones((2, 4)))


def test_a_model_is_not_optimized_for_a_machine_that_is_not_here():
    for model in (loss, torch.nn.Linear(2, 2)):
        with pytest.raises(kpx.TargetError, match=r"is not on this machine.*kpx\.compile"):
            kpx.optimize(model, target="cuda:h100")


def test_a_jitted_function_keeps_its_shardings_for_another_target():
    target = kpx.Target("tpu-v5e:2x2")
    rows = NamedSharding(target.mesh(data=4), P("data"))
    jitted = kpx.jit(lambda x: x * 2, in_shardings=rows)
    compiled = kpx.compile(jitted, jax.ShapeDtypeStruct((64, 128), jnp.float32), target=target)
    assert compiled.memory.argument_bytes == 4 * 64 * 128 // 4


def test_a_mesh_of_another_size_than_the_target_is_refused():
    rows = NamedSharding(kpx.Target("tpu-v5e:4x4").mesh(data=16), P("data"))
    with pytest.raises(kpx.CompileError, match=r"over 16 devices, and tpu-v5e:2x2 has 4.*mesh"):
        kpx.compile(lambda x: x, jax.ShapeDtypeStruct((64,), jnp.float32, sharding=rows), target="tpu-v5e:2x2")


def test_what_does_not_fit_gives_the_vendors_numbers_the_largest_values_and_remedies():
    def deep(x, w):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    x, w = jax.ShapeDtypeStruct((400_000, 8192), jnp.float32), jax.ShapeDtypeStruct((8192, 8192), jnp.float32)
    with pytest.raises(kpx.OutOfMemoryError, match="does not fit tpu-v5e:1x1") as caught:
        kpx.compile(jax.grad(deep, 1), x, w, target="tpu-v5e")
    error = caught.value
    assert error.used_bytes > error.available_bytes > 15 * 2**30
    assert error.buffers[0].bytes == 4 * 400_000 * 8192
    assert any(re.search(r"test_absent\.py:\d+$", b.source) for b in error.buffers)
    assert re.search(r"test_absent\.py:\d+", str(error))
    assert "What would make it fit" in str(error)


def test_what_a_compiler_refuses_is_in_its_own_words():
    def call(x):
        return jax.ffi.ffi_call("no_such_kernel", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    with pytest.raises(kpx.CompileError, match=r"compiler for tpu-v5e:1x1 did not compile.*no_such_kernel"):
        kpx.compile(call, jnp.ones(4), target="tpu-v5e")


@pytest.mark.parametrize("seconds", [0, -1, "soon", True])
def test_a_limit_that_is_no_time_is_refused(seconds):
    with pytest.raises(kpx.ConfigError, match="compile_seconds"):
        kpx.Config(compile_seconds=seconds)
