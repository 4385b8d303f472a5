"""Latent codes and the images that they stand for: diffusers' AutoencoderKL (Rombach et al. 2022, section 3.1)."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from csm.errors import InputError
from csm.model_folders import read_config, read_model


def read_vae(folder: Path, channels: int) -> Any:
    """The AutoencoderKL saved in ``folder``, in float32 (half precision overflows in some), in evaluation mode.

    Args:
        folder: with ``config.json`` and safetensors.
        channels: of the latent codes of the network that it belongs to.

    Raises:
        InputError: files are missing, damaged or pickles, or it is another model than expected.
    """
    file = folder / "config.json"
    read_config(file, ["AutoencoderKL"])
    vae = read_model(AutoencoderKL, folder)
    if vae.config.latent_channels != channels:
        raise InputError(f"{file}: latent codes of {vae.config.latent_channels} channels for a network of {channels}")
    vae.enable_slicing()  # decodes one by one: all images of a batch at once would take gigabytes each, and no less time
    return vae


def decode(vae: Any, x: torch.Tensor) -> torch.Tensor:
    """Images float32 (N, 3, height, width), nominally in [-1, 1], of codes (N, C, H, W) as the network sees them.

    The network saw codes times ``scaling_factor``, which gives them unit variance (Rombach et al. 2022, app. G).
    """
    images: torch.Tensor = vae.decode(x / vae.config.scaling_factor, return_dict=False)[0]
    return images
