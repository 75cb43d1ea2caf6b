"""Layers that are alike: found, run as a loop over their stacked weights where that costs nothing, the same to the last bit."""

import numpy as np
import pytest

import kpx
from kpx.hardware import cpu
from kpx.ir import cost
from kpx.ir import module as m
from kpx.kernels import onednn
from kpx.passes import layers
from kpx.passes.layers import Run, runs
from tests.optional import torch
from tests.reference import assert_closer

needs_onednn = pytest.mark.skipif(not onednn.available(), reason=f"oneDNN cannot be called: {onednn.missing()}")
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not cpu.has_wide_vectors(), reason="not run: oneDNN has no bf16 on this CPU"),
)
X = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


class Block(torch.nn.Module):
    """A layer of a transformer without attention: a norm, an MLP, a residual."""

    def __init__(self, width=128, scale=1.0):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down, self.scale = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width), scale

    def forward(self, x):
        return x + self.scale * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(torch.nn.Module):
    """Blocks behind each other, and what the last one gives, or what all do."""

    def __init__(self, blocks, every=False):
        super().__init__()
        self.blocks, self.head, self.every = torch.nn.ModuleList(blocks), torch.nn.Linear(128, 8), every

    def forward(self, x, bias=None):
        found = []
        for block in self.blocks:
            x = block(x) if bias is None else block(x + torch.tanh(bias))
            found.append(x)
        return found if self.every else self.head(x)


def _model(count, **kwargs):
    torch.manual_seed(0)
    model = Model([Block() for _ in range(count)], **kwargs).eval()
    for parameter in model.parameters():  # norms too are each layer's own
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def _run(model, *inputs, **config):
    optimized = kpx.optimize(model, config=kpx.Config(**config))
    with torch.no_grad():
        got = optimized(*inputs)
    return got, optimized.compile_for(list(inputs), {})


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("count", [4, 5, 9])
def test_a_loop_of_layers_gives_what_the_layers_give(count, dtype):
    model, x = _model(count).to(dtype), X.to(dtype)
    unrolled, before = _run(model, x, layers="unrolled")
    looped, after = _run(model, x, layers="loop")
    assert before.layers == {}
    assert list(after.layers.values()) == ["a loop"]
    assert "stablehlo.while" in after.stablehlo
    assert "stablehlo.while" not in before.stablehlo
    torch.testing.assert_close(looped, unrolled, rtol=0, atol=0)
    with torch.no_grad():
        eager, wanted = model(x), model.double()(x.double())
    assert_closer(looped.double(), eager.double(), wanted, relative=2e-6 if dtype == torch.float32 else 0.0)


@needs_onednn
def test_sixteen_layers_are_a_loop_and_fifteen_are_not():
    assert list(_run(_model(16), X)[1].layers.values()) == ["a loop"]
    assert _run(_model(15), X)[1].layers == {}


@needs_onednn
def test_the_module_and_the_executable_do_not_grow_with_the_layers():
    sizes = {}
    for count in (18, 48):
        _, compiled = _run(_model(count), X)
        sizes[count] = len(compiled.stablehlo.splitlines()), len(compiled.hlo.splitlines())
    assert sizes[48] == sizes[18]


@needs_onednn
def test_operations_and_bytes_are_counted_for_every_layer():
    flops = {}
    for how in ("unrolled", "loop"):
        _, compiled = _run(_model(8), X, layers=how)
        flops[how] = cost.cost(compiled._module)
    assert flops["loop"].flops == pytest.approx(flops["unrolled"].flops, rel=0.01)
    assert flops["loop"].bytes < 1.5 * flops["unrolled"].bytes


@needs_onednn
def test_what_all_layers_read_is_not_stacked():
    model, bias = _model(6), torch.randn(128)
    looped, compiled = _run(model, X, bias, layers="loop")
    assert list(compiled.layers.values()) == ["a loop"]
    torch.testing.assert_close(looped, _run(model, X, bias, layers="unrolled")[0], rtol=0, atol=0)


@needs_onednn
def test_a_layer_that_differs_from_its_neighbours_stays_out_of_the_loop():
    model = _model(9)
    model.blocks[4] = Block(scale=0.5)
    looped, compiled = _run(model, X, layers="loop")
    assert len(compiled.layers) == 1
    assert "a loop" in compiled.layers.values()
    assert compiled.stablehlo.count("stablehlo.while") == 2
    torch.testing.assert_close(looped, _run(model, X, layers="unrolled")[0], rtol=0, atol=0)


@needs_onednn
def test_layers_whose_results_are_all_read_stay_as_they_are():
    model = _model(6, every=True)
    found, compiled = _run(model, X, layers="loop")
    assert compiled.layers == {}
    with torch.no_grad():
        torch.testing.assert_close(found, model(X), rtol=1e-4, atol=1e-4)


@needs_onednn
def test_weights_that_xla_would_copy_leave_the_layers_unrolled_unless_a_loop_is_asked_for():
    model, x = _model(17), X[:2]  # so few rows are XLA's own product
    unrolled, compiled = _run(model, x)
    (told,) = compiled.layers.values()
    assert told == "unrolled: XLA would copy 0.3 MB of weights in each"
    assert "blocks/16/" in compiled.hlo
    assert "blocks/0/" in compiled.hlo
    looped, compiled = _run(model, x, layers="loop")
    assert list(compiled.layers.values()) == ["a loop"]
    assert "blocks/0..16/" in compiled.hlo
    torch.testing.assert_close(looped, unrolled, rtol=1e-5, atol=1e-5)


def test_a_loop_that_is_asked_for_is_compiled_for_a_target_that_is_not_here():
    try:
        compiled = kpx.compile(_model(5), X, target="tpu-v5e:1x1", config=kpx.Config(layers="loop"))
    except kpx.errors.TargetError as error:
        pytest.skip(f"not run: {error}")
    assert "while" in compiled.hlo
    assert list(compiled.layers.values()) == ["a loop"]


def test_a_loop_needs_neither_onednn_nor_more_than_weights(monkeypatch):
    monkeypatch.setattr(onednn, "missing", lambda: "it is switched off here")
    model = _model(4)
    looped, compiled = _run(model, X, layers="loop")
    assert "kpx_onednn" not in compiled.stablehlo
    assert list(compiled.layers.values()) == ["a loop"]
    torch.testing.assert_close(looped, _run(model, X, layers="unrolled")[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [{"prepare": False}, {"level": "none"}, {"layers": "unrolled"}], ids=str)
def test_layers_stay_where_they_are(config):
    _, compiled = _run(_model(16), X, **config)
    assert compiled.layers == {}
    assert "stablehlo.while" not in compiled.stablehlo


def test_an_unknown_word_for_layers_is_refused():
    with pytest.raises(kpx.errors.ConfigError, match="layers='rolled'"):
        kpx.Config(layers="rolled")


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("ab" + "cdefghij" * 4 + "kl", [Run(2, 8, 4)]),
        ("ab" + "cdefghij" * 4 + "cde", [Run(2, 8, 4, 3)]),
        ("cdefghij" * 3, []),
        ("abc" * 9, []),
        ("cdefghij" * 5 + "x" + "stuvwxyz" * 4, [Run(0, 8, 5), Run(41, 8, 4)]),
        ("", []),
    ],
)
def test_runs_are_the_longest_stretches_that_follow_each_other(labels, found):
    assert list(runs(labels)) == found


@pytest.mark.parametrize("seed", range(20))
def test_planted_runs_are_found_whatever_surrounds_them(seed):
    random = np.random.default_rng(seed)
    period, count = int(random.integers(8, 60)), int(random.integers(layers.LEAST, 20))
    layer = [*random.integers(0, 12, period).tolist(), 100]  # a mark, so that no shorter period is in it
    before, after = random.integers(200, 400, 30).tolist(), random.integers(400, 600, 30).tolist()
    (run,) = runs([*before, *(layer * count), *after])
    assert (run.start, run.period, run.count) == (30, period + 1, count)


@needs_onednn
@pytest.mark.parametrize("seed", range(6))
def test_layers_taken_out_and_unrolled_again_compute_the_same(seed, monkeypatch):
    """Random layers, with the copying of anything forbidden, so that every run is put back."""
    from kpx.passes import rolled

    monkeypatch.setattr(rolled, "_against", lambda *a: "the test wants it")
    torch.manual_seed(seed)
    model = _model(4 + seed % 3)
    for block in model.blocks:
        block.norm = torch.nn.Identity() if seed % 2 else block.norm
    got, compiled = _run(model, X, layers="loop")
    assert list(compiled.layers.values()) == ["unrolled: the test wants it"]
    torch.testing.assert_close(got, _run(model, X, layers="unrolled")[0], rtol=1e-6, atol=1e-6)
    assert m.parse(compiled.stablehlo) is not None


def test_layers_with_complex_constants_are_labelled_and_compiled():
    class Rotating(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8))

        def forward(self, x):
            z = torch.fft.fft(x * self.weight)
            for _ in range(6):
                z = z * 1j + z.conj()
            return z.real

    model, x = Rotating(), X[:4, :8]
    with torch.no_grad():
        torch.testing.assert_close(kpx.optimize(model)(x), model(x), rtol=1e-4, atol=1e-4)
