"""Several devices on a machine that has one: a process of its own, whose CPU is four."""

import os
import pathlib
import subprocess
import sys


def on_four(source: str, *arguments: str) -> None:
    """Runs a script where JAX has four CPU devices; it must end by printing "the same"."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *(p for p in sys.path if p)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == ["the same"], done.stderr[-2000:]
