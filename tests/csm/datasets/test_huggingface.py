import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from csm.datasets import source_digest
from csm.datasets.huggingface import huggingface
from csm.datasets.image_sources import labelled_images_of
from csm.errors import InputError
from tests.csm.datasets.conftest import drawn, encoded, write_parquet


def test_shards_splits_and_classes(hub_folder: Path) -> None:
    data = huggingface(str(hub_folder), val=0.2)
    assert data.info.class_names == ("cat", "dog", "emu")
    assert data.info.counts == {"train": 16, "val": 4, "test": 6}  # 8, 6 and 6 in train, of which 2, 1 and 1
    images, labels = data.split("test")
    test = parquet.read_table(hub_folder / "data" / "test-00000-of-00001.parquet").to_pylist()
    assert labels.tolist() == [row["label"] for row in test]
    expected = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in test]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("pattern", ["data/*.parquet", "**/*.parquet", "data"])
def test_a_pattern_gives_the_same(hub_folder: Path, pattern: str) -> None:
    assert huggingface(str(hub_folder / pattern)).info.digest == huggingface(str(hub_folder)).info.digest


def test_one_file_is_cut_in_three(hub_folder: Path) -> None:
    data = huggingface(str(hub_folder / "data" / "train-00000-of-00002.parquet"), val=0.34, test=0.34)
    assert data.info.counts == {"train": 4, "val": 3, "test": 3}


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("image", "labels"), ("img", "label")])
def test_usual_names_of_columns(tmp_path: Path, image: str, label: str) -> None:
    write_parquet(tmp_path / "a.parquet", [encoded(p) for p in drawn(0, 12, 4, 4, 3)], [0, 1] * 6, ["x", "y"], image, label)
    assert huggingface(str(tmp_path), val=0.2).info.class_names == ("x", "y")


def test_other_columns_plain_bytes_and_names_as_labels(tmp_path: Path) -> None:
    images = [encoded(pixels, "JPEG") for pixels in drawn(0, 12, 4, 5)]
    parquet.write_table(pa.table({"photo": images, "animal": ["dog", "cat"] * 6}), tmp_path / "a.parquet")
    data = huggingface(str(tmp_path), image_column="photo", label_column="animal", channels=1, val=0.2)
    assert data.info.class_names == ("cat", "dog")
    assert data.info.shape == (4, 5, 1)
    assert data.frame["label"].to_list() == [1, 0] * 6
    with pytest.raises(InputError, match=r"no column image or img among photo, animal: set data.image_column"):
        huggingface(str(tmp_path), label_column="animal")
    with pytest.raises(InputError, match=r"no column kind among photo, animal: set data.label_column"):
        huggingface(str(tmp_path), image_column="photo", label_column="kind")


def test_numbers_are_names_unless_a_file_says_them(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [encoded(p) for p in drawn(0, 12, 4, 4, 3)], [0, 1] * 6, None)
    assert huggingface(str(tmp_path), val=0.2).info.class_names == ("0", "1")
    (tmp_path / "names.txt").write_text("left\nright\n")
    assert huggingface(str(tmp_path), val=0.2, class_names=str(tmp_path / "names.txt")).info.class_names == ("left", "right")


def test_folders_say_the_split_too(tmp_path: Path) -> None:
    for split, rows in {"train": 9, "validation": 3, "test": 3}.items():
        images = [encoded(pixels) for pixels in drawn(rows, rows, 4, 4, 3)]
        write_parquet(tmp_path / split / "0000.parquet", images, [0, 1, 2] * (rows // 3), None)
    assert huggingface(str(tmp_path)).info.counts == {"train": 9, "val": 3, "test": 3}


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([None] * 6, [0, 1] * 3, r"row 0 has no bytes of an image in image"),
        ([b"no image"] * 6, [0, 1] * 3, r"cannot read image .*a.parquet row 0 \(no image\): repair or remove it"),
        (None, [0, 1, -1, 1, 0, 1], r"label -1 is no class"),
        (None, [0, 1, 2, 0, 1, 2], r"image 2 has label 2; expected 0 to 1"),
        (None, [0, 1, None, 0, 1, 0], r"row 2 has no label: remove it"),
        (None, [0.0, 1.0] * 3, r"expected labels that are all whole numbers or all names, got float"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, images: list[Any], labels: list[Any], message: str) -> None:
    write_parquet(tmp_path / "a.parquet", images or [encoded(p) for p in drawn(0, 6, 4, 4, 3)], labels, ["x", "y"])
    with pytest.raises(InputError, match=message) as caught:
        huggingface(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_images_of_two_shapes_need_a_size(tmp_path: Path) -> None:
    images = [encoded(p) for p in (*drawn(0, 11, 4, 4, 3), *drawn(1, 1, 5, 4, 3))]
    write_parquet(tmp_path / "a.parquet", images, [0, 1] * 6, None)
    with pytest.raises(InputError, match=r"a.parquet row 11 has 4 x 5 pixels, .* row 0 has 4 x 4: set data.size"):
        huggingface(str(tmp_path))
    assert huggingface(str(tmp_path), size=4, val=0.2).info.shape == (4, 4, 3)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(hub_folder: Path, share: float) -> None:
    file = hub_folder / "data" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(InputError, match=r"train-00001-of-00002.parquet is not a whole parquet file \(.*\): get it again"):
        huggingface(str(hub_folder))


def test_an_empty_split_is_named(hub_folder: Path) -> None:
    write_parquet(hub_folder / "data" / "test-00000-of-00001.parquet", [], pa.array([], pa.int64()), ["cat", "dog", "emu"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no image in split 'test'"):
        huggingface(str(hub_folder))


def test_a_file_without_a_split_beside_others_is_named(hub_folder: Path) -> None:
    write_parquet(hub_folder / "data" / "more.parquet", [encoded(drawn(0, 4, 4, 3))], [0], None)
    with pytest.raises(InputError, match=r"more.parquet: its name says no split as those of other files do"):
        huggingface(str(hub_folder))


@pytest.mark.parametrize(("name", "missing"), [("none", "does not exist"), ("", "holds no such file")])
def test_no_files(tmp_path: Path, name: str, missing: str) -> None:
    with pytest.raises(InputError, match=rf"data.path: expected \*.parquet, a folder of them or a pattern, but .* {missing}"):
        huggingface(str(tmp_path / name))


def test_the_digest_of_the_source_is_of_its_parquet_files_and_names(hub_folder: Path) -> None:
    before = source_digest("huggingface", path=str(hub_folder))
    (hub_folder / "README.md").write_text("about")
    assert source_digest("huggingface", path=str(hub_folder)) == before
    assert source_digest("huggingface", path=f"{hub_folder}/data/train-*").startswith("2 files, ")
    names = hub_folder / "names.txt"
    names.write_text("a\nb\nc\n")
    assert source_digest("huggingface", path=str(hub_folder), class_names=str(names)).startswith("4 files, ")


class Evil:
    """Unpickled, it makes the folder that it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.folder), 0o777, True)


@pytest.mark.parametrize("column", ["image", "label"])
@pytest.mark.parametrize("nested", [False, True])
def test_pickles_that_ray_reads_in_parquet_are_refused(tmp_path: Path, column: str, nested: bool) -> None:
    """Ray Data registers an Arrow type whose values are unpickled as they are read, in every process that imports it."""
    import ray.data  # noqa: F401

    pickles = pa.array([pickle.dumps(Evil(tmp_path / "made"))] * 12, type=pa.large_binary())
    marked = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object", b"ARROW:extension:metadata": b""}
    if nested:
        part = pa.field("bytes", pa.large_binary(), metadata=marked)
        values, field = pa.StructArray.from_arrays([pickles], fields=[part]), pa.field(column, pa.struct([part]))
    else:
        values, field = pickles, pa.field(column, pa.large_binary(), metadata=marked)
    other = {"image": ("label", pa.array([0, 1] * 6)), "label": ("image", pa.array([b"png"] * 12))}[column]
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table([values, other[1]], schema=pa.schema([field, pa.field(other[0], other[1].type)])), file)
    with pytest.raises(InputError, match=rf"a.parquet: column {column} holds values of type ray.data.arrow_pickled_object"):
        huggingface(str(file))
    with pytest.raises(InputError, match="which are never read"):
        list(labelled_images_of(str(file)).read())
    assert not (tmp_path / "made").exists()
    parquet.read_table(file)[column].to_pylist()
    assert (tmp_path / "made").exists(), "what is refused would be run"
