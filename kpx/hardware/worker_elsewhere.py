"""A worker under a Python in which kpx is not installed: a script, which makes the `kpx` that it lies in importable."""

from __future__ import annotations

import importlib.util
import pathlib
import runpy
import sys


def main() -> None:
    """Imports this file's kpx, and runs its worker with this script's arguments."""
    package = pathlib.Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        "kpx", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"There is no package in {package}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kpx"] = module
    spec.loader.exec_module(module)
    runpy.run_module("kpx.hardware.worker_main", run_name="__main__")


if __name__ == "__main__":
    main()
