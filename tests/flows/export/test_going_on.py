"""Exports that were interrupted, killed or met a full disk, and those that are finished."""

import json
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from csm import storage
from csm.export import FORMATS, WORK, encode
from csm.export_card import CARD
from tests.flows.export.conftest import files


@contextmanager
def file_size_limit(size):
    """No file of this process may grow beyond ``size`` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_finished_export_is_reused_and_not_written_again(call, snapshot, tmp_path):
    assert call("huggingface")[0] == 0
    before = snapshot(tmp_path / "out")
    code, out, err = call("huggingface", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["reused"] is True
    assert err == "export: reused, 45 images\n"
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("form", list(FORMATS))
def test_an_interrupted_export_goes_on_and_ends_as_if_undisturbed(call, form, monkeypatch, tmp_path):
    """Interrupted in the middle of the third piece; what was whole is not written again."""
    assert call(form, "--shard-rows", 10, output=tmp_path / "undisturbed")[0] == 0
    count = 0

    def interrupted(*arguments):
        nonlocal count
        for frame in encode(*arguments):
            count += 1
            if count == 6:
                raise KeyboardInterrupt
            yield frame

    out = tmp_path / "out"
    monkeypatch.setattr("flows.export.encode", interrupted)
    code, _, err = call(form, "--shard-rows", 10)
    assert code == 130
    assert err.splitlines()[-1] == "csm: interrupted; run the same command again to go on"
    assert not (out / CARD).exists()
    monkeypatch.undo()
    pieces = [out / FORMATS[form].piece(number, 5) for number in range(5)]
    assert [path.exists() for path in pieces] == [True, True, False, False, False]
    (pieces[0].parent / f".{pieces[2].name}.1.tmp").write_bytes(b"half")  # as a writer leaves it that was killed
    first = pieces[0]
    if form == "image-folder":  # whose pieces are gone in the end
        first = out / json.loads(pieces[0].read_text().split("\n")[0])["file_name"]
    written = first.stat().st_mtime_ns
    code, _, err = call(form, "--shard-rows", 10)
    assert code == 0
    assert err.startswith("export: going on\n")
    assert first.stat().st_mtime_ns == written
    assert files(out) == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("form", list(FORMATS))
def test_one_that_was_killed_while_it_finished_goes_on(call, form, monkeypatch, tmp_path):
    """Once before the card is written and once after, when only what is not needed any more is left to remove."""
    assert call(form, output=tmp_path / "undisturbed")[0] == 0

    write = storage.write_json

    def killed(*arguments, **settings):
        raise KeyboardInterrupt

    def killed_at_the_card(path, value):
        if path.parent.name != WORK:
            raise KeyboardInterrupt
        write(path, value)

    for name, end in (("shutil.rmtree", killed), ("storage.write_json", killed_at_the_card)):
        out = tmp_path / name
        monkeypatch.setattr(f"flows.export.{name}", end)
        assert call(form, output=out)[0] == 130
        monkeypatch.undo()
        assert (out / WORK).is_dir()
        assert call(form, output=out)[0] == 0
        assert files(out) == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("left", [[], [f"{WORK}"], [f"{WORK}/.{CARD}.1.tmp"]])
def test_an_empty_folder_or_one_killed_at_its_very_beginning_is_taken(call, left, tmp_path):
    (tmp_path / "out").mkdir()
    for name in left:
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name == WORK else path.touch()
    assert call("webdataset")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CARD, "README.md", "mixed-000000.tar"}


@pytest.mark.slow
def test_sigterm_stops_it_as_ctrl_c_does(config, made, tmp_path):
    slow = (
        "import time, csm.export as e; w = e.Image.Image.save; e.Image.Image.save = lambda *a, **k: (time.sleep(0.5), w(*a, **k))"
    )
    program = f"{slow}; import sys; sys.argv[0] = 'csm'; from flows.cli import main; main()"
    options = [
        "--config",
        config,
        "--workspace",
        made,
        "--output",
        tmp_path / "out",
        "--format",
        "image-folder",
        "--shard-rows",
        6,
    ]
    arguments = [sys.executable, "-c", program, "export", *map(str, options)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if line == "export: started\n":
                break
        while not any((tmp_path / "out").rglob("*.png")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "csm: interrupted; run the same command again to go on"


@pytest.mark.parametrize("form", list(FORMATS))
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(call, form, tmp_path):
    assert call(form, "--shard-rows", 10, output=tmp_path / "undisturbed")[0] == 0
    with file_size_limit(1500):
        code, _, err = call(form, "--shard-rows", 10)
    assert code == 2
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"csm: {tmp_path / 'out'}")
    assert "free space or change permissions, then run the same command again to go on" in err
    assert not (tmp_path / "out" / CARD).exists()
    assert call(form, "--shard-rows", 10)[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
