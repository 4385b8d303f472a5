"""Augmentation of whole batches, on the device that holds them."""

import torch
import torch.nn.functional as F


def random_shift(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Translate each image by its own offset, uniform in -pixels..pixels on both axes; black comes in (zero-pad and crop).

    Args:
        images: (N, C, H, W) of any dtype.
        pixels: largest offset, >= 0.
        generator: on the CPU.

    Returns:
        (N, C, H, W), the same dtype.
    """
    if pixels == 0:
        return images
    count, _, height, width = images.shape
    padded = F.pad(images, (pixels, pixels, pixels, pixels))
    offsets = torch.randint(0, 2 * pixels + 1, (2, count), generator=generator).to(images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)  # (N, H)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)  # (N, W)
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image (N, C, H, W) left to right with probability 1/2; ``generator`` is on the CPU."""
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def cutout(images: torch.Tensor, side: int, fill: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cover a square of each image whose centre is any pixel, so that a part of it may lie outside (DeVries & Taylor 2017).

    Args:
        images: (N, C, H, W) of any dtype.
        side: of the square in pixels; 0 covers nothing.
        fill: what covers it, (1, C, 1, 1) of the same dtype.
        generator: on the CPU.
    """
    if side == 0:
        return images
    count, _, height, width = images.shape
    top = (torch.randint(0, height, (count, 1), generator=generator) - side // 2).to(images.device)
    left = (torch.randint(0, width, (count, 1), generator=generator) - side // 2).to(images.device)
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows, columns = (y >= top) & (y < top + side), (x >= left) & (x < left + side)  # (N, H), (N, W)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], fill.to(images.device), images)
