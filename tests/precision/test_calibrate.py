"""Calibration: channels are balanced by data, scales may be fixed, nothing becomes worse, and what is odd is told."""

import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.errors import ConfigError, InputError
from kpx.precision import Calibration, Policy, calibrate
from tests.optional import torch
from tests.reference import distance


def _model(outlier=40.0):
    """An MLP behind a norm that makes some channels large, as those of language models are."""
    torch.manual_seed(0)
    norm, up, down = torch.nn.LayerNorm(64), torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
    norm.weight.data[3] = outlier
    return torch.nn.Sequential(norm, up, torch.nn.GELU(), down).eval()


X = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1))
BATCHES = [torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(s)) for s in (2, 3)]


def _error(model, precision, calibration=None):
    policy = Policy(precision, calibration=calibration)
    optimized = kpx.optimize(model, config=kpx.Config(precision=policy))
    with torch.no_grad():
        given, wanted = optimized(X), model.double()(X.double())
    model.float()
    assert set(optimized.compile_for([X], {}).precisions) == {precision}
    return distance(given.double(), wanted)


@pytest.mark.parametrize(
    ("precision", "gain"), [("int8", 1.8), ("fp8", 1.2), ("int4-weights", 1.3), ("int8-weights", 1.1)]
)
def test_balancing_is_nearer_to_f64_on_other_data(precision, gain):
    model = _model()
    calibration = calibrate(model, BATCHES, precision=precision)
    assert _error(model, precision) > gain * _error(model, precision, calibration)


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4-weights"])
def test_a_model_without_large_channels_becomes_no_worse(precision):
    model = _model(outlier=1.0)
    calibration = calibrate(model, BATCHES, precision=precision)
    assert _error(model, precision, calibration) < 1.05 * _error(model, precision)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_fixed_scales_are_near_f64_and_leave_no_maximum_to_find(precision):
    model = _model()
    calibration = calibrate(model, BATCHES, precision=precision, static=True)
    assert _error(model, precision, calibration) < _error(model, precision)
    fixed = kpx.compile(model, X, config=kpx.Config(precision=Policy(precision, calibration=calibration)))
    assert "kpx_onednn_quantized" not in fixed.stablehlo


def test_numbers_beyond_a_fixed_scale_become_its_largest():
    layer = torch.nn.Linear(32, 8, bias=False).eval()
    calibration = calibrate(layer, [torch.ones(4, 32)], static=True, balance=False)
    optimized = kpx.optimize(layer, config=kpx.Config(precision=Policy("int8", calibration=calibration)))
    with torch.no_grad():
        torch.testing.assert_close(optimized(torch.full((4, 32), 100.0)), optimized(torch.ones(4, 32)))
        x = torch.ones(4, 32)
        x[1, 3] = float("nan")
        given = optimized(x)
    assert given[1].isnan().all()
    assert given[[0, 2, 3]].isfinite().all()


def test_a_function_that_holds_its_weights_is_calibrated():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)
    calibration = calibrate(lambda x: jnp.tanh(x @ w), [jnp.asarray(X.numpy())])
    assert len(calibration.entries) == 1


def test_a_calibration_is_saved_and_read(tmp_path):
    calibration = calibrate(_model(), BATCHES, precision="int8", static=True)
    calibration.save(tmp_path / "c.npz")
    found = Calibration.load(tmp_path / "c.npz")
    assert found == calibration
    assert hash(found) == hash(calibration)
    assert found.entries.keys() == calibration.entries.keys()


@pytest.mark.parametrize("contents", [b"", b"nonsense", None])
def test_a_file_that_is_none_is_refused(tmp_path, contents):
    if contents is not None:
        (tmp_path / "c.npz").write_bytes(contents)
    with pytest.raises(ConfigError, match="is not a calibration"):
        Calibration.load(tmp_path / "c.npz")


def test_a_calibration_of_another_model_is_refused():
    calibration = calibrate(_model(), BATCHES)
    torch.manual_seed(0)
    other = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 32)).eval()
    policy = Policy("int8", calibration=calibration)
    with pytest.raises(InputError, match="64 input channels, and the product has 32"):
        kpx.compile(other, torch.zeros(4, 32), config=kpx.Config(precision=policy))


def test_odd_data_is_refused_with_the_place():
    bad = X.clone()
    bad[0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"product at `1` reads, or has, infinities or NaN"):
        calibrate(_model(), [bad])
    with pytest.raises(InputError, match="There is no batch"):
        calibrate(_model(), [])
    with pytest.raises((InputError, kpx.CaptureError)):
        calibrate(_model(), [torch.zeros(2, 24, 63)])
    with pytest.raises(InputError, match="cannot be looked into"):
        calibrate(3, [X])


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(ConfigError, match="cannot be calibrated"):
        calibrate(_model(), BATCHES, precision="bf16")
    with pytest.raises(ConfigError, match="does not have"):
        calibrate(_model(), BATCHES, precision="int4-weights", static=True)


def test_zeros_in_data_and_weights_are_no_harm():
    model = _model()
    model[1].weight.data[:, 5] = 0
    calibration = calibrate(model, [torch.zeros(2, 24, 64), X])
    assert all(np.isfinite(e.balance).all() for e in calibration.entries.values() if e.balance is not None)
    assert _error(model, "int8", calibration) < 0.05


def test_a_program_that_is_kept_is_of_its_calibration(tmp_path):
    model = _model()
    balanced, plain = calibrate(model, BATCHES), calibrate(model, BATCHES, balance=False)
    results = []
    for calibration in (balanced, plain, balanced):
        config = kpx.Config(
            precision=Policy("int8", calibration=calibration), cache_dir=str(tmp_path), measure_seconds=0
        )
        with torch.no_grad():
            results.append(kpx.optimize(model, config=config)(X))
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
