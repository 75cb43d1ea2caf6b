"""Fused operations for JAX users: each is one op of the module, and becomes its best kernel for the target, or plain XLA.

They can be jitted, differentiated as often as wanted, vmapped. Under `kpx.jit` and `kpx.compile` a kernel that the target
has takes their place, forward and backward; anywhere else they are plain JAX. `kpx.Compiled.kernels` says what was chosen.
"""

from kpx.kernels.activation import gelu
from kpx.kernels.attention import attention
from kpx.kernels.group_norm import group_norm
from kpx.kernels.grouped_matmul import grouped_matmul
from kpx.kernels.linear import gated_linear, linear
from kpx.kernels.linear_cross_entropy import linear_cross_entropy
from kpx.kernels.mixture import mixture_of_experts
from kpx.kernels.norm import layer_norm, rms_norm
from kpx.kernels.paged_attention import paged_attention
from kpx.kernels.rotary import rotary
from kpx.kernels.separable import separable_conv

__all__ = [
    "attention", "gated_linear", "gelu", "group_norm", "grouped_matmul", "layer_norm", "linear",
    "linear_cross_entropy", "mixture_of_experts", "paged_attention", "rms_norm", "rotary", "separable_conv",
]  # fmt: skip
