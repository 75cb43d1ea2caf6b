"""Fused operations for JAX users: each is one op of the module, and becomes its best kernel for the target, or plain XLA.

They can be jitted, differentiated as often as wanted, vmapped. Under `kpx.jit` and `kpx.compile` a kernel that the target
has takes their place, forward and backward; anywhere else they are plain JAX. `kpx.Compiled.kernels` says what was chosen.
"""

from kpx.kernels.activation import gelu
from kpx.kernels.attention import attention
from kpx.kernels.grouped_matmul import grouped_matmul
from kpx.kernels.linear_cross_entropy import linear_cross_entropy
from kpx.kernels.norm import layer_norm, rms_norm
from kpx.kernels.paged_attention import paged_attention

__all__ = [
    "attention", "gelu", "grouped_matmul", "layer_norm", "linear_cross_entropy", "paged_attention", "rms_norm",
]  # fmt: skip
