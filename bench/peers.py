"""The peers: each turns a model and its inputs into something to call, or says why it cannot."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

import kpx
from kpx.ir import module as m

Call = Callable[[], Any]


def eager(model: torch.nn.Module, inputs: dict[str, Any]) -> Call:
    """PyTorch as it comes."""
    return lambda: model(**inputs)


def compiled_by_torch(model: torch.nn.Module, inputs: dict[str, Any]) -> Call:
    """torch.compile, with its defaults; its caches off, so that a first call is one."""
    import torch._inductor.config

    torch._inductor.config.force_disable_caches = True
    torch._dynamo.reset()
    compiled = torch.compile(model)
    return lambda: compiled(**inputs)


def optimized(model: torch.nn.Module, inputs: dict[str, Any], **config) -> Call:
    """kpx.optimize."""
    ours = kpx.optimize(model, config=kpx.Config(**config))
    return lambda: ours(**inputs)


def plain_xla(model: torch.nn.Module, inputs: dict[str, Any]) -> Call:
    """jax.jit of the function that the bridge makes of the model: no rewrite, nothing prepared, JAX's defaults."""
    jitted, weights, arrays = _jitted(model, inputs)

    def call():
        with jax.enable_x64(True):
            return jax.block_until_ready(jitted(weights, arrays))

    return call


def _jitted(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Any, list[jax.Array], list[jax.Array]]:
    """The function that the bridge makes of a model, jitted and not lowered, its weights, and the inputs."""
    from kpx.bridges.torch.capture import capture
    from kpx.bridges.torch.exported import ExportedFunction
    from kpx.bridges.torch.tensors import to_array
    from kpx.bridges.torch.weights import LiveWeights

    device = jax.devices("cpu")[0]
    program = capture(model, (), inputs)
    function = ExportedFunction(program)
    weights = LiveWeights(model, function.weights, dict(program.constants)).read(device, ())
    arrays = [to_array(t, device) for t in inputs.values()]
    jitted = jax.jit(lambda w, a: [r for r in function(w, [], a).outputs if isinstance(r, jax.Array)], keep_unused=True)
    return jitted, weights, arrays


def iree(model: torch.nn.Module, inputs: dict[str, Any]) -> Call:
    """IREE's compiler for this CPU, over the same StableHLO as plain jax.jit's, the weights as arguments."""
    import iree.compiler
    import iree.runtime as rt

    jitted, weights, arrays = _jitted(model, inputs)
    with jax.enable_x64(True):
        text = m.text(jitted.lower(weights, arrays).compiler_ir("stablehlo"), large_constants=True)
    text = "\n".join(line for line in text.splitlines() if "sdy.mesh" not in line)  # of no devices; IREE has no Shardy
    options = ["--iree-llvmcpu-target-cpu=host", "--iree-opt-level=O3", "--iree-llvmcpu-stack-allocation-limit=1048576"]
    compiled = iree.compiler.compile_str(text, input_type="stablehlo", target_backends=["llvm-cpu"], extra_args=options)
    config = rt.Config("local-task")
    context = rt.SystemContext(config=config)
    context.add_vm_module(rt.VmModule.copy_buffer(context.instance, compiled))
    main = next(m for name, m in context.modules.items() if name.startswith("jit"))["main"]
    given = [rt.asdevicearray(config.device, np.asarray(a)) for a in (*weights, *arrays)]

    def call():
        results = main(*given)
        return [r.to_host() for r in (results if isinstance(results, (tuple, list)) else [results])]

    return call


def onnx_file(model: torch.nn.Module, inputs: dict[str, Any], folder: str) -> str:
    """The model as an ONNX file."""
    path = os.path.join(folder, "model.onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (), path, kwargs=inputs, dynamo=True, verbose=False)
    return path


def onnx_runtime(model: torch.nn.Module, inputs: dict[str, Any]) -> Call:
    """ONNX Runtime on the CPU, all its graph optimizations on."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            onnx_file(model, inputs, folder), options, providers=["CPUExecutionProvider"]
        )
    wanted = [i.name for i in session.get_inputs()]
    if any(t.dtype == torch.bfloat16 for t in inputs.values()):
        raise NotImplementedError("ONNX Runtime takes no bf16 inputs from numpy")
    arrays = dict(zip(wanted, (t.numpy() for t in inputs.values()), strict=False))
    return lambda: session.run(None, arrays)


def openvino(model: torch.nn.Module, inputs: dict[str, Any]) -> Call:
    """OpenVINO on the CPU, told to compute in the model's own precision."""
    import openvino as ov

    dtype = next(model.parameters()).dtype
    precision = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    with tempfile.TemporaryDirectory() as folder:
        # OpenVINO computes in bf16 by its hint; it is given the f32 model, as its own documentation has it.
        wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        converted = ov.convert_model(onnx_file(model.float(), wide, folder))
        model.to(dtype)
        compiled = ov.Core().compile_model(converted, "CPU", precision)
    arrays = [t.numpy() for t in wide.values()]
    request = compiled.create_infer_request()
    return lambda: request.infer(arrays[: len(compiled.inputs)])


PEERS: dict[str, Callable[[torch.nn.Module, dict[str, Any]], Call]] = {
    "torch eager": eager,
    "torch.compile": compiled_by_torch,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "IREE": iree,
    "plain jax.jit": plain_xla,
    "kpx": optimized,
}
