import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from csm.datasets import RealDataset, load_dataset, source_digest
from csm.datasets.decoding import resize
from csm.datasets.image_folder import image_folder
from csm.datasets.source_files import stamps
from csm.errors import InputError


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (4, 4)) -> Image.Image:
    """Random pixels; ``size`` is (width, height)."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.fromarray(levels[..., 0] if bands == 1 else levels, mode=None)


def fill(folder: Path, counts: dict[str, int], mode: str = "RGB") -> Path:
    """``counts`` pictures in each class folder."""
    for number, (label, count) in enumerate(counts.items()):
        (folder / label).mkdir(parents=True)
        for index in range(count):
            picture(1000 * number + index, mode).save(folder / label / f"{index:03d}.png")
    return folder


def pixels(dataset: RealDataset) -> list[np.ndarray]:
    return [np.frombuffer(cell, dtype=np.uint8).reshape(dataset.info.shape) for cell in dataset.frame["image"]]


def splits_of(dataset: RealDataset) -> dict[str, dict[str, int]]:
    """split -> class name -> images."""
    names = dataset.info.class_names
    return {
        str(split): {names[label]: len(rows.filter(pl.col("label") == label)) for label in sorted(set(rows["label"]))}
        for (split,), rows in dataset.frame.group_by("split")
    }


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pixels_of_each_mode_as_rgb(tmp_path: Path, mode: str) -> None:
    fill(tmp_path, {"a": 4, "b": 4}, mode)
    dataset = image_folder(str(tmp_path), size=4, val=0.25, test=0.25)
    assert dataset.info.shape == (4, 4, 3)
    found = {image.tobytes() for image in pixels(dataset)}
    for number in (0, 1000):
        source = np.asarray(picture(number, mode))
        # Grey is repeated; of RGBA the colours are kept as they are, whatever the alpha.
        expected = np.repeat(source[..., None], 3, axis=2) if mode == "L" else source[..., :3]
        assert expected.tobytes() in found


def test_rgb_as_grey_is_the_luma_of_bt601(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    dataset = image_folder(str(tmp_path), size=4, channels=1, val=0.3, test=0.3)
    assert dataset.info.shape == (4, 4, 1)
    luma = np.asarray(picture(0)).astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(pixels(dataset)[0][..., 0] - luma).max() <= 1


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3}, "L")
    levels = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    Image.fromarray(levels).save(tmp_path / "a" / "000.png")
    for channels in (1, 3):
        dataset = image_folder(str(tmp_path), size=4, channels=channels, val=0.3, test=0.3)
        assert np.abs(pixels(dataset)[0] - levels[..., None] / 257).max() <= 1


def test_a_palette_is_resolved(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    paletted = picture(5).convert("P")
    paletted.save(tmp_path / "a" / "000.png")
    dataset = image_folder(str(tmp_path), size=4, val=0.3, test=0.3)
    assert np.array_equal(pixels(dataset)[0], np.asarray(paletted.convert("RGB")))


@pytest.mark.parametrize(("size", "box"), [((6, 4), (1, 0)), ((4, 8), (0, 2))])
def test_the_middle_square_is_kept(tmp_path: Path, size: tuple[int, int], box: tuple[int, int]) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    picture(7, size=size).save(tmp_path / "a" / "000.png")
    dataset = image_folder(str(tmp_path), size=4, val=0.3, test=0.3)
    left, top = box
    expected = np.asarray(picture(7, size=size))[top : top + 4, left : left + 4]
    assert np.array_equal(pixels(dataset)[0], expected)


@pytest.mark.parametrize("size", [2, 9])
def test_images_are_resized_to_one_size(tmp_path: Path, size: int) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    Image.new("RGB", (5, 5), (10, 200, 90)).save(tmp_path / "a" / "000.png")
    dataset = image_folder(str(tmp_path), size=size, val=0.3, test=0.3)
    assert dataset.info.shape == (size, size, 3)
    assert (pixels(dataset)[0] == [10, 200, 90]).all()


def test_images_as_they_are(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(4):
            picture(number, size=(6, 4)).save(tmp_path / label / f"{number}.png")
    dataset = image_folder(str(tmp_path), size=0, val=0.25, test=0.25)
    assert dataset.info.shape == (4, 6, 3)
    assert np.array_equal(pixels(dataset)[5], np.asarray(picture(1, size=(6, 4))))
    picture(9, size=(5, 5)).save(tmp_path / "b" / "2.png")
    with pytest.raises(InputError, match=r"b/2.png has 5 x 5 pixels, .*a/0.png has 6 x 4: set data.size"):
        image_folder(str(tmp_path), size=0)


def test_array_and_files_are_resized_alike(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 4, "b": 4})
    whole = np.stack([np.asarray(picture(seed)) for seed in (0, 1, 2, 3, 1000, 1001, 1002, 1003)])
    dataset = image_folder(str(tmp_path), size=3, val=0.25, test=0.25)
    assert np.array_equal(pixels(dataset), resize(whole, 3))


def test_without_split_folders_all_three_are_cut(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 20, "ant": 10})
    dataset = image_folder(str(tmp_path), size=4, val=0.2, test=0.3)
    assert dataset.info.class_names == ("ant", "cat")
    assert splits_of(dataset) == {"train": {"ant": 5, "cat": 10}, "val": {"ant": 2, "cat": 4}, "test": {"ant": 3, "cat": 6}}
    labels = {image.tobytes(): label for image, label in zip(pixels(dataset), dataset.frame["label"], strict=True)}
    assert labels[np.asarray(picture(0)).tobytes()] == 1  # the first picture of "cat"
    assert labels[np.asarray(picture(1000)).tobytes()] == 0
    assert image_folder(str(tmp_path), size=4, val=0.2, test=0.3).frame.equals(dataset.frame)


def test_split_folders_are_the_splits(tmp_path: Path) -> None:
    given = {"train": {"a": 3, "b": 4}, "val": {"a": 1, "b": 2}, "test": {"a": 2, "b": 1}}
    for split, counts in given.items():
        fill(tmp_path / split, counts)
    dataset = image_folder(str(tmp_path), size=4, val=0.9, test=0.05)  # fractions that nothing is left to cut with
    assert splits_of(dataset) == given
    assert dataset.info.name == tmp_path.name


def test_a_missing_split_is_cut_from_train(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 10, "b": 10})
    fill(tmp_path / "test", {"a": 3, "b": 1})
    dataset = image_folder(str(tmp_path), size=4, val=0.2, test=0.5)
    assert splits_of(dataset) == {"train": {"a": 8, "b": 8}, "val": {"a": 2, "b": 2}, "test": {"a": 3, "b": 1}}


def test_images_in_subfolders_belong_to_the_class(tmp_path: Path) -> None:
    fill(tmp_path / "a", {"left": 2, "right": 2})
    fill(tmp_path, {"b": 4})
    dataset = image_folder(str(tmp_path), size=4, val=0.25, test=0.25)
    assert splits_of(dataset)["train"] == {"a": 2, "b": 2}


def test_other_files_are_no_images(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 4, "b": 4, "notes": 0})
    (tmp_path / "a" / "README.txt").write_text("no image")
    (tmp_path / "notes" / "list.csv").write_text("1,2")
    picture(9).save(tmp_path / "b" / "LOUD.PNG")
    dataset = image_folder(str(tmp_path), size=4, val=0.25, test=0.25)
    assert dataset.info.class_names == ("a", "b")
    assert len(dataset.frame) == 9


@pytest.mark.parametrize("keep", [0, 8, 40, -1])
def test_a_truncated_image_is_named(tmp_path: Path, keep: int) -> None:
    fill(tmp_path, {"a": 4, "b": 4})
    broken = tmp_path / "b" / "002.png"
    Image.effect_noise((32, 32), 90).save(broken)
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2] if keep < 0 else content[:keep])
    with pytest.raises(InputError, match=f"cannot read image {broken} "):
        image_folder(str(tmp_path), size=4)


def test_a_text_file_that_is_named_png_is_named(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "zz.png").write_text("this is no image")
    with pytest.raises(InputError, match=r"cannot read image .*zz.png"):
        image_folder(str(tmp_path), size=4)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        image_folder(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("counts", [{}, {"a": 5}, {"a": 5, "b": 0}], ids=["empty", "one-class", "one-class-with-images"])
def test_two_classes_are_needed(tmp_path: Path, counts: dict[str, int]) -> None:
    fill(tmp_path, counts)
    with pytest.raises(InputError, match=r"class folder\(s\) .* at least 2 are needed"):
        image_folder(str(tmp_path), size=4)


def test_a_class_without_training_image_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 3})
    fill(tmp_path / "val", {"a": 1, "b": 1, "late": 1})
    fill(tmp_path / "test", {"a": 1, "b": 1})
    with pytest.raises(InputError, match="class 'late' has no training image"):
        image_folder(str(tmp_path), size=4)


@pytest.mark.parametrize("empty", ["train", "val", "test"])
def test_an_empty_split_folder_is_named(tmp_path: Path, empty: str) -> None:
    for split in ("train", "val", "test"):
        fill(tmp_path / split, {"a": 0 if split == empty else 2, "b": 0 if split == empty else 2})
    with pytest.raises(InputError, match=f"no image in split '{empty}'"):
        image_folder(str(tmp_path), size=4)


def test_source_files_change_with_the_folder(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 1, "b": 1})
    before = stamps(str(tmp_path))
    assert [name for name, _, _ in before] == ["a/000.png", "b/000.png"]
    assert stamps(str(tmp_path)) == before
    os.utime(tmp_path / "a" / "000.png", ns=(0, 0))
    touched = stamps(str(tmp_path))
    assert touched != before
    picture(3).save(tmp_path / "b" / "more.png")
    assert len(stamps(str(tmp_path))) == 3
    assert source_digest("image-folder", path=str(tmp_path)).startswith("3 files, ")


def test_the_digest_of_a_folder_changes_with_its_files(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 1, "b": 1})
    before = source_digest("image-folder", path=str(tmp_path))
    assert source_digest("image-folder", path=str(tmp_path)) == before
    os.utime(tmp_path / "a" / "000.png", ns=(0, 0))
    assert source_digest("image-folder", path=str(tmp_path)) != before


def test_bundled_sources_have_nothing_outside_the_configuration() -> None:
    assert source_digest("digits") == ""


def test_load_dataset_passes_the_parameters(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 4, "b": 4})
    by_name = load_dataset("image-folder", path=str(tmp_path), size=2, val=0.25, test=0.25)
    assert by_name.frame.equals(image_folder(str(tmp_path), size=2, val=0.25, test=0.25).frame)


def test_an_unknown_source_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"data.source: unknown 'mnist'; one of digits, digits-hard, digits-degraded, image-folder"
    ):
        load_dataset("mnist")


def test_an_unknown_parameter_is_named_with_the_allowed_ones() -> None:
    with pytest.raises(InputError, match=r"data.blur: source 'digits' has no such setting; allowed: val, test, seed"):
        load_dataset("digits", blur=1.0)


def test_a_misspelt_split_is_not_left_out(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 4, "b": 4})
    (tmp_path / "notes").mkdir()
    assert len(image_folder(str(tmp_path), size=4).frame) == 8
    fill(tmp_path / "validation", {"a": 1, "b": 1})
    with pytest.raises(InputError, match="has a folder validation like a split, but splits are train, val, test"):
        image_folder(str(tmp_path), size=4)
