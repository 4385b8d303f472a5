"""Images as a pretrained vision model wants them, made in torch where the images are: what its image processor does with PIL."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

from csm.errors import InputError
from csm.model_folders import read_config
from csm.parameters import expected

PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "BitImageProcessor")  # these do the same, with the same defaults
MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
Sides = int | dict[str, int]


@dataclass(frozen=True)
class Preprocessing:
    """``preprocessor_config.json``: its names, and what the image processors do by default. In this order:

    Attributes:
        do_resize, size, resample: to {"height", "width"}, or the shorter side to {"shortest_edge"} (also written as one number) and the
            other in proportion; resample 2 is bilinear, 3 bicubic, both antialiased.
        do_center_crop, crop_size: {"height", "width"} of the centre that is kept, one number for a square; black comes in where an image
            is smaller.
        do_rescale, rescale_factor: levels 0..255 times this.
        do_normalize, image_mean, image_std: of each channel, after that.
        do_convert_rgb: grey becomes RGB.
        do_pad: must be false.
    """

    do_resize: bool = True
    size: Sides = 224
    resample: Literal[2, 3] = 3
    do_center_crop: bool = True
    crop_size: Sides = 224
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    do_convert_rgb: bool = True
    do_pad: Literal[False] = False

    def channels(self, images: int) -> int:
        """Of what ``preprocess`` makes of images of ``images`` channels."""
        return 3 if images == 1 and self.do_convert_rgb else images


def read_preprocessing(folder: Path, channels: int) -> Preprocessing:
    """What ``preprocessor_config.json`` in ``folder`` says, or ``processor_config.json``, where newer versions of transformers put it.

    Args:
        channels: that the model takes.

    Raises:
        InputError: there is neither, or it asks for what is not done here.
    """
    file = folder / "preprocessor_config.json"
    if not file.exists() and (folder / "processor_config.json").exists():
        file = folder / "processor_config.json"
        values = read_config(file).get("image_processor")
        if not isinstance(values, dict):
            raise InputError(f"{file} has no image_processor")
    else:
        values = read_config(file)
    kind = values.get("image_processor_type", values.get("feature_extractor_type"))
    if kind is not None and str(kind).removesuffix("Fast") not in PROCESSORS:
        raise InputError(f"{file}: {kind} cannot be used; expected {' or '.join(PROCESSORS)}")
    given = {key: value for key, value in values.items() if value is not None}  # null is the default
    try:
        preprocessing = TypeAdapter(Preprocessing).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise InputError(f"{file}: {key} is {given[key]!r}; {expected(first)}") from None
    _check(file, preprocessing, channels)
    return preprocessing


def preprocess(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Images uint8 (N, C, H, W) -> pixels float32 (N, ``preprocessing.channels(C)``, h, w), on the same device."""
    x = images.float()
    if preprocessing.do_resize:
        height, width = _resized(x.shape[2], x.shape[3], preprocessing.size)
        # PIL filters rows, then columns (but the side that shrinks before the one that grows), and rounds to levels after each: bicubic
        # overshoots at edges, and is clipped there.
        columns_first = height < x.shape[2] and width > x.shape[3]
        for size in ((height, x.shape[3]) if columns_first else (x.shape[2], width), (height, width)):
            if size != x.shape[2:]:
                x = F.interpolate(x, size=size, mode=MODES[preprocessing.resample], antialias=True).round_().clamp_(0, 255)
    if preprocessing.do_center_crop:
        height, width = _sides(preprocessing.crop_size)
        x = F.pad(x, (*_margins(x.shape[3], width), *_margins(x.shape[2], height)))
    if preprocessing.do_rescale:
        x = x * preprocessing.rescale_factor
    x = x.expand(-1, preprocessing.channels(x.shape[1]), -1, -1)
    if preprocessing.do_normalize:
        mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (preprocessing.image_mean, preprocessing.image_std))
        x = (x - mean) / std
    return x


def _resized(height: int, width: int, size: Sides) -> tuple[int, int]:
    if isinstance(size, dict) and "shortest_edge" not in size:
        return _sides(size)
    edge = size if isinstance(size, int) else size["shortest_edge"]
    short, long = min(height, width), max(height, width)
    other = int(edge * long / short)
    return (other, edge) if width <= height else (edge, other)


def _sides(size: Sides) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _margins(have: int, want: int) -> tuple[int, int]:
    """What comes before and after to make ``have`` pixels ``want``; negative if they are cut off."""
    before = math.ceil((want - have) / 2)
    return before, want - have - before


def _check(file: Path, preprocessing: Preprocessing, channels: int) -> None:
    """``InputError`` for values of the right type that mean nothing here."""
    keys: dict[str, Any] = {"size": [{"shortest_edge"}, {"height", "width"}], "crop_size": [{"height", "width"}]}
    for name, allowed in keys.items():
        value = getattr(preprocessing, name)
        sides = {"": value} if isinstance(value, int) else value
        if (value is sides and set(sides) not in allowed) or min(sides.values(), default=0) < 1:
            choices = " or ".join(str(sorted(choice)) for choice in allowed)
            raise InputError(f"{file}: {name} is {value!r}; expected a number of pixels, or {choices}")
    for name in ("image_mean", "image_std"):
        values = getattr(preprocessing, name)
        good = len(values) == channels and all(math.isfinite(value) for value in values)
        above = " above 0" if name == "image_std" else ""
        if preprocessing.do_normalize and (not good or (above and min(values) <= 0)):
            raise InputError(f"{file}: {name} is {list(values)}; expected a number{above} for each of the {channels} channels")
