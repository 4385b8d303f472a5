"""What every shift set is made of, and the conversion of foreign images to the shape of the data set."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from csm.errors import InputError

SEVERITIES = (1, 2, 3, 4, 5)
CHUNK = 1024  # images that are converted to float together
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as PIL's "L"


class ShiftPart(NamedTuple):
    """Images of one corruption at one severity, or of another data set (then there is no corruption, no severity, and no label).

    ``images`` uint8 (N, C, H, W) in the shape of the data set; ``labels`` int64 (N,) in 0..K-1.
    """

    corruption: str | None
    severity: int | None
    images: torch.Tensor
    labels: torch.Tensor | None


def fit_images(images: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Images uint8 (N, C, H, W) in another shape: centre-cropped to its aspect and resized (antialiased bicubic), grey or RGB.

    Args:
        images: uint8 (N, C, H, W), C = 1 or 3.
        shape: (height, width, channels) that is wanted, 1 or 3 channels.

    Returns:
        uint8 (N, channels, height, width); images that have the shape already are not touched.
    """
    height, width, channels = shape
    size = images.shape[2:]
    scale = min(size[0] / height, size[1] / width)
    cut = min(size[0], max(1, round(height * scale))), min(size[1], max(1, round(width * scale)))
    top, left = (size[0] - cut[0]) // 2, (size[1] - cut[1]) // 2
    images = images[:, :, top : top + cut[0], left : left + cut[1]]
    if channels == images.shape[1] and cut == (height, width):
        return images
    parts = []
    for part in images.split(CHUNK):
        x = part.float()
        if channels == 1 and x.shape[1] == 3:
            x = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        if cut != (height, width):
            x = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True)
        parts.append(x.round().clamp(0, 255).byte().expand(-1, channels, -1, -1))
    return torch.cat(parts)


def choose(setting: str, given: str, known: list[str]) -> list[str]:
    """The names in the comma-separated text ``given``, in the order of ``known``; "all" is all of them.

    Raises:
        InputError: a name is not among ``known``, which are listed, or there is none.
    """
    names = known if given.strip() == "all" else [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(
            f"{setting}: {', '.join(unknown) or 'nothing'} is not there; all, or some of {', '.join(known) or 'nothing'}"
        )
    return [name for name in known if name in names]


def choose_severities(given: str) -> list[int]:
    """The severities in ``given``, for instance "1,3,5" or "all"; ``InputError`` for others than 1..5."""
    return [int(name) for name in choose("severities", given, [str(severity) for severity in SEVERITIES])]
