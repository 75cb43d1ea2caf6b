"""Triton kernels inside a program, for NVIDIA and AMD GPUs, here or not.

Triton's front end alone runs in this process: a kernel becomes Triton's IR, as text, in a custom call that XLA's GPU
compilers compile with their own Triton, where the rest of the program is compiled. No device and no vendor's library is
asked for. (jax-triton compiles to machine code in the calling process instead, which takes the vendor's plugin there,
and for AMD a GPU.) On the CPU a call is interpreted: slow, and for tests.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir as jax_mlir

from kpx.ir.module import ir, stablehlo
from kpx.kernels.triton_interpreter import interpret

NAMES = {
    "float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5", "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "i1",
}  # fmt: skip
"""Triton's names of dtypes."""

LEAST = 16
"""Rows and columns of a product on tensor cores."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: rows and columns of a program, what it sums at a time, its warps, loads under way."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


_call = Primitive("kpx_triton_call")
_call.multiple_results = True


def unavailable() -> str | None:
    """Why no Triton kernel can be used here, or None."""
    found = importlib.util.find_spec("triton")
    return None if found is not None else "Triton is not installed: `pip install 'kpx-xla[triton]'`"


def triton_call(
    kernel: Any,
    *arrays: Any,
    out: Sequence[jax.ShapeDtypeStruct],
    grid: int,
    warps: int = 4,
    stages: int = 2,
    **constants: Any,
) -> list[Any]:
    """Runs a Triton kernel.

    Args:
        kernel: a `triton.jit` function that takes a pointer for each array and then for each output, all row-major and
            aligned to 16 bytes, and then its constants by name.
        out: the outputs' shapes and dtypes.
        grid: how many programs run (`tl.program_id(0)`).
        warps: of 32 threads (64 on AMD's CDNA), for each program.
        stages: how many loads of a loop are under way at once.
        constants: its `tl.constexpr` parameters.
    """
    return _call.bind(
        *arrays,
        kernel=kernel,
        out=tuple((tuple(o.shape), np.dtype(o.dtype)) for o in out),
        grid=int(grid),
        warps=warps,
        stages=stages,
        constants=tuple(sorted(constants.items())),
    )


def nothing() -> jax.Array:
    """What kernels are given in place of an array that is not there: it is not read."""
    return jnp.zeros((1,), jnp.int32)


@_call.def_abstract_eval
def _shapes(*_, out, **__):
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in out]


def _lower(ctx, *operands, kernel, out, grid, warps, stages, constants, platform):
    types = tuple(np.dtype(a.dtype).name for a in (*ctx.avals_in, *ctx.avals_out))
    number = functools.partial(ir.IntegerAttr.get, ir.IntegerType.get_signless(32))
    config = {
        "name": ir.StringAttr.get(kernel.__name__),
        "ir": ir.StringAttr.get(_triton_ir(kernel, types, constants, platform, warps)),
        "num_warps": number(warps),
        "num_stages": number(stages),
        **{f"grid_{axis}": number(size) for axis, size in (("x", grid), ("y", 1), ("z", 1))},
        "debug": ir.BoolAttr.get(False),
    }
    made = stablehlo.CustomCallOp(
        [ir.RankedTensorType.get(a.shape, jax_mlir.dtype_to_ir_type(a.dtype)) for a in ctx.avals_out],
        operands,
        call_target_name="__gpu$xla.gpu.triton",
        api_version=number(4),
        backend_config=ir.DictAttr.get(config),
        operand_layouts=_row_major(ctx.avals_in),
        result_layouts=_row_major(ctx.avals_out),
    )
    return list(made.results)


def _row_major(avals: Sequence[Any]) -> Any:
    index = ir.IndexType.get()
    layouts = [np.arange(a.ndim)[::-1].copy() for a in avals]
    return ir.ArrayAttr.get([ir.DenseIntElementsAttr.get(layout, type=index) for layout in layouts])


@functools.lru_cache(maxsize=256)
def _triton_ir(kernel: Any, types: tuple[str, ...], constants: tuple, platform: str, warps: int) -> str:
    """A kernel in Triton's IR, as its front end gives it."""
    from triton._C.libtriton import ir as triton_ir
    from triton._C.libtriton import passes
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if platform == "cuda":
        from triton.backends.nvidia.compiler import CUDABackend as Backend

        target = GPUTarget("cuda", 90, 32)
    else:
        from triton.backends.amd.compiler import HIPBackend as Backend

        target = GPUTarget("hip", "gfx942", 64)
    backend = Backend(target)
    options = backend.parse_options({"num_warps": warps, "enable_fp_fusion": True})
    context = triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    signature = dict(zip(kernel.arg_names, (f"*{NAMES[t]}" for t in types), strict=False))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(
        kernel, {**signature, **{name: "constexpr" for name, _ in constants}}, constexprs=dict(constants), attrs=aligned
    )
    codegen = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, codegen, backend.get_module_map(), context)
    manager = triton_ir.pass_manager(context)
    passes.common.add_inliner(manager)  # XLA takes kernels without calls
    passes.common.add_symbol_dce(manager)
    manager.run(module, "inline")
    return str(module)


def _interpret(*arrays, kernel, out, grid, warps, stages, constants):
    structs = [jax.ShapeDtypeStruct(*o) for o in out]

    def run(*arrays):
        return interpret(kernel, arrays, [np.zeros(*o) for o in out], grid, dict(constants))

    return jax.pure_callback(run, structs, *arrays)


for _platform in ("cuda", "rocm"):
    jax_mlir.register_lowering(_call, functools.partial(_lower, platform=_platform), platform=_platform)
jax_mlir.register_lowering(_call, jax_mlir.lower_fun(_interpret, multiple_results=True), platform="cpu")


@_call.def_impl
def _immediately(*arrays, **parameters):
    return jax.jit(functools.partial(_call.bind, **parameters))(*arrays)
