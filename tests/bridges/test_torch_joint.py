"""What is rewritten on the forward and backward passes together, and what is kept between them."""

import pytest
import torch

import kpx


def _t(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class _DroppedSoftmax(torch.nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return torch.nn.functional.dropout(x.softmax(-1), self.p, training=True)


def _trained(model, x):
    """A model's result, and what it keeps for its backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = kpx.optimize(model)(x)
    return y, kept


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_gradient_of_a_dropped_softmax_is_that_of_what_was_dropped(p):
    torch._dynamo.reset()
    x, upstream = _t(8, 64).requires_grad_(), _t(8, 64, seed=1)
    y, _ = _trained(_DroppedSoftmax(p), x)
    y.backward(upstream)
    softmax = x.detach().double().softmax(-1)
    masked = upstream.double() * (y.detach() != 0) / (1 - p)
    wanted = softmax * (masked - (masked * softmax).sum(-1, keepdim=True))
    torch.testing.assert_close(x.grad.double(), wanted, atol=1e-6, rtol=1e-5)


def test_the_mask_of_a_dropped_softmax_is_not_kept():
    torch._dynamo.reset()
    _, kept = _trained(_DroppedSoftmax(0.1), _t(8, 64).requires_grad_())
    assert kept
    assert not [t for t in kept if t.dtype == torch.bool]


def test_the_mask_of_another_dropout_is_kept():
    class Dropped(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.dropout(x.sin(), 0.5, training=True)

    torch._dynamo.reset()
    x = _t(8, 64).requires_grad_()
    y, _ = _trained(Dropped(), x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos() * (y.detach() != 0) * 2)


class _Heads(torch.nn.Module):
    """Attention as PyTorch composes it where no fused kernel takes it, over heads that are views."""

    def __init__(self, heads):
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.project = torch.nn.Linear(24, 72)
        self.out = torch.nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = self.project(x).chunk(3, -1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        weights = (q * 0.5 @ (k * 0.5).transpose(-2, -1)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shape", [(2, 6, 24), (1, 5, 24)])
def test_attention_over_heads_has_eagers_gradients(heads, shape):
    torch._dynamo.reset()
    model, x = _Heads(heads), _t(*shape)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(model.double()(x.double()).square().sum(), parameters)
    model.float()
    got = torch.autograd.grad(kpx.optimize(model)(x).square().sum(), list(model.parameters()))
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, atol=1e-5, rtol=1e-4)


def test_heads_are_kept_as_they_lie():
    torch._dynamo.reset()
    _, kept = _trained(_Heads(4), _t(2, 5, 24).requires_grad_())
    heads = [t.stride() for t in kept if t.shape == (2, 4, 5, 6)]
    assert heads == [(120, 6, 24, 1)] * 2  # queries and keys, as the projection gave them
