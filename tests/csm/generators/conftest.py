"""Folders of tiny models with random weights, as diffusers and transformers save them."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
TOKENS = 12  # that the tiny text encoder reads


def vae() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=8, scaling_factor=0.2, **blocks
    )


@pytest.fixture(scope="session")
def unet_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDPMPipeline's folder: 4 classes, images of 3 channels, 8 by 4, with a learned variance."""
    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=(8, 4),
        out_channels=6,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=4,
    )
    folder = tmp_path_factory.mktemp("unet-pipeline")
    DDPMPipeline(unet, DDIMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dit_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiTPipeline's folder: 5 classes, codes of 4 channels, 4 by 4, with a learned variance."""
    torch.manual_seed(2)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        sample_size=4,
        num_embeds_ada_norm=5,
    )
    folder = tmp_path_factory.mktemp("dit-pipeline")
    DiTPipeline(transformer, vae(), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stable_diffusion_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline's folder that spells its words; codes of 4 channels, 4 by 4."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("stable-diffusion-pipeline")
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "words").mkdir()
    (folder / "words" / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
    )
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
