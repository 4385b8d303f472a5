import threading
import time

import pytest

from csm.errors import InputError
from flows import store_lock
from flows.artifacts import Workspace, open_workspace
from flows.store_lock import hold


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(store_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(store_lock, "GONE_SECONDS", 1.0)


def test_a_place_on_a_store_is_kept_to_one_command(bucket):
    with open_workspace(bucket) as workspace:
        assert workspace == Workspace(bucket)
        with pytest.raises(InputError, match=rf"--workspace {bucket}: process \d+ on .* works in it"):
            open_workspace(bucket).__enter__()
        assert (bucket / ".lock").is_file()  # the one that was refused took nothing
    assert not (bucket / ".lock").exists()
    with open_workspace(bucket):
        pass


def test_a_holder_that_was_killed_is_waited_for_and_succeeded(bucket, capsys):
    (bucket / ".lock").write_bytes(store_lock._state("killed", 7))
    started = time.monotonic()
    with hold(bucket / ".lock"):
        assert 1.0 < time.monotonic() - started < 10.0
    assert "waiting up to 1 s" in capsys.readouterr().err


def test_one_that_is_written_anew_while_it_is_read_is_still_held(bucket, monkeypatch):
    monkeypatch.setattr(store_lock, "BEAT_SECONDS", 0.0)
    with hold(bucket / ".lock"):
        for _ in range(20):
            with pytest.raises(InputError, match="works in it"):
                hold(bucket / ".lock").__enter__()


def test_of_many_only_one_gets_it(bucket):
    held: list[int] = []
    refused: list[Exception] = []
    most = 0

    def work(number: int) -> None:
        nonlocal most
        try:
            with hold(bucket / ".lock"):
                held.append(number)
                most = max(most, len(held))
                time.sleep(1.0)
                held.remove(number)
        except InputError as error:
            refused.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused


def test_one_that_must_exist_is_not_made(bucket):
    with pytest.raises(InputError, match="does not exist; run `csm run --workspace s3://"):
        open_workspace(bucket, create=False).__enter__()


def test_what_only_a_file_system_can_lies_on_this_machine(bucket, tmp_path):
    assert Workspace(bucket).own.is_dir()
    assert Workspace(bucket).own == Workspace(bucket).own != Workspace(bucket / "other").own
    assert Workspace(tmp_path).own == tmp_path
