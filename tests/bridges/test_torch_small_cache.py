"""Generating text over a cache in int8: the tokens, how near the keys and values are, and what it takes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kpx
from kpx.bridges.torch.small_cache import Int8Layer
from tests.reference import distance


def _llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.tensor([[3, 17, 99, 5, 64, 2]])
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def test_logits_of_generated_text_are_near_those_over_a_cache_in_f32():
    model = _llama()
    optimized = kpx.optimize(model)
    exact = optimized.generate(IDS, **SETTINGS)
    small = optimized.generate(IDS, cache_precision="int8", **SETTINGS)
    layers = small.past_key_values.layers
    assert all(type(layer) is Int8Layer for layer in layers)
    assert 1e-5 < distance(small.logits[0].double(), exact.logits[0].double()) < 0.01
    held = sum(t.nbytes for x in layers for t in (x.keys, x.values, x.key_scales, x.value_scales))
    wide = sum(t.nbytes for x in exact.past_key_values.layers for t in (x.keys, x.values))
    assert held / wide <= (16 + 4) / (4 * 16) + 1e-6  # heads are 16 wide here
    assert torch.equal(exact.sequences[:, : IDS.shape[1]], small.sequences[:, : IDS.shape[1]])


def test_a_second_call_has_a_cache_of_its_own():
    optimized = kpx.optimize(_llama())
    first = optimized.generate(IDS, cache_precision="int8", **SETTINGS)
    second = optimized.generate(IDS, cache_precision="int8", **SETTINGS)
    plain = optimized.generate(IDS, **SETTINGS)
    assert torch.equal(first.sequences, second.sequences)
    assert type(plain.past_key_values.layers[0]) is not Int8Layer


@pytest.mark.parametrize("odd", [0.0, float("nan"), float("inf"), 1e30])
def test_odd_tokens_are_zeros_nan_or_near(odd):
    layer = Int8Layer(max_cache_len=4)
    x = torch.ones(1, 2, 3, 8)
    x[:, :, 1] = odd
    keys, values = layer.update(x, 2 * x)
    torch.testing.assert_close(keys[:, :, [0, 2]], x[:, :, [0, 2]])
    torch.testing.assert_close(values[:, :, [0, 2]], 2 * x[:, :, [0, 2]])
    assert keys[:, :, 1].isnan().all() if odd != odd or odd == float("inf") else (keys[:, :, 1] == odd).all()
    assert (keys[:, :, 3] == 0).all()


def test_beams_take_their_tokens_and_scales_along():
    layer = Int8Layer(max_cache_len=4)
    x = torch.randn(2, 2, 3, 8)
    keys, _ = layer.update(x, x)
    layer.reorder_cache(torch.tensor([1, 1]))
    swapped, _ = layer.update(x[:, :, :0], x[:, :, :0])
    torch.testing.assert_close(swapped, keys[[1, 1]])
    layer.reset()
    assert (layer.update(x[:, :, :0], x[:, :, :0])[0] == 0).all()


def test_another_precision_is_refused():
    with pytest.raises(kpx.InputError, match="cache_precision='int4'"):
        kpx.optimize(_llama()).generate(IDS, cache_precision="int4", **SETTINGS)
