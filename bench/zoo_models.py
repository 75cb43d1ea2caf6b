"""Small models of many architectures: transformers' own classes, seeded random weights, real shapes in small."""

from __future__ import annotations

import os
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What makes a configuration small, wherever it has such a field.
SMALL = {
    "hidden_size": 32, "d_model": 32, "dim": 32, "n_embd": 32, "embed_dim": 32, "embedding_size": 32, "d_kv": 8,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_encoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4, "num_heads": 4, "n_head": 4,
    "n_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "d_ff": 64, "hidden_dim": 64, "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "n_inner": 64, "vocab_size": 99, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "image_size": 32, "patch_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "forced_eos_token_id": None, "sep_token_id": 3, "max_source_positions": 64,
    "max_target_positions": 64, "projection_dim": 16, "layer_types": None,
}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "image_size": 32, "patch_size": 8}  # fmt: skip
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 99, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_SPEECH = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2),
           "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
           "apply_spec_augment": False}  # fmt: skip

# family -> {model type: overrides}. Inputs follow the family, see `_inputs`.
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "encoder": {
        "bert": {}, "roberta": {}, "distilbert": {}, "albert": {"embedding_size": 16}, "electra": {}, "mpnet": {},
        "deberta-v2": {}, "deberta": {}, "modernbert": {}, "camembert": {}, "xlm-roberta": {}, "ernie": {},
        "squeezebert": {"embedding_size": 32}, "fnet": {}, "roformer": {"embedding_size": 32}, "megatron-bert": {},
        "rembert": {"input_embedding_size": 32}, "layoutlm": {}, "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 16},
        "convbert": {"embedding_size": 32}, "ibert": {}, "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16},
    },
    "decoder": {
        "gpt2": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4}, "gpt_neox": {},
        "gptj": {"rotary_dim": 4}, "opt": {"word_embed_proj_dim": 32}, "bloom": {}, "llama": {}, "mistral": {}, "qwen2": {},
        "qwen3": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "phi": {"num_key_value_heads": 4}, "phi3": {}, "falcon": {},
        "mpt": {}, "stablelm": {}, "olmo": {}, "olmo2": {}, "starcoder2": {}, "cohere": {}, "granite": {},
        "codegen": {"rotary_dim": 4}, "persimmon": {}, "smollm3": {}, "glm": {}, "biogpt": {}, "xglm": {"attention_heads": 4},
        "helium": {}, "mamba": {"state_size": 4},
    },
    "mixture of experts": {
        "mixtral": {}, "qwen2_moe": {}, "qwen3_moe": {}, "olmoe": {}, "phimoe": {}, "granitemoe": {}, "gpt_oss": {},
        "deepseek_v3": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
                        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    },
    "encoder-decoder": {
        "bart": {}, "t5": {}, "mt5": {}, "mbart": {}, "pegasus": {}, "marian": {}, "blenderbot": {}, "m2m_100": {},
        "plbart": {}, "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    },
    "vision": {
        "vit": {}, "deit": {}, "beit": {}, "dinov2": {}, "dinov2_with_registers": {}, "data2vec-vision": {}, "ijepa": {},
        "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 2},
        "swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 2},
        "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "patch_size": 4},
        "convnextv2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "patch_size": 4},
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "bottleneck"},
        "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
        "mobilenet_v1": {"depth_multiplier": 0.25}, "mobilenet_v2": {"depth_multiplier": 0.25},
        "segformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
                      "sr_ratios": [8, 4, 2, 1], "patch_size": None},
        "poolformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
        "pvt": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
        "focalnet": {"embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3],
                     "hidden_sizes": [16, 32], "patch_size": 4},
    },
    "speech": {
        "wav2vec2": _SPEECH, "hubert": _SPEECH, "unispeech": _SPEECH, "wavlm": _SPEECH,
        "data2vec-audio": {**_SPEECH, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
        "whisper": {"num_mel_bins": 8, "max_source_positions": 32},
        "speech_to_text": {"input_feat_per_channel": 8, "conv_channels": 16, "input_channels": 1},
        "audio-spectrogram-transformer": {"num_mel_bins": 16, "max_length": 32, "patch_size": 8},
    },
    "multimodal": {
        "clip": {"text_config": _TEXT, "vision_config": _VISION},
        "siglip": {"text_config": _TEXT, "vision_config": _VISION},
        "chinese_clip": {"text_config": _TEXT, "vision_config": _VISION},
        "blip": {"text_config": {**_TEXT, "encoder_hidden_size": 32}, "vision_config": _VISION},
        "vilt": {}, "visual_bert": {"visual_embedding_dim": 16}, "altclip": {"text_config": {**_TEXT, "project_dim": 32}, "vision_config": _VISION},
        "llava": {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": {"model_type": "clip_vision_model", **_VISION},
                  "image_token_index": 98},
    },
}  # fmt: skip

# Those that are trained for a step as well.
TRAINED = [
    "bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "modernbert", "gpt2", "opt", "llama", "qwen2",
    "gemma", "phi", "gpt_neox", "mixtral", "bart", "t5", "vit", "convnext", "resnet", "swin", "wav2vec2", "whisper", "clip",
]  # fmt: skip


def family_of(name: str) -> str:
    return next(family for family, models in FAMILIES.items() if name in models)


def build(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A small model in evaluation mode, and named inputs for it."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    family = family_of(name)
    given = FAMILIES[family][name]
    torch.manual_seed(0)
    base = AutoConfig.for_model(name)
    config = AutoConfig.for_model(name, **{**_small(base), **given})
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            part.use_cache = False
    make = AutoModelForCausalLM if family in ("decoder", "mixture of experts") else AutoModel
    model = make.from_config(config).eval()
    return model, _inputs(name, family, config)


def _small(base: Any) -> dict[str, Any]:
    """The sizes of `SMALL` that a configuration has; what it keeps as a list, one for each stage, stays."""
    found = {}
    for key, value in SMALL.items():
        held = getattr(base, key, None)
        computed = isinstance(getattr(type(base), key, None), property)
        staged = hasattr(base, "num_stages") and key in ("num_hidden_layers", "num_layers")
        listed = isinstance(held, (list, tuple)) and key != "layer_types"
        unknown = key == "layer_types" and (held is None or not hasattr(base, "num_attention_heads"))
        if hasattr(base, key) and not (computed or staged or listed or unknown):
            found[key] = value
    return found


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, 90, shape, generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _inputs(name: str, family: str, config: Any) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 16, dtype=torch.int64)
    if family in ("encoder", "decoder", "mixture of experts"):
        return (
            {"input_ids": _ids(2, 16)}
            if name in ("fnet", "mamba")
            else {"input_ids": _ids(2, 16), "attention_mask": mask}
        )
    if family == "encoder-decoder":
        return {"input_ids": _ids(2, 16), "attention_mask": mask, "decoder_input_ids": _ids(2, 8)}
    if family == "vision":
        size = 64 if name in ("convnext", "convnextv2", "resnet", "regnet", "mobilenet_v1", "mobilenet_v2", "segformer",
                              "poolformer", "efficientnet") else 32  # fmt: skip
        return {"pixel_values": _noise(2, 3, size, size)}
    if family == "speech":
        return _speech(name)
    return _multimodal(name, mask)


def _speech(name: str) -> dict[str, torch.Tensor]:
    if name == "whisper":
        return {"input_features": _noise(2, 8, 64), "decoder_input_ids": _ids(2, 8)}
    if name == "speech_to_text":
        return {"input_features": _noise(2, 32, 8), "decoder_input_ids": _ids(2, 8)}
    if name == "audio-spectrogram-transformer":
        return {"input_values": _noise(2, 32, 16)}
    return {"input_values": _noise(2, 800)}


def _multimodal(name: str, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    if name == "visual_bert":
        return {"input_ids": _ids(2, 16), "attention_mask": mask, "visual_embeds": _noise(2, 4, 16)}
    if name == "llava":
        ids = _ids(2, 24)
        ids[:, 2:18] = 98
        return {
            "input_ids": ids,
            "pixel_values": _noise(2, 3, 32, 32),
            "attention_mask": torch.ones(2, 24, dtype=torch.int64),
        }
    pictures = {"pixel_values": _noise(2, 3, 32, 32)}
    if name == "siglip":
        return {"input_ids": _ids(2, 16), **pictures}
    return {"input_ids": _ids(2, 16), "attention_mask": mask, **pictures}
