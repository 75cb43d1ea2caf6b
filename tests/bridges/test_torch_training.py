"""Training from PyTorch: both passes compiled, every gradient PyTorch's."""

import copy
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kpx
from kpx.bridges.torch.dynamo import backend, differentiable
from kpx.runtime.memory import keep_freed

F = torch.nn.functional


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Dynamo counts how often it compiled a model's code, over all tests."""
    torch._dynamo.reset()


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.last = torch.nn.Linear(16, 8)

    def forward(self, x):
        return self.last(F.gelu(self.norm(self.first(x))))


class Block(torch.nn.Module):
    """Convolution, BatchNorm, pooling, attention and an embedding in one."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.pool = torch.nn.MaxPool2d(2)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.words = torch.nn.Embedding(11, 8, padding_idx=0)

    def forward(self, image, ids):
        y = self.pool(F.relu(self.norm(self.conv(image))))
        y = y.flatten(2).transpose(1, 2) + self.words(ids)
        return self.attention(y, y, y, need_weights=False)[0]


def _models(make=Net):
    torch.manual_seed(0)
    eager = make()
    return eager, copy.deepcopy(eager)


def _same_gradients(eager, ours):
    for (name, p), (_, q) in zip(eager.named_parameters(), ours.named_parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None, name
        else:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def _step(model, parameters, *inputs):
    loss = model(*inputs).square().mean()
    loss.backward()
    return loss


# Gradients -------------------------------------------------------------------------------------


def test_backward_fills_every_gradient():
    eager, model = _models()
    trained = kpx.optimize(model)
    torch.testing.assert_close(_step(trained, model, _x(4, 8)), _step(eager, eager, _x(4, 8)))
    _same_gradients(eager, model)


def test_convolution_norm_pooling_attention_and_embedding_have_pytorchs_gradients():
    eager, model = _models(Block)
    inputs = _x(2, 3, 16, 16), torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        _step(kpx.optimize(model), model, *inputs), _step(eager, eager, *inputs), rtol=1e-4, atol=1e-6
    )
    _same_gradients(eager, model)
    for (_, a), (_, b) in zip(eager.named_buffers(), model.named_buffers(), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_over_transposed_heads_has_pytorchs_gradients(causal):
    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = (a.unflatten(-1, (4, 4)).transpose(1, 2) for a in self.qkv(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            return self.out(y.transpose(1, 2).flatten(2))

    eager, model = _models(Heads)
    _step(eager, eager, _x(2, 6, 16))
    _step(kpx.optimize(model), model, _x(2, 6, 16))
    _same_gradients(eager, model)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_whose_heads_share_keys_has_pytorchs_gradients(causal):
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.both = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x):
            q = self.query(x).unflatten(-1, (4, 4)).transpose(1, 2)
            k, v = (a.unflatten(-1, (2, 4)).transpose(1, 2) for a in self.both(x).chunk(2, -1))
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    eager, model = _models(Shared)
    _step(eager, eager, _x(2, 6, 16))
    _step(kpx.optimize(model), model, _x(2, 6, 16))
    _same_gradients(eager, model)


def test_an_input_gets_its_gradient_too():
    eager, model = _models()
    a, b = _x(4, 8).requires_grad_(), _x(4, 8).requires_grad_()
    _step(eager, eager, a)
    _step(kpx.optimize(model), model, b)
    torch.testing.assert_close(b.grad, a.grad)


def test_gradients_are_as_close_to_f64_as_pytorchs():
    eager, model = _models()
    exact = copy.deepcopy(eager).double()
    _step(exact, exact, _x(4, 8).double())
    _step(eager, eager, _x(4, 8))
    _step(kpx.optimize(model), model, _x(4, 8))
    for e, p, q in zip(exact.parameters(), eager.parameters(), model.parameters(), strict=True):
        error = (q.grad.double() - e.grad).norm() / e.grad.norm()
        assert error <= 2 * (p.grad.double() - e.grad).norm() / e.grad.norm() + 1e-6


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop"])
def test_any_optimizer_steps_as_with_eager(optimizer):
    eager, model = _models()
    losses = []
    for net, call in ((eager, eager), (model, kpx.optimize(model))):
        steps = getattr(torch.optim, optimizer)(net.parameters(), lr=1e-2)
        mine = []
        for i in range(4):
            steps.zero_grad()
            mine.append(_step(call, net, _x(4, 8, seed=i)).item())
            steps.step()
        losses.append(mine)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_gradients_accumulate_over_calls():
    eager, model = _models()
    trained = kpx.optimize(model)
    for seed in range(3):
        _step(eager, eager, _x(4, 8, seed=seed))
        _step(trained, model, _x(4, 8, seed=seed))
    _same_gradients(eager, model)


def test_frozen_parameters_get_no_gradient():
    eager, model = _models()
    for net in (eager, model):
        net.first.requires_grad_(False)
    _step(eager, eager, _x(4, 8))
    _step(kpx.optimize(model), model, _x(4, 8))
    _same_gradients(eager, model)
    assert model.first.weight.grad is None


def test_tied_weights_get_the_sum_of_their_gradients():
    def tied():
        net = Net()
        net.last = torch.nn.Linear(16, 8)
        net.first.weight = torch.nn.Parameter(torch.randn(16, 8))
        net.tied = torch.nn.Linear(8, 16, bias=False)
        net.tied.weight = net.first.weight
        net.forward = lambda x: net.tied(net.last(torch.tanh(net.first(x))))
        return net

    torch.manual_seed(0)
    eager = tied()
    torch.manual_seed(0)
    model = tied()
    _step(eager, eager, _x(4, 8))
    _step(kpx.optimize(model), model, _x(4, 8))
    _same_gradients(eager, model)


def test_checkpointed_blocks_have_the_same_gradients():
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    eager, model = _models(Checkpointed)
    _step(eager, eager, _x(4, 8))
    _step(kpx.optimize(model), model, _x(4, 8))
    _same_gradients(eager, model)


def test_autocast_computes_in_bf16_and_keeps_f32_gradients():
    eager, model = _models()
    trained = kpx.optimize(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, got = eager(_x(4, 8)), trained(_x(4, 8))
    assert got.dtype == wanted.dtype == torch.bfloat16
    wanted.float().square().mean().backward()
    got.float().square().mean().backward()
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        torch.testing.assert_close(q.grad, p.grad, rtol=5e-2, atol=2e-3)


def test_no_grad_and_detach_stop_the_gradient():
    class Stops(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                y = self.a(x)
            return self.b(x) * y + self.b(x).detach()

    eager, model = _models(Stops)
    _step(eager, eager, _x(4, 8))
    _step(kpx.optimize(model), model, _x(4, 8))
    _same_gradients(eager, model)


def test_dropout_drops_in_training_and_not_in_evaluation():
    model = torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.Dropout(0.5))
    trained = kpx.optimize(model)
    out = trained(_x(4, 8))
    assert 0.4 < (out == 0).float().mean() < 0.6
    trained.eval()
    torch.testing.assert_close(trained(_x(4, 8)), model(_x(4, 8)))


def test_the_gradient_of_dropout_is_that_of_the_same_draw():
    trained = kpx.optimize(torch.nn.Dropout(0.5))
    x = torch.ones(64, requires_grad=True)
    out = trained(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_training_is_deprecated_and_without_effect():
    with pytest.warns(DeprecationWarning, match="outputs carry gradients where grad mode is on"):
        trained = kpx.optimize(Net(), training=True)
    assert trained(_x(4, 8)).requires_grad
    with torch.no_grad():
        assert not trained(_x(4, 8)).requires_grad


def test_training_a_jax_function_is_refused_with_the_remedy():
    with pytest.raises(kpx.InputError, match=r"jax\.grad"):
        kpx.optimize(lambda x: x, training=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.split(2, 1),
        lambda x: x.t(),
        lambda x: x[1:, ::2],
        lambda x: x[:, :1].expand(4, 5),
        lambda x: (2 * x).t()[1:],
        lambda x: torch.broadcast_tensors(x, torch.ones(2, 4, 8)),
    ],
    ids=["split", "t", "slice", "expand", "view of a result", "broadcast"],
)
def test_views_among_the_outputs_have_pytorchs_values_strides_and_gradients(function):
    def run(f):
        x = _x(4, 8).requires_grad_()
        outputs = torch.utils._pytree.tree_leaves(f(x))
        sum((o * torch.arange(o.numel()).reshape(o.shape)).sum() for o in outputs).backward()
        return [(o.detach(), o.stride()) for o in outputs], x.grad

    wanted, grad = run(function)
    for compiled in (torch.compile(function, backend="kpx"), differentiable(function)):
        got, ours = run(compiled)
        for (g, s), (w, t) in zip(got, wanted, strict=True):
            assert torch.equal(g, w)
            assert s == t
        torch.testing.assert_close(ours, grad)


# torch.compile ---------------------------------------------------------------------------------


def test_torch_compile_finds_the_backend_by_name():
    eager, model = _models()
    compiled = torch.compile(model, backend="kpx")
    torch.testing.assert_close(_step(compiled, model, _x(4, 8)), _step(eager, eager, _x(4, 8)))
    _same_gradients(eager, model)


def test_a_graph_break_tells_where_and_everything_is_computed():
    class Breaks(Net):
        def forward(self, x):
            y = self.first(x)
            if y.sum() > 1e9:
                y = -y
            return self.last(y)

    eager, model = _models(Breaks)
    with pytest.warns(kpx.GraphBreakWarning, match=r"test_torch_training\.py"):
        got = kpx.optimize(model)(_x(4, 8))
    torch.testing.assert_close(got, eager(_x(4, 8)))


def test_a_dimension_marked_dynamic_is_captured_once():
    model = Net()
    captured = []

    def counting(graph, inputs, **options):
        captured.append(graph)
        return backend(graph, inputs, **options)

    compiled = torch.compile(model, backend=counting)
    for n in (3, 5, 6):
        x = _x(n, 8)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(captured) == 1


def test_views_of_dynamic_size_keep_their_strides():
    def function(x):
        return (2 * x).t()[1:], x[1:].t()

    compiled = torch.compile(function, backend="kpx", dynamic=True)
    for n in (4, 7, 5):
        for got, wanted in zip(compiled(_x(n, 8)), function(_x(n, 8)), strict=True):
            assert torch.equal(got, wanted)
            assert got.stride() == wanted.stride()


def test_a_second_size_trains_without_a_mark():
    eager, model = _models()
    trained = kpx.optimize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kpx.RecompileWarning)
        for n in (3, 5, 6, 7):
            _step(eager, eager, _x(n, 8))
            _step(trained, model, _x(n, 8))
    _same_gradients(eager, model)


def test_an_unknown_option_of_the_backend_is_named():
    compiled = torch.compile(Net(), backend="kpx", options={"speed": 3})
    with pytest.raises(Exception, match="'speed'"):
        compiled(_x(4, 8))


def test_an_index_out_of_range_is_an_error_in_training_too():
    trained = kpx.optimize(torch.nn.Embedding(5, 3))
    trained(torch.tensor([0, 4])).sum().backward()
    with pytest.raises(IndexError, match="out of range"):
        trained(torch.tensor([5, 0]))


@pytest.mark.parametrize(
    "function", [torch.relu, torch.abs, torch.amax, torch.sort, torch.cummax, torch.linalg.svdvals]
)
def test_gradients_at_ties_and_kinks_are_pytorchs(function):
    x = torch.tensor([[0.0, 0.0, 1.0], [1.0, -2.0, 2.0], [3.0, 3.0, -3.0]])
    arguments = (0,) if function is torch.cummax else ()

    def gradient(f):
        leaf = x.clone().requires_grad_()
        torch.utils._pytree.tree_leaves(f(leaf, *arguments))[0].square().sum().backward()
        return leaf.grad

    ours = differentiable(lambda leaf: tuple(torch.utils._pytree.tree_leaves(function(leaf, *arguments))))
    torch.testing.assert_close(gradient(lambda leaf, *_: ours(leaf)), gradient(function), rtol=1e-4, atol=1e-5)


def test_training_keeps_the_memory_that_a_step_frees():
    keep_freed.cache_clear()
    model = torch.nn.Linear(4, 2)
    trained = kpx.optimize(model)
    with torch.no_grad():
        trained(torch.ones(3, 4))
    assert keep_freed.cache_info().currsize == 0
    trained(torch.ones(3, 4)).sum().backward()
    assert keep_freed.cache_info().currsize == 1
