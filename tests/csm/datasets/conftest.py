"""Tiny data sets in the files of the published ones."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 wrote it: text and bytes are one kind, numpy's modules have their old names."""

    dispatch: ClassVar[Any] = dict(pickle._Pickler.dispatch)

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=2)

    def save_text(self, value: bytes | str) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        short = len(content) < 256
        code, size = (pickle.SHORT_BINSTRING, 1) if short else (pickle.BINSTRING, 4)
        self.write(code + len(content).to_bytes(size, "little") + content)
        self.memoize(value)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch[bytes] = dispatch[str] = save_text
    dispatch[type] = save_global
    dispatch[type(len)] = dispatch[type(lambda: 0)] = save_global


def python2_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file).dump(value)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    """An image file of (H, W) or (H, W, 3) levels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=form)
    return file.getvalue()


def drawn(seed: int, rows: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, *shape), dtype=np.uint8)


def cifar_files(kind: str) -> dict[str, dict[bytes, Any]]:
    """File name -> what is in its pickle; 10 images a batch, labels 0, 1, 2, 0, ..."""
    names = [b"airplane", b"automobile", b"bird"]
    if kind == "cifar10":
        batches = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
        labels = [[(row + number) % 3 for row in range(10)] for number in range(6)]
        files: dict[str, dict[bytes, Any]] = {
            batch: {
                b"batch_label": batch.encode(),
                b"labels": labels[n],
                b"data": drawn(n, 10, 3072),
                b"filenames": [b"x.png"] * 10,
            }
            for n, batch in enumerate(batches)
        }
        return {**files, "batches.meta": {b"num_cases_per_batch": 10, b"label_names": names, b"num_vis": 3072}}
    files = {
        batch: {
            b"fine_labels": [row % 3 for row in range(rows)],
            b"coarse_labels": [row % 3 // 2 for row in range(rows)],
            b"data": drawn(n, rows, 3072),
        }
        for n, (batch, rows) in enumerate({"train": 30, "test": 9}.items())
    }
    return {**files, "meta": {b"fine_label_names": names, b"coarse_label_names": [b"vehicle", b"animal"]}}


CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


@pytest.fixture
def cifar(tmp_path: Path) -> Callable[..., Path]:
    """``cifar(kind, packed, **changes)``: the archive or the folder of ``kind``, with other content or without it (None)."""

    def make(kind: str, packed: bool = True, changes: dict[str, bytes | None] | None = None) -> Path:
        files: dict[str, bytes | None] = {name: python2_pickle(value) for name, value in cifar_files(kind).items()}
        files |= changes or {}
        archive = tmp_path / f"{kind}-python.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for name, content in files.items():
                if content is not None:
                    add(tar, f"{CIFAR_FOLDERS[kind]}/{name}", content)
        if not packed:
            with tarfile.open(archive) as tar:
                tar.extractall(tmp_path, filter="data")
            return tmp_path / CIFAR_FOLDERS[kind]
        return archive

    return make


@pytest.fixture
def tiny_imagenet_folder(tmp_path: Path) -> Path:
    """Three classes (two of them "crane"), 10 training and 4 validation images of each; the first of each class is grey."""
    root = tmp_path / "tiny-imagenet-200"
    ids = ["n03", "n01", "n02"]
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(ids))
    (root / "words.txt").write_text("n00\tthing\nn01\tEgyptian cat, cat\nn02\tcrane\nn03\tcrane, hoist\n")
    lines = []
    for number, wnid in enumerate(ids):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for row, pixels in enumerate(drawn(number, 10, 8, 8, 3)):
            (folder / f"{wnid}_{row}.JPEG").write_bytes(encoded(pixels[..., 0] if row == 0 else pixels, "JPEG"))
        for row, pixels in enumerate(drawn(10 + number, 4, 8, 8, 3)):
            name = f"val_{4 * number + row}.JPEG"
            (root / "val" / "images" / name).write_bytes(encoded(pixels, "JPEG"))
            lines.append(f"{name}\t{wnid}\t0\t0\t7\t7\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def write_parquet(
    file: Path, images: list[Any], labels: list[Any], names: list[str] | None, image: str = "image", label: str = "label"
) -> None:
    """A shard as the `datasets` library writes it: struct {bytes, path}, and the classes in the schema's metadata."""
    feature = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": {image: {"_type": "Image"}, label: feature}}})}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    structs = pa.array([{"bytes": content, "path": None} for content in images], kind)
    table = pa.table({image: structs, label: labels}).replace_schema_metadata(metadata)
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file, row_group_size=4)


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """Two training shards of 10 images, a test shard of 6; classes cat, dog, emu."""
    for seed, (name, rows) in enumerate(
        {"train-00000-of-00002": 10, "train-00001-of-00002": 10, "test-00000-of-00001": 6}.items()
    ):
        images = [encoded(pixels) for pixels in drawn(seed, rows, 6, 6, 3)]
        write_parquet(
            tmp_path / "hub" / "data" / f"{name}.parquet", images, [row % 3 for row in range(rows)], ["cat", "dog", "emu"]
        )
    return tmp_path / "hub"


def write_tar(file: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    """Samples as WebDataset writes them: key, and content by kind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for key, kinds in samples:
            for kind, content in kinds.items():
                add(tar, f"{key}.{kind}", content)


@pytest.fixture
def tar_folder(tmp_path: Path) -> Path:
    """A training tar of 18 PNG files with .cls, a validation tar of 6 with .json."""
    train = [
        (f"{row:04d}", {"png": encoded(pixels), "cls": f"{row % 3}\n".encode()})
        for row, pixels in enumerate(drawn(0, 18, 6, 6, 3))
    ]
    val = [
        (f"v/{row:04d}", {"json": json.dumps({"label": row % 3, "note": "x"}).encode(), "png": encoded(pixels)})
        for row, pixels in enumerate(drawn(1, 6, 6, 6, 3))
    ]
    write_tar(tmp_path / "shards" / "train-000000.tar", train)
    write_tar(tmp_path / "shards" / "val-000000.tar", val)
    return tmp_path / "shards"


@pytest.fixture
def npz_file(tmp_path: Path) -> Path:
    """MedMNIST's keys: 15, 6 and 6 grey images, labels (N, 1)."""
    counts = {"train": 15, "val": 6, "test": 6}
    arrays = {f"{split}_images": drawn(seed, rows, 7, 7) for seed, (split, rows) in enumerate(counts.items())}
    arrays |= {f"{split}_labels": np.arange(rows, dtype=np.uint8)[:, None] % 3 for split, rows in counts.items()}
    np.savez(tmp_path / "med.npz", **arrays)
    return tmp_path / "med.npz"
