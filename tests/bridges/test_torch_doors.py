"""Other ways in and out: JAX training, exported programs, StableHLO, DLPack, generation."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax import export

import kpx
from kpx.bridges import stablehlo
from kpx.bridges.torch import dynamo, functional, load
from kpx.bridges.torch.tensors import to_array, to_tensor

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def _net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.GELU(), torch.nn.Linear(16, 4)
    )


# JAX training ----------------------------------------------------------------------------------


def test_functional_gives_pytorchs_outputs_gradients_and_state():
    net = _net()
    params, buffers, fn = functional(net)

    def loss(params, buffers, x):
        y, buffers = fn(params, buffers, x)
        return jnp.mean(y**2), buffers

    (value, after), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, buffers, jnp.asarray(X.numpy()))
    wanted = net(X).square().mean()
    wanted.backward()
    assert float(value) == pytest.approx(wanted.item(), rel=1e-5)
    for name, p in net.named_parameters():
        np.testing.assert_allclose(grads[name], p.grad.numpy(), rtol=1e-4, atol=1e-6)
    for name, b in net.named_buffers():
        np.testing.assert_allclose(after[name], b.numpy(), rtol=1e-5)


def test_functional_trains_with_optax_under_kpx_jit():
    net = _net()
    params, buffers, fn = functional(net)
    optimizer = optax.adam(1e-2)
    x = jnp.asarray(X.numpy())

    @kpx.jit
    def step(params, buffers, state):
        def loss(params):
            y, after = fn(params, buffers, x)
            return jnp.mean(y**2), after

        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), after, state, value

    state, values = optimizer.init(params), []
    for _ in range(10):
        params, buffers, state, value = step(params, buffers, state)
        values.append(float(value))
    assert values[-1] < values[0] / 2


def test_functional_draws_from_the_key_it_is_given():
    params, buffers, fn = functional(torch.nn.Dropout(0.5).train())
    x = jnp.ones(64)
    first, _ = fn(params, buffers, x, key=jax.random.key(0))
    again, _ = fn(params, buffers, x, key=jax.random.key(0))
    other, _ = fn(params, buffers, x, key=jax.random.key(1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_functional_says_that_a_key_is_missing():
    params, buffers, fn = functional(torch.nn.Dropout(0.5).train())
    with pytest.raises(kpx.InputError, match="Pass a JAX key"):
        fn(params, buffers, jnp.ones(4))


def test_functional_keeps_tied_and_frozen_weights_apart():
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    net[1].weight = net[0].weight
    net[2].requires_grad_(False)
    params, buffers, fn = functional(net)
    assert sorted(params) == ["0.bias", "0.weight", "1.bias"]
    assert sorted(buffers) == ["2.bias", "2.weight"]
    np.testing.assert_allclose(
        fn(params, buffers, jnp.asarray(X.numpy()))[0], net(X).detach().numpy(), rtol=1e-4, atol=1e-6
    )


# Exported programs -----------------------------------------------------------------------------


def test_an_exported_program_is_a_model():
    net = _net().eval()
    program = torch.export.export(net, (X,))
    torch.testing.assert_close(kpx.optimize(program)(X), net(X).detach())


def test_a_saved_program_is_loaded(tmp_path):
    net = _net().eval()
    path = os.fspath(tmp_path / "net.pt2")
    torch.export.save(torch.export.export(net, (X,)), path)
    torch.testing.assert_close(kpx.optimize(load(path))(X), net(X).detach())


def test_a_file_that_is_no_program_is_refused(tmp_path):
    path = tmp_path / "net.pt2"
    path.write_text("not a program")
    with pytest.raises(kpx.InputError, match=r"cannot be read as an ExportedProgram"):
        load(path)


# StableHLO -------------------------------------------------------------------------------------


def _artifact():
    function = jax.jit(lambda x: jnp.sin(x) @ x.T)
    return export.export(function)(jax.ShapeDtypeStruct((3, 4), jnp.float32)).mlir_module_serialized


def test_a_portable_artifact_is_a_jax_function():
    x = jnp.arange(12.0).reshape(3, 4)
    (got,) = kpx.jit(stablehlo.load(_artifact()))(x)
    np.testing.assert_allclose(got, jnp.sin(x) @ x.T, rtol=1e-5)


def test_text_is_a_jax_function_from_a_string_or_a_file(tmp_path):
    text = kpx.compile(lambda x: jnp.tanh(x), jax.ShapeDtypeStruct((3,), jnp.float32)).stablehlo
    path = tmp_path / "module.mlir"
    path.write_text(text)
    x = jnp.arange(3.0)
    for source in (text, path, os.fspath(path), text.encode()):
        np.testing.assert_allclose(stablehlo.load(source)(x)[0], jnp.tanh(x), rtol=1e-6)


def test_what_is_no_module_is_refused():
    with pytest.raises(kpx.KpxError, match="not a valid StableHLO module"):
        stablehlo.load(b"nothing of the kind")
    with pytest.raises(kpx.InputError, match="cannot be read"):
        stablehlo.load("no/such/file.mlir")


def test_arguments_of_another_shape_are_refused():
    with pytest.raises(kpx.InputError, match=r"float32\[3, 4\]"):
        stablehlo.load(_artifact())(jnp.ones((4, 3)))


# DLPack ----------------------------------------------------------------------------------------


_UNALIGNED = """
import jax, torch
from kpx.bridges.torch.tensors import to_array
tensors = [torch.zeros((1 << 20) + 1)[1:] for _ in range(40)]
arrays = [to_array(tensor, jax.devices("cpu")[0]) for tensor in tensors]
"""


def test_a_process_that_ends_as_unaligned_tensors_are_read_ends_well():
    done = subprocess.run([sys.executable, "-c", _UNALIGNED], capture_output=True, text=True, timeout=1200)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.bool])
def test_tensors_and_arrays_share_memory_both_ways(dtype):
    device = jax.devices("cpu")[0]
    tensor = torch.ones(64, 64).to(dtype)
    array = to_array(tensor, device)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert to_tensor(array).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_dtypes_keep_their_width(dtype):
    class Same(torch.nn.Module):
        def forward(self, x):
            return x.reshape(2, 2)

    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).to(dtype)
    got = kpx.optimize(Same())(x)
    assert got.dtype == dtype
    assert torch.equal(got.float(), x.reshape(2, 2).float())


# Generation ------------------------------------------------------------------------------------


def _language_model(kind):
    import transformers

    torch.manual_seed(0)
    windows = {"sliding_window": 8} if kind == "Mistral" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **windows,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture
def compiled_graphs(monkeypatch):
    """The graphs that kpx compiles for Dynamo, as they come."""
    torch._dynamo.reset()
    graphs, compile_with = [], dynamo.compile_with

    def noted(graph, inputs, **settings):
        graphs.append(graph)
        return compile_with(graph, inputs, **settings)

    monkeypatch.setattr(dynamo, "compile_with", noted)
    return graphs


@pytest.mark.models
@pytest.mark.parametrize(
    "kind", ["Llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Mistral", "Mixtral"))]
)
def test_greedy_generation_is_eagers_token_for_token(kind, compiled_graphs):
    model = _language_model(kind)
    ids = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(kpx.optimize(model).generate(ids, **settings), model.generate(ids, **settings))
    assert len(compiled_graphs) == 2  # the prompt, and one step for all tokens


@pytest.mark.models
def test_generation_from_another_length_of_prompt_keeps_the_step(compiled_graphs):
    model = _language_model("Llama")
    optimized = kpx.optimize(model)
    for length in (7, 9, 7):
        optimized.generate(torch.ones(1, length, dtype=torch.int64), max_new_tokens=4, pad_token_id=0)
    assert len(compiled_graphs) == 3  # two prompts, one step


@pytest.mark.models
def test_generation_with_padded_prompts_is_eagers(compiled_graphs):
    model = _language_model("Llama")
    ids = torch.randint(1, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(kpx.optimize(model).generate(ids, **settings), model.generate(ids, **settings))


def test_a_model_without_generate_has_none():
    assert not hasattr(kpx.optimize(_net()), "generate")
