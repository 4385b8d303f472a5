"""The U-Nets of EDM's checkpoints: DDPM++ and NCSN++ (SongUNet), ADM (DhariwalUNet). Settings and tensors have the checkpoints' names."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from csm.generators.edm.layers import Block, BlockStyle, DownAfterConv, Resample, conv, group_norm
from csm.generators.edm.mapping import DhariwalMapping, FourierEmbedding, PositionalEmbedding, SongMapping
from csm.parameters import STRICT

# Bounds far beyond any network that was trained: a damaged file must not have us build for hours.
Channels = Annotated[int, Field(ge=1, le=4096)]
Multiple = Annotated[int, Field(ge=1, le=64)]
Multiples = Annotated[tuple[Multiple, ...], Field(min_length=1, max_length=12)]
Blocks = Annotated[int, Field(ge=1, le=64)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UNetSettings:
    """What both networks have.

    Attributes:
        img_resolution: height and width of the images.
        label_dim: classes.
        augment_dim: numbers that told the network how a training image was augmented; 0: none were given.
        model_channels, channel_mult: channels of each resolution, halved from one to the next: ``model_channels`` times ``channel_mult``.
        channel_mult_emb: channels of the embedding, divided by ``model_channels``.
        num_blocks: residual blocks of each resolution on the way down; one more on the way up.
        attn_resolutions: those with self-attention.
    """

    img_resolution: Channels
    in_channels: Channels
    out_channels: Channels
    label_dim: Annotated[int, Field(ge=1, le=100_000)]
    augment_dim: Annotated[int, Field(ge=0, le=4096)] = 0
    model_channels: Channels
    channel_mult: Multiples
    channel_mult_emb: Multiple = 4
    num_blocks: Blocks
    attn_resolutions: tuple[int, ...]

    @property
    def embedding(self) -> int:
        """Channels of the embedding."""
        return self.model_channels * self.channel_mult_emb

    @property
    def levels(self) -> list[tuple[int, int]]:
        """Height (and width) and channels of each resolution, the highest first."""
        return [
            (self.img_resolution >> level, self.model_channels * multiple) for level, multiple in enumerate(self.channel_mult)
        ]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SongUNetSettings(UNetSettings):
    """DDPM++ and NCSN++ (Song et al. 2021, app. H; Karras et al. 2022, table 7).

    Attributes:
        embedding_type, channel_mult_noise: of the noise level, in ``model_channels * channel_mult_noise`` channels.
        encoder_type: how the image, halved again and again, enters below: not ("standard"), added ("skip"), or through a chain of
            convolutions ("residual").
        decoder_type: whether only the highest resolution makes the output ("standard"), or each adds to it ("skip").
        resample_filter: its taps.
    """

    model_type: Literal["SongUNet"] = "SongUNet"
    model_channels: Channels = 128
    channel_mult: Multiples = (1, 2, 2, 2)
    num_blocks: Blocks = 4
    attn_resolutions: tuple[int, ...] = (16,)
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: Multiple = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: Annotated[tuple[Multiple, ...], Field(min_length=2, max_length=8)] = (1, 1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DhariwalUNetSettings(UNetSettings):
    """ADM (Dhariwal & Nichol 2021; Karras et al. 2022, table 7)."""

    model_type: Literal["DhariwalUNet"] = "DhariwalUNet"
    model_channels: Channels = 192
    channel_mult: Multiples = (1, 2, 3, 4)
    num_blocks: Blocks = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)


def _encoder(settings: UNetSettings, style: BlockStyle, first: int) -> tuple[nn.ModuleDict, list[int]]:
    """The way down, and the channels of what it hands across; the image becomes ``first`` channels."""
    layers, across = nn.ModuleDict(), [first]
    channels = first
    for level, (size, outputs) in enumerate(settings.levels):
        if level == 0:
            layers[f"{size}x{size}_conv"] = conv(settings.in_channels, first, 3)
        else:
            layers[f"{size}x{size}_down"] = Block(style, channels, channels, "down")
            across.append(channels)
        for number in range(settings.num_blocks):
            attention = size in settings.attn_resolutions
            layers[f"{size}x{size}_block{number}"] = Block(style, channels, outputs, attention=attention)
            channels = outputs
            across.append(channels)
    return layers, across


def _decoder(settings: UNetSettings, style: BlockStyle, across: list[int], attending: range) -> nn.ModuleDict:
    """The way up; ``attending`` are the blocks of a resolution that have self-attention where that is asked for."""
    layers, left = nn.ModuleDict(), list(across)
    channels = left[-1]
    for size, outputs in reversed(settings.levels):
        name = f"{size}x{size}"
        if not layers:
            layers[f"{name}_in0"] = Block(style, channels, channels, attention=True)
            layers[f"{name}_in1"] = Block(style, channels, channels)
        else:
            layers[f"{name}_up"] = Block(style, channels, channels, "up")
        for number in range(settings.num_blocks + 1):
            attention = size in settings.attn_resolutions and number in attending
            layers[f"{name}_block{number}"] = Block(style, channels + left.pop(), outputs, attention=attention)
            channels = outputs
    return layers


class SongUNet(nn.Module):
    """F(x; embedding) (N, out_channels, R, R) of x (N, in_channels, R, R) and the embedding (N, E), all in the weights' dtype."""

    def __init__(self, settings: SongUNetSettings) -> None:
        super().__init__()
        self.settings = settings
        taps, eps = settings.resample_filter, 1e-6
        style = BlockStyle(settings.embedding, eps, math.sqrt(0.5), False, 0, True, taps)
        self.enc, across = _encoder(settings, style, settings.model_channels)
        self.dec = _decoder(settings, style, across, range(settings.num_blocks, settings.num_blocks + 1))
        image, channels = settings.in_channels, settings.model_channels
        for level, (size, outputs) in enumerate(settings.levels):
            name = f"{size}x{size}_aux"
            if level > 0 and settings.encoder_type == "skip":
                self.enc[f"{name}_down"] = Resample("down", taps)
                self.enc[f"{name}_skip"] = conv(image, channels, 1)
            if level > 0 and settings.encoder_type == "residual":
                self.enc[f"{name}_residual"] = DownAfterConv(image, channels, 3, taps)
                image = channels
            if level == 0 or settings.decoder_type == "skip":
                self.dec[f"{name}_norm"] = group_norm(outputs, eps)
                self.dec[f"{name}_conv"] = conv(outputs, settings.out_channels, 3)
            if level < len(settings.levels) - 1 and settings.decoder_type == "skip":
                self.dec[f"{name}_up"] = Resample("up", taps)
            channels = outputs

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        settings, image = self.settings, x
        across: list[torch.Tensor] = []
        for level, (size, _) in enumerate(settings.levels):
            name = f"{size}x{size}"
            x = self.enc[f"{name}_conv"](x) if level == 0 else self.enc[f"{name}_down"](x, embedding)
            if level > 0 and settings.encoder_type == "skip":
                image = self.enc[f"{name}_aux_down"](image)
                x = x + self.enc[f"{name}_aux_skip"](image)
            if level > 0 and settings.encoder_type == "residual":
                x = image = (x + self.enc[f"{name}_aux_residual"](image)) * math.sqrt(0.5)
            across.append(x)
            for number in range(settings.num_blocks):
                x = self.enc[f"{name}_block{number}"](x, embedding)
                across.append(x)
        output: torch.Tensor | None = None
        for level, (size, _) in reversed(list(enumerate(settings.levels))):
            name = f"{size}x{size}"
            x = _enter(self.dec, name, x, embedding)
            for number in range(settings.num_blocks + 1):
                x = self.dec[f"{name}_block{number}"](torch.cat([x, across.pop()], dim=1), embedding)
            if level == 0 or settings.decoder_type == "skip":
                part = self.dec[f"{name}_aux_conv"](F.silu(self.dec[f"{name}_aux_norm"](x)))
                output = part if output is None else self.dec[f"{name}_aux_up"](output) + part
        assert output is not None
        return output


class DhariwalUNet(nn.Module):
    """As ``SongUNet``."""

    def __init__(self, settings: DhariwalUNetSettings) -> None:
        super().__init__()
        self.settings = settings
        style = BlockStyle(settings.embedding, 1e-5, 1.0, True, 64, False, (1, 1))
        channels = settings.levels[0][1]
        self.enc, across = _encoder(settings, style, channels)
        self.dec = _decoder(settings, style, across, range(settings.num_blocks + 1))
        self.out_norm = group_norm(channels, style.eps)
        self.out_conv = conv(channels, settings.out_channels, 3)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        across: list[torch.Tensor] = []
        for level, (size, _) in enumerate(self.settings.levels):
            name = f"{size}x{size}"
            x = self.enc[f"{name}_conv"](x) if level == 0 else self.enc[f"{name}_down"](x, embedding)
            across.append(x)
            for number in range(self.settings.num_blocks):
                x = self.enc[f"{name}_block{number}"](x, embedding)
                across.append(x)
        for size, _ in reversed(self.settings.levels):
            name = f"{size}x{size}"
            x = _enter(self.dec, name, x, embedding)
            for number in range(self.settings.num_blocks + 1):
                x = self.dec[f"{name}_block{number}"](torch.cat([x, across.pop()], dim=1), embedding)
        output: torch.Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return output


def _enter(layers: nn.ModuleDict, name: str, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """``x`` at the resolution ``name`` of the way up."""
    if f"{name}_up" in layers:
        return layers[f"{name}_up"](x, embedding)  # type: ignore[no-any-return]
    return layers[f"{name}_in1"](layers[f"{name}_in0"](x, embedding), embedding)  # type: ignore[no-any-return]


def make_unet(settings: SongUNetSettings | DhariwalUNetSettings) -> SongUNet | DhariwalUNet:
    """The network of ``settings``, with random weights; ``ValueError`` if they fit no network."""
    halvings = len(settings.channel_mult) - 1
    if settings.img_resolution % 2**halvings:
        raise ValueError(f"img_resolution {settings.img_resolution} cannot be halved {halvings} times")
    return SongUNet(settings) if isinstance(settings, SongUNetSettings) else DhariwalUNet(settings)


def make_mapping(settings: SongUNetSettings | DhariwalUNetSettings) -> SongMapping | DhariwalMapping:
    """The mapping of c_noise and class to the embedding that the network of ``settings`` takes, with random weights."""
    sizes = settings.embedding, settings.label_dim, settings.augment_dim
    if isinstance(settings, DhariwalUNetSettings):
        positions = PositionalEmbedding(settings.model_channels, endpoint=False, sines_first=False)
        return DhariwalMapping(positions, settings.model_channels, *sizes)
    channels = settings.model_channels * settings.channel_mult_noise
    if settings.embedding_type == "fourier":
        return SongMapping(FourierEmbedding(channels), channels, *sizes)
    return SongMapping(PositionalEmbedding(channels, endpoint=True, sines_first=True), channels, *sizes)
