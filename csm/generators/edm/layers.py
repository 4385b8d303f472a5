"""Layers of EDM's networks; their tensors have the names of the checkpoints."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Direction = Literal["up", "down"]


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of one network have in common.

    Attributes:
        embedding: channels of the embedding of noise level and class.
        eps: of the group norms.
        scale: of every sum of a residual and its input: 1, or sqrt(1/2), which keeps the variance.
        scale_and_shift: the embedding scales and shifts (Dhariwal & Nichol 2021, section 3.1, AdaGN); else it shifts.
        head_channels: of one head of attention; 0: one head of all channels.
        resampled_skip: the input of a block that changes the resolution also passes a 1x1 convolution.
        taps: of the filter that changes the resolution.
    """

    embedding: int
    eps: float
    scale: float
    scale_and_shift: bool
    head_channels: int
    resampled_skip: bool
    taps: tuple[int, ...]


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Groups of at least 4 channels, at most 32 of them."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


class Resample(nn.Module):
    """Twice or half the height and width, through the separable filter ``taps`` (Karras et al. 2022, table 7)."""

    resample_filter: torch.Tensor

    def __init__(self, direction: Direction, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.direction, self.taps = direction, taps
        row = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("resample_filter", (row.outer(row) / row.sum() ** 2)[None, None])  # (1, 1, k, k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return resample(x, self.direction, self.taps, self.resample_filter)


def resample(
    x: torch.Tensor, direction: Direction, taps: tuple[int, ...], kernel: torch.Tensor, padding: int | None = None
) -> torch.Tensor:
    """``x`` (N, C, H, W) at twice or half its height and width, each channel filtered with ``kernel`` (1, 1, k, k), the square of ``taps``.

    ``padding`` with zeros keeps the images centred, unless given.
    """
    if taps == (1, 1):  # pixels doubled, or means of 2x2
        return F.interpolate(x, scale_factor=2) if direction == "up" else F.avg_pool2d(x, 2)
    channels = x.shape[1]
    pad = (len(taps) - 1) // 2 if padding is None else padding
    kernel = kernel.expand(channels, 1, -1, -1)
    if direction == "up":
        return F.conv_transpose2d(x, kernel * 4, stride=2, padding=pad, groups=channels)
    return F.conv2d(x, kernel, stride=2, padding=pad, groups=channels)


class ResamplingConv(nn.Conv2d):
    """A convolution at the lower resolution when it goes down, at the higher when it goes up."""

    resample_filter: torch.Tensor

    def __init__(self, inputs: int, outputs: int, size: int, direction: Direction, taps: tuple[int, ...]) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)
        self.direction, self.taps = direction, taps
        self.register_buffer("resample_filter", Resample(direction, taps).resample_filter)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(resample(input, self.direction, self.taps, self.resample_filter))


class DownAfterConv(ResamplingConv):
    """A convolution at the higher resolution, then down; the border of zeros for both is laid before the convolution."""

    def __init__(self, inputs: int, outputs: int, size: int, taps: tuple[int, ...]) -> None:
        super().__init__(inputs, outputs, size, "down", taps)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        border = (len(self.taps) - 1) // 2
        x = F.conv2d(input, self.weight, self.bias, padding=self.padding[0] + border)  # type: ignore[operator]
        return resample(x, "down", self.taps, self.resample_filter, padding=0)


def conv(inputs: int, outputs: int, size: int, direction: Direction | None = None, taps: tuple[int, ...] = ()) -> nn.Conv2d:
    """A convolution of ``size`` by ``size`` that keeps the resolution, doubles or halves it."""
    if direction is None:
        return nn.Conv2d(inputs, outputs, size, padding=size // 2)
    return ResamplingConv(inputs, outputs, size, direction, taps)


class Block(nn.Module):
    """Residual block with self-attention (Song et al. 2021, app. H; Dhariwal & Nichol 2021, section 3)."""

    def __init__(
        self, style: BlockStyle, inputs: int, outputs: int, direction: Direction | None = None, attention: bool = False
    ) -> None:
        super().__init__()
        self.style = style
        self.heads = 0 if not attention else outputs // style.head_channels if style.head_channels else 1
        self.norm0 = group_norm(inputs, style.eps)
        self.conv0 = conv(inputs, outputs, 3, direction, style.taps)
        self.affine = nn.Linear(style.embedding, outputs * (2 if style.scale_and_shift else 1))
        self.norm1 = group_norm(outputs, style.eps)
        self.conv1 = conv(outputs, outputs, 3)
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs or (direction and style.resampled_skip):
            self.skip = conv(inputs, outputs, 1, direction, style.taps)
        elif direction:
            self.skip = Resample(direction, style.taps)
        if self.heads:
            self.norm2 = group_norm(outputs, style.eps)
            self.qkv = conv(outputs, outputs * 3, 1)
            self.proj = conv(outputs, outputs, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """(N, C_out, H', W') of x (N, C_in, H, W) and the embedding (N, E)."""
        h = self.conv0(F.silu(self.norm0(x)))
        change = self.affine(embedding)[:, :, None, None]
        if self.style.scale_and_shift:
            scale, shift = change.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + change)
        x = (self.skip(x) + self.conv1(F.silu(h))) * self.style.scale
        return (x + self._attend(x)) * self.style.scale if self.heads else x

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        # One channel's query, key and value lie side by side. With the channels last, the tokens need no copy.
        tokens = self.qkv(self.norm2(x)).permute(0, 2, 3, 1).reshape(n, height * width, self.heads, channels // self.heads, 3)
        query, key, value = tokens.permute(4, 0, 2, 1, 3).contiguous().unbind()  # each (N, heads, H W, C / heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        out: torch.Tensor = self.proj(mixed.reshape(n, height, width, channels).permute(0, 3, 1, 2))
        return out
