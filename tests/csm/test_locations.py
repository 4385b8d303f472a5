import os
import pickle
import stat
import threading
import time
from pathlib import Path

import polars as pl
import pytest
import torch

from csm import storage, tables
from csm.errors import InputError
from csm.locations import cache, is_remote, listing, local, location, reach, remove, store


def test_a_path_stays_a_path(tmp_path):
    for text in (str(tmp_path), tmp_path, f"file://{tmp_path}"):
        assert location(text) == tmp_path
        assert type(location(text)) is type(tmp_path)
        assert not is_remote(location(text))
    assert local(tmp_path / "none") == tmp_path / "none"


def test_a_store_is_a_path_with_the_same_methods(bucket):
    path = bucket / "a" / "b.json"
    assert is_remote(path)
    assert (str(path), path.name, path.parent) == (f"{bucket}/a/b.json", "b.json", bucket / "a")
    assert not path.exists()
    storage.write_json(path, {"a": 1})
    assert path.is_file()
    assert bucket.is_dir()
    assert storage.read_json(pickle.loads(pickle.dumps(path))) == {"a": 1}
    assert location(path) == path


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nope://a/b", "no way to a store of nope://"),
        ("s3://", "expected s3://BUCKET/FOLDER"),
        ("s3:///", "expected s3://BUCKET"),
    ],
)
def test_a_url_that_names_no_place_is_refused(url, reason):
    with pytest.raises(InputError, match=reason):
        location(url)


def test_a_store_that_does_not_answer_is_said_in_a_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    with pytest.raises(InputError, match=r"^s3://bucket/w: cannot be written and read \(.*127\.0\.0\.1:9.*check") as refusal:
        reach(location("s3://bucket/w"))
    assert "\n" not in str(refusal.value)


def test_a_bucket_that_is_not_there_is_said_in_a_line(bucket):
    reach(bucket)
    assert listing(bucket) == {}  # the trial leaves nothing
    with pytest.raises(InputError, match="cannot be written and read"):
        reach(location("s3://nobody-made-this-bucket/w"))


def test_writers_of_the_product_reach_the_store_whole(bucket):
    tensors = {"a": torch.arange(6).view(2, 3)}
    storage.write_tensors(bucket / "t.safetensors", tensors)
    assert torch.equal(storage.read_tensors(bucket / "t.safetensors")["a"], tensors["a"])
    storage.write_state(bucket / "state.pt", {"epoch": 3, "a": tensors["a"]})
    assert storage.read_state(bucket / "state.pt")["epoch"] == 3
    with pytest.raises(RuntimeError), storage.replacing(bucket / "half") as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert not (bucket / "half").exists()
    assert not list((cache() / "writing").iterdir())


def test_tables_on_a_store(bucket):
    frame = pl.DataFrame({"mix_id": [str(i) for i in range(5000)], "image": [b"x"] * 5000}, schema=tables.MIXED)
    path = bucket / "mixed" / "part-00000000.parquet"
    tables.write(frame, path, tables.MIXED, {"key": "k"})
    assert tables.read(path, tables.MIXED).equals(frame)
    assert tables.read(path, tables.MIXED, ["mix_id"]).equals(frame.select("mix_id"))
    assert tables.read(path, tables.MIXED, rows=(4096, 10)).equals(frame[4096:4106])
    assert tables.metadata(path)["key"] == "k"
    path.write_bytes(path.read_bytes()[:-100])
    assert tables.metadata(path) is None
    with pytest.raises(InputError, match="not a whole parquet file"):
        tables.read(path, tables.MIXED)
    with pytest.raises(InputError, match="does not exist"):
        tables.read(bucket / "none.parquet", tables.MIXED)
    assert tables.metadata(bucket / "none.parquet") is None


def test_a_copy_is_made_once_for_each_version(bucket, monkeypatch):
    storage.write_text(bucket / "m" / "a.json", "one")
    storage.write_text(bucket / "m" / "deep" / "b.json", "two")
    folder = local(bucket / "m")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {"a.json", "deep/b.json"}
    with monkeypatch.context() as patch:
        patch.setattr(type(store(bucket)), "get", None)  # nothing is fetched
        assert local(bucket / "m") == folder
    assert local(bucket / "m" / "a.json").read_text() == "one"
    time.sleep(1.1)  # dates of objects are whole seconds
    storage.write_text(bucket / "m" / "a.json", "1.1")  # as long as before
    assert (local(bucket / "m") / "a.json").read_text() == "1.1"
    assert (folder / "a.json").read_text() == "one"  # who reads it goes on
    os.utime(folder.parent, (0, 0))
    local(bucket / "m")
    assert not folder.exists()
    with pytest.raises(FileNotFoundError):
        local(bucket / "none")


def test_many_ask_for_a_copy_at_once(bucket):
    storage.write_text(bucket / "plan", "x" * 1000)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(local(bucket / "plan"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert found[0].read_text() == "x" * 1000


def test_a_listing_has_sizes_and_tells_what_was_written_anew(bucket, tmp_path):
    for root in (bucket, tmp_path / "w"):
        for name in ("a", "deep/b"):
            storage.write_text(root / name, "xyz")
        before = listing(root)
        assert {name: size for name, (size, _) in before.items()} == {"a": 3, "deep/b": 3}
        storage.write_text(root / "a", "zyx")
        after = listing(root)
        assert before["a"] != after["a"]
        assert before["deep/b"] == after["deep/b"]
        assert listing(root / "a")[""][0] == 3
        assert listing(root / "none") == {}


def test_remove_takes_files_folders_and_nothing(bucket, tmp_path):
    for root in (bucket, tmp_path / "w"):
        for name in ("a", "deep/b", "deep/c"):
            storage.write_text(root / name, "xyz")
        remove(root / "deep")
        remove(root / "none")
        assert set(listing(root)) == {"a"}
        remove(root / "a")
        assert listing(root) == {}


def test_the_cache_is_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CSM_CACHE", str(tmp_path / "c"))
    assert stat.S_IMODE(cache().stat().st_mode) == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(InputError, match="belongs to another user"):
        cache()
