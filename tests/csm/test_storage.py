import errno
import hashlib
import json
import os
import pickle
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from csm import storage, tables
from csm.errors import InputError


class MakesFolder:
    """Its pickle makes a folder when it is loaded without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_replacing_shows_the_old_file_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    storage.write_text(path, "old")
    with storage.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename is atomic within one file system only
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with storage.replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_before_anything_is_written_is_the_one_that_is_seen(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.replacing(tmp_path / "a.txt"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_of_each_kind_leaves_the_old_file(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    writes = [
        (storage.write_json, {"a": 1}, {"a": object()}),
        (storage.write_tensors, tensors, {"a": torch.ones(2).to_sparse()}),
        (storage.write_state, tensors, {"a": lambda: 0}),
    ]
    for number, (write, good, bad) in enumerate(writes):
        path = tmp_path / str(number)
        write(path, good)
        before = path.read_bytes()
        with pytest.raises(Exception, match=r".+"):
            write(path, bad)
        assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0", "1", "2"]


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"z": [1, 2.5, None, True], "a": {"name": "σ – é"}}
    storage.write_json(tmp_path / "a.json", value)
    assert storage.read_json(tmp_path / "a.json") == value
    assert list(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))) == ["z", "a"]


def test_tensors_come_back_whatever_their_strides(tmp_path: Path) -> None:
    grid = torch.arange(6.0).view(2, 3)
    tensors = {"transposed": grid.t(), "parameter": torch.nn.Parameter(torch.ones(2)), "integer": torch.tensor(3)}
    storage.write_tensors(tmp_path / "a.safetensors", tensors)
    again = storage.read_tensors(tmp_path / "a.safetensors")
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor)
        assert again[name].dtype == tensor.dtype


def test_a_training_state_comes_back(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 1)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    sgd.step()
    state = {"epoch": 3, "sgd": sgd.state_dict(), "history": [{"loss": 0.25}], "fingerprint": "ab"}
    storage.write_state(tmp_path / "state.pt", state)
    again = storage.read_state(tmp_path / "state.pt")
    assert (again["epoch"], again["history"], again["fingerprint"]) == (3, [{"loss": 0.25}], "ab")
    assert again["sgd"]["param_groups"] == state["sgd"]["param_groups"]
    for key, values in sgd.state_dict()["state"].items():
        assert torch.equal(again["sgd"]["state"][key]["momentum_buffer"], values["momentum_buffer"])


@pytest.mark.parametrize("read", [storage.read_json, storage.read_tensors, storage.read_state])
def test_a_missing_file_is_named(tmp_path: Path, read: Any) -> None:
    with pytest.raises(InputError, match="absent"):
        read(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"[1,]", b"\xff\xfe{}", b'{"a": 1} trailing'])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad.json is not valid JSON"):
        storage.read_json(path)


def test_every_truncation_of_tensors_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    storage.write_tensors(path, {"a": torch.arange(5.0), "b": torch.ones(2, 2)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut.safetensors is not a whole safetensors file"):
            storage.read_tensors(path)


def test_every_truncation_of_a_state_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    storage.write_state(path, {"a": torch.arange(5.0), "epoch": 1})
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut.pt is a damaged training state .* remove it"):
            storage.read_state(path)
        assert path.stat().st_size == length  # the user decides what becomes of it


def test_a_state_that_holds_code_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    attack = {"epoch": MakesFolder(tmp_path / "made")}
    plain, zipped = tmp_path / "plain.pt", tmp_path / "zipped.pt"
    plain.write_bytes(pickle.dumps(attack, protocol=2))
    torch.save(attack, zipped)
    for path in (plain, zipped):
        with pytest.raises(InputError, match=path.name):
            storage.read_state(path)
        assert not (tmp_path / "made").exists()
    pickle.loads(plain.read_bytes())  # the attack itself works
    assert (tmp_path / "made").exists()


def test_digest_is_of_the_value_not_of_its_order() -> None:
    assert storage.digest({"a": 1, "b": [1, 2]}) == storage.digest({"b": [1, 2], "a": 1})
    others = [({"a": 1, "b": [2, 1]},), ({"a": 1}, {"b": [1, 2]}), ({"a": 1.5, "b": [1, 2]},), ({"a": "1", "b": [1, 2]},), ()]
    assert len({storage.digest(*other) for other in others} | {storage.digest({"a": 1, "b": [1, 2]})}) == 6


def test_digest_is_the_same_in_every_process_and_release() -> None:
    expected = hashlib.blake2b(b'["x",1,{"a":[true,null]}]', digest_size=8).hexdigest()
    assert storage.digest("x", 1, {"a": [True, None]}) == expected


def test_bytes_digest_keeps_the_parts_apart() -> None:
    splits = [(b"abc",), (b"a", b"bc"), (b"ab", b"c"), (b"abc", b""), (b"", b"abc")]
    assert len({storage.bytes_digest(*parts) for parts in splits}) == len(splits)
    assert storage.bytes_digest(b"a") == hashlib.blake2b(b"\x01" + bytes(7) + b"a", digest_size=8).hexdigest()


def test_file_digest_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 5000)
    assert storage.file_digest(tmp_path / "a") == hashlib.blake2b(bytes(range(256)) * 5000, digest_size=8).hexdigest()


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"scale": "much"}'])
def test_a_record_of_another_form_is_named(tmp_path: Path, text: str) -> None:
    from csm.reannotation import Calibration

    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"calibration\.json is not a Calibration"):
        storage.read_record(path, Calibration)


def test_a_record_comes_back_with_its_types(tmp_path: Path) -> None:
    from csm.classifiers import ClassifierSpec

    spec = ClassifierSpec("small-cnn", {"width": 4}, 3, ("a", "b"), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    storage.write_json(tmp_path / "model.json", {**asdict(spec), "unknown": 1})
    assert storage.read_record(tmp_path / "model.json", ClassifierSpec) == spec


def test_a_write_that_the_system_refuses_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; polars and safetensors have errors of their own for it."""
    frame = pl.DataFrame({"mix_id": ["a"] * 9, "image": [bytes(range(256)) * 9] * 9}, schema=dict(tables.MIXED))
    writers = {
        "text": lambda path: storage.write_text(path, "x" * 5000),
        "tensors": lambda path: storage.write_tensors(path, {"x": torch.zeros(5000)}),
        "table": lambda path: tables.write(frame, path, tables.MIXED),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in writers.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                write(tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / name))
        assert list(tmp_path.iterdir()) == []
