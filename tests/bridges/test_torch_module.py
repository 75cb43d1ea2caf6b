"""kpx.optimize of a torch.nn.Module: structure, shared weights, signatures, and bad input."""

import collections
import concurrent.futures
import copy
import warnings

import jax
import pytest
import torch

import kpx
from kpx.bridges.torch.registry import RULES
from kpx.bridges.torch.tensors import to_array, to_tensor

X = torch.linspace(-1, 1, 24).reshape(3, 8)


def _model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)]
    return torch.nn.Sequential(*layers).eval()


def _same(optimized, model, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(optimized(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_outputs_and_structure_are_the_models():
    Pair = collections.namedtuple("Pair", "left right")

    class Model(torch.nn.Module):
        def forward(self, x, *, scale=1.0, extra=None):
            return {"a": [x * scale], "b": Pair(x.sum(), 3), "none": None if extra is None else extra["t"] + x}

    optimized, inputs = kpx.optimize(Model()), {"scale": 2.0, "extra": {"t": X}}
    ours, wanted = optimized(X, **inputs), Model()(X, **inputs)
    assert torch.utils._pytree.tree_structure(ours) == torch.utils._pytree.tree_structure(wanted)
    assert ours["b"].right == 3
    torch.testing.assert_close(ours["none"], wanted["none"])
    assert optimized(X)["none"] is None


def test_int64_and_float64_stay_what_they_are():
    class Model(torch.nn.Module):
        def forward(self, i, d):
            return i + 2**40, d * 3

    i, d = torch.arange(3), torch.ones(3, dtype=torch.float64) / 3
    a, b = kpx.optimize(Model())(i, d)
    assert (a.dtype, b.dtype) == (torch.int64, torch.float64)
    assert a.tolist() == [2**40, 2**40 + 1, 2**40 + 2]
    assert torch.equal(b, d * 3)
    assert not jax.config.jax_enable_x64


# Weights ---------------------------------------------------------------------------------------


def test_names_parameters_and_buffers_are_the_models_own():
    model = _model()
    optimized = kpx.optimize(model)
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(optimized.parameters(), model.parameters(), strict=True))
    assert optimized.get_submodule("0") is model[0]


def _new(weight):
    torch.manual_seed(1)
    return torch.rand(weight.shape).to(weight.dtype)


def _in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(2)


def _through_data(model):
    model[0].weight.data.add_(0.5)


def _rows_through_data(model):
    model[0].weight.data[3:4].zero_()


def _column_through_data(model):
    model[0].weight.data[:, -1].zero_()


def _rows_through_numpy(model):
    model[0].weight.detach().numpy()[:2] = 0


def _data_replaced(model):
    model[0].weight.data = _new(model[0].weight)


def _parameter_replaced(model):
    model[0].weight = torch.nn.Parameter(_new(model[0].weight))


def _loaded(model):
    model.load_state_dict({k: _new(v) for k, v in model.state_dict().items()})


def _assigned(model):
    model.load_state_dict({k: _new(v) for k, v in model.state_dict().items()}, assign=True)


CHANGES = [
    _in_place, _through_data, _rows_through_data, _column_through_data, _rows_through_numpy, _data_replaced,
    _parameter_replaced, _loaded, _assigned,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "in place"])
def test_a_later_change_of_a_weight_is_seen(change, prepared):
    model = _model()
    if prepared:  # a weight that is transposed at load is a copy, and must be made again
        model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1, bias=False), torch.nn.BatchNorm2d(16)).eval()
    x = torch.ones(2, 8, 3, 3) if prepared else X
    optimized = kpx.optimize(model)
    _same(optimized, model, x)
    change(model)
    _same(optimized, model, x)


def test_rows_of_a_channels_last_weight_written_through_data_are_seen():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, bias=False), torch.nn.BatchNorm2d(16)).eval()
    model, x = model.to(memory_format=torch.channels_last), torch.ones(2, 8, 5, 5)
    optimized = kpx.optimize(model)
    _same(optimized, model, x)
    model[0].weight.data[3:5].zero_()
    _same(optimized, model, x)


def test_weights_made_in_inference_mode_are_read_at_each_call():
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1, bias=False), torch.nn.BatchNorm2d(16)).eval()
        x, optimized = torch.ones(2, 8, 3, 3), kpx.optimize(model)
        torch.testing.assert_close(optimized(x), model(x))
        model[0].weight[5, 3] = 9.0
        torch.testing.assert_close(optimized(x), model(x))


def test_load_state_dict_through_the_optimized_module_changes_both():
    model, other = _model(), _model()
    torch.nn.init.uniform_(other[0].weight)
    optimized = kpx.optimize(model)
    _same(optimized, model, X)
    optimized.load_state_dict(other.state_dict())
    _same(optimized, other, X)
    _same(model, other, X)


def test_tied_weights_stay_one():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    optimized = kpx.optimize(model)
    _same(optimized, model, X)
    with torch.no_grad():
        model[1].weight.zero_()
    _same(optimized, model, X)


def test_weights_of_another_dtype_compile_anew():
    model = _model()
    optimized = kpx.optimize(model)
    _same(optimized, model, X)
    model.double()
    with torch.no_grad():
        assert optimized(X.double()).dtype == torch.float64
        model.bfloat16()
        torch.testing.assert_close(optimized(X.bfloat16()), model(X.bfloat16()), rtol=2e-2, atol=2e-2)


def test_a_copy_has_weights_of_its_own():
    optimized = kpx.optimize(_model())
    before = optimized(X)
    copied = copy.deepcopy(optimized)
    with torch.no_grad():
        copied.get_submodule("3").bias.add_(1)
    torch.testing.assert_close(copied(X), before + 1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(optimized(X), before)


def test_many_threads_may_call_at_once():
    model = _model()
    optimized = kpx.optimize(model)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda _: optimized(X), range(32)))
    assert len(optimized.compiled_programs()) == 1
    for output in outputs:
        torch.testing.assert_close(output, model(X), rtol=1e-5, atol=1e-5)


def test_weights_that_run_as_they_are_are_not_copied():
    model = torch.nn.Linear(8, 4).eval()
    optimized = kpx.optimize(model, example_inputs=(X,))
    assert model.weight.data_ptr() in type(optimized)._kpx_engine.settings.freeze()


def test_originals_of_prepared_weights_can_be_freed():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Flatten(), torch.nn.Linear(16, 4)).eval()
    x = torch.ones(2, 8, 3, 3)
    optimized = kpx.optimize(model)
    with pytest.raises(kpx.InputError, match="Nothing is compiled yet"):
        optimized.free_originals()
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(optimized(x), wanted, rtol=1e-5, atol=1e-5)
        assert optimized.free_originals() >= 16 * 8 * 9 * 4
        assert not model[0].weight.untyped_storage().size()
        torch.testing.assert_close(optimized(x), wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(kpx.InputError, match="were freed"):
            optimized(x[:1])
        with pytest.raises(RuntimeError, match="not allocated"):
            model(x)


# Modes and signatures --------------------------------------------------------------------------


def test_train_and_eval_reach_the_model_and_are_signatures_of_their_own():
    class Model(torch.nn.Module):
        def forward(self, x):
            return x + 1 if self.training else x - 1

    model = Model()
    optimized = kpx.optimize(model)
    for mode in (True, False, True):
        optimized.train(mode)
        assert model.training is mode
        _same(optimized, model, X)
    assert len(optimized.compiled_programs()) == 2


def test_new_shapes_dtypes_and_constants_compile_anew_and_are_kept():
    class Model(torch.nn.Module):
        def forward(self, x, n=1):
            return x * n

    model = Model()
    optimized = kpx.optimize(model)
    for inputs in ((X,), (X[:2],), (X.bfloat16(),), (X, 3), (X, 2.5), (X,), (X, 3)):
        torch.testing.assert_close(optimized(*inputs), model(*inputs))
    count = len(optimized.compiled_programs())
    torch.testing.assert_close(optimized(X, 3), model(X, 3))
    assert len(optimized.compiled_programs()) == count <= 6


def test_true_and_one_are_different_constants():
    class Model(torch.nn.Module):
        def forward(self, x, flag):
            return x if flag is True else x + 1

    optimized = kpx.optimize(Model())
    assert torch.equal(optimized(X, True), X)
    assert torch.equal(optimized(X, 1), X + 1)


@pytest.mark.parametrize(
    "config",
    [kpx.Config.training(), kpx.Config.development(), kpx.Config(level="none"), kpx.Config(matmul_precision="high")],
    ids=["training", "development", "none", "high"],
)
def test_every_config_gives_the_models_numbers(config):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.BatchNorm1d(512), torch.nn.Linear(512, 512)).eval()
    x = torch.randn(64, 512)
    with torch.no_grad():
        torch.testing.assert_close(kpx.optimize(model, config=config)(x), model(x), rtol=1e-4, atol=1e-4)


def test_executables_persist_where_the_config_says(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        kpx.optimize(_model(), config=kpx.Config.production(cache_dir=str(tmp_path)))(X)
        assert any(tmp_path.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_example_inputs_compile_at_once():
    optimized = kpx.optimize(_model(), example_inputs=(X,))
    assert len(optimized.compiled_programs()) == 1
    _same(optimized, _model(), X)
    assert len(optimized.compiled_programs()) == 1


def test_example_inputs_leave_buffers_and_random_state_as_they_were():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    kpx.optimize(model, example_inputs=(X,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_of_any_layout_in_memory():
    model = _model()
    optimized = kpx.optimize(model)
    for x in (X.T.contiguous().T, X[::2], X.flip(0)[1:], torch.randn(3, 9)[:, 1:], X[0].expand(3, 8), X[:0]):
        _same(optimized, model, x)


def test_an_input_changed_after_the_call_does_not_change_the_output():
    optimized = kpx.optimize(torch.nn.ReLU())
    x = X.clone()
    y = optimized(x)
    x.zero_()
    assert torch.equal(y, X.relu())


def test_an_output_that_is_an_input_or_a_weight_is_that_very_tensor():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x, self.weight, x.view(-1)

    model, x = Model(), X.clone()
    with torch.no_grad():
        same, weight, view = kpx.optimize(model)(x)
        view.add_(1)
    assert same is x
    assert weight is model.weight
    assert torch.equal(x, X + 1)


def test_conversion_shares_memory_both_ways():
    x = torch.arange(64, dtype=torch.float32)
    array = to_array(x, jax.devices("cpu")[0])
    assert array.unsafe_buffer_pointer() == x.data_ptr() == to_tensor(array).data_ptr()


def test_compiled_for_tensors_or_structs():
    model = _model()
    for spec in (X, jax.ShapeDtypeStruct((3, 8), "float32")):
        compiled = kpx.compile(model, spec)
        torch.testing.assert_close(compiled(X), model(X))
        assert compiled.kernels == {"kpx.gelu": "decomposition (XLA)", "kpx.layer_norm": "decomposition (XLA)"}
        assert compiled.memory.output_bytes == 48


# Graph breaks ----------------------------------------------------------------------------------


class _Inner(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.ldl_factor_ex(x)[0]


class _WithoutRules(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = _Inner(), _Inner()

    def forward(self, x):
        return self.second(self.first(x + 1) * 2) - 1


def test_operators_without_a_rule_run_in_eager_pytorch_with_one_warning_that_names_them():
    model = _WithoutRules()
    optimized = kpx.optimize(model)
    with pytest.warns(kpx.errors.GraphBreakWarning) as warned:
        got = optimized(torch.eye(3))
    torch.testing.assert_close(got, model(torch.eye(3)))
    breaks = [w for w in warned if w.category is kpx.errors.GraphBreakWarning]
    assert len(breaks) == 1
    assert "aten.linalg_ldl_factor_ex.default, in `first`" in str(breaks[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimized(torch.eye(3))


def test_fullgraph_refuses_operators_without_a_rule_and_lists_them_with_their_modules():
    with pytest.raises(kpx.UnsupportedError) as error:
        kpx.optimize(_WithoutRules(), fullgraph=True)(torch.eye(3))
    message = str(error.value)
    assert "aten.linalg_ldl_factor_ex.default: used by first, second" in message
    assert "kpx.bridges.torch.lowers" in message


class _Branches(torch.nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the line
            return x * 2
        return -x


def test_control_flow_on_a_value_breaks_the_graph_with_a_warning_that_names_the_line():
    optimized = kpx.optimize(_Branches())
    with pytest.warns(kpx.errors.GraphBreakWarning, match=r"test_torch_module\.py.*if x\.sum\(\) > 0:  # the line"):
        torch.testing.assert_close(optimized(X + 2), (X + 2) * 2)
    torch.testing.assert_close(optimized(X - 2), 2 - X)


def test_fullgraph_refuses_control_flow_on_a_value():
    with pytest.raises(kpx.CaptureError, match="Leave `fullgraph=True` out"):
        kpx.optimize(_Branches(), fullgraph=True)(X)


# Bad input -------------------------------------------------------------------------------------


def test_compile_ahead_gives_the_line_of_control_flow_on_a_value():
    with pytest.raises(kpx.CaptureError) as error:
        kpx.compile(_Branches(), X)
    assert "if x.sum() > 0:  # the line" in str(error.value)
    assert "torch.where" in str(error.value)


def test_a_wrong_shape_is_pytorchs_own_error():
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(3x7 and 8x16\)"):
        kpx.optimize(_model())(torch.ones(3, 7))


def test_a_missing_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'input'"):
        kpx.optimize(torch.nn.Linear(8, 4))()


def test_a_tensor_that_cannot_be_compiled_for_runs_in_eager_pytorch():
    model = torch.nn.ReLU()
    for x in (X.to("meta"), X.to_sparse()):
        with pytest.warns(kpx.errors.GraphBreakWarning):
            assert kpx.optimize(model)(x).shape == X.shape


def test_a_torchscript_module_is_refused():
    with pytest.raises(kpx.InputError, match="that it was scripted or traced from"):
        kpx.optimize(torch.jit.trace(_model(), X))


def test_a_compiled_signature_refuses_another():
    compiled = kpx.compile(_model(), X)
    for wrong in (X[:2], X.double(), X[0]):
        with pytest.raises(kpx.InputError, match=r"compiled for \(float32\[3, 8\]\), and was called with"):
            compiled(wrong)


def test_named_inputs_in_place_of_positional_ones_are_pointed_at():
    with pytest.raises(kpx.InputError, match="example_kwargs"):
        kpx.optimize(_model(), example_inputs={"input": X})


def test_an_absent_target_is_refused_before_anything_is_compiled():
    with pytest.raises(kpx.TargetError, match="is not on this machine"):
        kpx.optimize(_model(), target="cuda")


def test_a_rule_that_gives_another_shape_than_pytorch_is_refused(monkeypatch):
    monkeypatch.setitem(RULES, torch.ops.aten.tanh.default, lambda x: x[:1])
    with pytest.raises(kpx.UnsupportedError, match=r"gave float32\[1, 8\] where PyTorch gives float32\[3, 8\]"):
        kpx.optimize(torch.nn.Tanh(), fullgraph=True)(X)
