"""Every lowering rule gives PyTorch's values, dtypes and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kpx
from bench import opinfo_check
from kpx.bridges.torch import capture, checks, dtypes
from kpx.bridges.torch.dynamo import differentiable
from kpx.bridges.torch.registry import RULES, lowers
from tests.bridges.opinfo_ops import OPINFO
from tests.bridges.torch_samples import DRAWS, ELSEWHERE, MORE

F = torch.nn.functional
aten = torch.ops.aten


def _t(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)
    if dtype == torch.bool:
        return torch.rand(*shape, generator=generator) < 0.5
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


X, Y, V = _t(3, 4), _t(3, 4, seed=1), _t(4, seed=2)
POSITIVE, UNIT = X.abs() + 0.1, X.tanh() * 0.9
N, J, B = _t(3, 4, dtype=torch.int64), _t(3, 4, dtype=torch.int32, seed=1), _t(3, 4, dtype=torch.bool)
IMAGE = _t(2, 4, 9, 8)
Q, K = _t(2, 4, 5, 8), _t(2, 2, 6, 8, seed=1)

# Overload -> argument tuples, or (arguments, keywords).
SAMPLES = {
    aten.add.Tensor: [(X, Y), (X, V), (X, N), (N, J), (B, B), ((X, Y), {"alpha": 2}), ((B, B), {"alpha": False}), (X, torch.tensor(2.0, dtype=torch.float64))],
    aten.add.Scalar: [(X, 2), (N, 2), (N, 1.5)],
    aten.sub.Tensor: [(X, Y), (N, J), ((X, Y), {"alpha": 0.5})],
    aten.sub.Scalar: [(X, 2), (N, 1.5)],
    aten.rsub.Tensor: [(X, Y)],
    aten.rsub.Scalar: [(X, 2), (N, 1)],
    aten.mul.Tensor: [(X, Y), (X, N), (B, B), (B, X), (X.bfloat16(), V)],
    aten.mul.Scalar: [(X, 3), (N, 0.5), (B, 2)],
    aten.div.Tensor: [(X, Y), (N, J + 9), (B, X)],
    aten.div.Scalar: [(X, 3), (N, 2)],
    aten.div.Tensor_mode: [((X, Y), {"rounding_mode": m}) for m in (None, "floor", "trunc")] + [((N, J * 0 + 3), {"rounding_mode": m}) for m in ("floor", "trunc")],
    aten.div.Scalar_mode: [((X, 0.7), {"rounding_mode": "floor"}), ((N, 2), {"rounding_mode": "trunc"})],
    aten.floor_divide.default: [(N, J * 0 - 3), (X, Y)],
    aten.remainder.Tensor: [(N, J * 0 + 3), (X, POSITIVE)],
    aten.remainder.Scalar: [(N, -3), (X, 0.7)],
    aten.pow.Tensor_Scalar: [(X, 2), (X, 3.0), (POSITIVE, 0.5), (POSITIVE, -1.5), (N, 2), (X, -2), (N, 0.5)],
    aten.pow.Tensor_Tensor: [(POSITIVE, Y), (N, J.abs())],
    aten.pow.Scalar: [(2.0, X), (2, N.abs())],
    aten.maximum.default: [(X, Y), (X, N)],
    aten.minimum.default: [(X, Y)],
    aten.clamp.default: [(X, -0.5, 0.5), (X, None, 0.5), (N, -1, None), (N, 0.5, None)],
    aten.clamp.Tensor: [(X, -V.abs(), V.abs())],
    **{getattr(aten, n).Tensor: [(X, Y), (N, J), (X, N), (N, torch.tensor(0.5))] for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{getattr(aten, n).Scalar: [(X, 0), (N, 0.5)] for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{getattr(aten, f"bitwise_{n}").Tensor: [(N, J), (B, B)] for n in ("and", "or", "xor")},
    **{getattr(aten, f"bitwise_{n}").Scalar: [(N, 3)] for n in ("and", "or", "xor")},
    **{getattr(aten, f"logical_{n}").default: [(B, X), (N, X)] for n in ("and", "or", "xor")},
    aten.logical_not.default: [(X,), (B,)],
    aten.bitwise_not.default: [(N,), (B,)],
    aten.where.self: [(B, X, Y), (B, X, N), (B[:1], V, V)],
    aten.where.ScalarSelf: [(B, 1.0, X)],
    aten.where.ScalarOther: [(B, X, 2)],
    aten.where.Scalar: [(B, 1.0, 2.0)],
    aten.masked_fill.Scalar: [(X, B, -1e9), (N, B, 7)],
    aten.masked_fill.Tensor: [(X, B, torch.tensor(2.0))],
    aten.isnan.default: [(torch.tensor([1.0, float("nan")]),)],
    aten.isinf.default: [(torch.tensor([1.0, float("-inf")]),)],
    **{getattr(aten, n).default: [(X,), (N,)] for n in ("exp", "exp2", "expm1", "sin", "cos", "tan", "atan", "sinh", "cosh", "tanh", "asinh", "erf", "erfc", "sigmoid")},
    **{getattr(aten, n).default: [(POSITIVE,)] for n in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal")},
    **{getattr(aten, n).default: [(UNIT,)] for n in ("asin", "acos", "atanh")},
    aten.acosh.default: [(POSITIVE + 1,)],
    **{getattr(aten, n).default: [(X,), (N,)] for n in ("neg", "abs", "sign", "relu")},
    **{getattr(aten, n).default: [(X * 3,), (torch.tensor([0.5, 1.5, -0.5, 2.5]),), (N,)] for n in ("floor", "ceil", "trunc", "round")},
    aten.silu.default: [(X,)],
    aten.gelu.default: [(X,), ((X,), {"approximate": "tanh"}), (X.bfloat16(),)],
    aten.leaky_relu.default: [(X,), (X, 0.2)],
    aten.elu.default: [(X,), (X, 0.5)],
    aten.hardtanh.default: [(X,), (X, -0.5, 0.25)],
    aten.hardsigmoid.default: [(X * 4,)],
    aten.hardswish.default: [(X * 4,)],
    aten.softplus.default: [(X,), (X * 30, 2, 10)],
    aten._to_copy.default: [((X,), {"dtype": torch.bfloat16}), ((X * 3,), {"dtype": torch.int64}), ((N,), {"dtype": torch.bool})],
    aten.clone.default: [(X,)],
    aten.contiguous.default: [(X,)],
    aten.alias.default: [(X,)],
    aten.detach.default: [(X,)],
    aten.lift_fresh_copy.default: [(X,)],
    aten.view.default: [(X, [2, 6]), (X, [-1])],
    aten.reshape.default: [(X, [4, -1])],
    aten._unsafe_view.default: [(X, [12])],
    aten.flatten.using_ints: [(IMAGE, 1), (torch.tensor(1.0),)],
    aten.permute.default: [(IMAGE, [0, 2, 3, -3])],
    aten.transpose.int: [(IMAGE, 1, -1)],
    aten.t.default: [(X,), (V,)],
    aten.unsqueeze.default: [(X, 0), (X, -1)],
    aten.squeeze.dim: [(X[:1], 0), (X, 0)],
    aten.squeeze.dims: [(X[:1, :1], [0, 1])],
    aten.squeeze.default: [(X[:1],)],
    aten.expand.default: [(V, [3, -1]), (X[:, :1], [2, 3, 5])],
    aten.select.int: [(X, 1, -1)],
    aten.slice.Tensor: [(X, 1, 1, 9223372036854775807), (X, 1, 0, -1, 2), (X, 0, 5, 9)],
    aten.split.Tensor: [(X, 2, 0)],
    aten.split_with_sizes.default: [(X, [1, 3], -1)],
    aten.chunk.default: [(X, 2, 1)],
    aten.unbind.int: [(X, 0)],
    aten.cat.default: [([X, Y], 1), ([X, N], 0), ([torch.zeros(0), X], -1)],
    aten.stack.default: [([X, Y], 1)],
    aten.repeat.default: [(X, [2, 1, 2])],
    aten.flip.default: [(X, [0, 1]), (torch.tensor(2.0), [0])],
    aten.roll.default: [(X, [1], [1]), (X, [2]), (torch.tensor(2.0), [1])],
    aten.constant_pad_nd.default: [(X, [1, 2], 3.0), (X, [0, -1, 1, 0])],
    aten.tril.default: [(X,), (X, 1)],
    aten.triu.default: [(X, -1)],
    aten.full.default: [([2, 3], 1.5), ([2], 3), ([2], True)],
    aten.full_like.default: [(X, 2)],
    aten.zeros.default: [([2, 3],)],
    aten.ones.default: [([2, 3],)],
    aten.zeros_like.default: [(N,)],
    aten.ones_like.default: [((X,), {"dtype": torch.int64})],
    aten.scalar_tensor.default: [(1.5,)],
    aten.arange.start_step: [
        (1, 9, 2), (0.0, 1.0, 0.25), ((2.1, -2.9, -1.0), {"dtype": torch.int64}), ((0.5, 6.1, 1.5), {"dtype": torch.int32}),
    ],
    aten.linspace.default: [
        (-2.5, 7.0, 5), (0, 7, 1), (1.0, 2.0, 0), ((-3, 7, 64), {"dtype": torch.int64}),
        ((4.3, -3, 50), {"dtype": torch.int32}),
    ],
    aten.linspace.Tensor_Tensor: [((torch.tensor(50), torch.tensor(1), 50), {"dtype": torch.int64})],
    aten.linspace.Tensor_Scalar: [(torch.tensor(0.5), 3, 4)],
    aten.linspace.Scalar_Tensor: [(-3, torch.tensor(7), 64)],
    aten.arange.default: [(5,)],
    aten.arange.start: [(2, 7)],
    aten.sum.default: [(X,), (N,), (B,)],
    aten.sum.dim_IntList: [(X, [0], True), (X.bfloat16(), [-1]), ((N, [1]), {"dtype": torch.float32})],
    aten.mean.default: [(X,)],
    aten.mean.dim: [(X, [-1], True), (IMAGE, [2, 3])],
    aten.prod.default: [(X,)],
    aten.prod.dim_int: [(X, 1)],
    aten.var.correction: [((X, [1]), {"correction": 1}), ((X, [1]), {"correction": 0, "keepdim": True})],
    aten.amax.default: [(X, [1]), (X,)],
    aten.amin.default: [(X, [0], True)],
    aten.max.default: [(X,)],
    aten.min.default: [(X,)],
    aten.max.dim: [(X, 1)],
    aten.min.dim: [(X, 0, True)],
    aten.argmax.default: [(X, 1), (X,)],
    aten.argmin.default: [(X, -1, True)],
    aten.any.default: [(B,)],
    aten.any.dim: [(B, 1)],
    aten.any.dims: [(B, [0, 1])],
    aten.all.default: [(B,)],
    aten.all.dim: [(B, 1, True)],
    aten.all.dims: [(B, [1])],
    aten._softmax.default: [(X, 1, False), (X[0, 0], 0, False)],
    aten.softmax.int: [(X, -1), (X[0, 0], -1), (X.bfloat16(), 0, torch.float32)],
    aten._log_softmax.default: [(X, 1, False), (X[0, 0], 0, False)],
    aten.log_softmax.int: [(X, 0), (X[0, 0], 0)],
    aten.logsumexp.default: [(X, [1])],
    aten.cumsum.default: [(X, 1), (N, 0), (B, 1)],
    aten.linalg_vector_norm.default: [(X, 2, [1]), (X, 1, [0], True), (X, float("inf"), [1]), (X, -float("inf"), [1]), (X, 0, [1]), (X, 3.0, None)],
    aten.embedding.default: [(X, torch.tensor([[0, 2], [1, 1]]))],
    aten.index.Tensor: [(X, [torch.tensor([0, 2, -1])]), (X, [None, torch.tensor([1, 0])]), (X, [torch.tensor([[0], [1]]), torch.tensor([1, 2])])],
    aten.index_select.default: [(X, 1, torch.tensor([0, 3]))],
    aten.gather.default: [(X, 1, torch.tensor([[0, 1], [3, 2]]))],
    aten.index_put.default: [(X, [torch.tensor([0, 2])], V), (X, [torch.tensor([0, 0])], V, True)],
    aten.slice_scatter.default: [(X, Y[:, :2], 1, 0, 2)],
    aten.select_scatter.default: [(X, V, 0, 1)],
    aten.linear.default: [(X, Y), (X, Y, V[:3]), (V, Y)],
    aten.mm.default: [(X, Y.T.contiguous())],
    aten.bmm.default: [(IMAGE[0], IMAGE[0].transpose(1, 2).contiguous())],
    aten.matmul.default: [(IMAGE, _t(8, 3)), (X, V)],
    aten.addmm.default: [(V[:3], X, Y.T.contiguous()), ((V[:3], X, Y.T.contiguous()), {"beta": 0.5, "alpha": 2}), ((V[:3] * float("nan"), X, Y.T.contiguous()), {"beta": 0})],
    aten.baddbmm.default: [(_t(4, 9, 9), IMAGE[0], IMAGE[0].transpose(1, 2).contiguous())],
    aten.dot.default: [(V, V)],
    aten.mv.default: [(X, V)],
    aten.scaled_dot_product_attention.default: [
        (Q, Q, Q), ((Q, Q, Q), {"is_causal": True}), ((Q, K, K), {"enable_gqa": True, "scale": 0.3}),
        (Q, Q, Q, _t(2, 1, 5, 5)), (Q, Q, Q, _t(5, 5, dtype=torch.bool)), (Q[0], Q[0], Q[0]),
        (Q.bfloat16(), Q.bfloat16(), Q.bfloat16()),
    ],
    aten.conv1d.default: [(_t(2, 4, 9), _t(3, 4, 3), V[:3], [2], [1])],
    aten.conv2d.default: [(IMAGE, _t(6, 4, 3, 3), _t(6), [2, 1], [1, 1]), (IMAGE, _t(4, 1, 3, 3), None, [1, 1], [0, 1], [1, 1], 4), (IMAGE, _t(6, 2, 3, 2), None, [1, 1], [1, 1], [2, 2], 2), (IMAGE[0], _t(6, 4, 1, 1))],
    aten.conv3d.default: [(_t(1, 2, 4, 5, 6), _t(3, 2, 2, 2, 2))],
    aten.conv1d.padding: [(_t(2, 4, 9), _t(3, 4, 3), None, [1], "same")],
    aten.conv2d.padding: [(IMAGE, _t(6, 4, 3, 3), None, [1, 1], "valid")],
    aten.conv3d.padding: [(_t(1, 2, 4, 5, 6), _t(3, 2, 3, 3, 3), None, [1, 1, 1], "same")],
    aten.layer_norm.default: [(X, [4]), (X, [4], V, V, 1e-6), (IMAGE, [9, 8]), (X.bfloat16(), [4], V.bfloat16())],
    aten.rms_norm.default: [(X, [4]), (X, [4], V, 1e-6)],
    aten._native_batch_norm_legit_no_training.default: [(IMAGE, V, V, V, V.abs() + 0.5, 0.1, 1e-5), (IMAGE, None, None, V, V.abs() + 0.5, 0.1, 1e-5)],
    aten.group_norm.default: [(IMAGE, 2, V, V), (IMAGE, 4)],
    aten.max_pool2d.default: [(IMAGE, [3, 3], [2, 2], [1, 1]), (IMAGE, [2, 2], [2, 2], [0, 0], [1, 1], True), (IMAGE, [3, 2], [1, 2], [1, 0], [2, 1])],
    aten.avg_pool2d.default: [(IMAGE, [3, 3], [2, 2], [1, 1]), (IMAGE, [3, 3], [2, 2], [1, 1], True, False), (IMAGE, [2, 2], [2, 2], [0, 0], True), (IMAGE, [2, 2], [2, 2], [0, 0], False, True, 3)],
    aten.adaptive_avg_pool2d.default: [(IMAGE, [1, 1]), (IMAGE, [3, 4]), (IMAGE, [4, 5])],
}  # fmt: skip
SAMPLES |= MORE

CASES = [
    (op, *(s if len(s) == 2 and isinstance(s[1], dict) else (s, {})))
    for op, samples in SAMPLES.items()
    for s in samples
]


class _Call(torch.nn.Module):
    """A model of one op; tensors among the arguments are its inputs."""

    def __init__(self, op, args, kwargs):
        super().__init__()
        self.op, self.args, self.kwargs = op, args, kwargs

    def forward(self, *tensors):
        left = list(tensors)
        args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda _: left.pop(0), self.args)
        return self.op(*args, **self.kwargs)


@pytest.mark.parametrize("op, args, kwargs", CASES, ids=[f"{op!s}-{i}" for i, (op, *_) in enumerate(CASES)])
def test_an_op_gives_what_pytorch_gives(op, args, kwargs):
    tensors = [a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, torch.Tensor)]
    wanted = torch.utils._pytree.tree_leaves(op(*args, **kwargs))
    # AOTAutograd makes no views of prims functional, which torch.export's decompositions are.
    model, is_prim = _Call(op, args, kwargs), str(op).startswith("prims.")
    call = kpx.compile(model, *tensors) if is_prim else kpx.optimize(model, fullgraph=True)
    got = torch.utils._pytree.tree_leaves(call(*tensors))
    for w, g in zip(wanted, got, strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        loose = 2e-2 if w.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(g, w, rtol=loose, atol=loose, equal_nan=True)


@pytest.mark.parametrize("op", DRAWS, ids=str)
def test_a_random_op_draws_around_its_mean(op):
    args, kwargs, mean = DRAWS[op]
    arrays = [jnp.asarray(a.numpy()) if isinstance(a, torch.Tensor) else a for a in args]
    named = {k: v for k, v in kwargs.items() if k != "device"}
    drawn = RULES[op](*arrays, **named, key=jax.random.key(0, impl="rbg"))
    first = np.asarray(drawn[0] if isinstance(drawn, tuple) else drawn)
    assert abs(first.mean() - mean) < 0.12 * max(1.0, first.std())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("count", "replacement"), [(4000, True), (1, False), (1, True), (3, False)])
def test_multinomial_draws_as_often_as_the_weights_say(dtype, count, replacement):
    weights = torch.tensor([[0.0, 3.0, 1.0, 0.0, 4.0], [1.0, 0.0, 0.0, 2.0, 1.0]], dtype=dtype)

    class Draw(torch.nn.Module):
        def forward(self, p):
            return torch.multinomial(p, count, replacement)

    rows = 1 if count > 100 else 4000
    p = weights.repeat(rows, 1)
    torch.manual_seed(0)
    drawn = kpx.optimize(Draw())(p).reshape(rows, 2, count)
    assert drawn.dtype == torch.int64
    expected = weights.double() / weights.double().sum(-1, keepdim=True)
    for row in range(2):
        first = drawn[:, row].flatten() if replacement else drawn[:, row, 0]
        found = torch.bincount(first, minlength=5) / first.numel()
        torch.testing.assert_close(found.double(), expected[row], rtol=0, atol=0.04)
        assert (found[weights[row] == 0] == 0).all()
        if count == 3:  # all three that have a weight, each once
            assert (drawn[:, row].sort(-1).values == weights[row].nonzero().flatten()).all()


@pytest.mark.parametrize("bad", [[0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]], ids=str)
def test_multinomial_refuses_what_are_no_weights(bad):
    class Draw(torch.nn.Module):
        def forward(self, p):
            return torch.multinomial(p, 1)

    weights = torch.tensor(bad)
    with pytest.raises(RuntimeError) as expected:
        Draw()(weights)
    with pytest.raises(
        RuntimeError, match="sum of probabilities <= 0" if not sum(bad) and bad[0] == 0 else "probability tensor"
    ):
        kpx.optimize(Draw())(weights)
    assert "probab" in str(expected.value)


def _only_draws(name):
    op = opinfo_check._database()[name]
    samples = opinfo_check.samples_of(op, torch.float32, 2, gradients=True)
    return all(opinfo_check.is_random(op, name, sample) for sample in samples)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPINFO)
def test_the_op_databases_samples_have_pytorchs_values_and_gradients(name):
    reached = set()

    def noted(op, rule):
        def run(*args, **kwargs):
            reached.add(str(op))
            return rule(*args, **kwargs)

        return run

    before = dict(RULES)
    try:
        RULES.update({op: noted(op, rule) for op, rule in before.items()})
        verdicts = opinfo_check.check(name, "f32", 2, True)
    finally:
        RULES.update(before)
    expected = dict.fromkeys(verdicts, "pass")
    if "gradient" in verdicts and _only_draws(name):  # their gradients are their own: nothing of PyTorch's to compare
        expected["gradient"] = "left out"
    assert {part: v["verdict"] for part, v in verdicts.items()} == expected, verdicts
    assert set(OPINFO[name]) <= reached


@pytest.mark.parametrize("n", [2, 3])
def test_fractional_pooling_has_pytorchs_gradient_for_given_draws(n):
    x = _t(1, 2, *[7] * n)
    draws = torch.rand(1, 2, n, generator=torch.Generator().manual_seed(0))
    pool = getattr(F, f"fractional_max_pool{n}d")

    def function(x, draws):
        return pool(x, 2, output_size=3, _random_samples=draws)

    _assert_same_gradient(function, x, draws)


def test_fractional_pooling_takes_empty_batches():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return F.fractional_max_pool3d(x, (2, 2, 1), output_size=2)

    assert kpx.optimize(Pool())(torch.zeros(0, 1, 4, 5, 4)).shape == (0, 1, 2, 2, 2)


def _assert_same_gradient(function, x, *others):
    def gradient(f):
        leaf = x.clone().requires_grad_()
        torch.utils._pytree.tree_leaves(f(leaf, *others))[0].square().sum().backward()
        return leaf.grad

    torch.testing.assert_close(gradient(differentiable(function)), gradient(function), equal_nan=True)


@pytest.mark.parametrize("batches", [((), (4,)), ((1,), (3,)), ((2, 1), (3,))])
def test_distances_over_batches_have_pytorchs_gradient(batches):
    _assert_same_gradient(torch.cdist, _t(*batches[0], 3, 2), _t(*batches[1], 5, 2, seed=1))


@pytest.mark.parametrize("odd", [[], [0.0], [0.0, 0.0], [float("nan")], [float("nan"), 0.0]], ids=str)
@pytest.mark.parametrize("initial", [None, 2.0])
def test_products_of_segments_have_pytorchs_gradient(odd, initial):
    x = _t(6)
    x[1 : 1 + len(odd)] = torch.tensor(odd)
    lengths = torch.tensor([4, 0, 2])
    _assert_same_gradient(
        lambda x, n: torch.segment_reduce(x, "prod", lengths=n, unsafe=True, initial=initial), x, lengths
    )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.bool, torch.complex64, torch.uint8]
)
def test_a_number_written_into_a_part_is_a_constant_of_any_dtype(dtype):
    def function(x, y):
        y = y.clone()
        y[..., :2] = 1
        return x * 2, y

    compiled = torch.compile(function, backend="kpx", fullgraph=True)
    x, y = torch.ones(3), torch.zeros(2, 3, dtype=dtype)
    torch.testing.assert_close(compiled(x, y), function(x, y), rtol=0, atol=0)


def test_sizes_are_those_of_a_row_major_array():
    x = jnp.zeros((2, 3, 4))
    assert [RULES[aten.sym_size.int](x, d) for d in (0, -1)] == [2, 4]
    assert [RULES[aten.sym_stride.int](x, d) for d in range(3)] == [12, 4, 1]
    assert (RULES[aten.sym_numel.default](x), RULES[aten.sym_storage_offset.default](x)) == (24, 0)


@pytest.mark.parametrize(
    "assertion", [aten._assert_async.msg, aten._assert_scalar.default, aten._functional_assert_async.msg]
)
def test_an_assertion_asks_for_its_condition(assertion):
    found = checks.Checks()
    with checks.collecting(found):
        for condition in (jnp.asarray(True), jnp.asarray(False)):
            RULES[assertion](condition, "must hold", *[None] * (assertion is aten._functional_assert_async.msg))
    assert [bool(f) for f in found.failed] == [False, True]
    assert all("must hold" in text for _, text in found.messages)


def test_every_rule_has_a_sample():
    sampled = {str(op) for op in (*SAMPLES, *DRAWS, *ELSEWHERE)} | {op for ops in OPINFO.values() for op in ops}
    assert {str(op) for op in RULES} - sampled == set()


def test_a_second_rule_for_an_op_is_refused():
    with pytest.raises(kpx.KpxError, match=r"aten\.tanh\.default` was given a second lowering rule"):
        lowers(aten.tanh.default)(lambda x: x)


# Dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_promotion_is_pytorchs(seed):
    rng = np.random.default_rng(seed)
    choices = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
               torch.bfloat16, torch.float32, torch.float64, torch.complex64]  # fmt: skip

    def operand():
        kind = rng.integers(3)
        if kind == 2:
            return [True, 3, 2.5][rng.integers(3)]
        return torch.ones((2,) * int(kind), dtype=choices[rng.integers(len(choices))])

    a, b = operand(), operand()
    arrays = [np.zeros(x.shape, dtypes.to_jax(x.dtype)) if isinstance(x, torch.Tensor) else x for x in (a, b)]
    if not any(isinstance(x, torch.Tensor) for x in (a, b)):
        return
    assert dtypes.result_type(*arrays) == dtypes.to_jax(torch.result_type(a, b))


def test_capture_decomposes_what_has_no_rule():
    class Model(torch.nn.Module):
        def forward(self, x):
            return F.mish(x)

    program = capture.capture(Model(), (X,), {})
    assert "mish" not in str(program.graph)


# Kernel size, stride, padding, dilation and whether sizes are rounded up: windows beyond what is compared in one step.
WINDOWS = [
    ([6, 7], [2, 3], [0, 3], [2, 1], False),
    ([4, 5], [3, 2], [1, 2], [1, 2], True),
    ([5, 3, 5], [1, 1, 3], [2, 1, 2], [2, 2, 1], False),
    ([4, 5, 5], [2, 3, 2], [1, 2, 1], [1, 1, 2], True),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_large_windows_have_pytorchs_maxima_and_places(window):
    kernel, n = window[0], len(window[0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (2, 2, *[12] * n), generator=generator).float()
    x[torch.rand(x.shape, generator=generator) < 0.3] = -float("inf")
    x[torch.rand(x.shape, generator=generator) < 0.02] = float("nan")
    pool = {2: torch.nn.functional.max_pool2d, 3: torch.nn.functional.max_pool3d}[n]

    class Model(torch.nn.Module):
        def forward(self, x):
            return pool(x, kernel, *window[1:], return_indices=True)

    wanted, got = Model()(x), kpx.compile(Model(), x)(x)
    torch.testing.assert_close(got[0], wanted[0], equal_nan=True, rtol=0, atol=0)
    assert torch.equal(got[1], wanted[1])
