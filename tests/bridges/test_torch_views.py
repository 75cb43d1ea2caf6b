"""Ops on views that the graph takes, `as_strided` by the strides of the capture, and outputs that lie as eager's do."""

import jax.numpy as jnp
import pytest
import torch
from torch.utils import _pytree as pytree

import kpx
from bench import opinfo_check
from bench.opinfo_views import VIEWS
from kpx.bridges.torch.dynamo import differentiable
from kpx.bridges.torch.registry import RULES
from kpx.errors import GraphBreakWarning, UnsupportedError
from tests.bridges.opinfo_ops import OPINFO

aten = torch.ops.aten
CONFIG = kpx.Config(measure_seconds=0)


def _t(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def _optimized(function):
    return kpx.optimize(Model(function), config=CONFIG)


def _assert_same(got, wanted):
    got, wanted = pytree.tree_leaves(got), pytree.tree_leaves(wanted)
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w)


def _written(write):
    def function(x):
        y = x * 1
        write(y)
        return y

    return function


# PyTorch decomposes these into strides of the tensor at hand.
STRIDED = {
    "diagonal": lambda x: torch.diagonal(x, 1),
    "diagonal of the last two": lambda x: torch.diagonal(x, -1, 1, 2),
    "diagonal_copy": lambda x: torch.diagonal_copy(x, 1, 2, 0),
    "diagonal_scatter": lambda x: torch.diagonal_scatter(x, x[0].t() * 2, 0, 0, 1),
    "linalg.diagonal": lambda x: torch.linalg.diagonal(x, offset=1),
    "trace": lambda x: x[0].trace(),
    "diag": lambda x: x[1].diag(1),
    "einsum of a diagonal": lambda x: torch.einsum("bii->bi", x[:, :4, :4]),
    "einsum of two diagonals": lambda x: torch.einsum("iijj->ij", x[:, :, :4, None].expand(4, 4, 4, 4)),
    "unfold": lambda x: x.unfold(1, 3, 1),
    "unfold in steps": lambda x: x.unfold(2, 2, 3),
    "patches": lambda x: x.unfold(0, 2, 2).unfold(1, 2, 2),
    "unfold_copy": lambda x: torch.unfold_copy(x, 0, 2, 1),
    "frames": lambda x: torch.stft(x.flatten(1), 8, 2, window=torch.ones(8), return_complex=True).abs(),
    "overlapped frames": lambda x: torch.istft(
        torch.stft(x.flatten(1), 8, 2, window=torch.ones(8), return_complex=True), 8, 2, window=torch.ones(8)
    ),
    "group_norm": lambda x: torch.nn.functional.group_norm(x, 2, x[0, :4, 0], x[0, :4, 1]),
    "fill_diagonal_": lambda x: x[0].clone().fill_diagonal_(9.0),
    "a written diagonal": _written(lambda y: y.transpose(1, 2).diagonal(1, 1, 2).mul_(0)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_ops_that_pytorch_writes_by_strides_give_eagers_values_on_views_in_the_graph(view):
    base, take = VIEWS[view]
    x = base(_t(4, 4, 5))

    def function(x):
        return [f(take(x)) for f in STRIDED.values()]

    _assert_same(_optimized(function)(x), function(x))


@pytest.mark.parametrize("view", VIEWS)
def test_ops_that_pytorch_writes_by_strides_have_eagers_gradients_on_views_in_the_graph(view):
    base, take = VIEWS[view]

    def gradients(wrap):
        x = base(_t(4, 4, 5)).requires_grad_()
        outputs = wrap(lambda x: [f(take(x)) for f in STRIDED.values()])(x)
        weights = [_t(*out.shape, seed=i) for i, out in enumerate(outputs)]
        return torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), x)

    _assert_same(gradients(differentiable), gradients(lambda f: f))


@pytest.mark.parametrize("door", ["optimize", "training", "compile"])
def test_patches_of_an_image_are_eagers_with_their_gradient_through_every_door(door):
    def function(x):
        return x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)

    doors = {
        "optimize": lambda: _optimized(function),
        "training": lambda: kpx.optimize(Model(function), config=CONFIG),
        "compile": lambda: torch.compile(Model(function), backend="kpx"),
    }
    x = _t(2, 3, 8, 8)
    _assert_same(doors[door]()(x), function(x))
    if door != "optimize":
        leaf, same = x.clone().requires_grad_(), x.clone().requires_grad_()
        doors[door]()(leaf).square().sum().backward()
        function(same).square().sum().backward()
        _assert_same(leaf.grad, same.grad)


@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_windows_of_any_size_and_step_are_pytorchs(length, size, step):
    if size > length:
        pytest.skip("PyTorch refuses windows longer than the dimension")
    x = torch.arange(2.0 * length).reshape(length, 2)
    wanted = x.unfold(0, size, step)
    got = RULES[aten.unfold.default](jnp.asarray(x.numpy()), 0, size, step)
    assert got.shape == tuple(wanted.shape)
    assert got.tolist() == wanted.tolist()


# as_strided ------------------------------------------------------------------------------------

RESTRIDED = {
    "a row's neighbours": lambda x: x[1].as_strided((3, 5), (5, 1)),
    "its own offset": lambda x: x[2:, 1:].as_strided((2, 2), (5, 1)),
    "a transposed matrix's memory": lambda x: x.t().as_strided((20,), (1,)),
    "a computed transposed matrix's memory": lambda x: (x.t() * 2).as_strided((4, 5), (5, 1), 0),
    "every third element": lambda x: (x * 2).as_strided((2, 3), (3, 6), 1),
    "overlapping windows": lambda x: (x + 1).as_strided((9, 4), (2, 1)),
    "one element, many times": lambda x: (x + 1).as_strided((3, 2), (0, 0), 7),
    "an expanded operand": lambda x: (x[:, :1] * 2).expand(4, 5).as_strided((4,), (1,)),
    "a stepped operand": lambda x: x[::2, ::2].as_strided((2, 2), (10, 2)),
    "windows of windows": lambda x: (x + 1).unfold(1, 3, 1).as_strided((2, 2, 2), (10, 1, 2), 1),
    "an unsafe view": lambda x: torch.ops.aten._unsafe_view(x[1:3], [10]).as_strided((2, 2), (5, 1), 0),
    "nothing": lambda x: (x + 1).as_strided((0, 3), (1, 1)),
    "a copy": lambda x: torch.as_strided_copy(x.t(), (3, 2), (5, 2), 1),
    "a scatter": lambda x: torch.as_strided_scatter(x.detach().t() * 2, x[:2, :2], (2, 2), (7, 1), 3),
    "a write": _written(lambda y: y.as_strided((3,), (6,), 1).fill_(9.0)),
    "slices of equal strides": lambda x: [torch.as_strided_copy(c, (2, 2), (5, 1)) for c in (x[:, :2], x[:, 2:4])],
}


def test_as_strided_is_eagers_on_any_operand():
    x = _t(4, 5)

    def function(x):
        return [f(x) for f in RESTRIDED.values()]

    _assert_same(_optimized(function)(x), function(x))


def test_as_strided_has_eagers_gradient_on_any_operand():
    def gradient(wrap):
        x = _t(4, 5).requires_grad_()
        outputs = pytree.tree_leaves(wrap(lambda x: [f(x) for f in RESTRIDED.values()])(x))
        return torch.autograd.grad(sum(o.square().sum() for o in outputs), x)

    _assert_same(gradient(differentiable), gradient(lambda f: f))


def test_as_strided_outside_of_its_operand_is_refused():
    with pytest.raises(UnsupportedError, match="reads or writes memory outside of its operand"):
        kpx.compile(Model(lambda x: torch.cos(x).as_strided((5, 5), (5, 1))), _t(4, 5))


def test_as_strided_follows_symbolic_strides():
    def function(x):
        y = (x * 2).t()
        return y.as_strided((y.shape[1], 2), (y.stride(1), 1))

    compiled = torch.compile(function, backend="kpx", dynamic=True)
    for rows, columns in ((4, 5), (6, 7), (9, 3)):
        x = _t(rows, columns)
        _assert_same(compiled(x), function(x))


def test_the_gradient_of_an_output_whose_elements_share_memory_is_eagers():
    # By AOTAutograd's own settings this is wrong: it copies the gradient into strides that overlap.
    def function(x):
        return x.t().clone().unfold(0, 3, 1)

    def gradient(f):
        x = _t(4, 5).requires_grad_()
        return torch.autograd.grad(f(x), x, _t(3, 4, 3, seed=1))

    _assert_same(gradient(torch.compile(function, backend="kpx")), gradient(function))


# Writes through views --------------------------------------------------------------------------


def _plus_plus(x):
    y = torch.nn.functional.dropout(x, 0.5, training=False)
    y += y
    return y


WRITES = {
    "windows with gaps": _written(lambda y: y.unfold(1, 2, 3).mul_(2)),
    "windows that end before the dimension does": _written(lambda y: y.unfold(1, 2, 2).add_(1)),
    "one of several windows": _written(lambda y: y.unfold(1, 2, 3).unbind(0)[1].mul_(2)),
    "windows by index": _written(lambda y: y.unfold(1, 2, 3)[0, 0].copy_(y[0, :2] * 3)),
    "windows that are read": lambda x: [y := x * 1, y.unfold(1, 3, 1).sum(), y.add_(1)],
    "the diagonal of a view": _written(lambda y: y.t()[1:].fill_diagonal_(3.0)),
    "the diagonal of a cube": lambda x: x[:, None, :4].expand(4, 4, 4).clone().fill_diagonal_(torch.tensor(2.0)),
    "what dropout gave back": _plus_plus,
}


@pytest.mark.parametrize("door", ["optimize", "compile"])
def test_writes_through_views_are_eagers(door):
    def function(x):
        return [f(x.clone() if f is _plus_plus else x) for f in WRITES.values()]

    compiled = _optimized(function) if door == "optimize" else torch.compile(function, backend="kpx")
    _assert_same(compiled(_t(4, 5)), function(_t(4, 5)))


def test_what_dropout_gave_back_is_the_input_that_is_written():
    x, same = _t(4, 5), _t(4, 5)
    _optimized(_plus_plus)(x)
    _plus_plus(same)
    torch.testing.assert_close(x, same)


@pytest.mark.parametrize("write", [
    lambda y: y.unfold(1, 3, 1).mul_(2),
    lambda y: y.t().as_strided((2, 2), (7, 1), 1).mul_(2),
    lambda y: y.unfold(1, 3, 1)[:, 1].mul_(2),
    lambda y: y.as_strided((2, 2), (1, 1)).t()[1].fill_(3),
    lambda y: y[:1].expand(4, 5)[2].add_(1),
], ids=["overlapping windows", "as_strided of a view", "one of overlapping windows", "a column of overlapping rows",
        "a row of an expanded one"])  # fmt: skip
def test_writes_that_pytorch_cannot_make_functional_are_refused(write):
    with pytest.raises(UnsupportedError, match="writes through a view"):
        kpx.optimize(Model(_written(write)), config=CONFIG, fullgraph=True)(_t(4, 5))


def test_what_is_written_may_be_an_expanded_value():
    function = _written(lambda y: y.masked_fill_((y[:1] > 0).expand(4, 5), 7.0))
    _assert_same(kpx.optimize(Model(function), config=CONFIG, fullgraph=True)(_t(4, 5)), function(_t(4, 5)))


def test_a_reduction_that_keeps_dimensions_writes_nothing():
    def function(x):
        return x[:1].expand(4, 5)[2].sum(-1, True)

    _assert_same(kpx.optimize(Model(function), config=CONFIG, fullgraph=True)(_t(4, 5)), function(_t(4, 5)))


@pytest.mark.parametrize("write", [
    lambda y: y.unfold(1, 3, 1).mul_(2),
    lambda y: y.unfold(1, 3, 1)[:, 1].mul_(2),
    lambda y: y.as_strided((2, 2), (1, 1)).t()[1].fill_(3),
    lambda y: y[:1].expand(4, 5)[2].add_(1),
], ids=["overlapping windows", "one of overlapping windows", "a column of overlapping rows", "a row of an expanded one"])  # fmt: skip
def test_writes_that_pytorch_cannot_make_functional_break_the_graph(write):
    function = _written(write)
    with pytest.warns(GraphBreakWarning, match="writes through a view"):
        _assert_same(_optimized(function)(_t(4, 5)), function(_t(4, 5)))


# Strides of outputs ----------------------------------------------------------------------------

OUTPUTS = {
    "transposed": lambda x: (x * 2).transpose(1, 2),
    "channels_last": lambda x: (x * 2).to(memory_format=torch.channels_last),
    "several": lambda x: ((x * 2).permute(1, 0, 2, 3), (x * 2).sum((2, 3)).t(), x + 1),
    "sliced": lambda x: (x + 1)[:, 1:],
    "stepped": lambda x: (x + 1)[..., ::2],
    "expanded": lambda x: (x[:1] * 2).expand(2, 3, 4, 5),
    "with a dimension of one": lambda x: (x[:, :1] * 3).permute(0, 2, 1, 3),
    "empty": lambda x: (x[:0] * 2).permute(3, 0, 1, 2),
    "of a transposed view": lambda x: torch.relu(x.permute(3, 1, 0, 2)),
}


@pytest.mark.parametrize("door", ["optimize", "training", "compile"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_have_eagers_values_and_strides(name, door):
    function, x = OUTPUTS[name], _t(2, 3, 4, 5)
    doors = {
        "optimize": lambda: _optimized(function),
        "training": lambda: kpx.optimize(Model(function), config=CONFIG),
        "compile": lambda: torch.compile(function, backend="kpx"),
    }
    got, wanted = doors[door]()(x), function(x)
    _assert_same(got, wanted)
    assert [g.stride() for g in pytree.tree_leaves(got)] == [w.stride() for w in pytree.tree_leaves(wanted)]


def test_a_convolution_with_channels_last_weights_gives_channels_last():
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).eval()
    x = _t(2, 3, 8, 8)
    with torch.no_grad():
        got, wanted = kpx.optimize(model, config=CONFIG)(x), model(x)
    torch.testing.assert_close(got, wanted)
    assert got.stride() == wanted.stride()


def test_a_program_from_the_cache_gives_the_same_strides(tmp_path):
    function, x = OUTPUTS["several"], _t(2, 3, 4, 5)
    config = kpx.Config(measure_seconds=0, cache_dir=str(tmp_path))
    first = kpx.optimize(Model(function), config=config)(x)
    again = kpx.optimize(Model(function), config=config)(x)
    _assert_same(again, first)
    assert [t.stride() for t in again] == [t.stride() for t in first] == [t.stride() for t in function(x)]


# The op database -------------------------------------------------------------------------------

# A few ops of each kind of view semantics; all of the database: `python -m bench.opinfo --views`.
QUICK = ["as_strided", "diagonal", "index_select", "matmul", "nn.functional.unfold", "unfold", "view_as_complex"]


@pytest.mark.parametrize("name", QUICK)
def test_an_op_of_the_database_is_eagers_on_views_in_the_graph(name):
    verdicts = opinfo_check.check(name, "f32", 1, False, views=True)
    assert verdicts["forward"]["verdict"] in ("pass", "left out"), verdicts


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OPINFO)[::12])  # `python -m bench.opinfo --views` runs them all
def test_a_rule_is_eagers_on_views_in_the_graph_with_its_gradient(name):
    verdicts = opinfo_check.check(name, "f32", 1, True, views=True)
    assert all(v["verdict"] in ("pass", "left out") for v in verdicts.values()), verdicts
