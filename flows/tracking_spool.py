"""What is yet to be sent to the tracking store, on disk: JSON lines that are appended, read from the front, and cut when all is sent."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from csm import storage
from csm.locations import fetch, is_remote

Record = dict[str, Any]


class Spool:
    """A file of records that wait, and a folder of the files that they name, below ``workspace``.

    One process holds it at a time; the caller's lock keeps its threads apart. What a killed process left is there again.
    """

    def __init__(self, workspace: Path, name: str) -> None:
        self.path = workspace / f"{name}.jsonl"
        self.refused = workspace / f"{name}-refused.jsonl"
        self._files = workspace / f"{name}-files"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        lines = self._read(0).splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # half a line, as a kill or a full disk leaves it
            del lines[-1]
        self._sent = 0
        self._size = sum(map(len, lines))
        self.waiting = len(lines)
        os.ftruncate(self._file, self._size)

    def append(self, *records: Record) -> None:
        """Add ``records``, all of them or none.

        Raises:
            OSError: the disk takes no more.
        """
        data = memoryview("".join(json.dumps(record) + "\n" for record in records).encode())
        try:
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:])
        except OSError as error:
            os.ftruncate(self._file, self._size)
            error.filename = str(self.path)
            raise
        self._size += len(data)
        self.waiting += len(records)

    def keep(self, source: Path) -> str:
        """A copy of a file or folder as it is now; where it lies, for ``file``.

        Of one on this machine it is a hard link: files are replaced, never changed.
        """
        kept = self._files / uuid.uuid4().hex / source.name
        kept.parent.mkdir(parents=True)
        try:
            if is_remote(source):
                fetch(source, kept)
            elif source.is_dir():
                shutil.copytree(source, kept, copy_function=_link)
            else:
                _link(str(source), str(kept))
        except BaseException:
            shutil.rmtree(kept.parent)
            raise
        return kept.relative_to(self._files).as_posix()

    def file(self, kept: str) -> Path:
        """The copy that ``keep`` made; it is gone once it was sent."""
        return self._files / kept

    def room(self, name: str) -> Path:
        """Path for a new file ``name`` that the caller writes, in place of a copy."""
        path = self._files / uuid.uuid4().hex / name
        path.parent.mkdir(parents=True)
        return path

    def first(self) -> Record | None:
        """The first record that waits; None if there is none. A line that is damaged is an empty record."""
        if self._sent == self._size:
            return None
        return _record(self._line())

    def records(self) -> list[Record]:
        """All that wait."""
        return [_record(line) for line in self._read(self._sent).splitlines(keepends=True)]

    def pop(self) -> None:
        """The first record was sent."""
        self._sent += len(self._line())
        self.waiting -= 1

    def refuse(self) -> None:
        """The store will never take the first record: put it aside."""
        with self.refused.open("ab") as file:
            file.write(self._line())
        self.pop()

    def cut(self) -> None:
        """Begin the file anew; call it when nothing waits."""
        os.ftruncate(self._file, 0)
        self._sent = self._size = 0
        shutil.rmtree(self._files, ignore_errors=True)

    def close(self) -> None:
        """Leave no file where nothing waits."""
        os.close(self._file)
        if not self.waiting:
            self.path.unlink()

    def _line(self) -> bytes:
        end, start = b"", self._sent
        while not end.endswith(b"\n"):
            part = os.pread(self._file, 2**16, start + len(end))
            end += part[: part.find(b"\n") + 1] or part
        return end

    def _read(self, start: int) -> bytes:
        return os.pread(self._file, os.fstat(self._file).st_size - start, start)


def waits(workspace: Path, name: str) -> bool:
    """Whether records of an earlier command wait."""
    path = workspace / f"{name}.jsonl"
    return path.is_file() and path.stat().st_size > 0


def folder_digest(folder: Path, without: str) -> str:
    """Identifies the files below ``folder`` but those named ``without``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != without)
    return storage.digest({path.relative_to(folder).as_posix(): storage.file_digest(path) for path in files})


def _record(line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
