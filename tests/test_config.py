"""Config: its checks, presets and variables."""

import dataclasses

import pytest

import kpx


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        kpx.Config().level = "none"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"level": "max"}, "`level='max'` is not known. Use one of 'none', 'conservative', 'balanced', 'aggressive'."),
        ({"matmul_precision": "fp7"}, "`matmul_precision='fp7'` is not known. Use one of 'highest', 'high'."),
        ({"prepare": 1}, "`prepare=1` is not a bool"),
        ({"verify_each": "yes"}, "`verify_each='yes'` is not a bool"),
        ({"disable": "add_zero"}, "is not a tuple of rewrite names"),
        ({"cache_dir": 3}, "`cache_dir=3` is not a path"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(fields, message):
    with pytest.raises(kpx.ConfigError) as error:
        kpx.Config(**fields)
    assert message in str(error.value)


def test_something_else_in_place_of_a_config_is_refused():
    with pytest.raises(kpx.ConfigError, match=r"is not a kpx\.Config"):
        kpx.jit(lambda x: x, config={"level": "none"})


def test_presets():
    assert kpx.Config.inference() == kpx.Config()
    assert not kpx.Config.training().prepare
    assert kpx.Config.development().level == "conservative"
    assert kpx.Config.development().verify_each
    assert kpx.Config.production().cache_dir.endswith("kpx")
    assert kpx.Config.production(level="none").level == "none"


def test_variables_override_fields():
    config = kpx.Config().with_environment(
        {"KPX_LEVEL": "none", "KPX_PREPARE": "0", "KPX_DISABLE": "a, b", "KPX_CACHE_DIR": "/x", "KPX_VERIFY_EACH": "on"}
    )
    assert config == kpx.Config(level="none", prepare=False, disable=("a", "b"), cache_dir="/x", verify_each=True)


@pytest.mark.parametrize(
    "variable, value", [("KPX_LEVEL", "max"), ("KPX_PREPARE", "maybe"), ("KPX_MATMUL_PRECISION", "x")]
)
def test_a_variable_with_a_bad_value_is_refused(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(kpx.ConfigError, match=value):
        kpx.jit(lambda x: x)
