from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from csm import tables
from csm.datasets.real import CHUNK, RealDataset, build, complete_splits, stratified_splits, with_truth
from csm.errors import InputError
from csm.generators.gaussians import GaussianGenerator, GaussiansSpec
from csm.generators.unet import UNetGenerator, UNetSpec


def arrays(rows: int = 12, shape: tuple[int, int, int] = (2, 3, 3)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (rows, *shape), dtype=np.uint8)
    return images, np.arange(rows) % 3, np.array([("train", "train", "val", "test")[row // 3 % 4] for row in range(rows)])


@pytest.fixture
def dataset() -> RealDataset:
    return build("tiny", *arrays(), ("x", "y", "z"))


def test_statistics_are_of_the_train_split_per_channel(dataset: RealDataset) -> None:
    images, _, splits = arrays()
    for channel in range(3):
        values = [
            int(v) / 255
            for image, split in zip(images, splits, strict=True)
            if split == "train"
            for v in image[..., channel].flat
        ]
        mean = sum(values) / len(values)
        assert dataset.info.mean[channel] == pytest.approx(mean, abs=1e-12)
        spread = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
        assert dataset.info.std[channel] == pytest.approx(spread, abs=1e-12)


def test_other_splits_do_not_touch_the_statistics(dataset: RealDataset) -> None:
    images, labels, splits = arrays()
    images[splits != "train"] = 255
    changed = build("tiny", images, labels, splits, ("x", "y", "z"))
    assert (changed.info.mean, changed.info.std) == (dataset.info.mean, dataset.info.std)


def test_a_constant_channel_has_the_spread_of_one_level() -> None:
    images, labels, splits = arrays()
    images[..., 1] = 77
    info = build("flat", images, labels, splits, ("x", "y", "z")).info
    assert info.std[1] == 1 / 255
    assert info.mean[1] == pytest.approx(77 / 255)


def test_a_split_is_read_in_order_of_image_id(dataset: RealDataset) -> None:
    images, labels, splits = arrays()
    shuffled = RealDataset(dataset.info, dataset.frame.sample(fraction=1.0, shuffle=True, seed=3))
    for name in tables.SPLITS:
        pixels, targets = shuffled.split(name)
        assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), images[splits == name])
        assert targets.dtype == torch.int64
        assert targets.tolist() == labels[splits == name].tolist()


def test_info_describes_the_table(dataset: RealDataset) -> None:
    assert dataset.info.shape == (2, 3, 3)
    assert dataset.info.n_classes == 3
    assert dataset.info.counts == {"train": 6, "val": 3, "test": 3}
    assert tables.check(dataset.frame, tables.REAL) is dataset.frame


def test_the_digest_is_of_pixels_labels_and_splits(dataset: RealDataset) -> None:
    images, labels, splits = arrays()
    assert build("other name", images, labels, splits, ("x", "y", "z")).info.digest == dataset.info.digest
    pixel, label, split = images.copy(), labels.copy(), splits.copy()
    pixel[0, 0, 0, 0] ^= 1
    label[0] = 1
    label[1] = 0
    split[0], split[6] = "val", "train"
    changed = [(pixel, labels, splits), (images, label, splits), (images, labels, split)]
    digests = {build("tiny", *arguments, ("x", "y", "z")).info.digest for arguments in changed}
    assert len(digests | {dataset.info.digest}) == 4


def test_a_data_set_survives_its_folder(tmp_path: Path, dataset: RealDataset) -> None:
    dataset.save(tmp_path)
    again = RealDataset.load(tmp_path)
    assert again.info == dataset.info
    assert again.frame.equals(dataset.frame)
    assert RealDataset.load_info(tmp_path) == dataset.info


def law() -> GaussianGenerator:
    return GaussianGenerator(GaussiansSpec((2, 3, 3), 3), torch.zeros(3, 18), torch.eye(18).expand(3, 18, 18), torch.ones(3) / 3)


def test_the_law_of_the_images_goes_with_them(tmp_path: Path, dataset: RealDataset) -> None:
    known = with_truth(dataset, law())
    assert known.info.digest != dataset.info.digest
    assert with_truth(dataset, law()).info == known.info
    other = law()
    other.means[0, 0] = 0.1
    assert with_truth(dataset, other).info.digest != known.info.digest
    known.save(tmp_path)
    again = RealDataset.load(tmp_path)
    assert again.info == known.info
    assert isinstance(again.truth, GaussianGenerator)
    assert torch.equal(again.truth.covariances, law().covariances)


def test_a_data_set_without_a_law_takes_that_of_the_one_before_away(tmp_path: Path, dataset: RealDataset) -> None:
    with_truth(dataset, law()).save(tmp_path)
    dataset.save(tmp_path)
    assert not (tmp_path / "truth").exists()
    assert RealDataset.load(tmp_path).truth is None


def test_a_generator_that_is_no_law_is_refused(tmp_path: Path, dataset: RealDataset) -> None:
    with_truth(dataset, law()).save(tmp_path)
    spec = UNetSpec((2, 3, 3), 3, 0.5, (4,), 1, 0.0)
    UNetGenerator(spec).save(tmp_path / "truth")
    with pytest.raises(InputError, match=r"truth holds no generator whose posterior is known"):
        RealDataset.load(tmp_path)


def test_damaged_files_are_named(tmp_path: Path, dataset: RealDataset) -> None:
    with pytest.raises(InputError, match=r"dataset.json does not exist"):
        RealDataset.load(tmp_path)
    dataset.save(tmp_path)
    part = tmp_path / "real" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"part-00000.parquet is not a whole parquet file"):
        RealDataset.load(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset.json is not valid JSON"):
        RealDataset.load_info(tmp_path)


def test_one_class_cannot_be_mixed() -> None:
    images, labels, splits = arrays()
    with pytest.raises(InputError, match=r"'tiny' has 1 class \(x\): at least 2"):
        build("tiny", images, labels * 0, splits, ("x",))


@pytest.mark.parametrize("label", [-1, 3, 70_000])
def test_a_label_that_is_no_class_is_named(label: int) -> None:
    images, labels, splits = arrays()
    labels[7] = label
    with pytest.raises(InputError, match=rf"'tiny': image 7 has label {label}; expected 0 to 2, as there are 3 classes"):
        build("tiny", images, labels, splits, ("x", "y", "z"))


def test_more_images_than_are_copied_at_once() -> None:
    images, _, _ = arrays(rows=2 * CHUNK + 5)
    labels = np.arange(len(images)) % 3
    splits = stratified_splits(labels, 0.2, 0.2, seed=0)
    dataset = build("many", images.transpose(0, 2, 1, 3), labels, splits, ("x", "y", "z"))  # not contiguous
    assert dataset.frame["image"].to_list() == [image.transpose(1, 0, 2).tobytes() for image in images]
    train = images[splits == "train"] / 255
    assert dataset.info.mean == pytest.approx(train.mean(axis=(0, 1, 2)), abs=1e-14)
    assert dataset.info.std == pytest.approx(train.std(axis=(0, 1, 2)), abs=1e-14)
    contiguous = build("many", np.ascontiguousarray(images.transpose(0, 2, 1, 3)), labels, splits, ("x", "y", "z"))
    assert contiguous.info == dataset.info
    pixels, _ = dataset.split("test")
    assert np.array_equal(pixels.permute(0, 3, 2, 1).numpy(), images[splits == "test"])


@pytest.mark.parametrize("given", [(), ("val",), ("test",), ("val", "test")])
def test_only_missing_splits_are_cut_from_train(given: tuple[str, ...]) -> None:
    labels = np.repeat([0, 1], 50)
    before = np.where(np.arange(100) % 5 == 0, "test", "train")
    after = complete_splits(labels, before, given, 0.1, 0.2, seed=3)
    assert (after[before == "test"] == "test").all()
    counts = {split: int((after[before == "train"] == split).sum()) for split in tables.SPLITS}
    assert counts["val"] == (0 if "val" in given else 8)
    assert counts["test"] == (0 if "test" in given else 16)
    assert np.array_equal(after, complete_splits(labels, before, given, 0.1, 0.2, seed=3))


@pytest.mark.parametrize("split", tables.SPLITS)
def test_an_empty_split_is_named(split: str) -> None:
    images, labels, splits = arrays()
    kept = splits != split
    with pytest.raises(InputError, match=f"no image in split '{split}'"):
        build("tiny", images[kept], labels[kept], splits[kept], ("x", "y", "z"))


def test_a_class_without_training_image_is_named() -> None:
    images, labels, splits = arrays()
    labels[splits == "train"] %= 2
    with pytest.raises(InputError, match="class 'z' has no training image"):
        build("tiny", images, labels, splits, ("x", "y", "z"))


@pytest.mark.parametrize(("val", "test"), [(0.2, 0.3), (0.0, 0.5), (0.4, 0.5), (0.0, 0.0)])
def test_stratified_splits_take_the_fraction_of_each_class(val: float, test: float) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [100, 37, 8]))
    splits = stratified_splits(labels, val, test, seed=5)
    for label in range(3):
        of_class = splits[labels == label].tolist()
        assert abs(of_class.count("val") - val * len(of_class)) <= 0.5
        assert abs(of_class.count("test") - test * len(of_class)) <= 0.5
        assert set(of_class) <= set(tables.SPLITS)


@pytest.mark.parametrize("members", [1, 2, 3])
def test_a_small_class_keeps_a_training_image(members: int) -> None:
    splits = stratified_splits(np.repeat([0, 1], members), 0.49, 0.5, seed=0)
    assert "train" in splits[:members]
    assert "train" in splits[members:]


def test_stratified_splits_are_random_in_the_seed_alone() -> None:
    labels = np.repeat([0, 1], 50)
    first = stratified_splits(labels, 0.3, 0.3, seed=1)
    assert np.array_equal(first, stratified_splits(labels, 0.3, 0.3, seed=1))
    assert not np.array_equal(first, stratified_splits(labels, 0.3, 0.3, seed=2))
    assert len(set(first[:15])) > 1  # not the first images of each class


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.2), (0.2, -0.1), (0.5, 0.5)])
def test_impossible_fractions_are_refused(val: float, test: float) -> None:
    with pytest.raises(ValueError, match=rf"got {val} and {test}"):
        stratified_splits(np.repeat([0, 1], 10), val, test, seed=0)


def test_image_ids_count_from_zero(dataset: RealDataset) -> None:
    assert dataset.frame["image_id"].to_list() == list(range(12))
    assert dataset.frame.filter(pl.col("split") == "val")["image_id"].to_list() == [6, 7, 8]
