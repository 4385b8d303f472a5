"""CLIP (Radford et al. 2021) as transformers saves it: its image half as an encoder, its text half for zero-shot classification."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csm.encoders.preprocessing import read_preprocessing
from csm.encoders.sources import Sources
from csm.encoders.vision import Vision
from csm.errors import InputError
from csm.model_folders import find_folder, model_type, read_model, read_tokenizer

CLIP = "openai/clip-vit-base-patch32"  # the paper's encoder
TEXTS = 256  # texts in the network together


class ImageEmbedding(nn.Module):
    """Pixels (N, C, h, w) -> embeddings (N, F) in the space that images and texts share, not normalised (Luo et al. 2025)."""

    def __init__(self, vision_model: nn.Module, visual_projection: nn.Module) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = vision_model, visual_projection

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)
        return embedding


def load_clip(sources: Sources, path: str = CLIP, precision: str = "auto") -> Vision:
    """The image half of the CLIP model at ``path``.

    Args:
        path: a folder that CLIPModel or CLIPVisionModelWithProjection of transformers was saved to, with ``preprocessor_config.json``;
            or its name on the Hugging Face hub.
        precision: "auto", "float32" or "bfloat16" (``Vision``).

    Raises:
        InputError: there is no such model, a file is missing or damaged, or the model is of another kind.
    """
    from transformers import CLIPModel, CLIPVisionModelWithProjection  # takes seconds; only who needs it pays

    folder = find_folder(path)
    model = _read(folder, {"clip": CLIPModel, "clip_vision_model": CLIPVisionModelWithProjection})
    config = model.vision_model.config
    network = ImageEmbedding(model.vision_model, model.visual_projection)
    preprocessing = read_preprocessing(folder, config.num_channels)
    return Vision("clip", network, preprocessing, config.num_channels, config.image_size, fixed=True, precision=precision)


def check_clip(path: str = CLIP, precision: str = "auto") -> None:
    """``InputError`` if there is no CLIP at ``path``; nothing is loaded."""
    model_type(find_folder(path), ("clip", "clip_vision_model"))


@torch.no_grad()
def encode_texts(path: str, texts: Sequence[str]) -> tuple[torch.Tensor, float]:
    """Embeddings float32 (T, F) of ``texts``, not normalised, and the number by which the model multiplies cosines to get logits.

    Args:
        path: as of ``load_clip``, of a whole CLIPModel, with its tokenizer.

    Raises:
        InputError: as ``load_clip``; or a text is longer than the model reads.
    """
    from transformers import CLIPModel

    folder = find_folder(path)
    tokenizer = read_tokenizer(folder)
    model = _read(folder, {"clip": CLIPModel})
    length = min(tokenizer.model_max_length, model.text_model.config.max_position_embeddings)
    embeddings = []
    for first in range(0, len(texts), TEXTS):
        batch = list(texts[first : first + TEXTS])
        inputs = tokenizer(batch, padding=True, return_tensors="pt")
        if inputs.input_ids.shape[1] > length:
            text, tokens = max(zip(batch, inputs.attention_mask.sum(dim=1).tolist(), strict=True), key=lambda pair: pair[1])
            raise InputError(f"prompt: {text!r} has {tokens} tokens; the model reads {length}")
        pooled = model.text_model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).pooler_output
        embeddings.append(model.text_projection(pooled))
    return torch.cat(embeddings), float(model.logit_scale.exp())


def _read(folder: Path, kinds: dict[str, Any]) -> Any:
    """The model in ``folder``, of a class of ``kinds`` by the model type in its configuration."""
    return read_model(kinds[model_type(folder, kinds)], folder, weights="model")
