from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csm.datasets import source_digest
from csm.datasets.tiny_imagenet import tiny_imagenet
from csm.errors import InputError


def test_its_val_is_the_test_split(tiny_imagenet_folder: Path) -> None:
    data = tiny_imagenet(str(tiny_imagenet_folder), val=0.2)
    assert data.info.class_names == ("Egyptian cat", "crane (n02)", "crane (n03)")
    assert data.info.shape == (8, 8, 3)
    assert data.info.counts == {"train": 24, "val": 6, "test": 12}
    images, labels = data.split("test")
    ids = {line.split("\t")[0]: line.split("\t")[1] for line in (tiny_imagenet_folder / "val" / "val_annotations.txt").open()}
    assert [["n01", "n02", "n03"][label] for label in labels] == list(ids.values())
    for pixels, name in zip(images, ids, strict=True):
        with Image.open(tiny_imagenet_folder / "val" / "images" / name) as image:
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


def test_grey_images_are_made_colour(tiny_imagenet_folder: Path) -> None:
    data = tiny_imagenet(str(tiny_imagenet_folder))
    first = np.frombuffer(data.frame["image"][0], dtype=np.uint8).reshape(8, 8, 3)
    with Image.open(tiny_imagenet_folder / "train" / "n01" / "images" / "n01_0.JPEG") as image:
        assert image.mode == "L"
        assert np.array_equal(first, np.repeat(np.asarray(image)[..., None], 3, axis=2))


def test_the_folder_that_holds_the_folder_size_and_channels(tiny_imagenet_folder: Path) -> None:
    assert tiny_imagenet(str(tiny_imagenet_folder.parent), size=4, channels=1).info.shape == (4, 4, 1)


@pytest.mark.parametrize("missing", ["wnids.txt", "words.txt", "val/val_annotations.txt"])
def test_a_missing_list_is_named(tiny_imagenet_folder: Path, missing: str) -> None:
    (tiny_imagenet_folder / missing).unlink()
    with pytest.raises(InputError, match=rf"{missing}; expected the folder tiny-imagenet-200 with wnids.txt"):
        tiny_imagenet(str(tiny_imagenet_folder))


def test_a_class_without_images_is_named(tiny_imagenet_folder: Path) -> None:
    (tiny_imagenet_folder / "train" / "n02").rename(tiny_imagenet_folder / "n02")
    with pytest.raises(InputError, match=r"train/n02/images has no \*.JPEG; expected the folder"):
        tiny_imagenet(str(tiny_imagenet_folder))


@pytest.mark.parametrize("name", ["train/n02/images/n02_3.JPEG", "val/images/val_5.JPEG"])
def test_an_image_that_cannot_be_read_is_named(tiny_imagenet_folder: Path, name: str) -> None:
    (tiny_imagenet_folder / name).write_bytes(b"\xff\xd8 no image")
    with pytest.raises(InputError, match=rf"cannot read image .*{name} "):
        tiny_imagenet(str(tiny_imagenet_folder))


def test_a_missing_image_of_the_list_is_named(tiny_imagenet_folder: Path) -> None:
    (tiny_imagenet_folder / "val" / "images" / "val_5.JPEG").unlink()
    with pytest.raises(InputError, match=r"image .*val_5.JPEG does not exist"):
        tiny_imagenet(str(tiny_imagenet_folder))


@pytest.mark.parametrize("line", ["val_0.JPEG n01", "val_0.JPEG\tn09\t0", "../wnids.txt\tn01", "val_0.JPEG"])
def test_a_line_that_says_no_class_is_named(tiny_imagenet_folder: Path, line: str) -> None:
    (tiny_imagenet_folder / "val" / "val_annotations.txt").write_text(line + "\n")
    with pytest.raises(InputError, match=r"val_annotations.txt: line .* is not a file name, a tab and an id of wnids.txt"):
        tiny_imagenet(str(tiny_imagenet_folder))


def test_the_digest_of_the_source_is_of_images_and_lists(tiny_imagenet_folder: Path) -> None:
    before = source_digest("tiny-imagenet", path=str(tiny_imagenet_folder))
    assert before.startswith("45 files, ")  # 30 and 12 images, three lists
    (tiny_imagenet_folder / "words.txt").write_text("n01\tcat\nn02\tdog\nn03\temu\n")
    assert source_digest("tiny-imagenet", path=str(tiny_imagenet_folder)) != before
