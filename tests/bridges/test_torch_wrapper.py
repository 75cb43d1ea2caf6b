"""The wrapper is the model: attributes, containers, hooks, copies, and models optimized in place."""

import collections
import copy
import inspect
import io
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kpx

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.scale = 1.0

    def forward(self, x: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
        y = self.linear(x) * self.scale
        return y * 2 if twice else y

    def encode(self, rows):
        return torch.stack([self(row[None])[0] for row in rows])


class Reveals(torch.nn.Module):
    """Returns 1 where it runs compiled, 0 in eager PyTorch."""

    def forward(self, x):
        return x * 0 + 1 if torch.compiler.is_compiling() else x * 0

    def encode(self, x):
        return self(x)


def _net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


# Attributes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [
    ("scale", 3.0), ("note", "text"), ("table", {"a": 1}), ("extra", torch.ones(2)), ("linear", torch.nn.Linear(4, 6)),
    ("forward", lambda x: x * 2), ("training", False),
])  # fmt: skip
def test_attribute_set_on_the_wrapper_is_the_models(name, value):
    model = Scaled()
    optimized = kpx.optimize(model)
    optimized(X)
    setattr(optimized, name, value)
    assert getattr(model, name) is value
    assert getattr(optimized, name) is value
    torch.testing.assert_close(optimized(X), model(X))


def test_attribute_deleted_on_the_wrapper_is_the_models():
    model = Scaled()
    model.note = "text"
    optimized = kpx.optimize(model)
    del optimized.note
    assert not hasattr(model, "note")
    with pytest.raises(AttributeError, match="note"):
        optimized.note  # noqa: B018


def test_missing_attribute_is_named_with_the_models_class():
    with pytest.raises(AttributeError, match="'Scaled' object has no attribute 'absent'"):
        kpx.optimize(Scaled()).absent  # noqa: B018


def test_parameter_and_buffer_registered_through_the_wrapper_are_the_models():
    model = Scaled()
    optimized = kpx.optimize(model)
    optimized.register_buffer("state", torch.ones(2))
    optimized.register_parameter("gain", torch.nn.Parameter(torch.ones(2)))
    optimized.add_module("more", torch.nn.ReLU())
    assert {"state", "gain", "linear.weight"} <= set(model.state_dict())
    assert model.more is optimized.more
    assert list(optimized.state_dict()) == list(model.state_dict())


def test_signature_of_forward_is_the_models():
    model = Scaled()
    assert inspect.signature(kpx.optimize(model).forward) == inspect.signature(model.forward)


def test_methods_of_the_model_are_the_wrappers():
    model = Scaled()
    optimized = kpx.optimize(model)
    torch.testing.assert_close(optimized.encode(X), model(X))
    assert {"encode", "linear", "scale", "forward"} <= set(dir(optimized))


def test_mode_set_on_either_is_seen_on_both():
    model = _net()
    optimized = kpx.optimize(model)
    model.eval()
    assert not optimized.training
    optimized.train()
    assert model.training
    assert model[0].training


# Containers ------------------------------------------------------------------------------------


def test_sequence_has_length_items_and_slices():
    model = _net()
    optimized = kpx.optimize(model)
    assert len(optimized) == 3
    assert optimized[0] is model[0]
    assert optimized[-1] is model[2]
    assert list(optimized) == list(model)
    assert len(optimized[:2]) == 2


def test_sequence_is_changed_through_the_wrapper():
    model = _net()
    optimized = kpx.optimize(model)
    optimized(X)
    optimized[1] = torch.nn.Tanh()
    optimized.append(torch.nn.Sigmoid())
    del optimized[0]
    optimized.insert(0, torch.nn.Linear(4, 4))
    assert [type(m).__name__ for m in model] == ["Linear", "Tanh", "Linear", "Sigmoid"]
    torch.testing.assert_close(optimized(X), model(X))


def test_dict_of_modules_has_keys_and_membership():
    class Choices(torch.nn.ModuleDict):
        def forward(self, x):
            return self["a"](x)

    model = Choices({"a": torch.nn.Linear(4, 4)})
    optimized = kpx.optimize(model)
    assert "a" in optimized
    assert "b" not in optimized
    assert list(optimized.keys()) == ["a"]
    optimized["b"] = torch.nn.ReLU()
    assert "b" in model


def test_model_without_length_has_none():
    optimized = kpx.optimize(Scaled())
    with pytest.raises(TypeError):
        len(optimized)
    with pytest.raises(TypeError):
        optimized[0]
    with pytest.raises(TypeError):
        iter(optimized)
    assert bool(optimized)


# Moves, gradients, hooks -----------------------------------------------------------------------


@pytest.mark.parametrize("move", [
    lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu"), lambda m: m.float(),
    lambda m: m.requires_grad_(False), lambda m: m.apply(lambda s: s), lambda m: m.train(), lambda m: m.eval(),
], ids=["double", "to dtype", "to device", "float", "requires_grad_", "apply", "train", "eval"])  # fmt: skip
def test_methods_that_return_the_module_return_the_wrapper(move):
    model = _net()
    optimized = kpx.optimize(model)
    assert move(optimized) is optimized
    x = X.to(model[0].weight.dtype)
    torch.testing.assert_close(optimized(x), model(x))


def test_zero_grad_and_parameters_are_the_models():
    model = _net()
    optimized = kpx.optimize(model)
    optimized(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimized.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert [id(p) for p in optimized.parameters()] == [id(p) for p in model.parameters()]


def _doubles(module, args, output):
    return output * 2


def _before(module, args):
    return (args[0] * 3,)


@pytest.mark.parametrize("register", [
    lambda m: m.register_forward_hook(_doubles), lambda m: m.register_forward_pre_hook(_before),
], ids=["forward", "pre"])  # fmt: skip
def test_hook_on_the_wrapper_acts_once_and_goes_when_removed(register):
    model, twin = _net(), _net()
    optimized = kpx.optimize(model)
    optimized(X)
    handle, eager = register(optimized), register(twin)
    torch.testing.assert_close(optimized(X), twin(X))
    handle.remove(), eager.remove()
    torch.testing.assert_close(optimized(X), twin(X))


def test_backward_hook_on_the_wrapper_sees_the_gradient():
    seen = []
    optimized = kpx.optimize(_net())
    optimized(X)
    optimized.register_full_backward_hook(lambda module, before, after: seen.append(after[0].clone()))
    optimized(X.clone().requires_grad_()).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.ones(3, 2))


# Copies ----------------------------------------------------------------------------------------


def _saved(module):
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": _saved}


@pytest.mark.parametrize("inplace", [False, True], ids=["wrapper", "inplace"])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copy_is_a_model_of_its_own(duplicate, inplace):
    model = _net().eval()
    optimized = kpx.optimize(model, inplace=inplace)
    with torch.no_grad():
        wanted = optimized(X).clone()
        other = duplicate(optimized)
        assert not other.training
        torch.testing.assert_close(other(X), wanted)
        next(other.parameters()).mul_(2)
        torch.testing.assert_close(optimized(X), wanted)
        assert not torch.allclose(other(X), wanted)


def test_shallow_copy_shares_the_weights():
    model = _net()
    optimized = kpx.optimize(model)
    shallow = copy.copy(optimized)
    with torch.no_grad():
        model[0].weight.zero_()
    torch.testing.assert_close(shallow(X), model(X))


def test_average_of_an_optimized_model_runs():
    optimized = kpx.optimize(_net().eval())
    average = AveragedModel(optimized, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    with torch.no_grad():
        average.update_parameters(optimized)
        for parameter in optimized.parameters():
            parameter.add_(0.5)
        average.update_parameters(optimized)
        eager = _net().eval()
        for mine, theirs in zip(eager.parameters(), average.module.parameters(), strict=True):
            mine.copy_(theirs)
        torch.testing.assert_close(average(X), eager(X))


def test_functional_call_takes_the_parameters_it_is_passed():
    model = _net()
    parameters = {name: p.detach() * 2 for name, p in model.named_parameters()}
    wanted = torch.func.functional_call(model, parameters, (X,))
    optimized = kpx.optimize(model)
    optimized(X)
    torch.testing.assert_close(torch.func.functional_call(optimized, parameters, (X,)), wanted)


# In place --------------------------------------------------------------------------------------


def test_optimized_in_place_is_the_model_itself():
    model = Scaled()
    assert kpx.optimize(model, inplace=True) is model
    assert type(model) is Scaled


@pytest.mark.parametrize("door", [
    lambda m: kpx.optimize(m, inplace=True), lambda m: m.compile(backend="kpx"),
], ids=["inplace", "compile"])  # fmt: skip
def test_method_that_calls_the_model_runs_compiled(door):
    model = Reveals()
    door(model)
    assert torch.equal(model.encode(X), torch.ones(3, 4))
    scaled = Scaled()
    wanted = scaled.encode(X)
    door(scaled)
    torch.testing.assert_close(scaled.encode(X), wanted)


def test_submodule_optimized_in_place_runs_compiled_in_its_parent():
    parent = torch.nn.Sequential(Reveals(), torch.nn.Identity())
    kpx.optimize(parent[0], inplace=True)
    assert torch.equal(parent(X), torch.ones(3, 4))


def test_optimized_module_in_a_parent_follows_its_mode():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    parent = torch.nn.Sequential(kpx.optimize(model))
    parent(X)
    parent.eval()
    before = model[1].running_mean.clone()
    torch.testing.assert_close(parent(X), model(X))
    assert torch.equal(model[1].running_mean, before)


def test_optimizing_twice_is_optimizing_once():
    model = _net()
    optimized = kpx.optimize(kpx.optimize(model))
    torch.testing.assert_close(optimized(X), model(X))
    kpx.optimize(model, inplace=True)
    wanted = _net()(X)
    torch.testing.assert_close(kpx.optimize(model, inplace=True)(X), wanted)


def test_in_place_model_trains_as_eager():
    model, twin = _net(), _net()
    kpx.optimize(model, inplace=True)
    for net in (model, twin):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


# Arguments -------------------------------------------------------------------------------------


class Reads(torch.nn.Module):
    def forward(self, batch, scale=1.0):
        return batch["x"] * scale + batch["y"]


class OwnMapping(collections.abc.Mapping):
    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


@pytest.mark.parametrize("make", [
    dict, collections.OrderedDict, collections.UserDict, OwnMapping, lambda **k: collections.defaultdict(list, k),
], ids=["dict", "OrderedDict", "UserDict", "Mapping", "defaultdict"])  # fmt: skip
def test_any_mapping_is_an_argument(make):
    optimized = kpx.optimize(Reads())
    for n in (2, 3):
        x = torch.ones(n)
        assert torch.equal(optimized(make(x=x, y=x * 2), scale=3.0), x * 5)


def test_wrong_call_has_pytorchs_own_message():
    optimized = kpx.optimize(_net())
    for wrong, message in [((), "missing 1 required positional argument"), ((X, X), "positional argument")]:
        with pytest.raises(TypeError, match=message):
            optimized(*wrong)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(3x5 and 4x4\)"):
        optimized(torch.ones(3, 5))
