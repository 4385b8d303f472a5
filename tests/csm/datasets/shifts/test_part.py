import numpy as np
import pytest
import torch
from PIL import Image

from csm.datasets.shifts.part import choose, choose_severities, fit_images
from csm.errors import InputError


def random_images(n: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, channels, height, width), dtype=np.uint8))


def by_pil(image: torch.Tensor, shape: tuple[int, int, int]) -> np.ndarray:
    """Centre square, then PIL's bicubic with antialiasing, then grey: each rounded to levels, as PIL does."""
    height, width, channels = shape
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    photo = photo.crop((left, top, left + side, top + side)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(photo.convert("RGB" if channels == 3 else "L"), dtype=np.int64)
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def test_images_of_the_shape_are_not_touched() -> None:
    images = random_images(3, 3, 5, 4)
    assert torch.equal(fit_images(images, (5, 4, 3)), images)


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (20, 20), (5, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_that_of_pil_within_two_levels(size: tuple[int, int], channels: int) -> None:
    images = random_images(4, 3, *size) // 2 + 64  # PIL clips bicubic overshoots after each axis
    fitted = fit_images(images, (8, 8, channels))
    assert fitted.shape == (4, channels, 8, 8)
    assert fitted.dtype == torch.uint8
    for image, got in zip(images, fitted, strict=True):
        assert np.abs(got.numpy().astype(np.int64) - by_pil(image, (8, 8, channels))).max() <= 2


def test_another_aspect_is_cut_from_the_middle() -> None:
    image = torch.arange(10, dtype=torch.uint8).view(1, 1, 10, 1).expand(1, 1, 10, 4)
    assert torch.equal(fit_images(image, (2, 4, 1))[0, 0, :, 0], torch.tensor([4, 5], dtype=torch.uint8))


def test_grey_becomes_three_equal_channels_and_colour_becomes_luma() -> None:
    grey = random_images(2, 1, 4, 4)
    assert torch.equal(fit_images(grey, (4, 4, 3)), grey.repeat(1, 3, 1, 1))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert (fit_images(red, (4, 4, 1)) == 76).all()  # 0.299 x 255


def test_an_image_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(7, 3, 12, 12)
    whole = fit_images(images, (8, 8, 3))
    monkeypatch.setattr("csm.datasets.shifts.part.CHUNK", 2)
    assert torch.equal(fit_images(images, (8, 8, 3)), whole)


def test_names_are_chosen_in_the_order_that_is_known() -> None:
    assert choose("corruptions", "all", ["fog", "snow"]) == ["fog", "snow"]
    assert choose("corruptions", " snow, fog,", ["fog", "snow", "frost"]) == ["fog", "snow"]
    assert choose_severities("all") == [1, 2, 3, 4, 5]
    assert choose_severities("5,1") == [1, 5]


@pytest.mark.parametrize(
    ("given", "named"), [("fog,rain", "rain is not there"), ("", "nothing is not there"), (",", "nothing is")]
)
def test_names_that_are_not_there(given: str, named: str) -> None:
    with pytest.raises(InputError, match=f"corruptions: {named}.*fog, snow"):
        choose("corruptions", given, ["fog", "snow"])


@pytest.mark.parametrize("given", ["0", "6", "1-5"])
def test_severities_are_1_to_5(given: str) -> None:
    with pytest.raises(InputError, match=f"severities: {given} is not there; all, or some of 1, 2, 3, 4, 5"):
        choose_severities(given)
