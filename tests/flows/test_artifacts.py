import os
import subprocess
import sys

import pytest

from csm import storage
from csm.errors import InputError
from csm.locations import location
from flows.artifacts import StageRecord, Workspace, differences, open_workspace

RECORD = StageRecord("plan", "abc", {"plan": {"seed": 0}}, 1, {"prepare": "d1"}, done=True, digest="d2", rows=3, seconds=1.5)

# Takes the lock of the folder that it is given, says so, and keeps it until its input ends.
HOLD = """
import sys
from pathlib import Path
from pathlib import Path
from flows.artifacts import open_workspace
with open_workspace(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_record_comes_back_as_it_was_written(tmp_path):
    workspace = Workspace(tmp_path)
    assert workspace.record("plan") is None
    workspace.write_record(RECORD)
    assert workspace.record("plan") == RECORD


def test_a_damaged_record_is_named(tmp_path):
    Workspace(tmp_path).write_record(RECORD)
    path = tmp_path / "stages" / "plan.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(InputError, match=r"stages/plan\.json is not .*: remove it and run again"):
        Workspace(tmp_path).record("plan")


def test_drop_removes_files_folders_and_the_record(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.write_record(RECORD)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "part").touch()
    (tmp_path / "dataset.json").touch()
    (tmp_path / "other").touch()
    workspace.drop("plan", [tmp_path / "real", tmp_path / "dataset.json", tmp_path / "never made"])
    assert workspace.record("plan") is None
    assert {path.name for path in tmp_path.iterdir()} == {"stages", "other"}


def test_a_new_workspace_is_made_with_its_parents(tmp_path):
    with open_workspace(tmp_path / "a" / "b") as workspace:
        workspace.write_record(RECORD)
    assert (tmp_path / "a" / "b" / "stages").is_dir()


def test_a_new_workspace_in_which_nothing_was_made_is_removed_again(tmp_path):
    with pytest.raises(KeyError), open_workspace(tmp_path / "new"):
        raise KeyError
    assert not any(tmp_path.iterdir())


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "mine").touch()
    with open_workspace(tmp_path):
        pass
    assert (tmp_path / "mine").exists()


def test_a_second_opener_is_told_who_works_there(tmp_path):
    with open_workspace(tmp_path / "w"):
        with pytest.raises(InputError, match=rf"--workspace .*/w: process {os.getpid()} works in it; wait for it"):
            open_workspace(tmp_path / "w").__enter__()
        assert (tmp_path / "w").is_dir()
    with open_workspace(tmp_path / "w"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"process {process.pid} works in it"):
            open_workspace(tmp_path).__enter__()
    finally:
        process.kill()
        process.communicate()
    with open_workspace(tmp_path):
        pass


@pytest.mark.parametrize("below", ["file", "file/workspace", "file/a/b"])
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"cannot be written \((it is a file|Not a directory)\); choose another folder"):
        open_workspace(tmp_path / below).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_url_of_no_store_is_refused_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no way to a store of nope://"):
        open_workspace(location("nope://bucket/w")).__enter__()
    assert not any(tmp_path.iterdir())


def test_one_that_must_exist_is_not_made(tmp_path):
    with pytest.raises(InputError, match=r"does not exist; run `csm run --workspace "):
        open_workspace(tmp_path / "none", create=False).__enter__()
    assert not any(tmp_path.iterdir())


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    Workspace(tmp_path).write_record(RECORD)
    left = ["mixed/.part-00000001.parquet.12.tmp", "runs/a/.state.pt.34.tmp", ".plan.parquet.5.tmp"]
    kept = ["mixed/part-00000001.parquet", "runs/a/state.pt", "notes.tmp", "mine/.x.1.tmp"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(KeyError), storage.replacing(tmp_path / "mixed" / "part-00000001.parquet") as temporary:  # noqa: PT012
        assert temporary.name.startswith(".part-00000001.parquet.")  # the names above are those that writers use
        assert temporary.suffix == ".tmp"
        raise KeyError
    with open_workspace(tmp_path):
        assert not [name for name in left if (tmp_path / name).exists()]
        assert all((tmp_path / name).exists() for name in kept)


def test_temporary_names_in_a_folder_that_is_no_workspace_are_not_ours(tmp_path):
    (tmp_path / ".x.1.tmp").touch()
    with open_workspace(tmp_path):
        assert (tmp_path / ".x.1.tmp").exists()


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a 1 -> 2"]),
        ({"a": {"b": {"c": 1}, "d": 0}}, {"a": {"b": {"c": [1]}, "d": 0}}, ["a.b.c 1 -> [1]"]),
        ({"a": 1}, {"b": 2}, ["a 1 -> (not set)", "b (not set) -> 2"]),
        ({"plan": {}}, {"plan": {"noise": "image"}}, ["plan.noise set -> image"]),  # the first version's was left out
        ({"a": {"b": 1}}, {"a": None}, ["a {'b': 1} -> None"]),
    ],
)
def test_differences_are_dotted_keys_with_both_values(before, after, expected):
    assert differences(before, after) == expected
