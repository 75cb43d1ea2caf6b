"""kpx.tune: implementations are compared, then measured, and the file decides from then on."""

import dataclasses
import json
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx import tuning
from kpx.cli import main
from kpx.kernels import onednn, registry, selection
from kpx.learned import Ranking
from kpx.runtime.build import environment

SPEC = jax.ShapeDtypeStruct((8, 64), jnp.float32)


@pytest.fixture(scope="module")
def halve():
    """A fused op with a good implementation, a wrong one, one that raises, and one that its rules prefer."""

    @registry.kernel("kpx.test_halve", version=1)
    def halve(x, *, times):
        return x / 2**times

    halve.preference = ("preferred",)

    @halve.on("cpu", prefers=registry.where_measured)
    def good(x, *, times):
        return x * 0.5**times

    @halve.on("cpu", prefers=registry.where_measured)
    def wrong(x, *, times):
        return x * 0.5**times + 1e-3

    @halve.on("cpu", prefers=registry.where_measured)
    def raising(x, *, times):
        raise RuntimeError("no such unit")

    @halve.on("cpu", prefers=registry.where_measured)
    def mute(x, *, times):
        raise AssertionError

    @halve.on("cpu", supports=lambda x, times: None if x.shape[0] % 2 == 0 else "rows are odd")
    def preferred(x, *, times):
        return x * 0.5**times

    return halve


def _model(halve):
    return lambda x: jnp.sum(halve(jnp.sin(x), times=2) ** 2)


def test_what_is_wrong_or_raises_is_refused_with_the_reason(halve, tmp_path):
    found = kpx.tune(_model(halve), SPEC, cache=tmp_path / "kernels.json", seconds=0.05)
    (case,) = found.measured
    assert case.case == "kpx.test_halve v1 (float32[8, 64]; times=2)"
    assert set(case.seconds) == {"xla", "good", "preferred"}
    assert "from a reference" in case.refused["wrong"]
    assert case.refused["raising"] == "it raised RuntimeError: no such unit"
    assert case.refused["mute"] == "it raised AssertionError: nothing more"
    assert case.rules == "preferred"


def test_gradients_are_compared_too(halve, tmp_path):
    @halve.on("cpu", prefers=registry.where_measured)
    @jax.custom_jvp
    def wrong_gradient(x):
        return x * 0.25

    wrong_gradient.defjvp(lambda p, t: (wrong_gradient(*p), t[0] * 0.3))
    case = selection.Case("kpx.test_halve", 1, (SPEC,), (("times", 2),), True)
    halve.implementations[-1] = dataclasses.replace(
        halve.implementations[-1], name="sly", function=lambda x, times: wrong_gradient(x)
    )
    target = kpx.Target("cpu")
    found = tuning._measure(halve, case, target, kpx.Config(), 0.05, Ranking(), None)
    halve.implementations.pop()
    assert "from a reference" in found.refused["sly"]


@pytest.mark.parametrize("fastest", ["good", "xla", "preferred"])
def test_the_file_decides_from_then_on(halve, tmp_path, fastest):
    path = tmp_path / "kernels.json"
    case = selection.Case("kpx.test_halve", 1, (SPEC,), (("times", 2),), False)
    selection.write(path, environment(kpx.Target("cpu")), {case.text: {"fastest": fastest}}, "2026-11-25")
    for _ in range(2):
        compiled = kpx.compile(_model(halve), SPEC, config=kpx.Config(kernel_cache=str(path)))
        chosen = compiled.kernels["kpx.test_halve"].partition(";")[0]
        assert chosen == ("decomposition (XLA)" if fastest == "xla" else fastest)
    assert kpx.compile(_model(halve), SPEC).kernels["kpx.test_halve"] == "preferred"


def test_what_was_measured_and_no_longer_supports_the_case_leaves_the_choice_to_rules(halve, tmp_path):
    odd = jax.ShapeDtypeStruct((3, 64), jnp.float32)
    case = selection.Case("kpx.test_halve", 1, (odd,), (("times", 2),), False)
    path = tmp_path / "kernels.json"
    selection.write(path, environment(kpx.Target("cpu")), {case.text: {"fastest": "preferred"}}, "2026-11-25")
    compiled = kpx.compile(_model(halve), odd, config=kpx.Config(kernel_cache=str(path)))
    assert compiled.kernels["kpx.test_halve"] == "decomposition (XLA); preferred: rows are odd"


def _written(path, **changes):
    whole = {"format": 1, "environment": environment(kpx.Target("cpu")), "cases": {}} | changes
    path.write_text(json.dumps(whole))


SPOILED = {
    "of another version": lambda path: _written(path, format=99),
    "they are of jax 0.0.1": lambda path: _written(path, environment=environment(kpx.Target("cpu")) | {"jax": "0.0.1"}),
    "they are of device": lambda path: _written(path, environment=environment(kpx.Target("cpu")) | {"device": "Z80"}),
    "it cannot be read": lambda path: path.write_text('{"format": 1, "cases": {'),
    "it is not whole": lambda path: _written(path, cases={"a": {"fastest": 3}}),
}


@pytest.mark.parametrize("says", SPOILED)
def test_a_file_that_cannot_be_used_is_ignored_and_says_why(halve, tmp_path, says):
    path = tmp_path / "kernels.json"
    SPOILED[says](path)
    with pytest.warns(kpx.KernelCacheWarning, match=says):
        compiled = kpx.compile(_model(halve), SPEC, config=kpx.Config(kernel_cache=str(path)))
    assert compiled.kernels["kpx.test_halve"] == "preferred"


def test_measurements_of_another_environment_are_replaced_and_of_this_one_kept(tmp_path):
    path = tmp_path / "kernels.json"
    here, there = {"device": "a"}, {"device": "b"}
    selection.write(path, here, {"one": {"fastest": "x"}}, "2026-11-25")
    selection.write(path, here, {"two": {"fastest": "y"}}, "2026-11-25")
    assert set(selection.entries(path)["cases"]) == {"one", "two"}
    selection.write(path, there, {"three": {"fastest": "z"}}, "2026-11-25")
    assert set(selection.entries(path)["cases"]) == {"three"}


def test_a_file_is_whole_whoever_writes_it(tmp_path):
    path = tmp_path / "kernels.json"
    writers = [
        threading.Thread(target=selection.write, args=(path, {"device": "a"}, {str(i): {"fastest": "x" * 5000}}, ""))
        for i in range(8)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or isinstance(selection.entries(path), dict)
    assert isinstance(selection.entries(path), dict)


def test_a_file_that_is_not_there_or_cannot_be_written_is_an_error(halve, tmp_path):
    with pytest.raises(kpx.ConfigError, match=r"There are no measurements at .* makes them"):
        kpx.compile(_model(halve), SPEC, config=kpx.Config(kernel_cache=str(tmp_path / "none.json")))
    (tmp_path / "file").write_text("")
    with pytest.raises(kpx.ConfigError, match="cannot be written"):
        kpx.tune(_model(halve), SPEC, cache=tmp_path / "file" / "kernels.json", seconds=0.01)


def test_a_target_that_is_not_here_is_not_measured(halve, tmp_path):
    with pytest.raises(kpx.TargetError, match="nothing can be measured there"):
        kpx.tune(kpx.jit(_model(halve), target="tpu-v5e"), SPEC, cache=tmp_path / "kernels.json")


@pytest.mark.parametrize(
    ("taken", "rules", "fastest"),
    [
        ({"a": [2.0] * 5, "b": [1.0] * 5}, "a", "b"),
        ({"a": [1.0] * 5, "b": [0.99] * 5}, "a", "a"),  # within the least gain
        ({"a": [1.0, 2.0, 1.0, 2.0, 1.0], "b": [1.5, 1.9, 0.97, 0.95, 0.97]}, "a", "a"),  # within the noise
        ({"a": [1.0] * 5}, "gone", "a"),
        ({}, "a", "a"),
    ],
)
def test_only_what_wins_by_more_than_the_noise_replaces_rules_choice(taken, rules, fastest):
    assert tuning._fastest(taken, rules) == fastest


# By name ------------------------------------------------------------------------------------------


def test_an_implementation_is_used_by_name(halve):
    for name in ("good", "preferred"):
        config = kpx.Config(kernels={"kpx.test_halve": name})
        assert kpx.compile(_model(halve), SPEC, config=config).kernels == {"kpx.test_halve": name}
    plain = kpx.compile(_model(halve), SPEC, config=kpx.Config(kernels={"kpx.test_halve": "xla"}))
    assert plain.kernels == {"kpx.test_halve": "decomposition (XLA)"}


def test_one_that_does_not_support_the_case_is_refused_with_its_reason(halve):
    odd = jax.ShapeDtypeStruct((3, 64), jnp.float32)
    with pytest.raises(kpx.KernelError, match=r"`preferred`, asked for by name, .*: rows are odd\. .* `good`"):
        kpx.compile(_model(halve), odd, config=kpx.Config(kernels={"kpx.test_halve": "preferred"}))


def test_one_that_is_not_known_is_refused_with_those_that_are(halve):
    with pytest.raises(
        kpx.KernelError, match=r"`fast` is no implementation of `kpx.test_halve` for cpu.*`good`.*`xla`"
    ):
        kpx.compile(_model(halve), SPEC, config=kpx.Config(kernels={"kpx.test_halve": "fast"}))


def test_a_variable_names_implementations(halve, monkeypatch):
    monkeypatch.setenv("KPX_KERNELS", "kpx.test_halve=good")
    assert kpx.compile(_model(halve), SPEC).kernels == {"kpx.test_halve": "good"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kpx.nothing": "xla"}, "no fused op. There are kpx.attention"),
        ({"kpx.attention": 3}, "Use a dict"),
        ("x", "Use a dict"),
    ],
)
def test_what_names_no_fused_op_is_refused(given, says):
    with pytest.raises(kpx.ConfigError, match=says):
        kpx.Config(kernels=given)


# Attention: the real choice on the CPU ------------------------------------------------------------


def attend(q, k, v):
    return kpx.ops.attention(q, k, v, causal=True)


def test_attention_is_chosen_by_name_and_explained():
    spec = jax.ShapeDtypeStruct((1, 2, 256, 16), jnp.float32)
    chosen = kpx.compile(attend, spec, spec, spec).kernels["kpx.attention"]
    assert chosen == "onednn" if onednn.available() else "(XLA)" in chosen
    config = kpx.Config(kernels={"kpx.attention": "in_chunks"})
    assert kpx.compile(attend, spec, spec, spec, config=config).kernels["kpx.attention"] == "in_chunks"
    said = kpx.explain(attend, spec, spec, spec, targets=["cuda:h100"]).to_dict()
    assert "flash_cuda; cudnn: it takes bf16 or f16 alone" in str(said)


def test_measurements_that_were_shipped_choose_for_a_machine_that_is_not_here(tmp_path):
    spec = jax.ShapeDtypeStruct((1, 4, 4096, 128), jnp.bfloat16)
    structs, attributes = (spec,) * 3, (("causal", True), ("scale", 128**-0.5))
    case = selection.Case("kpx.attention", registry.find("kpx.attention").version, structs, attributes, False)
    path = tmp_path / "kernels.json"
    selection.write(path, environment(kpx.Target("cuda:h200")), {case.text: {"fastest": "flash_cuda"}}, "2026-11-25")
    for target, chosen in (
        ("cuda:h200", "flash_cuda; cudnn: `flash_cuda` was measured as faster"),
        ("cuda:h100", "cudnn"),
    ):
        config = kpx.Config(kernel_cache=str(path))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            compiled = kpx.compile(attend, spec, spec, spec, target=target, config=config)
        assert compiled.kernels["kpx.attention"] == chosen
        assert any(issubclass(w.category, kpx.KernelCacheWarning) for w in warned) == (target == "cuda:h100")


def test_a_gradients_kernels_are_told_and_refused_with_the_reason():
    def step(q, k, v):
        return jax.grad(lambda *a: jnp.sum(attend(*a) ** 2), (0, 1, 2))(q, k, v)

    label = "kpx.attention and its gradient"
    short, long = (jax.ShapeDtypeStruct((1, 2, n, 16), jnp.float32) for n in (256, 2048))
    named = kpx.Config(kernels={"kpx.attention": "in_chunks"})
    assert kpx.compile(step, short, short, short, config=named).kernels[label] == "in_chunks"
    assert kpx.compile(step, long, long, long).kernels[label].partition(";")[0] == "in_chunks"


def test_the_command_measures_and_keeps(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    inputs = ["--input", "f32[1,2,64,16]"] * 3
    assert main(["tune", "tests.test_tuning:attend", *inputs, "--cache", str(path), "--seconds", "0.05", "--json"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["measured"]
    assert {"xla", "in_chunks"} <= set(case["seconds"])
    assert selection.entries(path)["cases"][case["case"]]["fastest"] == case["fastest"]


def test_a_sampled_mask_is_what_is_known_of_it():
    structs = [jax.ShapeDtypeStruct((1, 1, 6, 4), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((6, 6), jnp.bool_)]
    kernel = registry.find("kpx.attention")
    *_, mask = kernel.sample(np.random.default_rng(0), structs, {"visible": "causal window 2"})
    assert np.array_equal(mask, np.tri(6, dtype=bool) & ~np.tri(6, k=-2, dtype=bool))
