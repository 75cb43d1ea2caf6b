"""How long a 32-layer Llama takes from an ExportedProgram to a StableHLO module, step by step.

`python -m bench.conversion [--json FILE] [--layers 32]`

The sizes are small and the graph is whole: what is timed depends on the number of ops alone. Export itself, which is
PyTorch's, and XLA's compilation are timed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from typing import Any

import jax
import torch

from kpx.bridges.torch import resolve_target
from kpx.bridges.torch.capture import decomposed
from kpx.bridges.torch.exported import ExportedFunction
from kpx.bridges.torch.invoke import struct
from kpx.config import Config
from kpx.runtime.build import compile_lowered, optimize_lowered

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def llama(layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    }
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).eval()
    return model, {"input_ids": torch.randint(0, 256, (1, 32)), "use_cache": False}


def measure(layers: int) -> dict[str, float]:
    """Seconds of each step."""
    target, config = resolve_target("cpu"), Config()
    model, inputs = llama(layers)
    seconds, start = {}, time.perf_counter()

    def done(name: str) -> None:
        nonlocal start
        seconds[name] = time.perf_counter() - start
        start = time.perf_counter()

    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=False)
        done("export")
        program = decomposed(program)
        done("decompose")
    function = ExportedFunction(program)
    tensors = {**program.state_dict, **program.constants}
    weights = [struct(tensors[name]) for name in function.weights]
    with jax.enable_x64(True):
        run = jax.jit(lambda w, x: function(w, [], x).outputs[0])
        lowered = run.lower(weights, [jax.ShapeDtypeStruct((1, 32), "int64")])
        module = lowered.compiler_ir("stablehlo")
        done("lower to StableHLO")
        optimize_lowered(lowered, target, config)
        done("rewrite")
        compile_lowered(lowered, target, config)
        done("XLA")
    assert module is not None
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--layers", type=int, default=32)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    measure(2)  # imports and caches
    seconds = measure(given.layers)
    conversion = sum(seconds[step] for step in ("decompose", "lower to StableHLO", "rewrite"))
    for name, value in seconds.items():
        print(f"{name:20} {value:6.2f} s")
    print(
        f"conversion, export and XLA aside: {conversion:.2f} s, {conversion / seconds['export']:.2f} times export's own"
    )
    if given.json:
        versions = {"jax": jax.__version__, "torch": torch.__version__, "python": platform.python_version()}
        record = {"date": time.strftime("%Y-%m-%d"), "versions": versions, "layers": given.layers,
                  "seconds": seconds, "conversion_seconds": conversion}  # fmt: skip
        with open(given.json, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
