"""Every registered rewrite is tested by its own docstring."""

import re

import jax
import numpy as np
import pytest
import torch  # noqa: F401  (its MKL is what some rewrites call)

import kpx.pipeline  # noqa: F401  (registers every rewrite)
from kpx.hardware import cpu
from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.ir.rewrite import REWRITES, Fuel, Report, apply_rewrites
from kpx.kernels import mkl
from tests.reference import random_arguments

RULES = list(REWRITES.values())


def _canonical_text(module) -> str:
    m.run_passes(module, "cse,canonicalize")
    return re.sub(r" loc\(.*?\)$", "", m.text(module), flags=re.M)


def _applied(rule, source):
    module = m.parse(source)
    report = Report()
    count = apply_rewrites(module, [rule], Fuel(None), report)
    assert not report.reverted
    return module, count


# Their examples hold what oneDNN packs for, and has kernels for, on CPUs with 512-bit vectors.
_OF_WIDE_VECTORS = {"packed_convolution", "conversion_into_packed"}


def _lacking(rule) -> str | None:
    """Return why a rule's example cannot be run here; None where it can."""
    if rule.name in _OF_WIDE_VECTORS and not cpu.has_wide_vectors():
        return "not run: the example is of a CPU with AVX-512"
    return rule.lacks()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_rewrite_has_a_sentence_and_an_example_and_a_near_miss(rule):
    assert rule.doc.strip().splitlines()[0].endswith(".")
    assert len(rule.example("Before")) == len(rule.example("After")) >= 1
    assert rule.example("Unchanged")


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_rewrite_turns_its_example_into_what_it_says(rule):
    if (lacking := _lacking(rule)) is not None:
        pytest.skip(lacking)
    for before, after in zip(rule.example("Before"), rule.example("After"), strict=True):
        module, count = _applied(rule, before)
        assert count >= 1
        assert _canonical_text(module) == _canonical_text(m.parse(after))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_rewrite_leaves_its_near_miss_alone(rule):
    for source in rule.example("Unchanged"):
        _, count = _applied(rule, source)
        assert count == 0


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_rewrite_keeps_the_numbers_of_its_example(rule):
    if (lacking := _lacking(rule)) is not None:
        pytest.skip(lacking)
    if "kpx_matmul" in "".join(rule.example("After")) and not mkl.available():
        pytest.skip(f"MKL's products cannot be called: {mkl.missing()}")
    for before in rule.example("Before"):
        with jax.enable_x64(True):
            module, _ = _applied(rule, before)
            arguments = random_arguments(m.parse(before), seed=0)
            wanted = jax.jit(call_module(m.parse(before)))(*arguments)
            got = jax.jit(call_module(module))(*arguments)
        for w, g in zip(wanted, got, strict=True):
            if rule.exact:
                np.testing.assert_array_equal(np.asarray(g), np.asarray(w))
            else:
                scale = np.abs(np.asarray(w, np.float64)).max()
                low = g.dtype == jax.numpy.bfloat16
                np.testing.assert_allclose(
                    np.asarray(g, np.float64), np.asarray(w, np.float64), atol=(1e-2 if low else 1e-5) * scale
                )
