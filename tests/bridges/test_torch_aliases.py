"""Tensors that share memory: arguments with each other and with the model's state, outputs with either."""

import copy

import pytest
import torch

import kpx


def _in_place(model):
    kpx.optimize(model, inplace=True)
    return model


def _compiled(model):
    model.compile(backend="kpx")
    return model


DOORS = {"optimize": kpx.optimize, "inplace": _in_place, "compile": _compiled}


@pytest.fixture(params=list(DOORS), autouse=True)
def door(request):
    torch._dynamo.reset()
    return DOORS[request.param]


def _numbers(*shape):
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


class DoublesFirst(torch.nn.Module):
    def forward(self, x, y):
        x.mul_(2)
        return x + y


class AddsOne(torch.nn.Module):
    def forward(self, x):
        x.add_(1)
        return x * 2


# Arguments that share memory -------------------------------------------------------------------


@pytest.mark.parametrize("first", ["apart", "aliased"])
def test_same_tensor_twice_is_read_as_written(door, first):
    optimized = door(DoublesFirst())
    if first == "apart":
        optimized(torch.ones(4), torch.ones(4))
    x, twin = _numbers(4), _numbers(4)
    assert torch.equal(optimized(x, x), DoublesFirst()(twin, twin))
    assert torch.equal(x, twin)


@pytest.mark.parametrize("first", ["apart", "aliased"])
def test_overlapping_slices_are_read_as_written(door, first):
    optimized = door(DoublesFirst())
    if first == "apart":
        optimized(torch.ones(4), torch.ones(4))
    base, twin = _numbers(8), _numbers(8)
    assert torch.equal(optimized(base[:4], base[2:6]), DoublesFirst()(twin[:4], twin[2:6]))
    assert torch.equal(base, twin)


def test_arguments_apart_after_arguments_that_overlapped(door):
    optimized = door(DoublesFirst())
    base = torch.ones(8)
    optimized(base[:4], base[2:6])
    x, y = _numbers(4), _numbers(4)
    assert torch.equal(optimized(x, y), _numbers(4) * 3)
    assert torch.equal(y, _numbers(4))


def test_overlap_by_other_offsets_is_seen(door):
    optimized = door(DoublesFirst())
    for offset in (1, 3, 0, 4):
        base, twin = _numbers(8), _numbers(8)
        got = optimized(base[:4], base[offset : offset + 4])
        assert torch.equal(got, DoublesFirst()(twin[:4], twin[offset : offset + 4]))
        assert torch.equal(base, twin)


def test_row_of_a_matrix_beside_the_matrix(door):
    class Model(torch.nn.Module):
        def forward(self, matrix, row):
            row.zero_()
            return matrix.sum(0) + row

    optimized = door(Model())
    optimized(torch.ones(3, 4), torch.ones(4))
    base, twin = _numbers(3, 4), _numbers(3, 4)
    assert torch.equal(optimized(base, base[1]), Model()(twin, twin[1]))
    assert torch.equal(base, twin)


def test_transposed_view_of_another_argument_that_is_written(door):
    optimized = door(DoublesFirst())
    optimized(torch.ones(3, 3), torch.ones(3, 3))
    base, twin = _numbers(3, 3), _numbers(3, 3)
    assert torch.equal(optimized(base, base.T), DoublesFirst()(twin, twin.T))
    assert torch.equal(base, twin)


def test_tensors_in_a_list_share_memory(door):
    class Model(torch.nn.Module):
        def forward(self, tensors):
            tensors[0].add_(1)
            return sum(tensors)

    optimized = door(Model())
    optimized([torch.ones(4), torch.ones(4)])
    x, twin = _numbers(4), _numbers(4)
    assert torch.equal(optimized([x, x]), Model()([twin, twin]))
    assert torch.equal(x, twin)


def test_same_tensor_twice_has_the_sum_of_its_gradients(door):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return (x * 2 + y * 3).sum()

    optimized = door(Model())
    optimized(torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)).backward()
    x = torch.ones(4, requires_grad=True)
    optimized(x, x).backward()
    assert torch.equal(x.grad, torch.full((4,), 5.0))


def test_same_leaf_that_requires_grad_is_written_nowhere(door):
    optimized = door(DoublesFirst())
    x = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        optimized(x, x)
    assert torch.equal(x.detach(), torch.ones(4))


# Arguments that are views, and are written -----------------------------------------------------


def test_write_through_a_view_made_inside_reaches_the_argument(door):
    class Model(torch.nn.Module):
        def forward(self, x):
            x.t().add_(1)
            x[0] = 7
            return x.sum(0)

    model = Model()
    optimized = door(copy.deepcopy(model))
    x, twin = _numbers(3, 3), _numbers(3, 3)
    assert torch.equal(optimized(x), model(twin))
    assert torch.equal(x, twin)


def test_strided_argument_is_written_between_others(door):
    base, twin = _numbers(6), _numbers(6)
    assert torch.equal(door(AddsOne())(base[::2]), AddsOne()(twin[::2]))
    assert torch.equal(base, twin)


def test_transposed_argument_is_written(door):
    base, twin = _numbers(2, 3), _numbers(2, 3)
    assert torch.equal(door(AddsOne())(base.T), AddsOne()(twin.T))
    assert torch.equal(base, twin)


def test_argument_with_an_offset_is_written_alone(door):
    base, twin = _numbers(7), _numbers(7)
    assert torch.equal(door(AddsOne())(base[3:5]), AddsOne()(twin[3:5]))
    assert torch.equal(base, twin)


def test_expanded_argument_is_not_written(door):
    optimized = door(AddsOne())
    optimized(torch.ones(4))
    base = torch.zeros(1)
    with pytest.raises(RuntimeError, match="single memory location"):
        optimized(base.expand(4))
    assert base.item() == 0


# Arguments that are the model's own ------------------------------------------------------------


class Counts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x):
        self.count.add_(1)
        return x + self.count


class DoublesArgument(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.ones(4))
        self.weight = torch.nn.Parameter(torch.full((4,), 3.0))

    def forward(self, x):
        x.mul_(2)
        return x + self.state + self.weight


def test_own_buffer_as_argument_is_read_after_the_model_wrote_it(door):
    model, twin = Counts(), Counts()
    optimized = door(model)
    optimized(torch.ones(4)), twin(torch.ones(4))
    assert torch.equal(optimized(model.count), twin(twin.count))
    assert torch.equal(model.count, twin.count)


def test_slice_of_own_buffer_as_argument(door):
    class Model(Counts):
        def forward(self, x):
            self.count.add_(1)
            return x.sum() + self.count

    model, twin = Model(), Model()
    optimized = door(model)
    optimized(torch.ones(2)), twin(torch.ones(2))
    assert torch.equal(optimized(model.count[1:3]), twin(twin.count[1:3]))


def test_own_buffer_is_written_through_the_argument(door):
    model, twin = DoublesArgument(), DoublesArgument()
    optimized = door(model)
    optimized(torch.ones(4)), twin(torch.ones(4))
    for _ in range(2):
        assert torch.equal(optimized(model.state), twin(twin.state))
        assert torch.equal(model.state, twin.state)


def test_own_parameter_is_written_through_the_argument(door):
    model, twin = DoublesArgument(), DoublesArgument()
    optimized = door(model)
    with torch.no_grad():
        optimized(torch.ones(4)), twin(torch.ones(4))
        for _ in range(2):
            assert torch.equal(optimized(model.weight), twin(twin.weight))
            assert torch.equal(model.weight, twin.weight)
        assert torch.equal(optimized(torch.ones(4)), twin(torch.ones(4)))


def test_own_parameter_as_argument_has_both_gradients(door):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((4,), 3.0))

        def forward(self, x):
            return (x * 2 + self.weight * 5).sum()

    model = Model()
    optimized = door(model)
    optimized(torch.ones(4))
    optimized(model.weight).backward()
    assert torch.equal(model.weight.grad, torch.full((4,), 7.0))


def test_parameters_that_are_views_of_one_storage_change_together(door):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = torch.zeros(8)
            self.first = torch.nn.Parameter(self.flat[:4])
            self.second = torch.nn.Parameter(self.flat[2:6])

        def forward(self, x):
            return x + self.first * 2 + self.second

    model = Model()
    optimized = door(model)
    with torch.no_grad():
        optimized(torch.ones(4))
        model.flat.copy_(_numbers(8))
        assert torch.equal(optimized(torch.ones(4)), model.first * 2 + model.second + 1)
        model.first.zero_()
        assert torch.equal(optimized(torch.ones(4)), torch.tensor([1.0, 1.0, 6.0, 7.0]))


def test_buffers_that_share_memory_are_written_through_one(door):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("all", torch.zeros(4))
            self.register_buffer("part", self.all[1:3])

        def forward(self, x):
            self.part.add_(x)
            return self.all * 2

    model, twin = Model(), Model()
    optimized = door(model)
    for _ in range(2):
        assert torch.equal(optimized(torch.ones(2)), twin(torch.ones(2)))
        assert torch.equal(model.all, twin.all)


# Outputs that share memory ---------------------------------------------------------------------


class Returns(torch.nn.Module):
    """Returns what a function makes of its state and its argument."""

    def __init__(self, function):
        super().__init__()
        self.weight = torch.nn.Parameter(_numbers(3, 4))
        self.register_buffer("state", _numbers(3, 4))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def _call_twice(door, function):
    """Return a model, and its outputs for an argument at the second call."""
    model = Returns(function)
    optimized = door(model)
    x = _numbers(3, 4)
    with torch.no_grad():
        optimized(torch.ones(3, 4))
        return model, x, optimized(x)


def test_output_that_is_the_argument_is_that_object(door):
    _, x, (out, same) = _call_twice(door, lambda m, x: (x, x * 2))
    assert out is x
    assert same is not x


def test_output_that_is_a_parameter_is_that_object(door):
    model, _, (out, _) = _call_twice(door, lambda m, x: (m.weight, x * 2))
    assert out is model.weight


def test_output_that_is_a_buffer_is_that_object(door):
    model, _, (out, _) = _call_twice(door, lambda m, x: (m.state, x * 2))
    assert out is model.state


def test_argument_alone_comes_back_as_itself(door):
    _, x, out = _call_twice(door, lambda m, x: x)
    assert out is x


def test_written_argument_comes_back_as_itself(door):
    _, x, out = _call_twice(door, lambda m, x: x.add_(1))
    assert out is x
    assert torch.equal(x, _numbers(3, 4) + 1)


@pytest.mark.parametrize("view", [
    lambda t: t.view(-1), lambda t: t[1], lambda t: t.T, lambda t: t[:, ::2], lambda t: t.unsqueeze(0),
    lambda t: t.expand(2, 3, 4)[0], lambda t: t.detach(), lambda t: t.as_strided((2, 2), (4, 1), 1),
], ids=["view", "select", "transpose", "slice", "unsqueeze", "expand", "detach", "as_strided"])  # fmt: skip
@pytest.mark.parametrize("source", ["argument", "parameter", "buffer"])
def test_write_into_an_output_view_reaches_its_source(door, source, view):
    def function(model, x):
        return view({"argument": x, "parameter": model.weight, "buffer": model.state}[source]), x * 2

    model, x, (out, _) = _call_twice(door, function)
    tensor = {"argument": x, "parameter": model.weight, "buffer": model.state}[source]
    twin = tensor.detach().clone()
    with torch.no_grad():
        assert torch.equal(out, view(twin))
        assert out.stride() == view(twin).stride()
        out.fill_(-1)
        view(twin).fill_(-1)
    assert torch.equal(tensor, twin)


def test_outputs_that_share_memory_change_together(door):
    def function(model, x):
        y = x * 2
        return y, y[0], y.T

    _, _, (whole, row, turned) = _call_twice(door, function)
    whole.fill_(5)
    assert torch.equal(row, torch.full((4,), 5.0))
    turned.zero_()
    assert torch.equal(whole, torch.zeros(3, 4))


def test_one_tensor_returned_twice_is_one_object(door):
    def function(model, x):
        y = x * 2
        return {"first": y, "second": [y]}

    _, _, out = _call_twice(door, function)
    assert out["first"] is out["second"][0]


def test_outputs_are_not_written_by_later_calls(door):
    model = Returns(lambda m, x: (x + 1, m.state * 2, torch.arange(3.0)))
    optimized = door(model)
    first = optimized(torch.ones(3, 4))
    copies = [t.clone() for t in first]
    optimized(_numbers(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


def test_writes_into_outputs_change_no_later_call(door):
    model = Returns(lambda m, x: (x + 1, m.state * 2, torch.arange(3.0)))
    optimized = door(model)
    with torch.no_grad():
        wanted = [t.clone() for t in optimized(torch.ones(3, 4))]
        for tensor in optimized(torch.ones(3, 4)):
            tensor.fill_(float("nan"))
        again = optimized(torch.ones(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


def test_argument_may_be_changed_right_after_the_call(door):
    model = Returns(lambda m, x: x + 1)
    optimized = door(model)
    x = torch.ones(3, 4)
    with torch.no_grad():
        optimized(x)
        out = optimized(x)
        x.fill_(100)
    assert torch.equal(out, torch.full((3, 4), 2.0))


def test_view_of_an_argument_carries_its_gradient(door):
    model = Returns(lambda m, x: (x[1], m.weight.T))
    optimized = door(model)
    x = _numbers(3, 4).requires_grad_()
    row, turned = optimized(x)
    (row.sum() * 2 + turned.sum() * 3).backward()
    assert torch.equal(x.grad[1], torch.full((4,), 2.0))
    assert torch.equal(model.weight.grad, torch.full((3, 4), 3.0))


def test_parts_of_one_result_lie_in_its_memory(door):
    def function(model, x):
        first, second = (x * 2).T.relu().chunk(2)
        return first, second

    _, x, (first, second) = _call_twice(door, function)
    assert torch.equal(torch.cat([first, second]), (x * 2).T)
    assert first.stride() == (1, 4)
    assert second.data_ptr() - first.data_ptr() == 2 * 4


def test_results_that_share_memory_have_their_gradients(door):
    def function(model, x):
        y = x * model.weight
        return y, y[0], y.T

    model = Returns(function)
    optimized = door(model)
    for _ in range(2):
        model.weight.grad = None
        whole, row, turned = optimized(_numbers(3, 4))
        assert row.data_ptr() == turned.data_ptr() == whole.data_ptr()
        (whole.sum() + row.sum() * 2 + turned.sum() * 3).backward()
    factor = torch.tensor([[6.0], [4.0], [4.0]])
    assert torch.equal(model.weight.grad, _numbers(3, 4) * factor)


class ComplexViews(torch.nn.Module):
    def forward(self, x):
        z = torch.view_as_complex(x.reshape(-1, 2)) * 2
        return torch.view_as_real(z), z.conj(), z.imag, z.conj().imag, z[1:], z.real.view(torch.int32)


def test_outputs_of_other_dtypes_share_memory_as_eagers_do(door):
    x = _numbers(4, 6)
    with torch.no_grad():
        ours, eager = door(ComplexViews())(x), ComplexViews()(x)
    for outputs in (ours, eager):
        assert len({y.untyped_storage().data_ptr() for y in outputs}) == 1
    for o, e in zip(ours, eager, strict=True):
        assert torch.equal(o, e)
        assert (o.stride(), o.is_conj(), o.is_neg()) == (e.stride(), e.is_conj(), e.is_neg())
    ours[0].zero_()
    assert not any(y.any() for y in ours)


class WritesDouble(torch.nn.Module):
    def forward(self, x, y):
        x.mul_(-3)
        return y * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_write_of_a_0d_argument_is_not_lost(door, dtype):  # PyTorch's pass over numbers loses those of float64
    x, twin, y = torch.tensor(2, dtype=dtype), torch.tensor(2, dtype=dtype), torch.ones(4)
    with torch.no_grad():
        assert torch.equal(door(WritesDouble())(x, y), WritesDouble()(twin, y))
    assert torch.equal(x, twin)


class WritesDoubleByFloat(torch.nn.Module):
    def forward(self, x, y, by):
        x.mul_(by)
        return y * by


def test_write_of_a_0d_double_beside_a_float_that_changes_is_not_lost(door):
    model, y = WritesDoubleByFloat(), torch.ones(4)
    optimized = door(WritesDoubleByFloat())
    x, twin = torch.tensor(2.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    with torch.no_grad():
        for by in (2.5, 3.5, 4.5):
            assert torch.equal(optimized(x, y, by), model(twin, y, by))
            assert torch.equal(x, twin)
