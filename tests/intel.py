"""Intel's compiler in tests: it is there where its environment could be made, and may be hidden."""

import contextlib
from collections.abc import Iterator

import pytest

from kpx.hardware import plugins, worker

needed = pytest.mark.skipif(
    plugins.find("xpu") is None,
    reason="not run: Intel's compiler is not installed (python -m kpx doctor --install xpu)",
)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """As where Intel's compiler is not installed."""
    found = plugins.find
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "find", lambda platform: None if platform == "xpu" else found(platform))
        patch.delitem(worker._WORKERS, ("xpu", None), raising=False)
        yield
