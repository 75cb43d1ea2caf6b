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
_BF16, _F32, _I32 = "*bf16", "*fp32", "*i32"


def every() -> list[dict[str, Any]]:
    """A row for each kernel, in bf16, and each architecture that it is chosen for."""
    return [row for rows in (attention, decoding, grouped, norms, linear, around_norms, images) for row in rows()]


def attention(length: int = 4096, size: int = 128) -> list[dict[str, Any]]:
    """Of causal attention."""
    from kpx.kernels import attention_gpu, attention_triton

    struct = jax.ShapeDtypeStruct((16, length, size), jnp.bfloat16)
    types = {
        attention_triton.forward: [_BF16] * 3 + [_I32] * 7 + [_BF16, _F32],
        attention_triton.backward_keys: [_BF16] * 3 + [_I32] * 6 + [_BF16] + [_F32] * 2 + [_BF16] * 2,
        attention_triton.backward_queries: [_BF16] * 3 + [_I32] * 6 + [_BF16] + [_F32] * 2 + [_BF16],
    }
    rows = []
    for architecture, (backend, *_) in ARCHITECTURES.items():
        platform = "cuda" if backend == "cuda" else "rocm"
        settings = attention_gpu.Settings(platform, 16, size**-0.5, True, 0, 0.0)
        for kernel, of in types.items():
            forward = kernel is attention_triton.forward
            choose = attention_gpu.forward_blocks if forward else attention_gpu.backward_blocks
            blocks = choose(platform, 2 * size)
            constants = attention_gpu.sizes(struct, struct, struct, {}, settings, blocks)
            constants |= {"BLOCKS": 0} | ({"SINKS": False} if forward else {})
            rows.append(
                _row(f"attention, {kernel.__name__}", kernel, of, constants, blocks.warps, blocks.stages, architecture)
            )
    return rows


def decoding(kv_length: int = 8192, size: int = 128, group: int = 8) -> list[dict[str, Any]]:
    """Of one query's attention over a cache, whole and in pages."""
    from kpx.kernels import attention_decode, attention_decode_triton

    types = [_BF16] * 3 + [_I32] * 4 + [_F32] * 3
    rows = []
    for architecture, (backend, *_) in ARCHITECTURES.items():
        platform = "cuda" if backend == "cuda" else "rocm"
        for name, page in (("decoding", 0), ("decoding, pages", 16)):
            constants, blocks = attention_decode.example(platform, kv_length, size, group, page)
            kernel = attention_decode_triton.decode
            rows.append(_row(name, kernel, types, constants, blocks.warps, blocks.stages, architecture))
    return rows


def grouped(rows: int = 8192, groups: int = 16, size: int = 2048, width: int = 1024) -> list[dict[str, Any]]:
    """Of grouped products, for NVIDIA's alone."""
    from kpx.kernels import grouped_matmul_gpu as gpu
    from kpx.kernels import grouped_matmul_triton as kernels

    common = {"SIZE": size, "WIDTH": width, "PRECISION": "tf32"}
    by_row, by_group = gpu.tiles(rows // groups, width, size, 2), gpu.tiles(size, width, rows // groups, 2)
    cases = [
        (f"rows by group{', transposed' if t else ''}", kernels.rows_by_group, [_BF16] * 2 + [_I32] * 3 + [_BF16], by_row,
         {"GROUPS": groups, "TRANSPOSED": t}) for t in (False, True)
    ]  # fmt: skip
    cases.append(("sums by group", kernels.sums_by_group, [_BF16] * 2 + [_I32] * 2 + [_BF16], by_group, {}))
    return [
        _row(name, kernel, types, common | own | {"BM": cut.rows, "BN": cut.columns, "BK": cut.inner}, cut.warps, cut.stages, a)
        for name, kernel, types, cut, own in cases
        for a, (backend, *_) in ARCHITECTURES.items()
        if backend == "cuda"
    ]  # fmt: skip


def norms(rows: int = 8192) -> list[dict[str, Any]]:
    """Of layer norm with what flows around it, at a usual and at the largest size."""
    from kpx.kernels import norm_gpu
    from kpx.kernels import norm_triton as kernels

    found = []
    for size in (4096, norm_gpu.MOST_SIZE):
        blocks, warps = norm_gpu.cut(size)
        shared = {"ROWS": rows, "SIZE": size, "CENTRED": True, "WEIGHT": True} | blocks
        for architecture in ARCHITECTURES:
            found += [
                _row(f"layer norm of {size}, {kernel.__name__}", kernel, types, shared | own, warps, 2, architecture)
                for kernel, types, own in (
                    (kernels.forward, [_BF16] * 4 + [_F32] * 2, {"EPS": 1e-5, "BIAS": True}),
                    (
                        kernels.backward,
                        [_BF16] * 4 + [_F32] * 2 + [_BF16] + [_F32] * 2,
                        {"FURTHER": True, "PROGRAMS": 264},
                    ),
                )
            ]
    return found


def linear(rows: int = 8192, size: int = 4096, width: int = 14336) -> list[dict[str, Any]]:
    """Of linear layers with bias, GELU and residual, and of gated ones, as they are in training."""
    from kpx.kernels import linear_gpu as gpu
    from kpx.kernels import linear_triton as kernels
    from kpx.kernels.linear import Settings

    x, found = jax.ShapeDtypeStruct((rows, size), jnp.bfloat16), []
    for architecture, (backend, *_) in ARCHITECTURES.items():
        platform = "cuda" if backend == "cuda" else "rocm"
        for kernel, products, types, own in (
            (kernels.linear, 1, [_BF16] * 6, {"BIAS": True, "RESIDUAL": True}),
            (kernels.gated, 2, [_BF16] * 6, {}),
        ):
            cut = gpu.tiles(platform, rows, width, size, 2, products)
            settings = Settings(platform, "gelu" if products == 1 else "silu", False)
            constants = gpu.constants(x, width, settings, cut) | own | {"SAVE": True}
            name = f"{kernel.__name__} layer, bf16"
            found.append(_row(name, kernel, types, constants, cut.warps, cut.stages, architecture))
    return found


def around_norms(rows: int = 8192) -> list[dict[str, Any]]:
    """Of a sum, its norm, and that in int8 with a scale for each row, at a usual and at the largest size."""
    from kpx.kernels import norm_gpu
    from kpx.kernels import norm_triton as kernels

    found = []
    for size in (4096, norm_gpu.MOST_SIZE):
        blocks, warps = norm_gpu.cut(size)
        given = {"ROWS": rows, "SIZE": size, "EPS": 1e-6, "CENTRED": False, "RESIDUAL": True, "INDEX": False, "TABLE": rows,
                 "TOTAL": True, "WEIGHT": True, "BIAS": False, "QUANTIZED": True, "LARGEST": 127.0, "ROUND": True,
                 "BY_ROW": True}  # fmt: skip
        types = [_BF16] * 2 + [_I32] + [_BF16] + [_I32] * 2 + ["*i8", _F32, _BF16]
        for architecture in ARCHITECTURES:
            name = f"sum, norm and int8, {size}"
            found.append(_row(name, kernels.fused, types, given | blocks, warps, 2, architecture))
    return found


def images(batch: int = 4, side: int = 64, channels: int = 320) -> list[dict[str, Any]]:
    """Of a group norm with its SiLU, and of a depthwise-separable block."""
    from kpx.kernels import group_norm_gpu, group_norm_triton, separable_gpu, separable_triton

    found, positions = [], side * side
    blocks, warps = group_norm_gpu.cut(channels // 32)
    norm = {"POSITIONS": positions, "CHANNELS": channels, "GROUPS": 32, "EPS": 1e-5, "SILU": True} | blocks
    tiles, few = separable_gpu.cut(batch * positions, channels, 2 * channels)
    block = {"POSITIONS": batch * positions, "HEIGHT": side, "WIDTH": side, "CHANNELS": channels, "DOWN": side,
             "ACROSS": side, "DEPTH": 2 * channels, "KH": 3, "KW": 3, "STRIDE": 1, "TOP": 1, "LEFT": 1,
             "ACTIVATION": "relu6", "PRECISION": "ieee"} | tiles  # fmt: skip
    for a in ARCHITECTURES:
        found.append(_row("group norm and SiLU", group_norm_triton.forward, [_BF16] * 4, norm, warps, 2, a))
        types = [_BF16] * 2 + [_F32] * 2 + [_BF16] * 2
        found.append(_row("depthwise-separable", separable_triton.forward, types, block, few, 2, a))
    return found


def _row(
    name: str, kernel: Any, types: list[str], constants: dict[str, Any], warps: int, stages: int, architecture: str
):
    """What Triton says of a kernel, given its pointers' types and its constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = dict(zip(kernel.arg_names, types, strict=False))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(kernel, names | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made: Any = triton.compile(source, target=GPUTarget(*ARCHITECTURES[architecture]), options=options)
    found = _of_amd(made.asm["amdgcn"]) if "amdgcn" in made.asm else _of_nvidia(made.asm["ptx"], architecture)
    return {"kernel": name, "architecture": architecture} | found | {"shared": made.metadata.shared}


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
