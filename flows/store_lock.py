"""Keeping a workspace on a store to one command: an object that its holder writes anew every few seconds.

Clocks of different machines are not compared: a holder counts as gone when what it wrote has not changed for ``GONE_SECONDS``.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csm.errors import InputError
from csm.locations import read_bytes, store
from flows.progress import say

BEAT_SECONDS, GONE_SECONDS = 10.0, 40.0


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock object ``path`` until the block ends; waits for one whose holder was killed.

    Raises:
        InputError: somebody else holds it, and lives.
    """
    name = uuid.uuid4().hex
    _take(path, name)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, name, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        path.unlink(missing_ok=True)


def _take(path: Path, name: str) -> None:
    """Make the object, which only one can; one that stays as it is was left by a holder that was killed."""
    seen, since = b"", time.monotonic()
    while not _create(path, name):
        try:
            now = read_bytes(path)
        except FileNotFoundError:
            continue  # it was given back
        if not seen:
            seen, since = now, time.monotonic()
            say(f"{path}: another command was at work here; waiting up to {GONE_SECONDS:.0f} s to see whether it still is")
        elif now != seen:
            holder = json.loads(now)
            raise InputError(
                f"--workspace {path.parent}: process {holder['process']} on {holder['host']} works in it; "
                f"wait for it or choose another folder"
            )
        elif time.monotonic() - since > GONE_SECONDS:
            path.unlink(missing_ok=True)
            continue
        time.sleep(BEAT_SECONDS / 4)


def _create(path: Path, name: str) -> bool:
    """Whether the object was not there and is now ours."""
    try:
        store(path).pipe_file(str(path), _state(name, 0), mode="create")
    except FileExistsError:
        return False
    return bool(json.loads(read_bytes(path))["name"] == name)  # a store that does not know "create" lets the last one win


def _beat(path: Path, name: str, ended: threading.Event) -> None:
    count = 0
    while not ended.wait(BEAT_SECONDS):
        count += 1
        try:
            path.write_bytes(_state(name, count))
        except Exception:  # the store is away for a while; the next beat tries again
            continue


def _state(name: str, count: int) -> bytes:
    return json.dumps({"name": name, "process": os.getpid(), "host": os.uname().nodename, "beat": count}).encode()
