import json
import os

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from csm.datasets.decoding import decode, decode_as
from csm.datasets.image_sources import Item, decoded, images_of, labelled_images_of
from csm.datasets.real import build
from csm.errors import InputError
from tests.csm.datasets.conftest import drawn, encoded


@pytest.fixture
def folder(tmp_path):
    """Two classes of 3 colour pictures, 9 x 7 pixels."""
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for row, pixels in enumerate(drawn(len(name), 3, 7, 9, 3)):
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{row}.png")
    return tmp_path / "pets"


@pytest.fixture
def workspace(tmp_path):
    images = drawn(0, 12, 5, 4, 3)
    splits = np.array(["train", "val", "test"] * 4)
    build("pets", images, np.repeat([0, 1], 6), splits, ("cat", "dog")).save(tmp_path / "workspace")
    return tmp_path / "workspace", images, splits


def hf_parquet(path, labels, names=None, column="label"):
    features = {column: {"names": names, "_type": "ClassLabel"}} if names else {}
    table = pa.table({"image": [{"bytes": encoded(p), "path": None} for p in drawn(1, len(labels), 6, 6, 3)], column: labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return path


def labels(source):
    return [source.class_names[i.label] if source.class_names else i.label for i in source.read()]


def test_an_image_is_made_as_image_folder_makes_it(folder):
    file = folder / "cat" / "0.png"
    for channels in (1, 3):
        (expected,) = decode([("x", file)], 1, 4, channels)
        pixels = np.asarray(Image.open(file))
        for image in (file, file.read_bytes(), pixels):
            np.testing.assert_array_equal(decode_as("x", image, (4, 4, channels)), expected)


def test_an_oblong_model_takes_only_images_of_its_shape(folder):
    file = folder / "cat" / "0.png"
    assert decode_as("x", file, (7, 9, 3)).shape == (7, 9, 3)
    assert decode_as("x", np.asarray(Image.open(file)), (7, 9, 1)).shape == (7, 9, 1)
    with pytest.raises(InputError, match="image x has 9 x 7 pixels, the model takes 7 x 9"):
        decode_as("x", file, (9, 7, 3))


def test_grey_pixels_become_colour():
    grey = drawn(0, 1, 4, 4, 1)[0]
    np.testing.assert_array_equal(decode_as("x", grey, (4, 4, 3)), np.repeat(grey, 3, axis=2))


def test_a_folder_is_read_below_and_in_order(folder):
    source = images_of(str(folder))
    names = [item.name for item in source.read()]
    assert names == sorted(names)
    assert (source.count, [os.path.basename(name) for name in names]) == (6, ["0.png", "1.png", "2.png"] * 2)
    assert [item.label for item in source.read()] == [None] * 6


def test_batches_keep_the_order_and_put_bad_images_apart(folder):
    (folder / "cat" / "1.png").write_bytes(b"nonsense")
    items = [*images_of(str(folder)).read(), Item("gone", folder / "gone.png")]
    batches = list(decoded(items, (5, 5, 3), 3))
    assert [len(batch.items) for batch in batches] == [3, 3, 1]
    assert [len(batch.images) for batch in batches] == [2, 3, 0]
    assert [item for batch in batches for item in batch.items] == items
    assert [[error is None for error in batch.errors] for batch in batches] == [[True, False, True], [True] * 3, [False]]
    assert "gone" in str(batches[2].errors[0])
    expected = decode([(name, folder / name) for name in ("cat/0.png", "cat/2.png")], 2, 5, 3)
    assert torch.equal(batches[0].images, torch.from_numpy(expected))


def test_no_items_give_no_batch():
    assert list(decoded([], (5, 5, 3), 3)) == []


def test_labels_of_class_folders_are_their_names(folder):
    assert labels(labelled_images_of(str(folder))) == ["cat"] * 3 + ["dog"] * 3
    (folder.parent / "parts").mkdir()
    folder.rename(folder.parent / "parts" / "test")
    parts = str(folder.parent / "parts")
    assert labels(labelled_images_of(parts)) == ["cat"] * 3 + ["dog"] * 3
    with pytest.raises(InputError, match="no folder val; choose one of test with --split"):
        labelled_images_of(parts, "val")


def test_npz_of_one_or_several_splits(tmp_path):
    path = tmp_path / "a.npz"
    images = drawn(0, 4, 5, 5)
    np.savez(path, images=images, labels=[[0], [1], [1], [0]], class_names=["cat", "dog"])
    source = labelled_images_of(str(path))
    assert labels(source) == ["cat", "dog", "dog", "cat"]
    np.testing.assert_array_equal([item.image[..., 0] for item in source.read()], images)
    np.savez(path, x_train=images, y_train=[0, 1, 0, 1], x_test=images[:1], y_test=["dog"])
    assert labels(labelled_images_of(str(path))) == ["dog"]
    assert labels(labelled_images_of(str(path), "train")) == [0, 1, 0, 1]
    assert images_of(str(path)).count == 5
    np.savez(path, images=images)
    assert [item.label for item in images_of(str(path)).read()] == [None] * 4


def test_a_workspace_and_its_table(workspace):
    root, images, splits = workspace
    source = labelled_images_of(str(root), "test")
    assert labels(source) == ["cat", "cat", "dog", "dog"]
    np.testing.assert_array_equal([item.image for item in source.read()], images[splits == "test"])
    for path in (root, root / "real" / "part-00000.parquet"):
        everything = images_of(str(path))
        np.testing.assert_array_equal([item.image for item in everything.read()], images)
        assert everything.count == 12


def test_parquet_of_datasets(tmp_path):
    one = hf_parquet(tmp_path / "a" / "pets.parquet", [1, 0], ["cat", "dog"])
    assert labels(labelled_images_of(str(one))) == ["dog", "cat"]
    hf_parquet(tmp_path / "b" / "train-0.parquet", ["x"] * 3)
    hf_parquet(tmp_path / "b" / "test-0.parquet", ["cat", "dog"], column="labels")
    source = labelled_images_of(str(tmp_path / "b"))
    assert (source.count, labels(source)) == (2, ["cat", "dog"])
    assert all(isinstance(item.image, bytes) for item in source.read())
    assert images_of(str(one)).count == 2


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"pictures": drawn(0, 2, 4, 4)}, "no images; expected arrays images"),
        ({"images": drawn(0, 2, 4, 4).astype(float), "labels": [0, 1]}, "images is float64"),
        ({"images": drawn(0, 2, 4, 4, 2), "labels": [0, 1]}, r"shape \(2, 4, 4, 2\)"),
        ({"images": drawn(0, 2, 4, 4)}, "labels is missing"),
        ({"images": drawn(0, 2, 4, 4), "labels": [0.5, 1]}, "labels is float64"),
        ({"images": drawn(0, 2, 4, 4), "labels": np.array([None, 1])}, "pickled objects"),
        ({"x_train": drawn(0, 2, 4, 4), "y_train": [0, 1]}, "no images and labels of split 'test'"),
    ],
)
def test_bad_arrays(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=said):
        labelled_images_of(str(tmp_path / "a.npz"))


def test_what_is_no_data(tmp_path, workspace):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.parquet").write_text("hello")
    hf_parquet(tmp_path / "c" / "train-0.parquet", ["x"])
    hf_parquet(tmp_path / "c" / "val-0.parquet", ["x"])
    for path, said in (
        ("gone", "does not exist"),
        ("empty", "no image in a subfolder"),
        ("a.txt", "expected a folder"),
        ("a.parquet", "not a whole parquet file"),
        ("c", "no parquet file of split 'test'"),
    ):
        with pytest.raises(InputError, match=said):
            labelled_images_of(str(tmp_path / path))
    with pytest.raises(InputError, match="no image below this folder"):
        images_of(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="--split dev: unknown; one of train, val, test"):
        labelled_images_of(str(workspace[0]), "dev")
    parquet.write_table(pa.table({"image": [b"x"], "caption": ["y"]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match="no column label or fine_label or labels among image, caption"):
        labelled_images_of(str(tmp_path / "d.parquet"))
