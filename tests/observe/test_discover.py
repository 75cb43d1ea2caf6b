"""`kpx discover`: regions between products that pass over memory more than once, and patterns written of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.cli import main
from kpx.observe.discover import discover
from tests.optional import torch

ROWS, COLUMNS = 64, 256
X, W = jax.ShapeDtypeStruct((ROWS, 128), jnp.float32), jax.ShapeDtypeStruct((128, COLUMNS), jnp.float32)


def softmax_between(x, w):
    return jax.nn.softmax(x @ w, -1) @ w.T


def softmax_in_a_loop():
    def function(x, w):
        return jax.lax.scan(lambda h, _: (softmax_between(h, w), None), x, None, length=12)[0]

    return function, X, W


def test_a_softmax_is_found_with_the_bytes_that_two_passes_move():
    (found,) = discover(softmax_between, X, W)
    assert (found.count, found.runs, found.passes) == (1, 1, 3)
    assert found.operations == "2 reduce, subtract, exponential, divide"
    # Read three times, with the maxima twice and the sums once; in one pass, once.
    assert found.saved == 4 * (2 * ROWS * COLUMNS + 3 * ROWS)


def test_what_runs_in_a_loop_counts_as_often():
    (found,) = discover(*softmax_in_a_loop())
    (once,) = discover(softmax_between, X, W)
    assert (found.count, found.runs, found.saved) == (1, 12, 12 * once.saved)


def test_layers_that_are_alike_are_one_finding_and_the_largest_comes_first():
    def three(x, w):
        for _ in range(2):
            x = softmax_between(x, w)
        y = x @ w
        return (y - jnp.mean(y, 0)) @ w.T

    found = discover(three, X, W)
    assert [f.count for f in found] == [2, 1]
    assert found[0].saved > found[1].saved


def test_it_is_found_in_a_pytorch_model():
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Softmax(-1), torch.nn.Linear(32, 16))
    (found,) = discover(model.eval(), torch.zeros(8, 16), target="cpu")
    assert found.passes == 3


NOTHING = {
    "what XLA fuses": lambda x, w: jnp.tanh(jnp.sin(x @ w) + 1) @ w.T,
    "sums that are not used along what they sum": lambda x, w: jnp.sum(x @ w, -1),
    "what a kernel takes": lambda x, w: kpx.ops.attention(x, x, x),
}


@pytest.mark.parametrize("what", NOTHING)
def test_is_not_listed(what):
    assert discover(NOTHING[what], X, W) == []


# Regions of many ops, whose source must compute what they do.
WRITTEN = {
    "softmax": lambda y: jax.nn.softmax(y, -1),
    "log softmax": lambda y: jax.nn.log_softmax(y, 0),
    "a norm": lambda y: (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5),
    "a masked softmax": lambda y: jax.nn.softmax(jnp.where(np.tri(*y.shape, dtype=bool), y, -jnp.inf), -1),
    "extremes": lambda y: (y - y.min(0)) / (y.max(0) - y.min(0)) ** 2,
    "a product": lambda y: y / (jnp.prod(jnp.abs(y) + 0.5, -1, keepdims=True) + 1),
    "a test of all": lambda y: jnp.where(jnp.all(y > -2, -1, keepdims=True) | ~jnp.isfinite(y), y, -y),
    "rounded in bf16": lambda y: (
        y.astype(jnp.bfloat16).astype(jnp.float32) - jnp.sum(y.astype(jnp.bfloat16), -1, keepdims=True)
    ),
    "transposed": lambda y: (y.T / jnp.sum(jnp.exp(y), -1)).T.reshape(-1, y.shape[-1]),
    "functions": lambda y: jnp.tanh(jnp.log1p(y * y)) - jnp.mean(jnp.expm1(-jnp.sqrt(jnp.abs(y))), -1, keepdims=True),
    "two results": lambda y: jnp.concatenate([y - y.max(-1, keepdims=True), jnp.cos(y) * y.max(-1, keepdims=True)], 0),
}


IN_SHORT = ("softmax", "a norm", "a masked softmax", "two results")


@pytest.mark.parametrize(
    "written", [pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.slow) for name in WRITTEN]
)
def test_a_written_pattern_is_found_at_other_shapes_and_changes_nothing(written):
    def function(x, w):
        return WRITTEN[written](x @ w) @ w.T

    found = discover(function, X, W, target="cpu")
    assert len(found) == 1
    assert found[0].source is not None
    try:
        exec(compile(found[0].source, "written", "exec"), {})
        for rows in (ROWS, 24):
            rng = np.random.default_rng(rows)
            x, w = (rng.standard_normal(s).astype(np.float32) / 8 for s in ((rows, 40), (40, 96)))
            compiled = kpx.compile(function, x, w)
            assert compiled.fusions == {"kpx.region_1": 1}
            assert compiled.reverted == {}
            np.testing.assert_allclose(compiled(x, w), jax.jit(function)(x, w), rtol=2e-5, atol=2e-5)
    finally:
        kpx.fusion.unregister("region_1")


def test_the_command_prints_writes_and_gives_json(tmp_path, capsys):
    path = tmp_path / "pattern.py"
    name = "tests.observe.test_discover:softmax_between"
    inputs = ["--input", f"f32[{ROWS},128]", "--input", f"f32[128,{COLUMNS}]"]
    assert main(["discover", name, *inputs, "--write", str(path)]) == 0
    assert "2 reduce" in capsys.readouterr().out
    assert "def search(x0):" in path.read_text()
    assert main(["discover", name, *inputs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["passes"] == 3


def nothing(x):
    return x + 1


def test_the_command_says_that_there_is_nothing(tmp_path, capsys):
    arguments = ["discover", "tests.observe.test_discover:nothing", "--input", "f32[4]"]
    assert main(arguments) == 0
    assert "Nothing passes over memory more than once" in capsys.readouterr().out
    assert main([*arguments, "--write", str(tmp_path / "none.py")]) == 1
    assert "has no region that a pattern could be written of" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none.py").exists()
