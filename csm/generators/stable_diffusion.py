"""Stable Diffusion (Rombach et al. 2022) as diffusers' StableDiffusionPipeline saves it; a class is the prompt that names it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from csm import storage
from csm.errors import InputError
from csm.generators.guidance import guided
from csm.generators.importing import ImportOptions, marking
from csm.generators.latents import decode, read_vae
from csm.generators.noise_levels import VPSchedule, read_schedule
from csm.model_folders import read_config, read_model, read_tokenizer, write_model


@dataclass(frozen=True)
class StableDiffusionSpec:
    """``prompts``: of the classes, in order; ``guidance``: scale (``generator.json``)."""

    prompts: tuple[str, ...]
    guidance: float


class StableDiffusionGenerator(nn.Module):
    """``denoise(x, sigma, condition)`` of latent codes, around a UNet2DConditionModel.

    The condition is the text encoder's output for the prompt of a class, float32 (N, T, D), T tokens of D numbers; a mixture of classes
    is a mixture of these.
    """

    prompts: torch.Tensor
    spherical = True
    guides = True

    def __init__(self, unet: Any, vae: Any, schedule: VPSchedule, prompts: torch.Tensor, spec: StableDiffusionSpec) -> None:
        """``prompts`` float32 (K + 1, T, D): encoded, one for each class, then the empty one."""
        super().__init__()
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.noise_shape: tuple[int, int, int] = (unet.config.in_channels, height, width)
        self.unet, self.vae, self.schedule, self.spec = unet, vae, schedule, spec
        self.guidance = spec.guidance
        self.register_buffer("prompts", prompts)

    @property
    def device(self) -> torch.device:
        return self.prompts.device

    @property
    def network(self) -> nn.Module:
        network: nn.Module = self.unet
        return network

    @property
    def n_classes(self) -> int:
        return len(self.prompts) - 1

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.schedule.sigma_range

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """Encoded prompts float32 (N, T, D) of labels int64 (N,)."""
        return self.prompts[:-1][labels]

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Estimate of the clean codes float32 (N, C, H, W), guided, from x = clean + sigma * noise.

        Args:
            x: float32 (N, C, H, W).
            sigma: float32 (N,), > 0.
            condition: float32 (N, T, D).
        """
        none = self.prompts[-1:]
        return self.schedule.denoise(lambda z, t: guided(self._predict, z, t, condition, none, self.guidance), x, sigma)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images float32 (N, 3, height, width), nominally in [-1, 1], of codes (N, C, H, W)."""
        return decode(self.vae, x)

    def _predict(self, z: torch.Tensor, steps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        dtype = self.unet.dtype
        output: torch.Tensor = self.unet(z.to(dtype), steps, condition.to(dtype), return_dict=False)[0]
        return output.float()


def import_stable_diffusion(path: Path, directory: Path, options: ImportOptions) -> None:
    """Copy UNet and VAE of the pipeline at ``path`` to ``directory`` and encode the prompts there, ``generator.json`` last.

    Args:
        path: the pipeline's folder (``unet/``, ``vae/``, ``text_encoder/``, ``tokenizer/``, ``scheduler/``).
        directory: what ``load_stable_diffusion`` reads; text encoder and tokenizer are not needed there.
        options: ``classes`` must be empty, the model has no class numbers.

    Raises:
        InputError: files are missing, damaged or pickles; the pipeline is not Stable Diffusion 1 or 2; a prompt cannot be used.
    """
    if options.classes:
        raise InputError(
            "generator.classes: Stable Diffusion has prompts, not numbers, for classes: set generator.prompt instead"
        )
    if "{}" not in options.prompt:
        raise InputError(f"generator.prompt: expected a text with {{}} for the class name, got {options.prompt!r}")
    index = path / "model_index.json"
    encoder = read_config(index, ["StableDiffusionPipeline"]).get("text_encoder")
    if encoder != ["transformers", "CLIPTextModel"]:
        raise InputError(f"{index}: text_encoder is {encoder}; expected CLIPTextModel of transformers")
    schedule_file = path / "scheduler" / "scheduler_config.json"
    read_schedule(schedule_file)
    _check_unet(path / "unet" / "config.json")
    spec = StableDiffusionSpec(tuple(options.prompt.replace("{}", name) for name in options.class_names), options.guidance)
    encoded = encode_prompts(path, [*spec.prompts, ""])
    unet = read_model(UNet2DConditionModel, path / "unet")
    if unet.config.cross_attention_dim != encoded.shape[2]:
        raise InputError(
            f"{path}: the text encoder gives {encoded.shape[2]} numbers, the UNet takes {unet.config.cross_attention_dim}"
        )
    vae = read_vae(path / "vae", unet.config.in_channels)
    with marking(directory, {"kind": "stable-diffusion", **asdict(spec)}):
        write_model(unet, directory / "unet")
        write_model(vae, directory / "vae")
        storage.write_json(directory / "scheduler" / "scheduler_config.json", read_config(schedule_file))
        storage.write_tensors(directory / "prompts.safetensors", {"prompts": encoded})


def load_stable_diffusion(directory: Path) -> StableDiffusionGenerator:
    """Return the generator that ``import_stable_diffusion`` wrote to ``directory``, in evaluation mode, without gradients."""
    spec = storage.read_record(directory / "generator.json", StableDiffusionSpec)
    schedule = read_schedule(directory / "scheduler" / "scheduler_config.json")
    _check_unet(directory / "unet" / "config.json")
    unet = read_model(UNet2DConditionModel, directory / "unet")
    vae = read_vae(directory / "vae", unet.config.in_channels)
    file = directory / "prompts.safetensors"
    prompts = storage.read_tensors(file).get("prompts")
    if prompts is None or prompts.ndim != 3 or len(prompts) != len(spec.prompts) + 1:
        raise InputError(f"{file} does not hold the {len(spec.prompts) + 1} prompts: import the generator again")
    return StableDiffusionGenerator(unet, vae, schedule, prompts, spec).eval().requires_grad_(False)


@torch.no_grad()
def encode_prompts(path: Path, prompts: list[str]) -> torch.Tensor:
    """What the UNet of the pipeline at ``path`` sees of ``prompts``, float32 (P, T, D), as StableDiffusionPipeline.encode_prompt.

    Raises:
        InputError: a file is missing or damaged, or a prompt is longer than the T tokens of the text encoder.
    """
    tokenizer = read_tokenizer(path / "tokenizer")
    encoder = read_model(CLIPTextModel, path / "text_encoder", weights="model")
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    for prompt, tokens in zip(prompts, tokenizer(prompts).input_ids, strict=True):
        if len(tokens) > length:
            raise InputError(f"generator.prompt: {prompt!r} has {len(tokens)} tokens; the model reads {length}")
    inputs = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
    mask = inputs.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    encoded: torch.Tensor = encoder(inputs.input_ids, attention_mask=mask)[0]
    return encoded


def _check_unet(file: Path) -> None:
    """``InputError`` unless the UNet is conditioned on a step and a text alone, and predicts as many channels as it takes."""
    config = read_config(file, ["UNet2DConditionModel"])
    others = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
    for name in others:  # SDXL, upscalers, image prompts, consistency models, ...
        if config.get(name) is not None:
            raise InputError(f"{file}: {name} is {config[name]!r}; expected null, a UNet that takes text alone")
    if config.get("time_embedding_type", "positional") != "positional":
        raise InputError(f"{file}: time_embedding_type is {config['time_embedding_type']!r}; expected 'positional'")
    if config.get("sample_size") is None:
        raise InputError(f"{file}: sample_size is null; expected the height and width of the latent codes")
    channels, outputs = config.get("in_channels", 4), config.get("out_channels", 4)
    if outputs != channels:  # inpainting and depth models take more than they give
        raise InputError(f"{file}: {outputs} output channels for {channels} input channels; expected as many")
