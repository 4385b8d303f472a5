import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csm.datasets import source_digest
from csm.datasets.webdataset import webdataset
from csm.errors import InputError
from tests.csm.datasets.conftest import drawn, encoded, write_tar


def test_labels_of_cls_and_json(tar_folder: Path) -> None:
    data = webdataset(str(tar_folder), test=0.34)
    assert data.info.class_names == ("0", "1", "2")
    assert data.info.counts == {"train": 12, "val": 6, "test": 6}
    images, labels = data.split("val")
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), drawn(1, 6, 6, 6, 3))
    assert source_digest("webdataset", path=str(tar_folder)).startswith("2 files, ")


def test_packed_files_a_pattern_and_names(tar_folder: Path, tmp_path: Path) -> None:
    plain = tar_folder / "train-000000.tar"
    with tarfile.open(plain) as old, tarfile.open(tmp_path / "x.tar.gz", "w:gz") as new:
        for member in old:
            new.addfile(member, old.extractfile(member))
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    names = str(tmp_path / "names.txt")
    packed = webdataset(str(tmp_path / "*.tar.gz"), class_names=names)
    assert packed.info.class_names == ("a", "b", "c")
    assert packed.info.digest == webdataset(str(plain), class_names=names).info.digest


def test_other_kinds_and_dots_in_a_name(tmp_path: Path) -> None:
    samples = [
        (
            f"{row}",
            {"jpg": encoded(p, "JPEG"), "mask.png": encoded(p[..., 0]), "json": b'{"label": "%s"}' % [b"dog", b"cat"][row % 2]},
        )
        for row, p in enumerate(drawn(0, 10, 8, 8, 3))
    ]
    write_tar(tmp_path / "a.tar", samples)
    data = webdataset(str(tmp_path / "a.tar"), val=0.2)
    assert data.info.class_names == ("cat", "dog")
    with Image.open(io.BytesIO(samples[0][1]["jpg"])) as image:
        assert data.frame["image"][0] == np.asarray(image).tobytes()


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"cls": b"1"}, "bad has no image, only cls"),
        ({"png": b""}, "bad has no label; expected a whole number in .cls"),
        ({"png": b"", "cls": b"one"}, "bad has no label"),
        ({"png": b"", "json": b"[1]"}, "bad has no label"),
        ({"png": b"", "json": b'{"label": 1.5}'}, "bad has no label"),
        ({"png": b"", "json": b'{"label": true}'}, "bad has no label"),
        ({"png": b"", "json": b'{"label": '}, "bad has no label"),
        ({"png": b"", "cls": b"-1"}, "label -1 is no class"),
        ({"png": b"", "cls": b"70000"}, "label 70000 is no class"),
        ({"png": b"", "cls": b"1"}, r"cannot read image .*a.tar: bad \(no image\)"),
    ],
)
def test_a_bad_sample_is_named(tmp_path: Path, kinds: dict[str, bytes], message: str) -> None:
    samples = [(f"{row}", {"png": encoded(p), "cls": b"%d" % (row % 2)}) for row, p in enumerate(drawn(0, 10, 4, 4, 3))]
    write_tar(tmp_path / "a.tar", [*samples, ("bad", kinds)])
    with pytest.raises(InputError, match=message):
        webdataset(str(tmp_path))


def test_every_truncation_is_one_line(tar_folder: Path) -> None:
    file = tar_folder / "train-000000.tar"
    content = file.read_bytes()
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for size in [*range(0, end + 1, 512), 100, 1000, end - 600]:
        file.write_bytes(content[:size])
        with pytest.raises(InputError) as caught:
            webdataset(str(file))
        assert "train-000000.tar" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_damaged_header_is_no_end(tar_folder: Path) -> None:
    file = tar_folder / "train-000000.tar"
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        start = tar.getmembers()[10].offset
    content[start : start + 8] = b"xxxxxxxx"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"train-000000.tar is no whole tar file \(it ends too early\): get it again"):
        webdataset(str(tar_folder))
