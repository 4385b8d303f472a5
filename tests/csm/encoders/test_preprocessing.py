import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from csm.encoders.preprocessing import Preprocessing, preprocess, read_preprocessing
from csm.errors import InputError

# As facebook/dinov2-base publishes it, and openai/clip-vit-base-patch32.
DINOV2: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
CLIP: dict[str, Any] = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def written(folder: Path, **values: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def draw(height: int, width: int, channels: int) -> np.ndarray:
    """Noise, and black and white, whose edges make bicubic overshoot: uint8 (2, height, width, channels)."""
    noise = np.random.default_rng(0).integers(0, 256, (2, height, width, channels)).astype(np.uint8)
    noise[1] = np.where(noise[1] > 127, 255, 0)
    return noise


def expected(images: np.ndarray, config: dict[str, Any]) -> torch.Tensor:
    """What transformers makes with PIL, image by image."""
    processor = CLIPImageProcessorPil(**config)
    pictures = [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images]
    return torch.stack([torch.from_numpy(np.array(processor(picture).pixel_values[0])) for picture in pictures])


def found(images: np.ndarray, config: dict[str, Any], folder: Path) -> torch.Tensor:
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    return preprocess(batch, read_preprocessing(written(folder, **config), 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (64, 48), (300, 200)])
@pytest.mark.parametrize(
    "config",
    [
        CLIP,
        DINOV2,
        {**CLIP, "resample": 2},
        {**CLIP, "size": {"height": 50, "width": 70}, "crop_size": {"height": 41, "width": 84}},  # stretched; cut and padded
        {**CLIP, "do_resize": False, "crop_size": 21},
        {**DINOV2, "do_center_crop": False, "do_rescale": False},
    ],
    ids=["clip", "dinov2", "bilinear", "stretched", "only cropped", "only resized"],
)
def test_pixels_are_those_of_pil(config: dict[str, Any], shape: tuple[int, int], channels: int, tmp_path: Path) -> None:
    images = draw(*shape, channels)
    levels = {**config, "do_normalize": False}
    ours, theirs = found(images, levels, tmp_path), expected(images, levels)
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    level = 1 if config.get("do_rescale") is False else 1 / 255
    assert (ours - theirs).abs().mean() < 0.05 * level
    assert (ours - theirs).abs().max() < 4 * level
    normalised = found(images, config, tmp_path) - expected(images, config)
    assert normalised.abs().mean() < 0.05 * level / min(config["image_std"])


def test_an_image_does_not_depend_on_the_others() -> None:
    batch = torch.from_numpy(draw(32, 24, 3)).permute(0, 3, 1, 2)
    both = preprocess(batch, Preprocessing())
    for image, one in zip(batch, both, strict=True):
        assert torch.equal(preprocess(image[None], Preprocessing())[0], one)


def test_null_and_what_is_not_there_is_the_default(tmp_path: Path) -> None:
    assert read_preprocessing(written(tmp_path, size=None, do_pad=None), 3) == Preprocessing()


def test_the_file_of_a_processor_of_both_halves_is_read(tmp_path: Path) -> None:
    values = {"image_processor": DINOV2, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(values))
    processed = read_preprocessing(tmp_path, 3)
    assert processed == read_preprocessing(written(tmp_path, **DINOV2), 3)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"processor_config.json has no image_processor"):
        read_preprocessing(tmp_path, 3)


def test_grey_stays_grey_if_it_is_not_to_be_converted() -> None:
    grey = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    settings = Preprocessing(size=4, crop_size=4, do_convert_rgb=False, image_mean=(0.5,), image_std=(0.5,))
    assert torch.equal(preprocess(grey, settings), torch.full((2, 1, 4, 4), -1.0))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"preprocessor_config.json does not exist"):
        read_preprocessing(tmp_path, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_extractor_type": "ViTImageProcessor"}, r"ViTImageProcessor cannot be used; expected CLIPImageProcessor or"),
        ({"resample": 1}, r"resample is 1; expected 2 or 3"),
        ({"do_pad": True}, r"do_pad is True; expected False"),
        ({"size": {"shortest_edge": 224, "longest_edge": 448}}, r"size is .*longest_edge.*; expected a number of pixels, or"),
        ({"size": {}}, r"size is {}; expected a number of pixels, or"),
        ({"size": 0}, r"size is 0; expected a number of pixels, or"),
        ({"size": "large"}, r"size is 'large'; expected a whole number"),
        ({"crop_size": {"shortest_edge": 224}}, r"crop_size is {'shortest_edge': 224}; expected a number of pixels, or"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]; expected a number for each of the 3 channels"),
        ({"image_std": [0.5, 0.5, 0.0]}, r"image_std is \[0.5, 0.5, 0.0\]; expected a number above 0 for each"),
        ({"rescale_factor": "x"}, r"rescale_factor is 'x'; expected a number"),
    ],
)
def test_what_is_not_done_here_is_named(changes: dict[str, Any], message: str, tmp_path: Path, edit: Callable[..., None]) -> None:
    edit(written(tmp_path, **CLIP) / "preprocessor_config.json", **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_preprocessing(tmp_path, 3)
    assert "\n" not in str(caught.value)
