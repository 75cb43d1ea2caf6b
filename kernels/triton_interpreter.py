"""Triton's interpreter, in a process of its own: whether Triton interprets is decided once, when it is imported.

`interpret` runs a kernel there; the process (`python -m kpx.kernels.triton_interpreter`) starts when first asked.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kpx.errors import InputError

_LOCK = threading.Lock()


def interpret(
    kernel: Any, arrays: Sequence[Any], outputs: Sequence[np.ndarray], grid: int, constants: Mapping[str, Any]
) -> list[np.ndarray]:
    """What a Triton kernel writes to its outputs.

    Raises:
        InputError: an array is of bf16, whose products Triton's interpreter computes wrongly (seen in 3.6 and 3.9).
        RuntimeError: the interpreter's words, where it fails.
    """
    if any(a.dtype.name == "bfloat16" for a in (*arrays, *outputs)):
        raise InputError(
            f"`{kernel.__name__}` was given bf16, which Triton's interpreter does not know. Use f16 or f32."
        )
    request = kernel.__module__, kernel.__name__, [*map(np.asarray, arrays)], [*outputs], grid, dict(constants)
    with _LOCK:
        process = _process()
        stdin, stdout = process.stdin, process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("Triton's interpreter was started without pipes.")
        pickle.dump(request, stdin)
        stdin.flush()
        answer = pickle.load(stdout)
    if isinstance(answer, str):
        raise RuntimeError(f"Triton's interpreter failed: {answer}")
    return answer


@functools.cache
def _process() -> subprocess.Popen:
    started = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(started.kill)
    return started


def _run(module: str, name: str, arrays: list, outputs: list, grid: int, constants: dict) -> list[np.ndarray]:
    import torch

    given, made = ([torch.from_numpy(np.array(a)) for a in some] for some in (arrays, outputs))  # copies, to write to
    getattr(importlib.import_module(module), name)[(grid,)](*given, *made, **constants)
    return [tensor.numpy() for tensor in made]


def main() -> None:
    """Answers requests until there are no more."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what a kernel prints is no answer
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = _run(*request)
        except Exception as error:  # told to whoever asked
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
