"""The package: every folder of code is shipped, and names are what they should be."""

import pathlib
import subprocess
import sys
import tomllib

import pytest

import kpx

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / "kpx").is_dir(), reason="runs on a checkout")
def test_every_package_of_the_checkout_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(settings["packages"])
    found = set()
    for name, folder in settings["package-dir"].items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *parts)))
    assert found == listed


def test_every_public_name_exists_and_is_documented():
    for name in kpx.__all__:
        assert getattr(kpx, name).__doc__, name


def test_importing_kpx_imports_no_framework_but_jax():
    code = "import sys, kpx; print([m for m in ('torch', 'flax', 'transformers', 'tensorflow') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_error_is_a_kpx_error():
    errors = [getattr(kpx, n) for n in kpx.__all__ if n.endswith("Error")]
    assert all(issubclass(e, kpx.KpxError) for e in errors)


def test_onednn_can_be_called_where_its_packages_and_a_compiler_are():
    import importlib.metadata
    import shutil

    from kpx.kernels import onednn

    try:
        importlib.metadata.version("onednn-devel-cpu-gomp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the extra `onednn` is not installed")
    if sys.platform != "linux" or shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler, or this is not Linux")
    assert onednn.missing() is None  # else all its own tests would be left out without a word
