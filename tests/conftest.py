import os

# A GPU that the system has is JAX's first device, and the same tests run on it.
os.environ.setdefault(
    "JAX_PLATFORMS",
    "cuda,cpu" if os.path.exists("/dev/nvidia0") else "rocm,cpu" if os.path.exists("/dev/kfd") else "cpu",
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "standard")

pytest_plugins = ["tests.selection"]


@pytest.fixture(autouse=True)
def _no_kpx_variables(monkeypatch):
    """Tests see the defaults, whatever the shell that runs them has set; but nothing is measured unless a test says so:
    what is fastest on a busy machine decides nothing here."""
    for name in list(os.environ):
        if name.startswith("KPX_") and name != "KPX_PLUGINS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("KPX_MEASURE_SECONDS", "0")


def pytest_collection_modifyitems(items):
    """Where there is no GPU, what needs one is reported as not run."""
    if "cuda" in os.environ["JAX_PLATFORMS"] or "rocm" in os.environ["JAX_PLATFORMS"]:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="not run: there is no GPU here"))


def pytest_terminal_summary(terminalreporter):
    """Says by itself what was not run for want of a device or a compiler."""
    left = [report for report in terminalreporter.stats.get("skipped", []) if "not run: " in str(report.longrepr)]
    if left:
        terminalreporter.write_line(f"{len(left)} tests were NOT RUN for want of a device, a compiler or a browser.")
