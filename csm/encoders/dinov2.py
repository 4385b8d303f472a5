"""DINOv2 (Oquab et al. 2024) as transformers saves it."""

import torch
from torch import nn

from csm.encoders.preprocessing import read_preprocessing
from csm.encoders.sources import Sources
from csm.encoders.vision import Vision
from csm.model_folders import find_folder, model_type, read_model

DINOV2 = "facebook/dinov2-base"


class ClassToken(nn.Module):
    """Pixels (N, C, h, w) -> class tokens (N, F) after the last layer's norm.

    Its authors classify with this token alone by nearest neighbours, and use it for their linear probes: what it says of the
    image as a whole needs no further training, unlike the patch tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        token: torch.Tensor = self.model(pixel_values=pixels).pooler_output
        return token


def load_dinov2(sources: Sources, path: str = DINOV2, precision: str = "auto") -> Vision:
    """The DINOv2 model at ``path``.

    Args:
        path: a folder that Dinov2Model of transformers was saved to, with ``preprocessor_config.json``; or its name on the Hugging Face
            hub.
        precision: "auto", "float32" or "bfloat16" (``Vision``).

    Raises:
        InputError: there is no such model, a file is missing or damaged, or the model is of another kind.
    """
    from transformers import Dinov2Model  # takes seconds; only who needs it pays

    folder = find_folder(path)
    model_type(folder, ("dinov2",))
    model = read_model(Dinov2Model, folder, weights="model")
    preprocessing = read_preprocessing(folder, model.config.num_channels)
    return Vision(
        "dinov2",
        ClassToken(model),
        preprocessing,
        model.config.num_channels,
        model.config.image_size,
        fixed=False,  # it interpolates its positions
        precision=precision,
    )


def check_dinov2(path: str = DINOV2, precision: str = "auto") -> None:
    """``InputError`` if there is no DINOv2 at ``path``; nothing is loaded."""
    model_type(find_folder(path), ("dinov2",))
