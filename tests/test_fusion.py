"""Patterns of one's own: where they are found, what they leave alone, and what becomes of wrong ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels import patterns
from kpx.kernels import registry as kernels
from kpx.passes import fusion, skeletons
from tests.optional import torch

X, W = jax.ShapeDtypeStruct((4, 6, 32), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.float32)


def _norm(x, w, *, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * w


def _better(x, w, *, eps):
    """The same by way of a norm, so that it can be told apart in a module."""
    root = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(x)), -1, keepdims=True) / x.shape[-1] + eps)
    return x / root * w


@pytest.fixture
def register():
    made = []

    def register(*args, **kwargs):
        made.append(kpx.fusion.pattern(*args, **{"example": (X, W), "numbers": {"eps": 1e-6}} | kwargs))
        return made[-1]

    yield register
    for pattern in made:
        kpx.fusion.unregister(pattern.name)


NORM = []


@pytest.fixture
def norm():
    """A pattern that is checked once for all tests."""
    if NORM:
        patterns.register(NORM[0])
    else:
        NORM.append(kpx.fusion.pattern(_norm, _better, example=(X, W), numbers={"eps": 1e-6}, name="test_norm"))
    yield NORM[0]
    kpx.fusion.unregister("test_norm")


def _arguments(shape=(2, 8, 64), dtype=np.float32):
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape[-1:]).astype(dtype)


def _found(function, *arguments) -> dict[str, int]:
    compiled = kpx.compile(function, *arguments)
    got, wanted = compiled(*arguments), function(*arguments)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    return compiled.fusions


SPELLINGS = {
    "as it is": lambda x, w: _norm(x, w, eps=1e-5),
    "factors swapped": lambda x, w: w * (jax.lax.rsqrt(1e-5 + jnp.mean(x * x, -1, keepdims=True)) * x),
    "weight broadcast by hand": lambda x, w: _norm(x, jnp.broadcast_to(w, x.shape)[0, 0], eps=1e-5),
    "square as a power": lambda x, w: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * w,
    "mean as a sum": lambda x, w: x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) / x.shape[-1] + 1e-5) * w,
    "in a loop": lambda x, w: jax.lax.scan(lambda h, _: (_norm(h, w, eps=1e-5), None), x, None, length=3)[0],
    "in another jit": lambda x, w: jax.jit(lambda x: _norm(x, w, eps=1e-5))(x),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("shape", [(2, 8, 64), (3, 5, 96), (7, 48)])
def test_a_pattern_is_found_as(spelling, shape, norm):
    assert _found(SPELLINGS[spelling], *_arguments(shape)) == {"kpx.test_norm": 1}


def test_a_pattern_is_found_in_a_pytorch_model(norm):
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(32))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight

    model, x = torch.nn.Sequential(Norm(), torch.nn.Linear(32, 32), Norm()).eval(), torch.randn(2, 8, 32)
    compiled = kpx.compile(model, x)
    assert compiled.fusions == {"kpx.test_norm": 2}
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_constant_of_the_module_reaches_the_replacement(register):
    seen = []

    def replace(x, w, *, eps):
        seen.append(eps)
        return _better(x, w, eps=eps)

    register(_norm, replace, name="test_norm")
    _found(lambda x, w: _norm(x, w, eps=0.125), *_arguments())
    assert 0.125 in seen


LEFT_ALONE = {
    "something else": lambda x, w: x * jax.lax.rsqrt(jnp.max(x * x, -1, keepdims=True) + 1e-5) * w,
    "another axis": lambda x, w: x * jax.lax.rsqrt(jnp.mean(x * x, 0, keepdims=True) + 1e-5) * w,
    "two arrays": lambda x, w: x * jax.lax.rsqrt(jnp.mean(x * (x + 1), -1, keepdims=True) + 1e-5) * w,
    "another count": lambda x, w: x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) / 7 + 1e-5) * w,
    "an inner value that is used": lambda x, w: (
        _norm(x, w, eps=1e-5),
        jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5),
    ),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_is_left_alone(what, norm):
    assert _found(LEFT_ALONE[what], *_arguments()) == {}


def test_a_case_that_a_pattern_does_not_support_is_left_alone(register):
    register(_norm, _better, name="test_norm", supports=lambda x, w, *, eps: "too wide" if x.shape[-1] > 64 else None)
    function = lambda x, w: _norm(x, w, eps=1e-5)  # noqa: E731
    assert _found(function, *_arguments((4, 64))) == {"kpx.test_norm": 1}
    assert _found(lambda x, w: _norm(x, w, eps=1e-5), *_arguments((4, 128))) == {}


def test_of_two_that_overlap_the_one_that_saves_more_is_taken(norm, register):
    whole = lambda x, w, *, eps: jnp.tanh(_norm(x + w, w, eps=eps))  # noqa: E731
    register(whole, lambda x, w, *, eps: jnp.tanh(_better(x + w, w, eps=eps)), name="test_whole")
    assert _found(lambda x, w: jnp.tanh(_norm(x + w, w, eps=1e-5)), *_arguments()) == {"kpx.test_whole": 1}


def test_a_pattern_is_found_in_a_differentiated_module(norm):
    last = jax.grad(lambda w, x: jnp.sum(jnp.tanh(w) * jax.lax.stop_gradient(_norm(x, x[0, 0], eps=1e-5))))
    x, w = _arguments()
    assert _found(lambda w, x: last(w, x), w, x) == {"kpx.test_norm": 1}


@pytest.mark.parametrize("options", [{"disable": ("test_norm",)}, {"level": "conservative"}, {"level": "none"}])
def test_a_pattern_is_off_where_the_config_says_so(options, norm):
    compiled = kpx.compile(lambda x, w: _norm(x, w, eps=1e-5), *_arguments(), config=kpx.Config(**options))
    assert compiled.fusions == {}


def test_fuel_runs_out_between_fusions(norm, monkeypatch):
    monkeypatch.setenv("KPX_FUEL", "0")
    assert _found(lambda x, w: _norm(x, w, eps=1e-5), *_arguments()) == {}


def test_a_wrong_replacement_is_left_out_with_a_warning_and_the_result_is_right(register):
    register(_norm, lambda x, w, *, eps: _better(x, w, eps=eps + 0.1), name="test_norm")
    x, w = _arguments()
    with pytest.warns(kpx.RewriteWarning, match="`test_norm` was reverted.*not what it replaces"):
        compiled = kpx.compile(lambda x, w: _norm(x, w, eps=1e-5), x, w)
    assert compiled.fusions == {}
    assert "test_norm" in compiled.reverted
    np.testing.assert_allclose(compiled(x, w), _norm(x, w, eps=1e-5), rtol=1e-4, atol=1e-5)


def test_a_right_values_wrong_gradients_fail_the_check(register):
    @jax.custom_jvp
    def root(x):
        return jax.lax.rsqrt(x)

    root.defjvp(lambda primals, tangents: (root(*primals), tangents[0]))

    def replace(x, w, *, eps):
        return x * root(jnp.mean(x * x, -1, keepdims=True) + eps) * w

    verdict = kpx.fusion.check(register(_norm, replace, name="test_norm"))
    assert not verdict
    assert all(failure.startswith("gradients") for failure in verdict.failures)


def test_a_replacement_of_other_types_is_refused():
    with pytest.raises(kpx.InputError, match=r"gives float32\[4, 6, 32\], and its replacement bfloat16\[4, 6, 32\]"):
        kpx.fusion.pattern(
            _norm, lambda x, w, *, eps: x.astype(jnp.bfloat16), example=(X, W), numbers={"eps": 1e-6}, name="test_norm"
        )


def test_a_name_that_is_taken_is_refused(register):
    register(_norm, _better, name="test_norm")
    with pytest.raises(kpx.InputError, match="`test_norm` is registered already"):
        register(_norm, _better, name="test_norm")


def test_a_pattern_that_cannot_be_traced_is_refused():
    with pytest.raises(kpx.InputError, match=r"`_norm`, of the pattern `_norm`, cannot be traced at its example"):
        kpx.fusion.pattern(_norm, _better, example=(X, jax.ShapeDtypeStruct((5,), jnp.float32)), numbers={"eps": 1e-6})


def test_a_package_registers_its_patterns_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "someones.py").write_text(
        "import jax, jax.numpy as jnp, kpx\n"
        "def register():\n"
        "    s = jax.ShapeDtypeStruct((4, 8), jnp.float32)\n"
        "    kpx.fusion.pattern(lambda x: jnp.tanh(jnp.exp(x)), lambda x: jnp.tanh(jnp.exp(x)), example=(s,), name='theirs')\n"
    )
    folder = tmp_path / "someones-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: someones\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[kpx.patterns]\nsomeones = someones:register\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    patterns._load_packages.cache_clear()
    try:
        assert "theirs" in {p.name for p in kpx.fusion.patterns()}
    finally:
        kpx.fusion.unregister("theirs")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [p for p in patterns.patterns() if p.checked], ids=lambda p: p.name)
def test_kpxs_own_pattern_is_what_replaces_it(pattern):
    verdict = kpx.fusion.check(pattern, cases=0, spellings=1)
    assert verdict, verdict.failures
    assert verdict.cases >= 2


def test_kpxs_own_patterns_give_what_their_replacements_give():
    for pattern in patterns.patterns():
        patterns.check_types(pattern)


def test_every_kernel_of_a_pattern_is_registered():
    for pattern in patterns.patterns():
        jaxpr = jax.make_jaxpr(lambda *a, p=pattern: p.replace(*a, **p.numbers))(*pattern.example)
        for kernel, _, _ in kernels.calls(jaxpr.jaxpr):
            assert kernels.find(kernel.name) is kernel


def test_skeletons_that_were_traced_beforehand_are_those_of_these_sources():
    assert skeletons.are_of_these_sources(), "run `make skeletons`"


def test_a_skeleton_traced_beforehand_is_the_one_traced_now():
    for name in (
        "attention.causal.multiplied.heads_first",
        "layer_norm.wb.3",
        "linear_cross_entropy.logsumexp.0.tokens",
    ):
        (pattern,) = (p for p in patterns.patterns() if p.name == name)
        for each in (pattern, *patterns.with_gradient(pattern)):
            for group in (0, len(each.searches) - 1):
                known = skeletons.known(each, group, on_cpu=False)
                assert known is not None
                assert known.bones() == fusion.traced_skeleton(each, group, on_cpu=False).bones()
        assert skeletons.kernels(pattern) == fusion.kernels_of(pattern)


@pytest.mark.slow
@pytest.mark.parametrize("on_cpu", [False, True])
def test_patterns_that_are_called_alike_have_one_skeleton(on_cpu):
    alike: dict[str, set[tuple[str, ...]]] = {}
    every = [p for pattern in patterns.patterns() for p in (pattern, *patterns.with_gradient(pattern))]
    for pattern in every:
        if pattern.alike:
            graphs = [fusion.traced_skeleton(pattern, group, on_cpu) for group in range(len(pattern.searches))]
            alike.setdefault(pattern.alike, set()).add(tuple(graph.bones() for graph in graphs))
    assert len([name for name in alike if not name.endswith("gradient")]) == 50
    assert [name for name, bones in alike.items() if len(bones) > 1] == []
