"""Numbers that formulas get wrong at their edges: as eager PyTorch gives them, or as near to f64."""

import copy
import itertools

import pytest
import torch

import kpx
from tests.reference import assert_closer

F = torch.nn.functional
CONFIG = kpx.Config(measure_seconds=0)
NAN, INF = float("nan"), float("inf")
SPECIAL = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 0.5, 1e-30, 7.0, -7.0])
WHOLE = torch.tensor([0, 1, -1, 7, -7, 2**31, -(2**31), 2**32 + 5, 2**62, -(2**62), 2**63 - 1])


class _Each(torch.nn.Module):
    """Several functions of one set of tensors, compiled together."""

    def __init__(self, *functions):
        super().__init__()
        self.functions = functions

    def forward(self, *tensors):
        return tuple(function(*tensors) for function in self.functions)


def _both(tensors, *functions):
    model = _Each(*functions)
    with torch.no_grad():
        return zip(kpx.optimize(model, config=CONFIG)(*tensors), model(*tensors), strict=True)


def _assert_same_bits(ours, eager):
    assert ours.dtype == eager.dtype
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours[~ours.isnan()], eager[~eager.isnan()])
    assert torch.equal(ours.signbit() & ~ours.isnan(), eager.signbit() & ~eager.isnan())


def test_special_values_of_elementwise_functions_are_eagers():
    exact = [torch.sign, torch.sgn, torch.round, torch.floor, torch.trunc, torch.abs, torch.neg]
    for ours, eager in _both([SPECIAL], *exact):
        _assert_same_bits(ours, eager)
    near = [torch.relu, F.relu6, torch.nan_to_num, F.gelu, F.silu, F.hardswish, F.elu, torch.sigmoid, torch.tanh]
    near += [lambda x: x.clamp(-1, 1), lambda x: F.threshold(x, 0.1, 5.0), torch.frac, torch.erf]
    for ours, eager in _both([SPECIAL], *near):
        torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_special_values_of_pairs_are_eagers():
    a, b = (t.flatten() for t in torch.meshgrid(SPECIAL, SPECIAL, indexing="ij"))
    functions = [torch.floor_divide, torch.copysign]
    functions += [lambda a, b, mode=mode: torch.div(a, b, rounding_mode=mode) for mode in ("floor", "trunc")]
    for ours, eager in _both([a, b], *functions):
        _assert_same_bits(ours, eager)
    functions = [torch.maximum, torch.minimum, torch.fmax, torch.xlogy, torch.special.xlog1py, torch.logaddexp]
    for ours, eager in _both([a, b], *functions):
        torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_large_whole_numbers_divide_as_eagers():
    a, b = (t.flatten() for t in torch.meshgrid(WHOLE, WHOLE[1:], indexing="ij"))
    functions = [torch.add, torch.mul, torch.remainder, torch.fmod, torch.floor_divide, torch.gcd, torch.maximum]
    functions += [lambda a, b: torch.div(a, b, rounding_mode="trunc"), lambda a, b: a // 7, lambda a, b: a % -7]
    for ours, eager in _both([a, b], *functions):
        assert torch.equal(ours, eager)


# `x` is of a narrow integer dtype, `v` a number that the dtype may not hold.
NARROW = {
    "arithmetic": lambda x, v: (x + v, v - x, x * v, torch.add(x, x, alpha=abs(v) % 100)),
    "comparisons": lambda x, v: (x == v, x < v, x >= v, (x > v) & (x != v), torch.isin(x, v)),
    "bits": lambda x, v: (x & v, x | v, x ^ v, x << 1 | v),
    "divisions": lambda x, v: (x // v, x % v, torch.fmod(x, v), torch.div(x, v, rounding_mode="trunc")),
    "floats": lambda x, v: (x / v, torch.copysign(x, v), torch.float_power(x, 2) + v),
    "0-d tensors": lambda x, v: (x + torch.tensor(v), x == torch.tensor(v), torch.maximum(x, torch.tensor(v))),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
@pytest.mark.parametrize("name", NARROW)
def test_numbers_that_an_integer_dtype_cannot_hold_wrap_around_as_in_eager(name, dtype):
    x = torch.tensor([0, 3, 100, -1, 127]).to(dtype)
    for number in (-1, 300, -300, 2**33 + 5):
        ours, eager = next(_both([x], lambda x, v=number: NARROW[name](x, v)))
        for o, e in zip(ours, eager, strict=True):
            assert o.dtype == e.dtype
            assert torch.equal(o, e)


CHECKED = {
    "full_like": torch.full_like,
    "masked_fill": lambda x, v: x.masked_fill(x > 2, v),
    "where": lambda x, v: torch.where(x > 2, x, v),
    "clamp": lambda x, v: x.clamp(max=v),
    "index_fill": lambda x, v: x.index_fill(0, torch.tensor([0]), v),
    "scatter": lambda x, v: x.scatter(0, torch.tensor([0]), v),
    "alpha": lambda x, v: torch.add(x, x, alpha=v),
}


@pytest.mark.parametrize("name", CHECKED)
def test_numbers_to_fill_with_are_refused_where_eager_refuses_them(name):
    x = torch.tensor([0, 3, 200, 255], dtype=torch.uint8)
    ours, eager = next(_both([x], lambda x: CHECKED[name](x, -1)))
    assert torch.equal(ours, eager)
    with pytest.raises(RuntimeError, match="without overflow"):
        CHECKED[name](x, 300)
    with pytest.raises(RuntimeError, match="without overflow"):
        kpx.optimize(_Each(lambda x: CHECKED[name](x, 300)), config=CONFIG)(x)


DIVISIONS = {
    "floor": lambda x, y: x // y,
    "remainder": lambda x, y: x % y,
    "fmod": torch.fmod,
    "truncated": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_an_integer_divided_by_zero_is_an_error_as_in_eager(name):
    optimized = kpx.optimize(_Each(DIVISIONS[name]), config=CONFIG)
    x, y = torch.tensor([5, -7, 3]), torch.tensor([2, 1, -1])
    with torch.no_grad():
        assert torch.equal(optimized(x, y)[0], DIVISIONS[name](x, y))
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            optimized(x, y * 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        kpx.optimize(_Each(lambda x: DIVISIONS[name](x, 0)), config=CONFIG)(x)
    assert next(_both([x.float()], lambda x: DIVISIONS[name](x, 0)))[0].isfinite().sum() == 0


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 33])
def test_running_extremes_keep_the_sign_of_zero(length):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (3, length), generator=generator) * torch.where(torch.arange(3)[:, None] > 0, -0.5, 1.0)
    for ours, eager in _both(
        [x], lambda x: x.cummin(1).values, lambda x: x.cummax(1).values, lambda x: x.T.cummin(0).values
    ):
        _assert_same_bits(ours, eager)


@pytest.mark.parametrize("divide", [torch.floor_divide, torch.remainder], ids=["floor_divide", "remainder"])
def test_ties_and_order_are_eagers(divide):
    x = torch.randint(0, 3, (20, 9), generator=torch.Generator().manual_seed(0)).float()
    functions = [
        lambda x: x.argmax(1),
        lambda x: x.argmin(1),
        lambda x: x.median(1).indices,
        lambda x: x.mode(1).indices,
    ]
    functions += [
        lambda x: x.sort(dim=1, stable=True).indices,
        lambda x: x.sort(dim=1, descending=True, stable=True).indices,
    ]
    functions += [lambda x: x.topk(3, 1).values, lambda x: divide(x, 2)]
    for ours, eager in _both([x], *functions):
        assert torch.equal(ours, eager)


def test_mode_takes_nan_where_no_value_stands_twice():
    x = torch.tensor([[NAN, 1.0, NAN, 2.0, 2.0], [NAN, 3.0, NAN, 1.0, 2.0], [NAN] * 5])
    for ours, eager in _both([x], lambda x: x.mode(1).values, lambda x: x.mode(1).indices):
        torch.testing.assert_close(ours, eager, equal_nan=True)


RUNNING = {
    "cumsum": (lambda x: x.cumsum(0), lambda: torch.randn(10**6)),
    "cumsum of rows": (lambda x: x.cumsum(0), lambda: torch.rand(10**5, 3)),
    "cumprod": (lambda x: x.cumprod(0), lambda: 1 + torch.randn(10**5) * 1e-3),
    "logcumsumexp": (lambda x: x.logcumsumexp(0), lambda: torch.randn(10**5)),
    "prod": (lambda x: x.prod(), lambda: 1 + torch.randn(10**5) * 1e-3),
    "cumsum in bf16": (lambda x: x.cumsum(0), lambda: torch.rand(3000).bfloat16()),
}


@pytest.mark.parametrize("name", RUNNING)
def test_running_sums_and_products_are_as_near_to_f64_as_eagers(name):
    torch.manual_seed(0)
    function, draw = RUNNING[name]
    x = draw()

    def run(compiled, x):
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)[0]
        (y * torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)).sum().backward()
        return y.detach().double(), leaf.grad.double()

    model = _Each(function)
    ours, eager = run(kpx.optimize(model, config=CONFIG, training=True), x), run(model, x)
    for got, competitor, reference in zip(ours, eager, run(model, x.double()), strict=True):
        assert_closer(got.numpy(), competitor.numpy(), reference.numpy(), relative=1e-7)


def test_variance_at_a_large_mean_is_as_near_to_f64_as_eagers():
    torch.manual_seed(0)
    x = torch.randn(64, 1000) + 1e6
    functions = [lambda x: x.var(1), lambda x: x.std(1), lambda x: torch.var_mean(x, 1)[0], lambda x: x.std()]
    wide = _Each(*functions)(x.double())
    for (ours, eager), reference in zip(_both([x], *functions), wide, strict=True):
        assert_closer(ours.numpy(), eager.numpy(), reference.numpy(), relative=1e-7)


def test_variance_of_few_and_of_special_values_is_eagers():
    x = SPECIAL.repeat(3, 1)
    x[1, :3] = 0
    functions = [lambda x: x.var(1), lambda x: x[:1].var(0), lambda x: x[1:2, 3:].var(1), lambda x: x[:0].var(0)]
    for ours, eager in _both([x], *functions):
        torch.testing.assert_close(ours, eager, equal_nan=True)


NORMS = {
    "batch": lambda: torch.nn.BatchNorm1d(16),
    "batch, after a product": lambda: torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16)),
    "layer": lambda: torch.nn.LayerNorm(16),
    "group": lambda: torch.nn.GroupNorm(2, 16),
    "rms": lambda: torch.nn.RMSNorm(16),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_norm_in_f64_is_f64_everywhere(name, training):
    torch.manual_seed(0)
    norm, x = NORMS[name]().double().train(training), torch.randn(8, 16, dtype=torch.float64)
    with torch.no_grad():
        eager = copy.deepcopy(norm)(x)
        torch.testing.assert_close(kpx.optimize(norm, config=CONFIG)(x), eager, rtol=1e-13, atol=1e-13)


def test_constants_tell_zeros_apart_and_hold_any_whole_number():
    def constants(x):
        negative, zero = torch.full((3,), -0.0), torch.zeros(3)
        return torch.stack([torch.copysign(x, negative), torch.copysign(x, zero), 1 / (x * -0.0), negative + negative])

    def whole(x):
        return torch.full((3,), 2**63 + 5, dtype=torch.uint64), torch.tensor([2**63, 2**64 - 1, 1], dtype=torch.uint64)

    for ours, eager in _both([torch.tensor([1.0, -2.0, 3.0])], constants):
        assert torch.equal(ours, eager)
        assert torch.equal(ours.signbit(), eager.signbit())
    for ours, eager in itertools.chain(*(zip(*pair, strict=True) for pair in _both([torch.ones(1)], whole))):
        assert ours.dtype == eager.dtype == torch.uint64
        assert torch.equal(ours.view(torch.int64), eager.view(torch.int64))


LABELS = {
    "cross_entropy": (lambda x, t: F.cross_entropy(x, t), [0, 5, 1, 2]),
    "cross_entropy, negative": (lambda x, t: F.cross_entropy(x, t), [0, -1, 1, 2]),
    "nll_loss": (lambda x, t: F.nll_loss(x, t), [0, 5, 1, 2]),
    "multi_margin_loss": (lambda x, t: F.multi_margin_loss(x, t), [0, 5, 1, 2]),
    "one_hot": (lambda x, t: F.one_hot(t, 5), [0, 5, 1, 2]),
    "one_hot, negative": (lambda x, t: F.one_hot(t, 5), [0, -1, 1, 2]),
    "binary_cross_entropy": (lambda x, t: F.binary_cross_entropy(x, x * 0), [0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", LABELS)
def test_label_or_probability_out_of_range_raises_as_in_eager(name):
    function, labels = LABELS[name]
    x, target = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor(labels)
    with pytest.raises((IndexError, RuntimeError)) as eager:
        function(x, target)
    with pytest.raises((IndexError, RuntimeError)) as ours, torch.no_grad():
        kpx.optimize(_Each(function), config=CONFIG)(x, target)
    if "one_hot" in name or "binary" in name:
        assert str(eager.value) in str(ours.value)


def test_ignored_labels_and_ended_ones_count_for_nothing():
    x, target = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, -100, 1, 2])
    functions = [lambda x, t: F.cross_entropy(x, t), lambda x, t: F.cross_entropy(x, t * 0 - 100)]
    functions += [lambda x, t: F.multilabel_margin_loss(x, torch.tensor([[3, 1, -1, 0, 2]]).expand(4, 5).contiguous())]
    functions += [lambda x, t: F.multilabel_margin_loss(x, torch.full((4, 5), -1))]
    for ours, eager in _both([x, target], *functions):
        torch.testing.assert_close(ours, eager, equal_nan=True)


def _hidden(scores, mask, kind):
    if kind == "filled":
        return scores.masked_fill(~mask, -INF)
    if kind == "added":
        return scores + torch.where(mask, 0.0, -INF)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


@pytest.mark.parametrize("length", [8, 300])
@pytest.mark.parametrize("kind", ["filled", "added", "finite"])
def test_fully_masked_row_of_written_attention_is_as_written(kind, length):
    torch.manual_seed(0)
    arrays = torch.randn(3, 1, 2, length, 16)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    mask[:, :, length // 2] = False

    def attend(q, k, v):
        return (_hidden((q @ k.mT) * 0.25, mask, kind).softmax(-1) @ v,)

    def run(function):
        leaves = [a.clone().requires_grad_() for a in arrays]
        out = function(*leaves)[0]
        (out * torch.arange(16.0)).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    model = _Each(lambda q, k, v: attend(q, k, v)[0])
    with torch.no_grad():
        eager = attend(*arrays)[0]
        ours = kpx.optimize(model, config=CONFIG)(*arrays)[0]
    torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert eager.isnan().any() == (kind != "finite")
    for got, wanted in zip(run(kpx.optimize(model, config=CONFIG, training=True)), run(attend), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-3, atol=1e-3)
