"""The models that benchmarks and tests run: real architectures, real shapes, and small versions of both."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Case:
    """A model and its inputs.

    Attributes:
        name: what tables call it.
        shape: the inputs in words, at full size.
        build: `small -> (model, named inputs)`; weights and inputs are f32, seeded.
    """

    name: str
    shape: str
    build: Callable[[bool], tuple[torch.nn.Module, dict[str, Any]]]

    def make(
        self, *, small: bool = False, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The model in evaluation mode and its inputs, in a floating dtype."""
        torch.manual_seed(0)
        model, inputs = self.build(small)
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        return model.eval().to(dtype), cast


def _ids(vocabulary: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape)


def _minilm(small):
    from kpx.observe import minilm

    model, tokenizer = minilm.load()
    sentences = minilm.SENTENCES * (1 if small else 2)
    return model, minilm.tokenize(tokenizer, sentences[:4] if small else sentences, 16 if small else 64)


def _bert(small):
    from transformers import BertConfig, BertModel

    sizes = (
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128} if small else {}
    )
    batch, length = (2, 16) if small else (8, 128)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if small:
        mask[0, 10:] = 0
    return BertModel(BertConfig(**sizes)), {"input_ids": _ids(30522, batch, length), "attention_mask": mask}


def _gpt2(small):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512} if small else {}
    config = GPT2Config(use_cache=False, **sizes)
    return GPT2LMHeadModel(config), {"input_ids": _ids(config.vocab_size, 1, 32 if small else 512)}


def _llama(small):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64 if small else 1024,
        intermediate_size=128 if small else 2816,
        num_hidden_layers=2 if small else 8,
        num_attention_heads=8 if small else 16,
        num_key_value_heads=2 if small else 4,
        vocab_size=512 if small else 32000,
        use_cache=False,
    )
    return LlamaForCausalLM(config), {"input_ids": _ids(config.vocab_size, 1, 32 if small else 512)}


class Decoding(torch.nn.Module):
    """A step of decoding: one token, and the keys and values of those before it.

    Inputs: ids `[batch, 1]`; keys and values `[layers, batch, kv_heads, length, size]`. Output: logits `[batch, 1, vocab]`.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, keys, values):
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(keys.shape[0]):
            cache.update(keys[layer], values[layer], layer)
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits


def _llama_decode(small):
    model, _ = _llama(small)
    config = model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, 1, heads, 15 if small else 511, size)
    past = {"keys": torch.randn(shape), "values": torch.randn(shape)}
    return Decoding(model), {"input_ids": _ids(config.vocab_size, 1, 1), **past}


def _vit(small):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = (
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": 64,
            "num_labels": 100,
        }
        if small
        else {}
    )
    side = 64 if small else 224
    return ViTForImageClassification(ViTConfig(**sizes)), {
        "pixel_values": torch.randn(2 if small else 4, 3, side, side)
    }


def _resnet(small):
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "num_labels": 100} if small else {}
    model = ResNetForImageClassification(ResNetConfig(**sizes))
    for module in model.modules():  # statistics of a trained model are neither 0 nor 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    side = 64 if small else 224
    return model, {"pixel_values": torch.randn(2 if small else 4, 3, side, side)}


def _convnext(small):
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, "num_labels": 100} if small else {}
    side = 64 if small else 224
    config = ConvNextConfig(**sizes)
    return ConvNextForImageClassification(config), {"pixel_values": torch.randn(2 if small else 4, 3, side, side)}


def _mlp(small):
    layers = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
    return layers, {"input": torch.randn(8, 256)}


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("minilm", "32 x 64, real weights", _minilm),
        Case("bert", "8 x 128", _bert),
        Case("gpt2", "1 x 512", _gpt2),
        Case("llama", "1 x 512", _llama),
        Case("llama-decode", "1 token after 511", _llama_decode),
        Case("vit", "4 x 3 x 224 x 224", _vit),
        Case("resnet50", "4 x 3 x 224 x 224", _resnet),
        Case("convnext", "4 x 3 x 224 x 224", _convnext),
        Case("mlp", "8 x 256", _mlp),
    )
}
