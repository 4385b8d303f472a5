"""The embedding of noise level and class, which every block of EDM's networks gets."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class PositionalEmbedding(nn.Module):
    """Cosines and sines of the noise level at frequencies from 1 down to 1/10000 (Ho et al. 2020, after Vaswani et al. 2017)."""

    def __init__(self, channels: int, endpoint: bool, sines_first: bool) -> None:
        """``endpoint``: the last frequency is 1/10000 itself."""
        super().__init__()
        self.count, self.endpoint, self.sines_first = channels // 2, endpoint, sines_first

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """(N, channels) of noise levels (N,)."""
        ramp = torch.arange(self.count, dtype=torch.float32, device=noise.device) / (self.count - self.endpoint)
        angles = noise[:, None] * (1 / 10000) ** ramp
        cosines, sines = angles.cos(), angles.sin()
        return torch.cat([sines, cosines] if self.sines_first else [cosines, sines], dim=1)


class FourierEmbedding(nn.Module):
    """Sines and cosines of the noise level at random frequencies of standard deviation 16 (Tancik et al. 2020; Song et al. 2021)."""

    freqs: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """(N, channels) of noise levels (N,)."""
        angles = noise[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class SongMapping(nn.Module):
    """Of DDPM++ and NCSN++: the class is added to the noise level, two layers follow."""

    def __init__(self, noise: nn.Module, channels: int, embedding: int, label_dim: int, augment_dim: int) -> None:
        """``noise`` gives ``channels``; ``augment_dim`` 0: trained without augmentation."""
        super().__init__()
        self.map_noise = noise
        self.map_label = nn.Linear(label_dim, channels)
        self.map_augment = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)

    def forward(self, noise: torch.Tensor, classes: torch.Tensor, augment: torch.Tensor | None = None) -> torch.Tensor:
        """Embedding (N, E) of c_noise (N,), weights of the classes (N, label_dim), and augmentation (N, augment_dim), else none."""
        x = self.map_noise(noise) + self.map_label(classes * math.sqrt(classes.shape[1]))
        if self.map_augment is not None and augment is not None:
            x = x + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(x))))


class DhariwalMapping(nn.Module):
    """Of ADM: the class is added behind two layers."""

    def __init__(self, noise: nn.Module, channels: int, embedding: int, label_dim: int, augment_dim: int) -> None:
        """As of ``SongMapping``."""
        super().__init__()
        self.map_noise = noise
        self.map_augment = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(label_dim, embedding, bias=False)

    def forward(self, noise: torch.Tensor, classes: torch.Tensor, augment: torch.Tensor | None = None) -> torch.Tensor:
        """As of ``SongMapping``."""
        x = self.map_noise(noise)
        if self.map_augment is not None and augment is not None:
            x = x + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(x))) + self.map_label(classes))
