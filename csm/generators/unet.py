"""diffusers' UNet2DModel as a class-conditional EDM denoiser."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from csm import storage
from csm.classifiers.classifier import load_weights
from csm.generators.guidance import guided


@dataclass(frozen=True)
class UNetSpec:
    """Everything but the weights (``generator.json``). ``shape`` is (H, W, C); ``sigma_data`` in units of images in [-1, 1].

    The ``attention_levels`` lowest of the resolutions have self-attention. ``label_dropout`` is the share of the images that the training
    showed without their class; above 0 the network can be guided.
    """

    shape: tuple[int, int, int]
    n_classes: int
    sigma_data: float
    block_channels: tuple[int, ...]
    layers_per_block: int
    dropout: float
    attention_levels: int = 1
    label_dropout: float = 0.0


NO_CLASS = -1  # the label of an image that is shown without its class


class UNetGenerator(nn.Module):
    """``denoise(x, sigma, condition)`` around a UNet2DModel, preconditioned as EDM (Karras et al. 2022, table 1).

    D(x; sigma, c) = c_skip x + c_out F(c_in x; c_noise, c). The condition is a vector: ``embed(labels)`` looks one up per class, and a
    mixture of classes is a mixture of vectors. That of no class is 0.
    """

    spherical = True
    guidance = 1.0

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        size = spec.block_channels[0] * 4  # diffusers' size of the time embedding, to which the class embedding is added
        self.embedding = nn.Embedding(spec.n_classes, size)
        attended = spec.block_channels[-spec.attention_levels :]
        plain = len(spec.block_channels) - len(attended)
        down = ("DownBlock2D",) * plain + ("AttnDownBlock2D",) * len(attended)
        up = ("AttnUpBlock2D",) * len(attended) + ("UpBlock2D",) * plain
        self.unet = UNet2DModel(
            sample_size=spec.shape[:2],
            in_channels=spec.shape[2],
            out_channels=spec.shape[2],
            block_out_channels=spec.block_channels,
            layers_per_block=spec.layers_per_block,
            down_block_types=down,
            up_block_types=up,
            dropout=spec.dropout,
            norm_num_groups=min(32, spec.block_channels[0]),
            attention_head_dim=min(spec.block_channels[-1] // 2, *attended),
            class_embed_type="identity",
            time_embedding_type="positional",
        )

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def guides(self) -> bool:
        return self.spec.label_dropout > 0

    @property
    def network(self) -> nn.Module:
        network: nn.Module = self.unet
        return network

    @property
    def n_classes(self) -> int:
        return self.spec.n_classes

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.spec.shape
        return channels, height, width

    @property
    def sigma_range(self) -> tuple[float, float]:
        """EDM's for sampling (Karras et al. 2022, table 1), whatever the noise that the training drew."""
        return 0.002, 80.0

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``denoise`` under the conditions of ``labels``, some ``NO_CLASS``: the one call that DistributedDataParallel sees."""
        known = (labels != NO_CLASS).unsqueeze(1)
        return self.denoise(x, sigma, torch.where(known, self.embed(labels.clamp(min=0)), 0.0))

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """Condition vectors (N, E) of class labels int64 (N,)."""
        vectors: torch.Tensor = self.embedding(labels)
        return vectors

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Estimate of the clean images (N, C, H, W) in [-1, 1], guided, from x = clean + sigma * noise.

        Args:
            x: float32 (N, C, H, W).
            sigma: float32 (N,), > 0.
            condition: float32 (N, E).
        """
        none = torch.zeros_like(condition[:1])
        return guided(self._denoise, x, sigma, condition, none, self.guidance)

    def _denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        s = sigma.view(-1, 1, 1, 1)
        data = self.spec.sigma_data
        total = (s**2 + data**2).sqrt()
        c_skip, c_out, c_in = data**2 / total**2, s * data / total, 1 / total
        # EDM's c_noise = ln(sigma) / 4 spans about -2..1; the positional embedding was made for steps 0..1000.
        c_noise = sigma.log() / 4 * 250
        output = self.unet((c_in * x).to(self.unet.dtype), c_noise, class_labels=condition, return_dict=False)[0]
        denoised: torch.Tensor = c_skip * x + c_out * output.float()
        return denoised

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself: the model works on pixels."""
        return x

    def save(self, directory: Path) -> None:
        """Write ``model.safetensors`` and then ``generator.json``."""
        storage.write_tensors(directory / "model.safetensors", self.state_dict())
        storage.write_json(directory / "generator.json", {"kind": "unet", **asdict(self.spec)})


def load_unet(directory: Path) -> UNetGenerator:
    """Return the generator that ``UNetGenerator.save`` wrote to ``directory``, in evaluation mode."""
    generator = UNetGenerator(storage.read_record(directory / "generator.json", UNetSpec))
    load_weights(generator, directory / "model.safetensors")
    return generator.eval().requires_grad_(False)
