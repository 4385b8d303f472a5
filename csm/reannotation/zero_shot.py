"""CLIP as a classifier of the names of the classes (Radford et al. 2021, section 3.1)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from csm import storage
from csm.encoders.clip import CLIP, encode_texts
from csm.errors import InputError
from csm.reannotation.heads import FitInputs, check_size


class ZeroShot(nn.Module):
    """Features (N, F) -> log softmax of scale * cosine with each class's text, (N, K)."""

    texts: torch.Tensor
    scale: torch.Tensor

    def __init__(self, texts: torch.Tensor, scale: torch.Tensor) -> None:
        """``texts`` float32 (K, F), of length 1; ``scale`` float32 ()."""
        super().__init__()
        self.register_buffer("texts", texts)
        self.register_buffer("scale", scale)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        check_size(features, self.texts.shape[1], "zero-shot")
        return (self.scale * F.normalize(features, dim=1) @ self.texts.T).log_softmax(dim=1)


def fit_zero_shot(directory: Path, inputs: FitInputs, prompt: str = "a photo of a {}.") -> None:
    """Keep the text embedding of each class and the model's scale in ``directory``.

    Args:
        inputs: ``encoder["path"]`` is the CLIP model that the features come from.
        prompt: with {} for the name of a class. Several, separated by "|", are averaged: the mean of their embeddings, each of length 1,
            brought to length 1 again (section 3.1.4).

    Raises:
        InputError: a prompt has no {} or is too long, or the model is none of CLIP, not whole or not that of the features.
    """
    prompts = [text.strip() for text in prompt.split("|")]
    for text in prompts:
        if "{}" not in text:
            raise InputError(f"prompt: expected a text with {{}} for the class name, got {text!r}")
    path = str(inputs.encoder.get("path", CLIP))
    sentences = [text.replace("{}", name) for name in inputs.class_names for text in prompts]
    embeddings, scale = encode_texts(path, sentences)  # (K * prompts, F)
    if embeddings.shape[1] != inputs.features.size:
        raise InputError(
            f"zero-shot: the texts of {path} have {embeddings.shape[1]} numbers, the features of the images {inputs.features.size}: "
            "take the encoder clip with the same path"
        )
    texts = F.normalize(embeddings, dim=1).unflatten(0, (-1, len(prompts))).mean(dim=1)  # (K, F)
    storage.write_tensors(_file(directory), {"texts": F.normalize(texts, dim=1), "scale": torch.tensor(scale)})


def load_zero_shot(directory: Path) -> ZeroShot:
    """Return what ``fit_zero_shot`` kept."""
    tensors = storage.read_tensors(_file(directory))
    return ZeroShot(tensors["texts"], tensors["scale"])


def _file(directory: Path) -> Path:
    return directory / "texts.safetensors"
