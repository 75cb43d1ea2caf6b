"""The learned start: what was measured before orders what is tried, and without it rules do."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx import learned, tuning
from kpx.kernels import registry, selection

HERE = {"device": "a CPU", "cores": "2"}


def _text(length, batch=1, dtype="float32", causal=1):
    array = f"{dtype}[{batch}, 8, {length}, 64]"
    return f"kpx.attention v3 ({array}, {array}, {array}; causal={causal}, scale=0.125)"


def _seconds(length):
    """Of two implementations: one is faster on long sequences, one on short ones."""
    return {"xla": 1.0, "long": (256 / length) ** 0.7, "short": (length / 256) ** 0.7 / 4 + 0.2}


def _ranking(lengths, environment=HERE):
    found = learned.Ranking()
    for n in lengths:
        found.add(_text(n), environment, _seconds(n))
    return found


@pytest.mark.parametrize(("length", "first"), [(96, "short"), (3000, "long")])
def test_what_was_faster_on_such_a_case_comes_first(length, first):
    order, known = _ranking([64, 128, 512, 1024, 2048, 4096]).order(_text(length), HERE, ["long", "short", "xla"])
    assert known
    assert order[0] == first


def test_predictions_are_near_what_was_measured_within_what_was_seen():
    ranking = _ranking([64, 128, 256, 512, 1024, 2048, 4096])
    for length in (90, 700, 3000):
        found = ranking.predicted(_text(length), HERE, ["long", "xla"])
        assert abs(math.log(found["long"] / _seconds(length)["long"])) < 0.5


def test_far_beyond_what_was_seen_nothing_absurd_is_predicted():
    found = _ranking([64, 128, 256, 512]).predicted(_text(1 << 30), HERE, ["long"])
    assert 1e-3 < found["long"] < 1e3


def test_without_history_or_with_little_the_order_is_the_given_one():
    for ranking in (learned.Ranking(), _ranking([64, 128])):
        assert ranking.order(_text(96), HERE, ["long", "short", "xla"]) == (["long", "short", "xla"], False)


def test_an_implementation_of_which_nothing_is_known_comes_after_those_that_are():
    order, _ = _ranking([64, 128, 512, 1024]).order(_text(96), HERE, ["new", "long", "short", "xla"])
    assert order[-1] == "new"


def test_another_kernels_cases_say_nothing():
    other = _text(96).replace("kpx.attention", "kpx.linear")
    assert not _ranking([64, 128, 512, 1024]).order(other, HERE, ["long", "xla"])[1]


def test_features_tell_sizes_dtypes_attributes_and_machines_apart():
    plain = learned.features(_text(128), HERE)
    changes = (
        _text(256),
        _text(128, batch=4),
        _text(128, dtype="bfloat16"),
        _text(128, causal=0),
        _text(128) + " with gradient",
    )
    for other in changes:
        assert not np.array_equal(plain, learned.features(other, HERE))
    assert not np.array_equal(plain, learned.features(_text(128), {**HERE, "cores": "64"}))
    assert not np.array_equal(plain, learned.features(_text(128), {"device": kpx.Target("cuda:h100").device_kind}))
    assert learned.features("no case", HERE) is None


@pytest.mark.parametrize("seed", range(5))
def test_random_cases_of_real_kernels_have_features_of_one_length(seed):
    rng = np.random.default_rng(seed)
    lengths = set()
    for kernel in registry.kernels():
        structs = tuple(
            jax.ShapeDtypeStruct(tuple(int(n) for n in rng.integers(1, 99, rng.integers(0, 6))), jnp.float32)
            for _ in range(rng.integers(0, 5))
        )
        text = selection.Case(kernel.name, kernel.version, structs, (("causal", True), ("given", "a b")), True).text
        lengths.add(len(learned.features(text, HERE)))
    assert len(lengths) == 1


def attend(q, k, v):
    return kpx.ops.attention(q, k, v, causal=True)


def test_tuning_tries_what_history_says_first_and_no_more_than_asked(tmp_path):
    spec = jax.ShapeDtypeStruct((1, 2, 64, 16), jnp.float32)
    whole = kpx.tune(attend, spec, spec, spec, cache=tmp_path / "whole.json", seconds=0.05)
    (case,) = whole.measured
    assert not case.learned
    names = [n for n in case.seconds if n != "xla"]
    wanted = names[-1]
    kept = {}
    for n in (16, 32, 128, 256):  # as if it had been by far the fastest
        text = case.case.replace("64", str(n))
        kept[text] = {
            "fastest": wanted,
            "rules": "xla",
            "seconds": {"xla": 1.0, **dict.fromkeys(names, 2.0), wanted: 0.01},
        }
    selection.write(tmp_path / "history.json", {"device": "another"}, kept, "2026-11-26")
    few = kpx.tune(
        attend,
        spec,
        spec,
        spec,
        cache=tmp_path / "few.json",
        seconds=0.05,
        tries=1,
        history=[tmp_path / "history.json"],
    )
    (tried,) = few.measured
    assert tried.learned
    assert tried.order[0] == wanted
    assert set(tried.seconds) <= {wanted, "xla"}
    assert all("expected to be faster" in tried.refused[n] for n in names if n != wanted)


def test_without_history_one_try_is_rules_choice(tmp_path):
    spec = jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.float32)
    (case,) = kpx.tune(attend, spec, spec, spec, cache=tmp_path / "a.json", seconds=0.05, tries=1).measured
    assert not case.learned
    if case.rules != "xla":
        assert case.order[0] == case.rules
    assert len(case.seconds) <= 2


@pytest.mark.parametrize("tries", [0, -1, True, 1.5, "2"])
def test_tries_that_are_no_number_are_refused(tries, tmp_path):
    with pytest.raises(kpx.ConfigError, match="tries"):
        kpx.tune(attend, cache=tmp_path / "a.json", tries=tries)


def test_a_file_that_cannot_be_read_says_nothing(tmp_path):
    (tmp_path / "text").write_text("no measurements")
    assert learned.Ranking.of_files([tmp_path / "text", tmp_path / "none"]).known == {}


def test_measured_is_plain_data():
    found = tuning.Measured("case", "a", "b", {}, {}, {}, ("a",), True)
    assert dataclasses.asdict(found)["order"] == ("a",)
