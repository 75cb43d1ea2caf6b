"""What Triton's own compiler says of kpx's kernels, with no device: registers, spills, shared memory."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

ARCHITECTURES = {"sm_80": ("cuda", 80, 32), "sm_90a": ("cuda", 90, 32), "sm_100a": ("cuda", 100, 32),
                 "gfx942": ("hip", "gfx942", 64), "gfx950": ("hip", "gfx950", 64)}  # fmt: skip
_INPUTS = {"forward": 4, "backward_keys": 7, "backward_queries": 7}
_OUTPUTS = {"forward": ("*bf16", "*fp32"), "backward_keys": ("*bf16", "*bf16"), "backward_queries": ("*bf16",)}


def attention(length: int = 4096, size: int = 128) -> list[dict[str, Any]]:
    """A row for each kernel of causal attention in bf16, and each architecture."""
    from kpx.kernels import attention_gpu

    struct = jax.ShapeDtypeStruct((16, length, size), jnp.bfloat16)
    rows = []
    for architecture, (backend, *_) in ARCHITECTURES.items():
        platform = "cuda" if backend == "cuda" else "rocm"
        settings = attention_gpu.Settings(platform, 16, size**-0.5, True, 0, 0.0)
        for kernel in _INPUTS:
            choose = attention_gpu.forward_blocks if kernel == "forward" else attention_gpu.backward_blocks
            blocks = choose(platform, 2 * size)
            constants = attention_gpu.sizes(struct, struct, struct, None, settings, blocks)
            rows.append(
                {"kernel": kernel, "architecture": architecture} | _resources(kernel, architecture, constants, blocks)
            )
    return rows


def _resources(kernel: str, architecture: str, constants: dict[str, Any], blocks: Any) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kpx.kernels import attention_triton

    function = getattr(attention_triton, kernel)
    types = ["*bf16"] * min(_INPUTS[kernel], 5) + ["*fp32"] * (_INPUTS[kernel] - 5) + list(_OUTPUTS[kernel])
    names = dict(zip(function.arg_names, types, strict=False))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(function, names | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    made: Any = triton.compile(source, target=GPUTarget(*ARCHITECTURES[architecture]), options=options)
    found = _of_amd(made.asm["amdgcn"]) if "amdgcn" in made.asm else _of_nvidia(made.asm["ptx"], architecture)
    return found | {"shared": made.metadata.shared}


def _of_amd(assembly: str) -> dict[str, int]:
    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])

    return {"registers": number("vgpr_count"), "spilled": number("vgpr_spill_count") + number("sgpr_spill_count")}


def _of_nvidia(ptx: str, architecture: str) -> dict[str, int]:
    import triton

    folder = pathlib.Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
    tool = next(t for t in (folder / "ptxas-blackwell", folder / "ptxas") if t.exists())
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool, "-v", "--gpu-name", architecture, file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.findall(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill stores", said)
    return {"registers": int(registers[0]), "spilled": int(spilled[0])}
