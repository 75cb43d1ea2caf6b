"""What tests need of devices: several on a machine that has one, and compilers for those that are not here."""

import os
import pathlib
import subprocess
import sys

import pytest

from kpx.hardware import plugins

needs_cuda = pytest.mark.skipif(plugins.find("cuda") is None, reason="NVIDIA's compiler is not installed: not run")
needs_rocm = pytest.mark.skipif(plugins.find("rocm") is None, reason="AMD's compiler is not installed: not run")
needs_tpu = pytest.mark.skipif(plugins.find("tpu") is None, reason="TPU's compiler is not installed: not run")


def on_four(source: str, *arguments: str) -> None:
    """Runs a script where JAX has four CPU devices; it must end by printing "the same"."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *(p for p in sys.path if p)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["the same"], done.stderr[-2000:]
