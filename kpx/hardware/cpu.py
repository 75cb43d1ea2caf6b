"""The CPU: what it has, and XLA's options for it."""

from __future__ import annotations

import functools
import os
import pathlib
import platform


@functools.cache
def features() -> frozenset[str]:
    """The instruction set extensions that the operating system reports (Linux; empty elsewhere)."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def has_bf16_tiles() -> bool:
    """Whether bf16 products run several times faster than f32 ones (AMX), and not just twice as fast."""
    return "amx_bf16" in features()


# Instruction sets that XLA:CPU can be kept to, oldest first, with XLA's names for them.
ISAS = {"sse4_2": "SSE4_2", "avx": "AVX", "avx2": "AVX2", "avx512": "AVX512", "amx": "AMX"}


def has_wide_vectors() -> bool:
    """Whether the CPU computes 512 bits at a time."""
    return "avx512f" in features()


def has_int8_products() -> bool:
    """Return whether the CPU multiplies bytes into 32-bit sums (VNNI, AMX).

    Without, oneDNN adds pairs of products in 16 bits, which saturates: the results are wrong, and not just rounded.
    """
    return bool(features() & {"avx512_vnni", "avx_vnni", "amx_int8"})


def compiler_options(has_convolutions: bool, has_arctangents: bool, wide_vectors: bool) -> dict[str, str]:
    """XLA:CPU options for a module.

    Which ops XLA hands to YNNPACK one by one: products always; sums only where there are no convolutions,
    because in convolutional networks that breaks up fusions of more worth; convolutions never, since
    Eigen's were faster on every shape of ResNet-50 that was measured.
    """
    kinds = ["INDIVIDUAL_DOT"] if has_convolutions else ["INDIVIDUAL_DOT", "REDUCE"]
    options = {"xla_cpu_experimental_ynn_fusion_type": ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds)}
    # At 512 bits LLVM miscompiles an arctangent (atan2 with a constant second operand): errors near pi.
    if wide_vectors and not has_arctangents:
        options["xla_cpu_prefer_vector_width"] = "512"  # LLVM's default is 256; gelu and shifted sums gain a fifth
    return options


def model() -> str:
    """The CPU's name, as the operating system gives it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def memory_bytes() -> int | None:
    """The machine's memory; None where the operating system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
