"""GPUs: what XLA's compiler must be told of one that is not here."""

from __future__ import annotations

import json

from kpx.hardware.chips import Chip

# The CUDA plugin checks for a driver and for cuDNN as it registers; compiling needs neither.
ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


def topology(chip: Chip, hosts: int, each: int) -> tuple[str, dict]:
    """A cluster's name, which has no meaning, and the options that describe it."""
    return "", {"topology": f"1x{hosts}x{each}", "target_config": target_config(chip)}


def target_config(chip: Chip) -> str:
    """The device as XLA's `stream_executor.GpuTargetConfigProto`, in text form."""
    c = chip.compiler
    platform, prefix = ("SYCL", "oneapi") if chip.platform == "xpu" else (chip.platform.upper(), chip.platform)
    capability = " ".join(f"{name}: {json.dumps(value)}" for name, value in c["capability"].items())
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: {c["warp"]} threads_per_core_limit: 2048
  shared_memory_per_block: {c["shared_per_block"]} shared_memory_per_core: {c["shared_per_core"]}
  shared_memory_per_block_optin: {c["shared_optin"]}
  core_count: {chip.cores} fpus_per_core: {c["fpus_per_core"]}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {c["l2"]} clock_rate_ghz: {chip.clock / 1e9}
  device_memory_size: {chip.memory}
  registers_per_core_limit: {c["registers"]} registers_per_block_limit: {c["registers"]}
  {prefix}_compute_capability {{ {capability} }}
}}
platform_name: "{platform}"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.device_kinds[0]}"
"""
