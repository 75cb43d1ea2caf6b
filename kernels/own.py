"""kpx's own kernels and patterns: they are registered when this is imported."""
# ruff: noqa: F401

from kpx.kernels import (
    activation,
    attention_cpu,
    attention_decode,
    attention_gpu,
    attention_spellings,
    attention_tpu,
    grouped_matmul,
    grouped_matmul_gpu,
    grouped_matmul_tpu,
    linear_cross_entropy_spellings,
    norm_gpu,
    norm_spellings,
    paged_attention,
)
