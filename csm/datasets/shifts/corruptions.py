"""Corruptions at five severities, in the spirit of Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions
and perturbations" (ICLR 2019), for images of any size; and the test split of a data set under them.

Noise levels, contrast and brightness do not depend on the size of an image and are theirs (noise and brightness as for ImageNet-C, contrast
as for CIFAR-10-C). Lengths are our own: blur in pixels, pixelation and translation in shares of the image's side.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F

from csm import storage
from csm.datasets.real import RealDataset
from csm.datasets.shifts.part import CHUNK, ShiftPart, choose, choose_severities
from csm.errors import InputError
from csm.noise import mix_seeds


class Corruption(NamedTuple):
    """``function(x, level, draws)`` of images float32 (N, C, H, W) in [0, 1], with a generator for each; ``levels`` of severity 1 to 5."""

    function: Callable[[np.ndarray, float, list[np.random.Generator]], np.ndarray]
    levels: tuple[float, float, float, float, float]


def corrupt(images: torch.Tensor, corruption: str, severity: int, seeds: np.ndarray) -> torch.Tensor:
    """Corrupt images uint8 (N, C, H, W); each is a function of itself and its own seed, the same at every severity.

    Args:
        images: uint8 (N, C, H, W).
        corruption: key of ``CORRUPTIONS``.
        severity: 1 to 5.
        seeds: int64 (N,), >= 0.

    Returns:
        uint8 (N, C, H, W).
    """
    function, levels = CORRUPTIONS[corruption]
    parts = []
    for start in range(0, len(images), CHUNK):
        rows = slice(start, start + CHUNK)
        draws = [np.random.default_rng(seed) for seed in seeds[rows]]
        x = function(images[rows].numpy().astype(np.float32) / 255, levels[severity - 1], draws)
        parts.append(torch.from_numpy(np.rint(x.clip(0, 1) * 255).astype(np.uint8)))
    return torch.cat(parts)


def corrupted(data: RealDataset, corruptions: str = "all", severities: str = "all", seed: int = 0) -> Iterator[ShiftPart]:
    """The test split of ``data`` itself under ``CORRUPTIONS``: a corruption set for data that has none.

    Args:
        data: the data set.
        corruptions, severities: comma-separated, for example "gaussian-noise,contrast" and "1,3,5"; "all".
        seed: of noise and directions, which belong to the image: the same whatever else is made with it.
    """
    if seed < 0:
        raise InputError(f"seed: expected a number greater than or equal to 0, got {seed}")
    names, levels = choose("corruptions", corruptions, list(CORRUPTIONS)), choose_severities(severities)
    images, labels = data.split("test")
    ids = data.frame.filter(pl.col("split") == "test").sort("image_id")["image_id"].to_numpy()

    def parts() -> Iterator[ShiftPart]:
        for name in names:
            kind = int(storage.bytes_digest(name.encode())[:8], 16)
            seeds = mix_seeds(seed, np.full(len(ids), kind), ids)
            for level in levels:
                yield ShiftPart(name, level, corrupt(images, name, level, seeds), labels)

    return parts()


def _gaussian_noise(x: np.ndarray, deviation: float, draws: list[np.random.Generator]) -> np.ndarray:
    noise = np.stack([draw.standard_normal(x.shape[1:], dtype=np.float32) for draw in draws])
    return np.asarray(x + deviation * noise)


def _shot_noise(x: np.ndarray, photons: float, draws: list[np.random.Generator]) -> np.ndarray:
    return np.stack([draw.poisson(image * photons) for draw, image in zip(draws, x, strict=True)]).astype(np.float32) / photons


def _impulse_noise(x: np.ndarray, share: float, draws: list[np.random.Generator]) -> np.ndarray:
    drawn = np.stack([draw.random(x.shape[1:], dtype=np.float32) for draw in draws])
    return np.where(drawn < share / 2, 0, np.where(drawn > 1 - share / 2, 1, x)).astype(np.float32)


def _gaussian_blur(x: np.ndarray, pixels: float, draws: list[np.random.Generator]) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(x, sigma=(0, 0, pixels, pixels), mode="nearest"))


def _contrast(x: np.ndarray, kept: float, draws: list[np.random.Generator]) -> np.ndarray:
    mean = x.mean(axis=(2, 3), keepdims=True)
    return np.asarray((x - mean) * kept + mean)


def _brightness(x: np.ndarray, added: float, draws: list[np.random.Generator]) -> np.ndarray:
    """Added to every channel (they add to the value of HSV, which is the same for grey)."""
    return x + added


def _pixelate(x: np.ndarray, share: float, draws: list[np.random.Generator]) -> np.ndarray:
    """Means over cells, ``share`` as many along a side as there are pixels."""
    rows, columns = (_cell_means(side, max(1, round(share * side))) for side in x.shape[2:])
    return np.asarray(rows @ x @ columns.T)


def _cell_means(side: int, cells: int) -> np.ndarray:
    """float32 (side, side): maps ``side`` numbers to the means of the cell that each lies in."""
    cell = np.arange(side) * cells // side
    same = (cell[:, None] == cell).astype(np.float32)
    return np.asarray(same / same.sum(axis=1, keepdims=True))


def _translate(x: np.ndarray, share: float, draws: list[np.random.Generator]) -> np.ndarray:
    """By ``share`` of the side in a direction of its own; bilinear, the edge goes on outside."""
    angles = torch.tensor([draw.uniform(0, 2 * np.pi) for draw in draws], dtype=torch.float64)
    moves = 2 * share * torch.stack([angles.cos(), angles.sin()], dim=1)  # the grid's coordinates run from -1 to 1
    maps = torch.cat([torch.eye(2, dtype=torch.float64).expand(len(x), 2, 2), moves[:, :, None]], dim=2).float()
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(torch.from_numpy(x), grid, padding_mode="border", align_corners=False).numpy()


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian-noise": Corruption(_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),  # standard deviation
    "shot-noise": Corruption(_shot_noise, (60, 25, 12, 5, 3)),  # photons of a white pixel
    "impulse-noise": Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),  # share of values that become 0 or 1
    "gaussian-blur": Corruption(_gaussian_blur, (0.4, 0.6, 0.8, 1.0, 1.4)),  # standard deviation in pixels
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),  # share of the distance from the mean that is kept
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),  # added
    "pixelate": Corruption(_pixelate, (0.75, 0.625, 0.5, 0.375, 0.25)),  # cells along a side, of its pixels
    "translate": Corruption(_translate, (0.05, 0.1, 0.15, 0.2, 0.25)),  # of the side
}
