from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm.datasets import source_digest
from csm.datasets.npz import npz
from csm.errors import InputError
from tests.csm.datasets.conftest import drawn

LABELS = np.arange(12) % 3


def saved(folder: Path, **arrays: Any) -> str:
    np.savez_compressed(folder / "a.npz", **arrays)
    return str(folder / "a.npz")


def test_medmnists_arrays(npz_file: Path) -> None:
    data = npz(str(npz_file))
    assert data.info.name == "med"
    assert data.info.shape == (7, 7, 1)
    assert data.info.counts == {"train": 15, "val": 6, "test": 6}
    for seed, (split, rows) in enumerate(data.info.counts.items()):
        images, labels = data.split(split)
        assert np.array_equal(images[:, 0].numpy(), drawn(seed, rows, 7, 7))
        assert labels.tolist() == [row % 3 for row in range(rows)]
    assert source_digest("npz", path=str(npz_file)).startswith("1 files, ")


def test_keras_arrays_get_a_validation_split(tmp_path: Path) -> None:
    arrays = {"x_train": drawn(0, 30, 4, 4, 3), "y_train": np.arange(30) % 3, "x_test": drawn(1, 12, 4, 4, 3), "y_test": LABELS}
    assert npz(saved(tmp_path, **arrays)).info.counts == {"train": 27, "val": 3, "test": 12}


def test_one_set_is_cut_in_three_and_may_have_names(tmp_path: Path) -> None:
    path = saved(tmp_path, images=drawn(0, 12, 4, 4), labels=LABELS, class_names=np.array(["a", "b", "c"]))
    data = npz(path, val=0.25, test=0.25)
    assert data.info.counts == {"train": 6, "val": 3, "test": 3}
    assert data.info.class_names == ("a", "b", "c")


@pytest.mark.parametrize("shape", [(6, 4), (4, 4, 1), (6, 9, 3)])
def test_the_middle_square_is_resized_as_files_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    flat = np.full((12, *shape), 77, dtype=np.uint8)
    data = npz(saved(tmp_path, images=flat, labels=LABELS), size=5, val=0.25, test=0.25)
    assert data.info.shape == (5, 5, shape[2] if len(shape) == 3 else 1)
    assert set(data.frame["image"][0]) == {77}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.full((12, 4, 4), np.nan), "labels": LABELS}, "images is float64; expected uint8"),
        ({"images": drawn(0, 12, 4, 4, 3) / np.float32(255), "labels": LABELS}, "images is float32; expected uint8"),
        ({"images": drawn(0, 12, 3, 4, 4), "labels": LABELS}, r"images has shape \(12, 3, 4, 4\); expected \(N, H, W\)"),
        ({"images": drawn(0, 12), "labels": LABELS}, r"images has shape \(12,\)"),
        ({"images": drawn(0, 12, 4, 4), "labels": LABELS / 1}, "labels is float64 of shape"),
        ({"images": drawn(0, 12, 4, 4), "labels": LABELS[:5]}, "expected one whole number for each of 12 images"),
        ({"images": drawn(0, 12, 4, 4), "labels": np.eye(12, dtype=int)}, r"labels is int64 of shape \(12, 12\)"),
        ({"images": drawn(0, 12, 4, 4), "labels": LABELS - 1}, "label -1 is no class"),
        ({"images": drawn(0, 12, 4, 4), "labels": LABELS, "class_names": np.array(["a", "b"])}, "has label 2; expected 0 to 1"),
        ({"images": drawn(0, 12, 4, 4)}, "has images without labels"),
        ({"pictures": drawn(0, 12, 4, 4)}, "has the arrays pictures; expected images and labels"),
        ({"x_test": drawn(0, 12, 4, 4), "y_test": LABELS}, "has the arrays x_test, y_test; expected"),
        ({"images": np.array([{}] * 12), "labels": LABELS}, "it holds pickled objects, which are never read"),
        (
            {"x_train": drawn(0, 12, 4, 4), "y_train": LABELS, "x_test": drawn(0, 12, 5, 4), "y_test": LABELS},
            "images of other shapes in each split .* set data.size",
        ),
        (
            {"x_train": drawn(0, 36, 4, 4), "y_train": np.tile(LABELS, 3), "x_test": drawn(0, 0, 4, 4), "y_test": LABELS[:0]},
            "no image in split 'test'",
        ),
    ],
)
def test_other_arrays_are_refused_in_one_line(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        npz(saved(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_a_truncated_file_is_named(npz_file: Path, share: float) -> None:
    npz_file.write_bytes(npz_file.read_bytes()[: int(share * npz_file.stat().st_size)])
    with pytest.raises(InputError, match=r"med.npz is no whole file of plain numpy arrays \(.*\): write it again"):
        npz(str(npz_file))


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", LABELS)
    for name, content in {"a.npz": (tmp_path / "a.npy").read_bytes(), "b.npz": b"text"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is no whole file of plain numpy arrays"):
            npz(str(tmp_path / name))
    with pytest.raises(InputError, match=r"c.npz does not exist; expected a file"):
        npz(str(tmp_path / "c.npz"))
