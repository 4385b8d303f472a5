"""The oracle for the pickles is Python's own reader, on files that the test wrote itself."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm.datasets import load_dataset, source_digest
from csm.datasets.cifar import cifar10, cifar100
from csm.errors import InputError
from tests.csm.datasets.conftest import cifar_files, drawn, python2_pickle

Cifar = Callable[..., Path]


class Run:
    def __reduce__(self) -> Any:
        return os.system, ("touch side-effect",)


def pixels(data: np.ndarray) -> np.ndarray:
    """From planes of red, green, blue, row by row: (N, C, H, W)."""
    return data.reshape(-1, 3, 32, 32)


def test_the_files_of_the_tests_are_those_of_python_2() -> None:
    content = python2_pickle(cifar_files("cifar10")["data_batch_1"])
    assert b"numpy.core.multiarray\n_reconstruct" in content
    assert b"U\x06labels" in content  # SHORT_BINSTRING
    values = pickle.loads(content, encoding="bytes")
    assert np.array_equal(values[b"data"], drawn(0, 10, 3072))


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10(cifar: Cifar, packed: bool) -> None:
    data = cifar10(str(cifar("cifar10", packed)), val=0.1)
    assert data.info.name == "cifar10"
    assert data.info.class_names == ("airplane", "automobile", "bird")
    assert data.info.shape == (32, 32, 3)
    assert data.info.counts == {"train": 44, "val": 6, "test": 10}  # classes of 17, 17 and 16
    images, labels = data.split("test")
    files = cifar_files("cifar10")
    assert np.array_equal(images.numpy(), pixels(files["test_batch"][b"data"]))
    assert labels.tolist() == files["test_batch"][b"labels"]
    rows = data.frame.filter(data.frame["split"].cast(str) != "test").sort("image_id")
    train = np.concatenate([files[f"data_batch_{n}"][b"data"] for n in range(1, 6)])
    assert rows["label"].to_list() == [label for n in range(1, 6) for label in files[f"data_batch_{n}"][b"labels"]]
    assert b"".join(rows["image"]) == pixels(train).transpose(0, 2, 3, 1).tobytes()


def test_the_folder_that_holds_the_folder(cifar: Cifar) -> None:
    folder = cifar("cifar10", packed=False)
    assert cifar10(str(folder.parent)).info.digest == cifar10(str(folder)).info.digest


@pytest.mark.parametrize(("labels", "names"), [("fine", ("airplane", "automobile", "bird")), ("coarse", ("vehicle", "animal"))])
def test_cifar100(cifar: Cifar, labels: str, names: tuple[str, ...]) -> None:
    data = cifar100(str(cifar("cifar100")), labels=labels)
    assert data.info.class_names == names
    assert data.info.counts == {"train": 27, "val": 3, "test": 9}
    images, targets = data.split("test")
    test = cifar_files("cifar100")["test"]
    assert np.array_equal(images.numpy(), pixels(test[b"data"]))
    assert targets.tolist() == test[f"{labels}_labels".encode()]


def test_other_labels_are_refused(cifar: Cifar) -> None:
    with pytest.raises(InputError, match=r"data.labels: expected fine or coarse, got 'super'"):
        cifar100(str(cifar("cifar100")), labels="super")


def test_files_of_python_3_are_read_too(cifar: Cifar) -> None:
    again = {name: pickle.dumps(value, protocol=4) for name, value in cifar_files("cifar10").items()}
    assert cifar10(str(cifar("cifar10", changes=again))).info == cifar10(str(cifar("cifar10"))).info


def test_it_is_resized(cifar: Cifar) -> None:
    assert load_dataset("cifar10", path=str(cifar("cifar10")), size=16).info.shape == (16, 16, 3)


def test_nothing_in_a_pickle_is_run(cifar: Cifar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = {"data_batch_2": pickle.dumps({b"data": Run(), b"labels": []}, protocol=2)}
    with pytest.raises(InputError, match=r"data_batch_2 holds posix.system, which is not part of CIFAR: nothing was run$"):
        cifar10(str(cifar("cifar10", changes=bad)))
    assert not (tmp_path / "side-effect").exists()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_missing_file_is_named(cifar: Cifar, packed: bool, name: str) -> None:
    with pytest.raises(InputError, match=rf"has no {name}; expected the archive of cifar10 \(Python version\) or its folder"):
        cifar10(str(cifar("cifar10", packed, {name: None})))


def test_another_data_set_is_named(cifar: Cifar) -> None:
    with pytest.raises(InputError, match=r"has no train; expected the archive of cifar100"):
        cifar100(str(cifar("cifar10")))


def test_no_path() -> None:
    with pytest.raises(InputError, match=r"data.path: nowhere does not exist; expected the archive of cifar10"):
        cifar10("nowhere")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_truncated_archive(cifar: Cifar, share: float) -> None:
    archive = cifar("cifar10")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"cifar10-python.tar.gz is no whole tar file \(.*\): get it again$"):
        cifar10(str(archive))


def test_a_damaged_archive(cifar: Cifar) -> None:
    archive = cifar("cifar10")
    content = bytearray(archive.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"cifar10-python.tar.gz is no whole tar file \(.*CRC.*\): get it again$"):
        cifar10(str(archive))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({b"data": drawn(0, 2, 3072)}, "has no list 'labels' with a whole number for each of its 2 images"),
        ({b"data": drawn(0, 2, 3072), b"labels": [0]}, "has no list 'labels'"),
        ({b"data": drawn(0, 2, 3072), b"labels": [0, 0.5]}, "has no list 'labels'"),
        ({b"labels": [0]}, "has no array 'data' of 3072 bytes"),
        ({b"data": drawn(0, 2, 3000), b"labels": [0, 1]}, "has no array 'data'"),
        ({b"data": drawn(0, 2, 3072).astype(np.float32), b"labels": [0, 1]}, "has no array 'data'"),
        ({b"data": b"text", b"labels": [0, 1]}, "has no array 'data'"),
        ([1, 2], "holds no dictionary"),
        ({b"data": drawn(0, 2, 3072), b"labels": [0, 3]}, "image 1 has label 3; expected 0 to 2"),
    ],
)
def test_what_is_no_batch_is_named(cifar: Cifar, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        cifar10(str(cifar("cifar10", changes={"data_batch_1": python2_pickle(value)})))
    assert "\n" not in str(caught.value)


def test_a_truncated_batch_in_a_folder(cifar: Cifar) -> None:
    folder = cifar("cifar10", packed=False)
    batch = folder / "data_batch_4"
    batch.write_bytes(batch.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"data_batch_4 is not a whole pickle of CIFAR \(\w+\): get it again"):
        cifar10(str(folder))


@pytest.mark.parametrize("packed", [True, False])
def test_the_digest_of_the_source_changes_with_its_files(cifar: Cifar, packed: bool) -> None:
    path = cifar("cifar10", packed)
    before = source_digest("cifar10", path=str(path))
    assert before.startswith("1 files, " if packed else "7 files, ")
    assert source_digest("cifar10", path=str(path)) == before
    os.utime(path if packed else path / "test_batch", ns=(10**9, 10**9))
    assert source_digest("cifar10", path=str(path)) != before
