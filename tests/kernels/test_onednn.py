"""oneDNN's products, convolutions and attention, called from XLA, against f64; and what happens where they cannot be had."""

import concurrent.futures
import json
import os
import random
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.hardware import cpu
from kpx.kernels import onednn
from kpx.kernels.attention import attention_kernel
from kpx.kernels.attention_onednn import attention
from tests.optional import torch
from tests.reference import assert_closer

pytestmark = pytest.mark.skipif(not onednn.available(), reason=f"oneDNN cannot be called: {onednn.missing()}")

HAS_BF16 = "avx512f" in cpu.features()  # without it oneDNN has but plain loops for bf16
BF16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not HAS_BF16, reason="not run: oneDNN has no bf16 on this CPU")
)

ACTIVATIONS = {
    "none": torch.nn.Identity(),
    "relu": torch.nn.ReLU(),
    "gelu": torch.nn.GELU(),
    "gelu, tanh": torch.nn.GELU(approximate="tanh"),
    "silu": torch.nn.SiLU(),
    "tanh": torch.nn.Tanh(),
    "sigmoid": torch.nn.Sigmoid(),
}


class _Layer(torch.nn.Module):
    """A linear layer with an activation, a residual, and a gate."""

    def __init__(self, inner, columns, activation, *, bias=True, residual=False, gated=False):
        super().__init__()
        self.linear = torch.nn.Linear(inner, columns, bias=bias)
        self.gate = torch.nn.Linear(inner, columns, bias=bias) if gated else None
        self.activation, self.residual = activation, residual

    def forward(self, x, y):
        found = self.activation(self.linear(x))
        if self.gate is not None:
            found = found * self.gate(x)
        return found + y if self.residual else found


def _check(model, inputs, *called, relative=2e-6):
    """That calls of oneDNN are made, and are no farther from f64 than eager PyTorch is."""
    optimized = kpx.optimize(model.eval())
    with torch.no_grad():
        got, eager = optimized(*inputs), model(*inputs)
        text = optimized.compile_for(list(inputs), {}).stablehlo
        wanted = model.double()(*(t.double() for t in inputs))
    for call in called:
        assert call in text
    assert got.dtype == eager.dtype
    assert_closer(got.double().numpy(), eager.double().numpy(), wanted.numpy(), relative=relative)
    return text


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_layer_with_an_activation_is_one_call(name, dtype):
    torch.manual_seed(0)
    layer = _Layer(96, 200, ACTIVATIONS[name]).to(dtype)
    x = torch.randn(4, 33, 96, dtype=dtype)
    text = _check(layer, (x, x), "kpx_onednn_matmul", relative=2e-6 if dtype == torch.float32 else 8e-3)
    rest = ("tanh", "erf", "logistic", "maximum")
    assert not any(f"stablehlo.{op}" in text or f"chlo.{op}" in text for op in rest)


class _NewGelu(torch.nn.Module):
    """As GPT-2 has it: written out, in the numbers that it is given."""

    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_an_activation_that_is_written_out_in_narrow_numbers_is_known_too(dtype):
    layer = _Layer(96, 200, _NewGelu()).to(dtype)
    x = torch.randn(4, 33, 96, dtype=dtype)
    text = _check(layer, (x, x), "kpx_onednn_matmul", relative=2e-6 if dtype == torch.float32 else 8e-3)
    assert "stablehlo.tanh" not in text


def test_what_is_nearly_an_activation_and_is_none_stays():
    class Nearly(torch.nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.01 * x)

    x = torch.randn(64, 96)
    assert "steps = array<i64: 1>" in _check(_Layer(96, 200, Nearly()), (x, x), "kpx_onednn_matmul")


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(s, marks=pytest.mark.slow) for s in range(6, 40))])
def test_a_random_layer_matches_f64_as_well_as_pytorch_does(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rows, inner, columns = (int(rng.choice(s)) for s in ([5, 17, 64, 130, 700], [33, 64, 257], [48, 130, 513]))
    inner = max(inner, -(-(1 << 18) // (2 * rows * columns)))
    options = {name: bool(rng.integers(2)) for name in ("bias", "residual", "gated")}
    layer = _Layer(inner, columns, list(ACTIVATIONS.values())[rng.integers(len(ACTIVATIONS))], **options)
    dtype = torch.bfloat16 if rng.integers(2) and HAS_BF16 else torch.float32
    x, y = torch.randn(rows, inner, dtype=dtype), torch.randn(rows, columns, dtype=dtype)
    _check(layer.to(dtype), (x, y), "kpx_onednn_matmul", relative=2e-6 if dtype == torch.float32 else 1e-2)


# Batch, channels, channels out, height, width, kernel, stride, padding, dilation, groups.
CONVOLUTIONS = [
    (4, 3, 64, 33, 35, 7, 2, 3, 1, 1),
    (4, 64, 64, 14, 13, 3, 1, 1, 1, 1),
    (3, 32, 48, 15, 14, 3, 2, 1, 1, 1),
    (4, 64, 128, 14, 14, 1, 2, 0, 1, 1),
    (5, 64, 128, 15, 15, 1, 3, 0, 1, 1),
    (1, 64, 64, 20, 14, 3, 1, 1, 1, 1),
    (1, 64, 64, 21, 14, 3, 2, 0, 1, 1),
    (2, 64, 64, 14, 14, 3, 1, 2, 2, 1),
    (2, 64, 64, 14, 14, 7, 1, 3, 1, 64),
    (2, 64, 96, 14, 14, 3, 1, 1, 1, 4),
    (3, 128, 128, 7, 7, 3, 1, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
def test_a_convolution_with_batch_norm_and_relu_is_one_call(sizes, dtype):
    n, channels, out, height, width, *further = sizes
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(out)
    torch.nn.init.normal_(norm.running_mean)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    kernel, stride, padding, dilation, groups = further
    conv = torch.nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=False)
    model = torch.nn.Sequential(conv, norm, torch.nn.ReLU()).to(dtype)
    x = torch.randn(n, channels, height, width, dtype=dtype)
    if dtype == torch.bfloat16 and groups == channels:
        _check(model, (x,), relative=2e-2)  # of these oneDNN has but a plain loop
    else:
        text = _check(model, (x,), "kpx_onednn_conv", relative=2e-6 if dtype == torch.float32 else 2e-2)
        assert "stablehlo.maximum" not in text
        assert "stablehlo.add" not in text


def _drawn(rng):
    """A convolution, and an input that it takes: small images, whose padding may be most of a band of rows."""
    while True:
        channels, kernel, padding = rng.choice((8, 16, 64, 384)), rng.choice((1, 3, 5, 7, 9)), rng.choice((0, 1, 2))
        stride, dilation, depthwise = rng.choice((1, 1, 2)), rng.choice((1, 1, 2)), rng.random() < 0.6
        padding = (0, kernel // 2, kernel - 1)[padding]
        n, height, width = rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 9)
        if min(height, width) + 2 * padding > dilation * (kernel - 1):
            conv = torch.nn.Conv2d(channels, channels, kernel, stride, padding, dilation, channels if depthwise else 1)
            return conv, torch.randn(n, channels, height, width)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(s, marks=pytest.mark.slow) for s in range(4, 60))])
def test_a_convolution_of_a_small_image_is_right(seed):
    torch.manual_seed(seed)
    conv, x = _drawn(random.Random(seed))
    _check(torch.nn.Sequential(conv, torch.nn.ReLU()), (x,))


@pytest.mark.parametrize(("channels", "kernel", "size"), [(384, 7, (2, 2)), (384, 5, (3, 9))])
def test_rows_that_are_mostly_padding_are_computed_with_the_others(channels, kernel, size):
    torch.manual_seed(0)
    groups, padding = (channels, 3) if kernel == 7 else (1, 4)
    conv = torch.nn.Conv2d(channels, channels, kernel, padding=padding, groups=groups)
    _check(torch.nn.Sequential(conv, torch.nn.ReLU()), (torch.randn(1, channels, *size),))


def test_a_residual_network_adds_inside_its_convolutions():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))

        def forward(self, x):
            y = torch.relu(self.a(x))
            return torch.relu(self.b(y) + y)

    text = _check(Block(), (torch.randn(2, 32, 16, 16),), "kpx_onednn_conv")
    assert "stablehlo.add" not in text


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=BF16.marks)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 37, 53, 16, 24), (1, 2, 2, 700, 700, 32, 32), (3, 2, 1, 16, 300, 64, 8),
                                   (1, 1, 1, 40, 8000, 16, 16)], ids=str)  # fmt: skip
@pytest.mark.parametrize("mask", [None, (2, 1, 1, -1), (-2, -1), "added for heads"], ids=str)
def test_attention_is_as_near_to_f64_as_its_plain_form(shape, causal, mask, dtype):
    batch, heads, kv_heads, length, keys, size, value_size = shape
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal(s).astype(np.float32)
        for s in ((batch, heads, length, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, value_size))
    ]
    if isinstance(mask, tuple):
        dims = [{-1: keys, -2: length, 2: batch}.get(d, d) for d in mask]
        arrays.append(rng.random(dims) < 0.7)
    elif mask is not None:
        arrays.append(rng.standard_normal((1, heads if "heads" in mask else 1, length, keys)).astype(np.float32))
    options = {"scale": size**-0.5, "causal": causal}
    given = [jnp.asarray(a, dtype if a.ndim == 4 and i < 3 else None) for i, a in enumerate(arrays)]
    ours = jax.jit(lambda *a: attention(*a, **options))(*given)
    plain = jax.jit(lambda *a: attention_kernel.decomposition(*a, **options))(*given)
    with jax.enable_x64(True):
        wide = [np.asarray(a).astype(np.float64) if a.dtype != bool else np.asarray(a) for a in given]
        reference = attention_kernel.decomposition(*map(jnp.asarray, wide), **options)
    assert ours.dtype == plain.dtype
    rounding = 1e-6 * max(1.0, (keys / 2000) ** 0.5)  # of sums over the keys
    assert_closer(ours, plain, reference, relative=rounding if dtype == jnp.float32 else 4e-3)


def test_attention_that_sees_nothing_is_zero_and_nan_stays_in_its_row():
    q = np.ones((1, 2, 32, 16), np.float32)
    seen = np.ones((32, 32), bool)
    seen[5] = False
    q[0, 1, 7, 3] = np.nan
    ours = np.asarray(
        jax.jit(lambda *a: attention(*a, scale=1.0, causal=False))(q, np.ones_like(q), np.ones_like(q), seen)
    )
    assert (ours[0, :, 5] == 0).all()
    assert np.isnan(ours[0, 1, 7]).all()
    assert np.isnan(ours).sum() == 16


def test_attention_of_a_model_reads_and_writes_heads_where_they_lie():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (torch.nn.Linear(64, 64) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
            seen = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(seen.transpose(1, 2).flatten(2))

    text = _check(Attention(), (torch.randn(4, 96, 64),), "kpx_onednn_attention", "kpx_onednn_matmul")
    assert "stablehlo.transpose" not in text


def test_weights_are_packed_once_and_those_that_change_are_seen():
    linear = torch.nn.Linear(256, 256).eval()
    optimized, x = kpx.optimize(linear), torch.randn(64, 256)
    with torch.no_grad():
        compiled = optimized.compile_for([x], {})
        assert "kpx_onednn_pack" in compiled.prepare_stablehlo
        assert "kpx_onednn_pack" not in compiled.stablehlo
        linear.weight.mul_(2)
        torch.testing.assert_close(optimized(x), linear(x), rtol=1e-4, atol=1e-4)


def test_weights_that_are_constants_of_a_function_are_not_packed_at_each_call():
    weights = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    compiled = kpx.compile(lambda x: jnp.maximum(x @ weights, 0), np.ones((64, 256), np.float32))
    assert "kpx_onednn_pack" not in compiled.stablehlo


def test_infinities_and_nan_come_through():
    linear = torch.nn.Linear(128, 128).eval()
    x = torch.randn(64, 128)
    x[3, 5], x[9, 0] = float("inf"), float("nan")
    with torch.no_grad():
        got, eager = kpx.optimize(linear)(x), linear(x)
    assert torch.equal(got.isnan(), eager.isnan())
    assert torch.equal(got[got.isinf()], eager[eager.isinf()])


def test_threads_of_pytorch_stay_as_they_were():
    before = torch.get_num_threads()
    with torch.no_grad():
        kpx.optimize(torch.nn.Linear(256, 256).eval())(torch.randn(256, 256))
    assert torch.get_num_threads() == before


def test_calls_from_several_threads_at_once_are_right():
    model = torch.nn.Sequential(torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128)).eval()
    optimized, inputs = kpx.optimize(model), [torch.randn(80, 128) for _ in range(32)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
        optimized(inputs[0])

    def call(x):
        with torch.no_grad():
            return optimized(x)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got, w in zip(pool.map(call, inputs), wanted, strict=True):
            torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-4)


_SCRIPT = """
    import json
    import numpy as np
    {before}
    import torch
    import kpx
    from kpx.kernels import onednn
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(256, 256).eval(), torch.randn(64, 256)
    with torch.no_grad():
        optimized = kpx.optimize(linear)
        error = float((optimized(x) - linear(x)).abs().max())
    print(json.dumps([onednn.missing(), "kpx_onednn" in optimized.compile_for([x], {}).stablehlo, error]))
"""


def _elsewhere(before="", **variables):
    script = textwrap.dedent(_SCRIPT).replace("{before}", before)
    environment = {**os.environ, **{k: str(v) for k, v in variables.items()}}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_without_its_package_everything_is_as_before():
    hides = "import importlib.metadata as d; f = d.files; d.files = lambda n: None if n.startswith('onednn') else f(n)"
    missing, called, error = _elsewhere(hides)
    assert "has no libdnnl" in missing
    assert not called
    assert error < 1e-4


@pytest.mark.slow
def test_without_a_working_compiler_everything_is_as_before(tmp_path):
    missing, called, error = _elsewhere(CXX="no-such-compiler", XDG_CACHE_HOME=tmp_path)
    assert "compiler" in missing
    assert not called
    assert error < 1e-4


def test_a_set_of_instructions_that_is_asked_for_is_kept_to():
    attend = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    compiled = kpx.compile(attend.eval(), torch.randn(4, 96, 64), target="cpu:avx2")
    assert "kpx_onednn" not in compiled.stablehlo


def test_what_was_packed_before_for_other_columns_decides_nothing():
    """A block of columns of one product has the sizes of another's whole: how weights are packed is each one's own."""
    for sizes in ([64, 128, 128, 1], [64, 256, 128, 2], [64, 512, 128, 4]):
        assert onednn.packed_bytes(sizes, [], ["f32", "f32"]) is not None


# What is not a number ----------------------------------------------------------------------------


def _specials(shape, dtype):
    """Normal numbers with a NaN and both infinities, each in a row of its own."""
    x = torch.randn(shape, dtype=dtype)
    flat = x.reshape(-1, shape[-1])
    for row, number in enumerate((float("nan"), float("inf"), -float("inf"))):
        flat[row, row] = number
    return x


def _assert_same_specials(got, eager):
    assert torch.equal(got.isnan(), eager.isnan())
    assert torch.equal(got.isinf(), eager.isinf())
    assert torch.equal(got[got.isinf()], eager[eager.isinf()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", ["", "residual", "gated"])
@pytest.mark.parametrize("name", [*ACTIVATIONS, "relu6"])
def test_an_activation_in_a_product_keeps_nan_and_infinities(name, tail, dtype):
    torch.manual_seed(0)
    options = {tail: True} if tail else {}
    layer = _Layer(96, 200, ACTIVATIONS.get(name) or torch.nn.ReLU6(), **options).to(dtype).eval()
    x, y = _specials((4, 33, 96), dtype), torch.randn(4, 33, 200, dtype=dtype)
    with torch.no_grad():
        _assert_same_specials(kpx.optimize(layer)(x, y), layer(x, y))


@pytest.mark.parametrize("precision", [None, "bf16", "int8", "int8-weights"])
@pytest.mark.parametrize("activation", [torch.nn.ReLU(), torch.nn.ReLU6(), torch.nn.GELU()], ids=str)
def test_nan_of_inputs_and_of_weights_reaches_the_result(activation, precision):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 200), activation, torch.nn.Linear(200, 96)).eval()
    config = kpx.Config(precision=precision)
    x = torch.randn(64, 96)
    with torch.no_grad():
        x[3, 5] = float("nan")
        assert torch.equal(kpx.optimize(model, config=config)(x).isnan(), model(x).isnan())
        model[2].weight[7, 7] = x[3, 5] = float("nan")
        x[3, 5] = 0
        assert torch.equal(kpx.optimize(model, config=config)(x).isnan(), model(x).isnan())


@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("activation", [torch.nn.ReLU(), torch.nn.ReLU6(), torch.nn.SiLU()], ids=str)
def test_an_activation_in_a_convolution_keeps_nan_and_infinities(sizes, activation):
    n, channels, out, height, width, *further = sizes
    torch.manual_seed(0)
    kernel, stride, padding, dilation, groups = further
    conv = torch.nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups)
    model = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(out), activation).eval()
    x = torch.randn(n, channels, height, width)
    x[0, 0, 1, 1], x[-1, -1, 6, 3], x[0, 1, 5, 6] = float("nan"), float("inf"), -float("inf")
    with torch.no_grad():
        _assert_same_specials(kpx.optimize(model)(x), model(x))


@pytest.mark.parametrize("seed", range(4))
def test_what_follows_a_relu_is_in_its_call_and_matches_f64(seed):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(96, 200), torch.nn.BatchNorm1d(200)

        def forward(self, x, y):
            return torch.relu(self.norm(torch.relu(self.linear(x)))) * y + y

    torch.manual_seed(seed)
    block = Block()
    torch.nn.init.normal_(block.norm.running_mean)
    rows = (8, 64, 130, 700)[seed]
    text = _check(block, (torch.randn(rows, 96), torch.randn(rows, 200)), "kpx_onednn_matmul")
    assert "stablehlo.maximum" not in text
