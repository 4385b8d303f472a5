import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image, ImageFilter

from csm.datasets import RealDataset, load_dataset
from csm.datasets.shifts.corruptions import CORRUPTIONS, corrupt, corrupted
from csm.errors import InputError

SIZES = [(1, 8), (3, 32), (3, 64)]  # channels and side: grey digits, CIFAR, Tiny-ImageNet


def smooth_images(n: int, channels: int, side: int, texture: float = 0.0) -> torch.Tensor:
    """Blobs of random size and place, on a grey ground with a fine texture."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    centre, width, tint = draw.uniform(0.3, 0.7, (n, 2)), draw.uniform(0.1, 0.3, n), draw.uniform(0.3, 0.6, (n, channels))
    squares = (y - centre[:, :1, None]) ** 2 + (x - centre[:, 1:, None]) ** 2
    blobs = np.exp(-squares / (2 * width[:, None, None] ** 2))
    grain = texture * draw.uniform(-1, 1, (n, channels, side, side))
    return torch.from_numpy(np.rint(255 * (0.2 + tint[:, :, None, None] * blobs[:, None] + grain)).astype(np.uint8))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()) / 255).square().mean().sqrt().item()


@pytest.mark.parametrize(("channels", "side"), SIZES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_farther_from_the_image_than_the_one_before(name: str, channels: int, side: int) -> None:
    images = smooth_images(40, channels, side, texture=0.1)
    distances = [distance(corrupt(images, name, severity, np.arange(40)), images) for severity in range(1, 6)]
    assert distances == sorted(distances)
    assert len(set(distances)) == 5
    assert distances[0] > 0.001


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_a_function_of_itself_and_its_seed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, seeds = smooth_images(9, 3, 16), np.arange(100, 109)
    whole = corrupt(images, name, 3, seeds)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    monkeypatch.setattr("csm.datasets.shifts.corruptions.CHUNK", 2)
    assert torch.equal(corrupt(images, name, 3, seeds), whole)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(corrupt(images[order], name, 3, seeds[order.numpy()]), whole[order])
    if name in ("gaussian-noise", "shot-noise", "impulse-noise", "translate"):
        assert not torch.equal(corrupt(images, name, 3, seeds + 1), whole)


# Closed forms and other libraries, at severity 3.


@pytest.fixture(scope="module")
def grey() -> torch.Tensor:
    """Large and mid-grey, so that nothing is clipped by chance."""
    return torch.full((4, 1, 128, 128), 128, dtype=torch.uint8)


def test_gaussian_noise_has_its_deviation(grey: torch.Tensor) -> None:
    noisy = corrupt(grey, "gaussian-noise", 3, np.arange(4)).double() / 255
    assert noisy.std().item() == pytest.approx(0.18, rel=0.02)  # 2.8 deviations to black and white: hardly clipped
    assert noisy.mean().item() == pytest.approx(128 / 255, abs=0.003)


def test_shot_noise_has_the_variance_of_a_count(grey: torch.Tensor) -> None:
    dark = grey // 2
    noisy = corrupt(dark, "shot-noise", 1, np.arange(4)).double() / 255
    level = 64 / 255
    assert noisy.mean().item() == pytest.approx(level, rel=0.01)
    assert noisy.var().item() == pytest.approx(level / 60, rel=0.03)


def test_impulse_noise_blackens_and_whitens_half_of_its_share_each(grey: torch.Tensor) -> None:
    noisy = corrupt(grey, "impulse-noise", 3, np.arange(4))
    assert (noisy == 0).double().mean().item() == pytest.approx(0.045, abs=0.004)
    assert (noisy == 255).double().mean().item() == pytest.approx(0.045, abs=0.004)
    assert set(noisy.unique().tolist()) == {0, 128, 255}


def test_blur_is_that_of_pil_for_a_wide_one() -> None:
    images = smooth_images(3, 1, 64)
    blurred = corrupt(images, "gaussian-blur", 5, np.arange(3))
    for image, got in zip(images, blurred, strict=True):
        pil = np.asarray(Image.fromarray(image[0].numpy()).filter(ImageFilter.GaussianBlur(1.4)), dtype=np.int64)
        assert np.abs(got[0].numpy() - pil).max() <= 3  # PIL's is a row of box filters


def test_contrast_shrinks_the_distance_to_the_mean_of_each_channel() -> None:
    images = smooth_images(5, 3, 16)
    x = images.double().numpy()
    for image, got in zip(x, corrupt(images, "contrast", 2, np.arange(5)).numpy(), strict=True):
        for channel in range(3):
            wanted = image[channel].mean() + 0.5 * (image[channel] - image[channel].mean())
            assert np.abs(got[channel] - wanted).max() <= 0.51


def test_brightness_adds_and_stops_at_white() -> None:
    images = torch.tensor([0, 100, 250], dtype=torch.uint8).view(1, 1, 1, 3)
    assert corrupt(images, "brightness", 1, np.zeros(1, dtype=np.int64)).flatten().tolist() == [26, 126, 255]  # 25.5 to even


def test_pixelate_takes_the_means_of_cells() -> None:
    images = smooth_images(2, 3, 32)
    means = images.double().view(2, 3, 8, 4, 8, 4).mean(dim=(3, 5))  # (N, C, 8, 8): a quarter of the cells at severity 5
    wanted = means.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert (corrupt(images, "pixelate", 5, np.arange(2)).double() - wanted).abs().max() <= 0.51


def test_translate_moves_by_its_share_of_the_side() -> None:
    images = torch.zeros(50, 1, 40, 40, dtype=torch.uint8)
    images[:, :, 18:22, 18:22] = 200  # centre of mass at 19.5
    moved = corrupt(images, "translate", 2, np.arange(50)).double()[:, 0]
    mass = moved.sum(dim=(1, 2))
    places = torch.arange(40, dtype=torch.float64)
    dy = (moved.sum(dim=2) * places).sum(dim=1) / mass - 19.5
    dx = (moved.sum(dim=1) * places).sum(dim=1) / mass - 19.5
    assert torch.allclose((dx**2 + dy**2).sqrt(), torch.full((50,), 4.0, dtype=torch.float64), atol=0.05)  # 0.1 x 40
    assert len({(round(x, 1), round(y, 1)) for x, y in zip(dx.tolist(), dy.tolist(), strict=True)}) > 40  # directions differ


# The test split of a data set


@pytest.fixture(scope="module")
def digits() -> RealDataset:
    return load_dataset("digits", test=0.1)


def test_parts_are_every_corruption_at_every_severity_with_the_labels_of_the_test_split(digits: RealDataset) -> None:
    parts = list(corrupted(digits))
    assert [(part.corruption, part.severity) for part in parts] == [(name, s) for name in CORRUPTIONS for s in range(1, 6)]
    images, labels = digits.split("test")
    for part in parts:
        assert part.images.shape == images.shape
        assert torch.equal(part.labels, labels)  # type: ignore[arg-type]


def test_noise_belongs_to_the_image_whatever_else_is_made(digits: RealDataset) -> None:
    whole = {(part.corruption, part.severity): part.images for part in corrupted(digits, "gaussian-noise,translate")}
    (alone,) = corrupted(digits, "translate", "4")
    assert torch.equal(alone.images, whole["translate", 4])
    ids = digits.frame.filter(pl.col("split") == "test").sort("image_id")["image_id"]
    without_first = digits.frame.filter(pl.col("image_id") != ids[0])
    (fewer,) = corrupted(RealDataset(digits.info, without_first), "translate", "4")
    assert torch.equal(fewer.images, alone.images[1:])
    (other,) = corrupted(digits, "translate", "4", seed=1)
    assert not torch.equal(other.images, alone.images)


def test_a_corruption_that_is_not_there(digits: RealDataset) -> None:
    with pytest.raises(InputError, match="corruptions: fog is not there; all, or some of gaussian-noise, shot-noise"):
        corrupted(digits, "fog")
    with pytest.raises(InputError, match="seed: expected a number greater than or equal to 0, got -1"):
        corrupted(digits, seed=-1)
