"""PyTorch's higher-order ops, `torch.cond` and loops, mean what they mean in eager PyTorch."""

import pytest
import torch
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import kpx

CONFIG = kpx.Config(measure_seconds=0)


def _module(function, weight=None):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]) if weight is None else weight)

        def forward(self, *args):
            return function(self, *args)

    return Model()


def _branches(m, x):
    return torch.cond(x.sum() > 0, lambda x: x * m.w + 1, lambda x: (x - m.w).sin(), (x,))


def _nested(m, x):
    def inner(x):
        return torch.cond(x.max() > 2, lambda x: x.exp(), lambda x: -x, (x,))

    return torch.cond(x.sum() > 0, inner, lambda x: x * m.w, (x,))


def _scanned(m, x):
    return scan(lambda carry, v: (carry * m.w + v, carry.sin()), torch.zeros(3), x)


def _scanned_backwards(m, x):
    return scan(lambda carry, v: (carry + v, carry * v), torch.ones(3), x, reverse=True)


def _mapped(m, x):
    return map_(lambda v, w: v.cos() * w, x, m.w)


def _associative(m, x):
    return associative_scan(lambda a, b: a * b + a * m.w, x, 0, combine_mode="generic")


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
CASES = {
    "cond, true": (_branches, X[0].abs()), "cond, false": (_branches, -X[0].abs()),
    "nested cond, first": (_nested, X[0].abs() + 2), "nested cond, second": (_nested, X[0].abs() / 9),
    "scan": (_scanned, X), "scan in reverse": (_scanned_backwards, X), "map": (_mapped, X),
    "associative scan": (_associative, X),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_branches_and_loops_have_eagers_values(name):
    function, x = CASES[name]
    model = _module(function)
    with torch.no_grad():
        torch.testing.assert_close(kpx.optimize(model, config=CONFIG)(x), torch.compile(model, backend="eager")(x))


@pytest.mark.parametrize("name", ["cond, true", "cond, false", "nested cond, first", "scan", "map"])
def test_branches_and_loops_have_eagers_gradients(name):
    function, x = CASES[name]

    def gradients(backend):
        torch.compiler.reset()
        model, leaf = _module(function), x.clone().requires_grad_()
        results = torch.compile(model, backend=backend)(leaf)
        sum(r.square().sum() for r in torch.utils._pytree.tree_leaves(results)).backward()
        return leaf.grad, model.w.grad

    torch.testing.assert_close(gradients("kpx"), gradients("aot_eager"))


def test_one_program_takes_either_branch():
    model = _module(_branches)
    optimized = kpx.optimize(model, config=CONFIG)
    with torch.no_grad():
        for x in (X[0].abs(), -X[0].abs()):
            torch.testing.assert_close(optimized(x), model(x))


@pytest.mark.parametrize("start", [torch.tensor(0), 0], ids=["tensor", "int"])
def test_while_loop_runs_as_often_as_its_condition_holds(start):
    def function(m, x):
        return while_loop(lambda i, x: (i < 7) & (x.sum() < 20), lambda i, x: (i + 1, x * 2 + m.w), (start, x))

    def counted(m, x):
        return while_loop(lambda i, x: i < 5, lambda i, x: (i + 1, x * 2 + m.w), (start, x))

    model = _module(function if isinstance(start, torch.Tensor) else counted)
    optimized = kpx.optimize(model, config=CONFIG)
    with torch.no_grad():
        for x in (X[0].abs(), -X[0].abs()):
            found, expected = optimized(x), model(x)
            assert int(found[0]) == int(expected[0])
            torch.testing.assert_close(found[1], expected[1])


def test_a_branch_draws_random_numbers_of_its_own_at_every_call():
    def function(m, x):
        return torch.cond(x.sum() > 0, lambda x: x + torch.rand_like(x), lambda x: x.clone(), (x,))

    optimized = kpx.optimize(_module(function), config=CONFIG)
    x = torch.ones(500)
    with torch.no_grad():
        first, second = optimized(x) - x, optimized(x) - x
        assert torch.equal(optimized(-x), -x)
    assert 0.4 < float(first.mean()) < 0.6
    assert not torch.equal(first, second)


def test_every_turn_of_a_loop_draws_anew():
    def function(m, x):
        return scan(lambda carry, v: (carry + 1, v + torch.rand_like(v)), torch.zeros(()), x)[1]

    x = torch.zeros(3, 400)
    with torch.no_grad():
        rows = kpx.optimize(_module(function), config=CONFIG)(x)
    assert not torch.equal(rows[0], rows[1])
    assert 0.4 < float(rows.mean()) < 0.6
