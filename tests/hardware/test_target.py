"""Names of targets, the spec table, prices."""

import math

import pytest

import kpx
from kpx.hardware import chips, tpu
from kpx.hardware.gpu import target_config

NAMES = {
    "cpu": ("cpu", None, (), 1, 1),
    "cpu:avx2": ("cpu", None, (), 1, 1),
    "cuda:h200": ("cuda", "h200", (1, 1), 1, 1),
    "cuda:h100x8": ("cuda", "h100", (1, 8), 1, 8),
    "cuda:b200:32x8": ("cuda", "b200", (32, 8), 1, 256),
    "rocm:mi300x8": ("rocm", "mi300", (1, 8), 1, 8),
    "tpu-v5e:16x16": ("tpu", "v5e", (16, 16), 1, 256),
    "tpu-v6e:4x4": ("tpu", "v6e", (4, 4), 1, 16),
    "tpu-v5p:8x8x8": ("tpu", "v5p", (8, 8, 8), 1, 512),
    "tpu-v7x:4x4x4": ("tpu", "v7x", (4, 4, 4), 1, 128),
    "tpu-v5e:16x16*2": ("tpu", "v5e", (16, 16), 2, 512),
    "xpu:pvc": ("xpu", "pvc", (1, 1), 1, 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_which_machine(name):
    target = kpx.Target(name)
    assert (target.platform, target.chip, target.shape, target.slices, target.device_count) == NAMES[name]


@pytest.mark.parametrize(
    "name", [*NAMES, "tpu-v5p", " CUDA:H100x1 ", "rocm:mi300xx8", "tpu-v5p:8x4x4", "cuda:h100:1x8"]
)
def test_a_target_is_the_same_as_the_one_of_its_text(name):
    target = kpx.Target(name)
    assert kpx.Target(str(target)) == target
    assert hash(kpx.Target(str(target))) == hash(target)


@pytest.mark.parametrize("given, near", [
    ("cuda:h1000", "cuda:h100"), ("tpu-v5:2x2", "tpu-v5e:2x2"), ("rocm:mi300y", "rocm:mi300"), ("cpu:avx3", "cpu:avx2"),
    ("v5e", "tpu-v5e"), ("cuda:", "cuda"),
])  # fmt: skip
def test_an_unknown_name_gives_the_nearest(given, near):
    with pytest.raises(kpx.TargetError, match=f"is not known.*Did you mean.*{near}"):
        kpx.Target(given)


@pytest.mark.parametrize("given, says", [
    ("tpu-v5e:3x3", "2x2, 2x4, 4x4"), ("tpu-v5p:7x7x7", "4x8x8"), ("tpu-v5e:32x32", "largest is 16x16"),
    ("tpu-v5e:4x4x4", "8x8"), ("tpu-v5e:2x2*0", "no slice"), ("tpu-v6e:x", "no slice"), ("tpu-v5e:2x2*two", "no slice"),
    ("cuda:h100x9", "cuda:h100:2x8"), ("cuda:h100x0", "1 to 8"), ("cuda:h100:4", "cuda:h100x8"), ("cuda:h100:0x8", "hosts"),
])  # fmt: skip
def test_a_topology_that_does_not_exist_gives_those_that_do(given, says):
    with pytest.raises(kpx.TargetError, match=says):
        kpx.Target(given)


def test_a_target_that_is_no_text_is_refused():
    with pytest.raises(kpx.TargetError, match="`target=3` is not a target"):
        kpx.Target(3)


def test_a_mesh_covers_the_targets_devices():
    mesh = kpx.Target("tpu-v5e:4x4").mesh(data=-1, model=2)
    assert dict(mesh.shape) == {"data": 8, "model": 2}


@pytest.mark.parametrize("axes", [{}, {"data": 3}, {"data": -1, "model": 3}, {"data": -1, "model": -1}, {"data": 0}])
def test_a_mesh_of_other_sizes_is_refused(axes):
    with pytest.raises(kpx.TargetError, match="which has 16 devices"):
        kpx.Target("tpu-v5e:4x4").mesh(**axes)


@pytest.mark.parametrize("chip", [c for c in chips.chips().values() if c.platform == "tpu"], ids=lambda c: c.key)
def test_every_listed_slice_can_be_named(chip):
    for shape in tpu.topologies(chip):
        assert kpx.Target(f"tpu-{chip.key}:{'x'.join(map(str, shape))}").shape == shape


@pytest.mark.parametrize("chip", chips.chips().values(), ids=lambda c: c.key)
def test_a_device_has_figures_with_sources(chip):
    assert chip.sources
    assert 0.3 < chip.bandwidth / 1e12 < 20
    assert 2**33 < chip.memory < 2**40
    assert chip.links.kind in ("switch", "torus")
    assert chip.peak("f64") <= chip.peak("f32") <= chip.peak("bf16") <= chip.peak("f8")
    assert chip.peak("bf16") == chip.peaks["bf16"]
    assert math.isfinite(chip.network)


@pytest.mark.parametrize(
    "chip", [c for c in chips.chips().values() if c.platform in ("cuda", "rocm")], ids=lambda c: c.key
)
def test_a_gpu_is_described_to_its_compiler_by_the_table(chip):
    text = target_config(chip)
    assert f"device_memory_size: {chip.memory}" in text
    assert f"core_count: {chip.cores} " in text


def test_prices_carry_their_date_and_source():
    price = kpx.Target("cuda:h100").spec.price
    assert price.dollars_per_hour > 0
    assert price.source
    assert price.date == "2025-07-01"


def test_the_users_prices_come_first(tmp_path, monkeypatch):
    path = tmp_path / "prices.toml"
    path.write_text('date = 2026-11-01\n[devices]\nh100 = { price = 2.5, source = "our contract" }\n')
    monkeypatch.setenv("KPX_PRICES", str(path))
    prices = chips.prices()
    assert prices["h100"] == chips.Price(2.5, "our contract", "2026-11-01")
    assert prices["h200"].date == "2025-07-01"


@pytest.mark.parametrize("contents, says", [
    ('[devices]\nh100 = { price = 2.5, source = "x" }', "date"),
    ('date = "2026-11-01"\n[devices]\nh101 = { price = 2.5, source = "x" }', "h101, which are not devices"),
    ('date = "2026-11-01"\n[devices]\nh100 = 2.5', "cannot be read"),
    ('date = "soon"', "cannot be read"),
    ("date = ", "cannot be read"),
])  # fmt: skip
def test_a_file_of_prices_with_a_fault_is_refused(contents, says, tmp_path, monkeypatch):
    path = tmp_path / "prices.toml"
    path.write_text(contents)
    monkeypatch.setenv("KPX_PRICES", str(path))
    with pytest.raises(kpx.TargetError, match=says):
        chips.prices()


def test_a_missing_file_of_prices_is_named(monkeypatch):
    monkeypatch.setenv("KPX_PRICES", "/nowhere/prices.toml")
    with pytest.raises(kpx.TargetError, match="no such file"):
        chips.prices()
