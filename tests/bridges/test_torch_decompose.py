"""Programs whose few ops without a rule are decomposed where they stand give what PyTorch gives, and so do the others."""

import pytest
import torch

import kpx
from kpx.bridges.torch import capture
from kpx.bridges.torch.decompose import decompose_apart
from kpx.bridges.torch.interpret import is_known

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def _in_place_on_an_array_of_its_own(x):
    y = torch.nn.functional.linear(x, torch.ones(6, 6))
    y += x
    return y.relu()


def _in_place_through_a_view(x):
    y = x * 2
    y[:, 0].add_(1.0)
    return y


def _in_place_after_a_view_was_taken(x):
    y = x * 2
    z = y.transpose(0, 1)
    y.mul_(3.0)
    return z


def _in_place_through_a_reshape(x):
    y = x * 2
    z = y.reshape(12, 6)
    y.sub_(1.0)
    return z, y


def _in_place_twice(x):
    y = x.exp()
    y.add_(1.0)
    y.mul_(2.0)
    return y


def _in_place_keeps_the_type(x):
    y = x.to(torch.bfloat16) * 2
    y += x
    return y


def _read_before_it_is_written(x):
    y = x.exp()
    z = y * 2
    y.add_(1.0)
    return y, z


FUNCTIONS = [
    (_in_place_on_an_array_of_its_own, True),
    (_read_before_it_is_written, True),
    (_in_place_through_a_view, False),
    (_in_place_after_a_view_was_taken, False),
    (_in_place_through_a_reshape, False),
    (_in_place_keeps_the_type, False),
    (_in_place_twice, False),
    (lambda x: torch.linalg.inv(x[0, :3, :3]), False),
    (lambda x: x.diff(dim=-1), True),
    (lambda x: x.to(torch.float64).new_ones(2, 3), True),
    (lambda x: (x > 0) & (x < 1), True),
    (lambda x: torch.aminmax(x, dim=1), True),
    (lambda x: torch.nn.functional.batch_norm(x, torch.zeros(4), torch.ones(4)), True),
]


class Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _program(function):
    with torch.no_grad():
        return torch.export.export(Model(function), (X,), strict=False)


@pytest.mark.parametrize(("function", "apart"), FUNCTIONS)
def test_a_program_gives_what_pytorch_gives(function, apart):
    with torch.no_grad():
        given, wanted = kpx.optimize(Model(function))(X), function(X)
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize(("function", "apart"), FUNCTIONS)
def test_only_what_others_may_see_written_has_the_whole_traced_anew(function, apart):
    program = _program(function)
    before = str(program.graph)
    assert decompose_apart(program, capture._decompositions(), is_known) is apart
    program.graph.lint()
    if apart:
        assert all(is_known(n.target) for n in program.graph.nodes if n.op == "call_function")
        assert not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in program.graph.nodes)
    else:
        assert str(program.graph) == before


def test_batch_norm_is_decomposed_as_pytorch_does():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 5, 5),), strict=False)
    whole = [n.target for n in program.run_decompositions(capture._decompositions()).graph.nodes]
    assert decompose_apart(program, capture._decompositions(), is_known)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [t for t in whole if callable(t)]


def test_sizes_that_are_symbols_have_the_whole_traced_anew():
    dynamic = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    with torch.no_grad():
        program = torch.export.export(Model(lambda x: x.diff()), (X,), strict=False, dynamic_shapes=dynamic)
    assert not decompose_apart(program, capture._decompositions(), is_known)


def test_equal_ops_are_traced_once(monkeypatch):
    from kpx.bridges.torch import decompose

    traced = []
    monkeypatch.setattr(decompose, "_traced", lambda *a, f=decompose._traced: traced.append(1) or f(*a))

    def many(x):
        for _ in range(5):
            x = x + x.diff(prepend=x[..., :1])
        return x

    assert decompose_apart(_program(many), capture._decompositions(), is_known)
    assert len(traced) == 1


@pytest.mark.parametrize(
    "dtypes", [(torch.int64, torch.float32), (torch.float32, torch.int64), (torch.float32, torch.float64)]
)
def test_gradients_of_thresholds_are_promoted_as_by_the_op(dtypes):
    class Backward(torch.nn.Module):
        def forward(self, grad, x):
            return torch.ops.aten.threshold_backward(grad, x, 0.5)

    grad, x = (torch.tensor([3, 1, 2]).to(d) for d in dtypes)
    expected = Backward()(grad, x / 2)
    torch.testing.assert_close(kpx.optimize(Backward())(grad, x / 2), expected)
    compiled = kpx.compile(Backward(), grad, x / 2)
    torch.testing.assert_close(compiled(grad, x / 2), expected)
