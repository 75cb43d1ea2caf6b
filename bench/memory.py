"""Peak resident memory over the weights' bytes, kpx beside OpenVINO: `python -m bench.memory [--json FILE]`.

Each way in a process of its own: what it imports and compiles for the first time is paid with a small model first; then the
model is made, compiled and called, and the highest resident size since counts, less what was there before. OpenVINO is given
a file, of ONNX or of its own, that another process converted: no PyTorch model is beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import peers
from bench.cases import CASES
from kpx.hardware.cpu import model as cpu_model
from kpx.observe.demo import versions

_CASES = ("bert", "llama")
_CALLS = 3


def _kpx(model: torch.nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
    import kpx

    optimized = kpx.optimize(model)
    return lambda: optimized(**inputs)


def _openvino(inputs: dict[str, Any], file: str) -> Callable[[], Any]:
    import openvino as ov

    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(file, "CPU", options)
    arrays = [t.numpy() for t in inputs.values()]
    request = compiled.create_infer_request()
    return lambda: request.infer(arrays[: len(compiled.inputs)])


FILES = {"OpenVINO from ONNX": "model.onnx", "OpenVINO from its own file": "model.xml"}
WAYS = ("kpx", *FILES)


def _kilobytes(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _convert(case: str, small: bool, folder: str) -> None:
    import openvino as ov

    model, inputs = CASES[case].make(small=small)
    with torch.no_grad():
        converted = ov.convert_model(peers.onnx_file(model, inputs, folder))
        ov.save_model(converted, f"{folder}/model.xml", compress_to_fp16=False)


def _measure(case: str, way: str, folders: list[str]) -> dict[str, float]:
    """In a process of its own: the peak and what stays, over the weights' bytes."""
    with torch.no_grad():
        small, inputs = CASES[case].make(small=True)
        (_openvino(inputs, f"{folders[0]}/{FILES[way]}") if way in FILES else _kpx(small, inputs))()
        del small
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
        before = _kilobytes("VmRSS")
        model, inputs = CASES[case].make()
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        if way in FILES:
            del model
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        call = _openvino(inputs, f"{folders[1]}/{FILES[way]}") if way in FILES else _kpx(model, inputs)
        for _ in range(_CALLS):
            call()
    peak, stays = _kilobytes("VmHWM") - before, _kilobytes("VmRSS") - before
    return {
        "weights_bytes": weights,
        "peak_over_weights": peak * 1024 / weights,
        "stays_over_weights": stays * 1024 / weights,
    }


def _elsewhere(*arguments: str) -> dict[str, float]:
    environment = {**os.environ, "KPX_MEASURE_SECONDS": "0"}  # what the gate tries beside it is no part of running
    run = subprocess.run(
        [sys.executable, "-m", "bench.memory", *arguments], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(run.stdout.splitlines()[-1])


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.memory", description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--of", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.of:
        case, way, *folders = options.of
        if way == "convert":
            for small, folder in zip((True, False), folders, strict=True):
                _convert(case, small, folder)
            print("{}")
        else:
            print(json.dumps(_measure(case, way, folders)))
        return 0
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for case in _CASES:
        with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as whole:
            _elsewhere("--of", case, "convert", small, whole)
            rows[case] = {way: _elsewhere("--of", case, way, small, whole) for way in WAYS}
    result = {"machine": cpu_model(), "versions": versions(), "peak_resident": rows}
    table = Table(title="Resident memory over the weights")
    for column in ("model", "by", "peak", "stays"):
        table.add_column(column)
    for case, ways in rows.items():
        for way, row in ways.items():
            table.add_row(case, way, f"{row['peak_over_weights']:.2f}", f"{row['stays_over_weights']:.2f}")
    Console().print(table)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
