"""kpx's own kernels and patterns: they are registered when this is imported."""
# ruff: noqa: F401

from kpx.kernels import (
    activation,
    attention_cpu,
    attention_cudnn,
    attention_decode,
    attention_gpu,
    attention_spellings,
    attention_tokamax,
    attention_tpu,
    group_norm_gpu,
    group_norm_spellings,
    grouped_matmul,
    grouped_matmul_gpu,
    grouped_matmul_tpu,
    linear_cross_entropy_spellings,
    linear_gpu,
    linear_spellings,
    linear_tpu,
    norm_gpu,
    norm_spellings,
    paged_attention,
    rotary_spellings,
    rotary_tpu,
    separable_gpu,
    separable_spellings,
)
