"""A class-conditional UNet2DModel that somebody trained with diffusers."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from csm import storage
from csm.errors import InputError
from csm.generators.importing import ImportOptions, class_numbers, marking
from csm.generators.noise_levels import VPSchedule, read_schedule
from csm.model_folders import read_config, read_model, write_model


@dataclass(frozen=True)
class DiffusersUNetSpec:
    """``classes``: the model's class for each class of the data set (``generator.json``)."""

    classes: tuple[int, ...]


class DiffusersUNetGenerator(nn.Module):
    """``denoise(x, sigma, condition)`` around a UNet2DModel of pixels in [-1, 1].

    The condition is the vector that the model's own table holds for a class and adds to the embedding of the step: the table is taken
    out of the model, whose place for it then passes vectors through, so that a mixture of classes is a mixture of vectors.
    """

    table: torch.Tensor
    spherical = True
    guides, guidance = False, 1.0

    def __init__(self, unet: Any, schedule: VPSchedule, spec: DiffusersUNetSpec) -> None:
        """Take over ``unet``, a UNet2DModel that ``_check`` accepts."""
        super().__init__()
        self.register_buffer("table", unet.class_embedding.weight.detach()[list(spec.classes)])  # (K, E)
        unet.class_embedding = nn.Identity()
        self.unet = unet
        self.schedule = schedule
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.noise_shape: tuple[int, int, int] = (unet.config.in_channels, height, width)

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def network(self) -> nn.Module:
        network: nn.Module = self.unet
        return network

    @property
    def n_classes(self) -> int:
        return len(self.table)

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.schedule.sigma_range

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """Condition vectors float32 (N, E) of labels int64 (N,)."""
        return self.table[labels]

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Estimate of the clean images float32 (N, C, H, W), from x = clean + sigma * noise.

        Args:
            x: float32 (N, C, H, W).
            sigma: float32 (N,), > 0.
            condition: float32 (N, E).
        """

        def network(z: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.unet(z.to(self.unet.dtype), steps, class_labels=condition, return_dict=False)[0]
            return output[:, : z.shape[1]].float()  # a learned variance would be the second half

        return self.schedule.denoise(network, x, sigma)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself: the model works on pixels."""
        return x


def import_diffusers_unet(path: Path, directory: Path, options: ImportOptions) -> None:
    """Copy the model at ``path`` to ``directory``, its weights as float32 safetensors, ``generator.json`` last.

    Args:
        path: a pipeline's folder (``unet/``, ``scheduler/``), or a UNet's folder with ``scheduler_config.json`` in it or beside it.
        directory: what ``load_diffusers_unet`` reads.
        options: ``guidance`` must be 1: nothing in these models says which class, if any, stands for none.

    Raises:
        InputError: files are missing, damaged or pickles; the model has no classes, or another schedule or output than supported.
    """
    if options.guidance != 1:
        raise InputError(f"generator.guidance: a UNet2DModel has no class for 'none': expected 1, got {options.guidance}")
    index = path / "model_index.json"
    if index.exists() and (coders := {"vae", "vqvae"} & read_config(index).keys()):
        raise InputError(f"{index}: a UNet2DModel in the latent space of a {coders.pop()} cannot be used; expected one of pixels")
    unet_folder = path / "unet" if (path / "unet").is_dir() else path
    _check(unet_folder)
    schedule_file = _schedule_file(path, unet_folder)
    read_schedule(schedule_file)
    unet = read_model(UNet2DModel, unet_folder)
    spec = DiffusersUNetSpec(class_numbers(options, unet.config.num_class_embeds))
    with marking(directory, {"kind": "diffusers-unet", **asdict(spec)}):
        write_model(unet, directory / "unet")
        storage.write_json(directory / "scheduler" / "scheduler_config.json", read_config(schedule_file))


def load_diffusers_unet(directory: Path) -> DiffusersUNetGenerator:
    """Return the generator that ``import_diffusers_unet`` wrote to ``directory``, in evaluation mode, without gradients."""
    spec = storage.read_record(directory / "generator.json", DiffusersUNetSpec)
    _check(directory / "unet")
    unet = read_model(UNet2DModel, directory / "unet")
    generator = DiffusersUNetGenerator(unet, read_schedule(directory / "scheduler" / "scheduler_config.json"), spec)
    return generator.eval().requires_grad_(False)


def _schedule_file(path: Path, unet_folder: Path) -> Path:
    """The ``scheduler_config.json`` of the model at ``path``."""
    folders = [path / "scheduler"] if unet_folder != path else [path, path.parent, path.parent / "scheduler"]
    for folder in folders:
        if (folder / "scheduler_config.json").exists():
            return folder / "scheduler_config.json"
    raise InputError(f"{path}: no scheduler_config.json; expected it in {' or '.join(map(str, folders))}")


def _check(folder: Path) -> None:
    """``InputError`` unless the UNet2DModel in ``folder`` has a table of classes and predicts images at VP steps."""
    file = folder / "config.json"
    config = read_config(file, ["UNet2DModel"])
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is None:
        raise InputError(f"{file}: the model knows no classes; expected num_class_embeds and class_embed_type null")
    if config.get("sample_size") is None:
        raise InputError(f"{file}: sample_size is null; expected the height and width of the images")
    if config.get("time_embedding_type", "positional") != "positional":
        raise InputError(f"{file}: time_embedding_type is {config['time_embedding_type']!r}; expected 'positional'")
    channels, outputs = config.get("in_channels", 3), config.get("out_channels", 3)
    if outputs not in (channels, 2 * channels):
        raise InputError(f"{file}: {outputs} output channels for {channels} input channels; expected as many or twice as many")
