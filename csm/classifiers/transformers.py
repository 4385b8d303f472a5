"""Image classifiers of transformers (ViT, ConvNeXt, DINOv2, ResNet, ...): pretrained ones to fine-tune, or only their architecture."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from csm.classifiers.classifier import ClassifierSpec
from csm.errors import InputError
from csm.model_folders import find_folder, read_config, read_model

# Of a configuration, what belongs to its training or its files and not to its architecture.
FOREIGN = ("id2label", "label2id", "num_labels", "problem_type", "architectures", "auto_map", "dtype", "torch_dtype")
NEW = ("classifier", "pooler")  # parts that a model trained for something else may lack, or have in other shapes or in vain
UNKNOWN_STEPS = (
    "do_pad",
    "do_flip_channel_order",
    "rescale_offset",
)  # that an image processor may take, and that are not taken here

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, of pixels in 0..1


class TransformersClassifier(nn.Module):
    """A model with ``AutoModelForImageClassification``'s head for K classes.

    Images are normalised with the mean and std that the model was trained with (``complete``), resized on their device to the square that
    it takes (bicubic, antialiased, nothing is cropped), and made RGB if they are grey. The head is kept if the model has one for K
    classes already, else drawn anew as transformers draws it.

    Args:
        channels: of the image: those of the model, or 1.
        n_classes: K.
        path: a folder that such a model was saved to, with its ``preprocessor_config.json``, or its name on the Hugging Face hub.
        pretrained: start from its weights; if not, only ``config.json`` is read, and ``preprocessor_config.json`` where there is one.
        size: height and width of the images that the model gets; 0: what it was trained with. Not every model takes others.
        config: in place of the files, what ``complete`` put into the specification.

    Raises:
        InputError: there is no such model, it is no image classifier, or it does not take these images.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        channels: int,
        n_classes: int,
        path: str,
        pretrained: bool = True,
        size: Annotated[int, Field(ge=0)] = 0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.statistics: Statistics | None = None
        if config is None:
            folder = find_folder(path)
            config = _read_architecture(folder)
            kind, full = _kind(config, n_classes, str(folder / "config.json"))
            self.side, self.statistics = _read_inputs(folder, full, pretrained)
            self.side = size or self.side
            self.model = read_model(kind, folder, "model", NEW, config=full) if pretrained else kind(full)
        else:
            kind, full = _kind(config, n_classes, "model.json")
            self.side, self.model = size, kind(full)
        self.config = dict(config)
        self.channels = _check_channels(path, channels, full)
        self.register_buffer("scale", torch.ones(1, self.channels, 1, 1))
        self.register_buffer("shift", torch.zeros(1, self.channels, 1, 1))
        if self.statistics and channels != self.channels:
            self._take_grey(self.statistics)
        if not isinstance(getattr(self.model, "classifier", None), nn.Module):
            raise InputError(f"{path}: {kind.__name__} has no one head called classifier, which is needed here")
        self.head = self.model.classifier
        self.model.classifier = nn.Identity()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.endswith("mask_token"))  # which stands for patches that were masked: none is
        self._try(f"{path}: {kind.__name__}", n_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What the head sees (N, F), of normalised images (N, C, H, W)."""
        x = x * self.scale + self.shift
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", antialias=True)
        features: torch.Tensor = self.model(pixel_values=x).logits.flatten(1)
        return features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, K)."""
        logits: torch.Tensor = self.head(self.features(x))
        return logits

    def complete(self, spec: ClassifierSpec) -> ClassifierSpec:
        """``spec`` with which the network is built again without its files, and with the statistics that the model was trained with."""
        mean, std = self.statistics or (spec.mean, spec.std)
        return replace(spec, parameters={**spec.parameters, "size": self.side, "config": self.config}, mean=mean, std=std)

    def _take_grey(self, colour: Statistics) -> None:
        """Grey images have one mean and one std: what else their copies in the model's channels need is ``scale`` and ``shift``."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in colour)
        self.scale = std.mean() / std
        self.shift = (mean.mean() - mean) / std
        self.statistics = (float(mean.mean()),), (float(std.mean()),)

    @torch.no_grad()
    def _try(self, name: str, n_classes: int) -> None:
        """``InputError`` if an image cannot go through, before others are prepared for it."""
        self.eval()
        try:
            features = self.features(torch.zeros(1, self.channels, self.side, self.side))
            found = tuple(self.head(features).shape)
        except (ValueError, RuntimeError) as error:  # of a model that takes one size only, for example
            raise InputError(f"{name} does not take images of {self.side} x {self.side}: {_line(error)}") from None
        if found != (1, n_classes):
            raise InputError(f"{name} gives {found} for one image and {n_classes} classes")
        self.train()


def check_transformers(channels: int, path: str, pretrained: bool = True, size: int = 0) -> None:
    """``InputError`` if there is no image classifier at ``path`` that takes such images; its weights are not loaded."""
    folder = find_folder(path)
    _, full = _kind(_read_architecture(folder), 2, str(folder / "config.json"))
    _read_inputs(folder, full, pretrained)
    _check_channels(path, channels, full)


def _read_architecture(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in read_config(folder / "config.json").items() if key not in FOREIGN and key[0] != "_"}


def _kind(config: Mapping[str, Any], n_classes: int, where: str) -> tuple[Any, Any]:
    """The class of transformers for ``config``, and its configuration for ``n_classes``."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING  # takes seconds; only who needs it pays

    name = config.get("model_type")
    try:
        full = CONFIG_MAPPING[name].from_dict(dict(config))
        full.num_labels = n_classes
        kinds = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(full)]
    except KeyError:
        raise InputError(f"{where}: transformers knows no image classifier of model_type {name!r}") from None
    except Exception as error:  # many types, of every configuration's own checks
        raise InputError(f"{where} cannot be used ({type(error).__name__}: {_line(error)})") from None
    return (kinds[0] if isinstance(kinds, tuple) else kinds), full


def _check_channels(path: str, images: int, config: Any) -> int:
    """Channels that the model takes; ``InputError`` if the images have others and are not grey."""
    channels: int = getattr(config, "num_channels", 3)
    if images not in (1, channels):
        raise InputError(f"{path}: the images have {images} channels, the model takes {channels}")
    return channels


def _read_inputs(folder: Path, config: Any, pretrained: bool) -> tuple[int, Statistics | None]:
    """(height and width, (mean, std) of pixels in 0..1) of the images that the model was trained with; see ``PreTrainedImageProcessor``.

    A model that is only an architecture may have no ``preprocessor_config.json``: then the statistics are the data's.
    """
    file = folder / "preprocessor_config.json"
    values: Any = None
    if file.exists():
        values = read_config(file)
    elif (folder / "processor_config.json").exists():  # where newer versions of transformers put it
        file = folder / "processor_config.json"
        values = read_config(file).get("image_processor")
    if not isinstance(values, dict):
        if pretrained:
            raise InputError(
                f"{file} does not exist, or says nothing of images: give it, for the mean, std and size to fine-tune with"
            )
        return int(getattr(config, "image_size", 224)), None
    for step in UNKNOWN_STEPS:
        if values.get(step):
            raise InputError(f"{file}: {step} cannot be used here")
    crops = values.get("do_center_crop", True) and values.get("crop_size")
    side = _side(file, values["crop_size"] if crops else values.get("size"))
    # It rescales levels 0..255, subtracts and divides; mean and std are those of pixels in 0..1.
    scale = 255 * float(values.get("rescale_factor") or 1 / 255) if values.get("do_rescale", True) else 255.0
    channels = getattr(config, "num_channels", 3)
    if not values.get("do_normalize", True):
        return side, ((0.0,) * channels, (1 / scale,) * channels)
    mean, std = (_numbers(file, name, values.get(name), channels) for name in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise InputError(f"{file}: image_std is {list(std)}; expected numbers above 0")
    return side, (tuple(value / scale for value in mean), tuple(value / scale for value in std))


def _side(file: Path, size: Any) -> int:
    sides = set(size.values()) if isinstance(size, dict) else {size}
    side = sides.pop() if len(sides) == 1 else None
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        raise InputError(f"{file}: size is {size!r}; expected a number of pixels, one for height and width")
    return side


def _numbers(file: Path, name: str, values: Any, channels: int) -> tuple[float, ...]:
    numbers = isinstance(values, list) and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    if not numbers or len(values) != channels:
        raise InputError(f"{file}: {name} is {values!r}; expected a list of {channels} numbers, one for each channel")
    return tuple(float(value) for value in values)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
