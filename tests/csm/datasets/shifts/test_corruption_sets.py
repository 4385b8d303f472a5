"""Tiny files of the published formats."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from csm.datasets import RealDataset
from csm.datasets.shifts.corruption_sets import cifar_c, class_folders, npy_files, tiny_imagenet_c
from csm.errors import InputError

Real = Callable[..., RealDataset]
ROWS = 6  # for each severity
WNIDS = ("n01", "n02", "n03")


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Two corruptions; the first pixel of an image says which corruption, severity and row it is."""
    for number, name in enumerate(("fog", "contrast")):
        images = np.zeros((5 * ROWS, 32, 32, 3), dtype=np.uint8)
        images[:, 0, 0] = [(number, row // ROWS + 1, row % ROWS) for row in range(5 * ROWS)]
        np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.arange(ROWS) % 3, 5))
    return tmp_path


def test_cifar_c_severities_are_blocks(cifar: Path, real: Real) -> None:
    parts = list(cifar_c(real(), str(cifar)))
    assert [(part.corruption, part.severity) for part in parts] == [
        (name, s) for name in ("contrast", "fog") for s in range(1, 6)
    ]
    for part in parts:
        assert part.images.shape == (ROWS, 3, 32, 32)
        number = {"fog": 0, "contrast": 1}[part.corruption or ""]
        assert part.images[:, :, 0, 0].tolist() == [[number, part.severity, row] for row in range(ROWS)]
        assert part.labels is not None
        assert part.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert part.labels.dtype == torch.int64


def test_cifar_c_some_of_it(cifar: Path, real: Real) -> None:
    parts = list(cifar_c(real(), str(cifar), "fog", "5,2"))
    assert [(part.corruption, part.severity) for part in parts] == [("fog", 2), ("fog", 5)]
    assert [part.images[0, 1, 0, 0].item() for part in parts] == [2, 5]


def test_cifar_c_takes_the_shape_of_the_data(cifar: Path, real: Real) -> None:
    assert next(cifar_c(real(shape=(16, 16, 1)), str(cifar))).images.shape == (ROWS, 1, 16, 16)


def replace_array(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, array, allow_pickle=array.dtype == object)


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            replace_array("fog.npy", np.zeros((30, 3, 32, 32), np.uint8)),
            r"fog\.npy: expected uint8 \(30, 32, 32, 3\), got uint8 \(30, 3",
        ),
        (replace_array("fog.npy", np.zeros((30, 32, 32, 3))), r"fog\.npy: expected uint8 .*, got float64"),
        (replace_array("fog.npy", np.zeros((20, 32, 32, 3), np.uint8)), r"fog\.npy: expected uint8 .*, got uint8 \(20,"),
        (replace_array("fog.npy", np.array([{}])), r"fog\.npy is not a whole array \(.*Python objects.*\): fetch it again"),
        (cut("fog.npy", 5000), r"fog\.npy is not a whole array \(mmap length is greater than file size\): fetch it again"),
        (cut("fog.npy", 10), r"fog\.npy is not a whole array"),
        (cut("fog.npy", 0), r"fog\.npy is not a whole array"),
        (
            replace_array("labels.npy", np.tile(np.arange(ROWS), 5)),
            r"expected labels of 3 classes, 0\.\.2, .* got 6, 0\.\.5: it belongs",
        ),
        (replace_array("labels.npy", np.tile(np.arange(ROWS) % 2, 5)), r"expected labels of 3 classes, 0\.\.2, .* got 2, 0\.\.1"),
        (replace_array("labels.npy", np.tile(np.arange(ROWS) % 3 - 1, 5)), r"expected labels of 3 classes, .* got 3, -1\.\.1"),
        (replace_array("labels.npy", np.arange(29) % 3), r"labels\.npy: expected whole numbers, as many for each of 5"),
        (replace_array("labels.npy", np.zeros((5, 6), np.int64)), r"labels\.npy: expected whole numbers"),
        (replace_array("labels.npy", np.zeros(30)), r"labels\.npy: expected whole numbers, .* got float64"),
        (replace_array("labels.npy", np.zeros(0, np.int64)), r"labels\.npy: expected whole numbers"),
        (lambda folder: (folder / "labels.npy").unlink(), r"labels\.npy does not exist"),
    ],
)
def test_cifar_c_that_cannot_be_used_is_refused_before_a_part(
    cifar: Path, real: Real, damage: Callable[[Path], None], message: str
) -> None:
    damage(cifar)
    with pytest.raises(InputError, match=message):
        cifar_c(real(), str(cifar))


def test_cifar_c_missing_folder_or_corruption(cifar: Path, real: Real) -> None:
    with pytest.raises(InputError, match=r"corruptions .*: snow is not there; all, or some of contrast, fog"):
        cifar_c(real(), str(cifar), "fog,snow")
    with pytest.raises(InputError, match="path: folder none does not exist"):
        cifar_c(real(), "none")


def test_cifar_c_files_tell_a_change(cifar: Path) -> None:
    before = npy_files(str(cifar))
    assert [name for name, _, _ in before] == ["contrast.npy", "fog.npy", "labels.npy"]
    np.save(cifar / "fog.npy", np.ones((30, 32, 32, 3), dtype=np.uint8))
    os.utime(cifar / "fog.npy", ns=(0, 1))
    assert npy_files(str(cifar)) != before


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Two corruptions, five severities, two images of one colour for each class: the class by its green, the severity by its red."""
    root = tmp_path / "Tiny-ImageNet-C"
    for name in ("fog", "snow"):
        for severity in range(1, 6):
            for label, wnid in enumerate(WNIDS):
                folder = root / name / str(severity) / wnid
                folder.mkdir(parents=True)
                for number in range(2):
                    Image.new("RGB", (64, 64), (40 * severity, 80 * label, 100)).save(folder / f"{number}.JPEG", quality=95)
    return root


def labels_by_colour(images: torch.Tensor) -> list[int]:
    return (images[:, 1].double().mean(dim=(1, 2)) / 80).round().long().tolist()


def test_tiny_imagenet_c_classes_are_folders_in_order(tiny: Path, real: Real) -> None:
    parts = list(tiny_imagenet_c(real((64, 64, 3)), str(tiny)))
    assert [(part.corruption, part.severity) for part in parts] == [(name, s) for name in ("fog", "snow") for s in range(1, 6)]
    for part in parts:
        assert part.images.shape == (6, 3, 64, 64)
        assert part.labels is not None
        assert part.labels.tolist() == [0, 0, 1, 1, 2, 2] == labels_by_colour(part.images)
        assert part.images[:, 0].double().mean().item() == pytest.approx(40 * (part.severity or 0), abs=3)


def test_tiny_imagenet_c_classes_are_lines_of_a_file(tiny: Path, real: Real) -> None:
    (tiny.parent / "wnids.txt").write_text("n03\nn01\nn02\n")
    part = next(tiny_imagenet_c(real((64, 64, 3)), str(tiny), "fog", "1", wnids=str(tiny.parent / "wnids.txt")))
    assert part.labels is not None
    assert part.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert labels_by_colour(part.images) == [2, 2, 0, 0, 1, 1]  # colours are those of WNIDS: n03 is 2


def test_tiny_imagenet_c_class_names_may_be_wnids(tiny: Path, real: Real) -> None:
    part = next(tiny_imagenet_c(real((64, 64, 3), ("n02", "n03", "n01")), str(tiny), "fog", "1"))
    assert labels_by_colour(part.images) == [1, 1, 2, 2, 0, 0]


def test_tiny_imagenet_c_takes_the_shape_of_the_data(tiny: Path, real: Real) -> None:
    assert next(tiny_imagenet_c(real((32, 32, 1)), str(tiny))).images.shape == (6, 1, 32, 32)


def test_tiny_imagenet_c_of_another_number_of_classes(tiny: Path, real: Real) -> None:
    with pytest.raises(InputError, match="expected a folder for each of the 4 classes of the data set, got 3"):
        tiny_imagenet_c(real((64, 64, 3), ("a", "b", "c", "d")), str(tiny))


def test_tiny_imagenet_c_that_cannot_be_used(tiny: Path, real: Real) -> None:
    data = real((64, 64, 3))
    with pytest.raises(InputError, match=r"corruptions .*: rain is not there; all, or some of fog, snow"):
        tiny_imagenet_c(data, str(tiny), "rain")
    with pytest.raises(InputError, match=r"wnids: none\.txt does not exist"):
        tiny_imagenet_c(data, str(tiny), wnids="none.txt")
    (tiny.parent / "wnids.txt").write_text("n01\nn02\nn99\n")
    with pytest.raises(InputError, match=r"wnids: expected .*wnids\.txt to name the 3 class folders"):
        tiny_imagenet_c(data, str(tiny), wnids=str(tiny.parent / "wnids.txt"))
    (tiny / "snow" / "3" / "n02").rename(tiny / "snow" / "3" / "n77")
    with pytest.raises(InputError, match=r"snow/3: expected the 3 class folders of .*fog/1"):
        tiny_imagenet_c(data, str(tiny))


def test_tiny_imagenet_c_truncated_image_is_named(tiny: Path, real: Real) -> None:
    os.truncate(tiny / "fog" / "1" / "n01" / "1.JPEG", 300)
    parts = tiny_imagenet_c(real((64, 64, 3)), str(tiny), "fog")
    with pytest.raises(InputError, match=r"cannot read image .*fog/1/n01/1\.JPEG .*repair or remove it"):
        next(parts)


def test_tiny_imagenet_c_without_images(tiny: Path, real: Real) -> None:
    for file in (tiny / "fog" / "1").glob("*/*"):
        file.unlink()
    with pytest.raises(InputError, match=r"fog/1: no \*\.JPEG in the class folders"):
        next(tiny_imagenet_c(real((64, 64, 3)), str(tiny), "fog"))


def test_tiny_imagenet_c_folders_tell_a_change(tiny: Path) -> None:
    before = class_folders(str(tiny))
    assert len(before) == 2 * 5 * 3
    (tiny / "fog" / "1" / "n01" / "1.JPEG").unlink()
    assert class_folders(str(tiny)) != before
    (tiny / "wnids.txt").touch()
    assert len(class_folders(str(tiny), str(tiny / "wnids.txt"))) == 2 * 5 * 3 + 1
