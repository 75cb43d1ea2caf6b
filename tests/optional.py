"""PyTorch where it is installed; else a stand-in that reports what needs it as not run."""

import importlib

import pytest


class _Missing:
    """A package that is not installed: a test that uses it is skipped, and so is a file that uses it when imported."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        pytest.skip(f"not run: {self._name} is not installed", allow_module_level=True)


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return _Missing(name)


torch = _package("torch")
