import errno
import os
import resource
import signal

import pytest

from flows.tracking_spool import Spool, folder_digest, waits


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path, "tracking")


def drain(spool):
    """All records, as a sender takes them."""
    records = []
    while (record := spool.first()) is not None:
        records.append(record)
        spool.pop()
    return records


def test_records_come_out_in_their_order_and_then_the_file_is_cut(spool, tmp_path):
    spool.append({"a": 1}, {"a": 2})
    assert drain(spool) == [{"a": 1}, {"a": 2}]
    spool.append({"a": 3})
    assert (spool.waiting, spool.records()) == (1, [{"a": 3}])
    assert drain(spool) == [{"a": 3}]
    spool.cut()
    assert (spool.path.stat().st_size, waits(tmp_path, "tracking")) == (0, False)
    spool.append({"a": 4})
    assert waits(tmp_path, "tracking")
    assert drain(spool) == [{"a": 4}]


def test_an_empty_one_leaves_no_file(spool):
    spool.close()
    assert not spool.path.exists()


def test_what_waits_is_there_again(spool, tmp_path):
    spool.append({"a": 1}, {"b": "ü" * 70_000})  # longer than a read
    spool.close()
    again = Spool(tmp_path, "tracking")
    assert again.waiting == 2
    assert drain(again) == [{"a": 1}, {"b": "ü" * 70_000}]


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_half_a_line_is_cut_off(spool, tmp_path, cut):
    """As a kill leaves it; what comes next stands on a line of its own."""
    spool.append({"a": 1}, {"b": 2})
    spool.close()
    os.truncate(spool.path, spool.path.stat().st_size - cut)
    again = Spool(tmp_path, "tracking")
    again.append({"c": 3})
    assert drain(again) == [{"a": 1}, {"c": 3}]


def test_a_damaged_line_is_an_empty_record_that_can_be_put_aside(spool, tmp_path):
    spool.append({"a": 1})
    spool.close()
    spool.path.write_bytes(b"\0\0\n[1]\n" + spool.path.read_bytes())
    again = Spool(tmp_path, "tracking")
    assert again.first() == {}
    again.refuse()
    again.refuse()
    assert drain(again) == [{"a": 1}]
    assert again.refused.read_bytes() == b"\0\0\n[1]\n"


def test_a_full_disk_takes_all_of_a_record_or_none(spool, tmp_path):
    """No byte more can be written (a limit on the size of files, which needs no mount)."""
    spool.append({"a": 1})
    size = spool.path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
    try:
        with pytest.raises(OSError, match=r"tracking\.jsonl") as caught:
            spool.append({"b": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.errno == errno.EFBIG
    assert spool.path.stat().st_size == size
    spool.append({"c": 3})
    assert drain(Spool(tmp_path, "tracking")) == [{"a": 1}, {"c": 3}]


def test_a_file_is_kept_as_it_was(spool, tmp_path):
    source = tmp_path / "model.json"
    source.write_text("first")
    kept = spool.keep(source)
    (tmp_path / "new").write_text("second")
    os.replace(tmp_path / "new", source)
    assert spool.file(kept).read_text() == "first"
    assert spool.file(kept).name == "model.json"
    assert spool.file(spool.keep(source)).read_text() == "second"
    spool.cut()
    assert not spool.file(kept).exists()


def test_a_file_on_another_file_system_is_copied(spool, tmp_path, monkeypatch):
    def across(*arguments):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", across)
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "folder" / "in" / "a").write_text("a")
    assert (spool.file(spool.keep(tmp_path / "folder")) / "in" / "a").read_text() == "a"


def test_a_file_that_is_not_there_is_the_callers_error(spool, tmp_path):
    with pytest.raises(FileNotFoundError):
        spool.keep(tmp_path / "none")
    assert not any((tmp_path / "tracking-files").iterdir())


def test_the_digest_of_a_folder_is_that_of_its_files(tmp_path):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(text)
        (tmp_path / name / "MLmodel").write_text(name)
    digests = [folder_digest(tmp_path / name, without="MLmodel") for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert folder_digest(tmp_path / "a", without="") != folder_digest(tmp_path / "b", without="")
