"""Random programs give the same numbers with and without the passes."""

import jax
import numpy as np
import pytest

from kpx.config import Config
from kpx.hardware.target import Target
from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.ir.rewrite import Fuel
from kpx.passes.composites import Device
from kpx.pipeline import Context, optimize_module
from tests.programs import Program
from tests.reference import random_arguments


def check(seed: int, config: Config) -> int:
    """Runs a program before and after the pipeline; gives how many rewrites fired."""
    source = Program(seed).text
    module = m.parse(source)
    arguments = random_arguments(module, seed)
    context = Context(Device("cpu", "cpu"), Target("cpu").features, config, Fuel(None))
    optimize_module(module, context)
    assert not context.report.reverted, context.report.reverted
    with jax.enable_x64(True):
        wanted = jax.jit(call_module(m.parse(source)))(*arguments)
        got = jax.jit(call_module(module))(*arguments)
    for w, g in zip(wanted, got, strict=True):
        w, g = np.asarray(w), np.asarray(g)
        # XLA fuses the two programs differently and so rounds differently; NaN, inf and shape are exact.
        scale = np.abs(w[np.isfinite(w)]).max(initial=1.0)
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-6 * scale, err_msg=source)
    return sum(context.report.counts.values())


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in range(1, 10))])
def test_thirty_random_programs_give_the_same_numbers(block):
    fired = [check(seed, Config()) for seed in range(30 * block, 30 * block + 30)]
    assert sum(f > 0 for f in fired) > 15  # the programs do exercise the rewrites


@pytest.mark.parametrize("seed", range(1000, 1010))
def test_random_programs_survive_verification_after_each_rewrite(seed):
    check(seed, Config(level="balanced", verify_each=True))
