import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture(autouse=True)
def _no_kpx_variables(monkeypatch):
    """Tests see the defaults, whatever the shell that runs them has set."""
    for name in list(os.environ):
        if name.startswith("KPX_") and name != "KPX_PLUGINS":
            monkeypatch.delenv(name)
