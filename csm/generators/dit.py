"""Class-conditional diffusion transformers (DiT; Peebles & Xie 2023) as diffusers' DiTPipeline saves them."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import nn
from torch.nn import functional as F

from csm import storage
from csm.errors import InputError
from csm.generators.guidance import guided
from csm.generators.importing import ImportOptions, class_numbers, marking
from csm.generators.latents import decode, read_vae
from csm.generators.noise_levels import VPSchedule, read_schedule
from csm.model_folders import read_config, read_model, write_model


@dataclass(frozen=True)
class DiTSpec:
    """``classes``: the model's class for each class of the data set; ``guidance``: scale (``generator.json``)."""

    classes: tuple[int, ...]
    guidance: float


class SoftLabels(nn.Module):
    """In place of diffusers' LabelEmbedding, which takes integers only: weights of the classes times the same table."""

    def __init__(self, table: torch.Tensor) -> None:
        """``table`` float32 (K_model + 1, E), the last row of no class."""
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, E) of ``weights`` float32 (N, K_model + 1); one-hot weights give the row itself."""
        return (weights @ self.table.float()).to(self.table.dtype)  # the ratio that goes in keeps its digits


class DiTGenerator(nn.Module):
    """``denoise(x, sigma, condition)`` of latent codes, around a DiTTransformer2DModel.

    Every block has a table of classes of its own, so no single vector stands for a class. The condition is the weight of each of the
    model's classes, float32 (N, K_model + 1), the last that of none: one-hot for a class, and a mixture of classes has two weights.
    """

    classes: torch.Tensor
    none: torch.Tensor
    spherical = False
    guides = True

    def __init__(self, transformer: Any, vae: Any, schedule: VPSchedule, spec: DiTSpec) -> None:
        """Take over ``transformer``, a DiTTransformer2DModel, and its AutoencoderKL ``vae``."""
        super().__init__()
        for block in transformer.transformer_blocks:
            embedder = block.norm1.emb
            embedder.class_embedder = SoftLabels(embedder.class_embedder.embedding_table.weight.detach())
        config = transformer.config
        self.transformer, self.vae, self.schedule, self.spec = transformer, vae, schedule, spec
        self.guidance = spec.guidance
        self.noise_shape: tuple[int, int, int] = (config.in_channels, config.sample_size, config.sample_size)
        self.null_class: int = config.num_embeds_ada_norm
        self.register_buffer("classes", torch.tensor(spec.classes))
        self.register_buffer("none", self._one_hot(torch.tensor([self.null_class])))

    @property
    def device(self) -> torch.device:
        return self.classes.device

    @property
    def network(self) -> nn.Module:
        network: nn.Module = self.transformer
        return network

    @property
    def n_classes(self) -> int:
        return len(self.spec.classes)

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.schedule.sigma_range

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """One-hot conditions float32 (N, K_model + 1) of labels int64 (N,)."""
        return self._one_hot(self.classes[labels])

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Estimate of the clean codes float32 (N, C, H, W), guided, from x = clean + sigma * noise.

        Args:
            x: float32 (N, C, H, W).
            sigma: float32 (N,), > 0.
            condition: float32 (N, K_model + 1).
        """
        guide = partial(guided, self._predict, condition=condition, none=self.none, scale=self.guidance)
        return self.schedule.denoise(guide, x, sigma)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images float32 (N, 3, height, width), nominally in [-1, 1], of codes (N, C, H, W)."""
        return decode(self.vae, x)

    def _one_hot(self, classes: torch.Tensor) -> torch.Tensor:
        return F.one_hot(classes, self.null_class + 1).float()

    def _predict(self, z: torch.Tensor, steps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.transformer(z.to(self.transformer.dtype), steps, condition, return_dict=False)[0]
        return output[:, : z.shape[1]].float()  # the learned variance is the second half


def import_dit(path: Path, directory: Path, options: ImportOptions) -> None:
    """Copy the DiTPipeline at ``path`` to ``directory``, its weights as float32 safetensors, ``generator.json`` last.

    Args:
        path: the pipeline's folder (``transformer/``, ``vae/``, ``scheduler/``).
        directory: what ``load_dit`` reads.
        options: ``prompt`` is not used.

    Raises:
        InputError: files are missing, damaged or pickles, or hold other models than those of a DiTPipeline.
    """
    schedule_file = path / "scheduler" / "scheduler_config.json"
    read_schedule(schedule_file)
    transformer = _read_transformer(path / "transformer")
    vae = read_vae(path / "vae", transformer.config.in_channels)
    spec = DiTSpec(class_numbers(options, transformer.config.num_embeds_ada_norm), options.guidance)
    with marking(directory, {"kind": "dit", **asdict(spec)}):
        write_model(transformer, directory / "transformer")
        write_model(vae, directory / "vae")
        storage.write_json(directory / "scheduler" / "scheduler_config.json", read_config(schedule_file))


def load_dit(directory: Path) -> DiTGenerator:
    """Return the generator that ``import_dit`` wrote to ``directory``, in evaluation mode, without gradients."""
    spec = storage.read_record(directory / "generator.json", DiTSpec)
    schedule = read_schedule(directory / "scheduler" / "scheduler_config.json")
    transformer = _read_transformer(directory / "transformer")
    vae = read_vae(directory / "vae", transformer.config.in_channels)
    return DiTGenerator(transformer, vae, schedule, spec).eval().requires_grad_(False)


def _read_transformer(folder: Path) -> Any:
    """The DiTTransformer2DModel in ``folder``; pipelines saved before diffusers 0.28 call it Transformer2DModel."""
    file = folder / "config.json"
    config = read_config(file, ["DiTTransformer2DModel", "Transformer2DModel"])
    if config.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise InputError(f"{file}: norm_type is {config['norm_type']!r}; expected 'ada_norm_zero', that of a DiT")
    transformer = read_model(DiTTransformer2DModel, folder)
    channels, outputs = transformer.config.in_channels, transformer.out_channels
    if outputs not in (channels, 2 * channels):
        raise InputError(f"{file}: {outputs} output channels for {channels} input channels; expected as many or twice as many")
    return transformer
