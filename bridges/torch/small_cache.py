"""Hugging Face's static cache with its keys and values in int8."""

from __future__ import annotations

import torch
from transformers.cache_utils import StaticLayer


class Int8Layer(StaticLayer):
    """A layer's keys and values in int8, each token's and head's by a scale of its own, symmetric, rounded to nearest even.

    A quarter of f32's bytes, half of bf16's, and a scale of 4 bytes for each token and head. What holds an infinity or a NaN has
    a scale of NaN. What attention is given is widened at each step.
    """

    key_scales: torch.Tensor
    value_scales: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the buffers, once shapes are known."""
        self.dtype = key_states.dtype
        super().lazy_initialization(key_states.to(torch.int8), value_states.to(torch.int8))
        shape = (self.batch_size, self.num_heads, self.max_cache_len, 1)
        self.key_scales, self.value_scales = (torch.zeros(shape, device=self.device) for _ in range(2))
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.key_scales)
            torch._dynamo.mark_static_address(self.value_scales)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps more tokens `[batch, heads, tokens, width]`; gives all keys and values, widened."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        places = torch.arange(count, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(count)
        for numbers, scales, given in (
            (self.keys, self.key_scales, key_states),
            (self.values, self.value_scales, value_states),
        ):
            small, by = _quantized(given)
            numbers.index_copy_(2, places, small)
            scales.index_copy_(2, places, by)
        keys, values = self.keys.float() * self.key_scales, self.values.float() * self.value_scales
        return keys.to(self.dtype), values.to(self.dtype)

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()
        if self.is_initialized:
            self.key_scales.zero_()
            self.value_scales.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Gives each beam the tokens of the one that it came from."""
        super().reorder_cache(beam_idx)
        if self.is_initialized:
            self.key_scales = self.key_scales.index_select(0, beam_idx.to(self.device))
            self.value_scales = self.value_scales.index_select(0, beam_idx.to(self.device))


def _quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(x.isfinite().all(-1, keepdim=True), scale, torch.full_like(scale, float("nan")))
    by = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return torch.nan_to_num(x * by, 0.0, 0.0, 0.0).round().to(torch.int8), scale
