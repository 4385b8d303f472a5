"""Where files lie: on a file system, or on a store that fsspec knows (``s3://BUCKET/...``).

A location is a ``Path``. One on a store is an ``upath.UPath``, which has the methods of ``Path`` and no file behind it; that it is
annotated as ``Path`` is a white lie, told in ``location`` alone. What can read nothing but a file gets one from ``local``.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from fsspec import AbstractFileSystem
from upath import UPath

from csm.errors import InputError

UNUSED_SECONDS = 3600.0  # a copy of what has changed on the store since is kept for who still reads it
# Of each store: it is always asked anew, as other machines write there, and requests that fail are sent again for about a minute.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 7}, "connect_timeout": 10, "read_timeout": 60},
    }
}


def location(text: str | Path) -> Path:
    """The place that ``text`` names: a path, or ``SCHEME://...`` of a store.

    Raises:
        InputError: there is no such kind of store, or its package is not installed.
    """
    scheme, found, rest = str(text).partition("://")
    if not found or isinstance(text, UPath):
        return Path(text) if isinstance(text, str) else text
    if scheme in ("file", "local"):
        return Path(rest)
    try:
        path = UPath(str(text), **_OPTIONS.get(scheme, {"use_listings_cache": False}))
        _ = path.fs  # makes it: a package that is missing is said now
    except (ValueError, ImportError) as error:
        hint = " (pip install 'csm[s3]')" if scheme == "s3" else ""
        raise InputError(f"{text}: there is no way to a store of {scheme}://: {error}{hint}") from None
    if not path.path.strip("/"):
        raise InputError(f"{text}: expected {scheme}://BUCKET/FOLDER")
    return cast(Path, path)


def reach(path: Path) -> None:
    """Raise ``InputError`` within seconds if files cannot be written and read below ``path`` on a store, really tried."""
    scheme = str(path).partition("://")[0]
    impatient = {"config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 3, "read_timeout": 10}}
    options = {**_OPTIONS["s3"], **impatient} if scheme == "s3" else {}
    try:
        trial = UPath(str(path), skip_instance_cache=True, **options) / f".trial-{uuid.uuid4().hex}"
        trial.write_bytes(b"csm")
        if trial.read_bytes() != b"csm":
            raise OSError("what was written is not what is read")
        trial.unlink()
    except Exception as error:  # every store has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: cannot be written and read ({reason}); check the name, that the store answers, and this machine's rights to it"
        ) from None


def is_remote(path: Path) -> bool:
    """Whether ``path`` is on a store."""
    return isinstance(path, UPath) and not isinstance(path, Path)


def store(path: Path) -> AbstractFileSystem:
    """The file system of a path on a store; its methods take ``str(path)``."""
    return cast(UPath, path).fs


def cache() -> Path:
    """Folder of this machine for copies of what lies on stores: CSM_CACHE, else one of the user's below the temporary folder.

    Raises:
        InputError: it belongs to somebody else.
    """
    folder = Path(os.environ.get("CSM_CACHE") or Path(tempfile.gettempdir()) / f"csm-cache-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise InputError(f"CSM_CACHE {folder}: belongs to another user; name another folder")
    return folder


def local(path: Path) -> Path:
    """A file or folder of this machine with what ``path`` holds: itself, or a copy, made once for each version and process-safe.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
    """
    if not is_remote(path):
        return path
    found = listing(path)
    if not found:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    versions = cache() / "copies" / _digest(str(path))
    folder = versions / _digest(*(f"{name} {version}" for name, (_, version) in sorted(found.items())))
    copy = folder / path.name
    with _alone(versions):
        if not copy.exists():
            temporary = folder.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            targets = [temporary / path.name / name if name else temporary / path.name for name in found]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            store(path).get([str(path / name) if name else str(path) for name in found], [str(target) for target in targets])
            os.replace(temporary, folder)
        os.utime(folder)
        for old in versions.iterdir():
            if old.is_dir() and old.stat().st_mtime < time.time() - UNUSED_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    return copy


def listing(path: Path) -> dict[str, tuple[int, str]]:
    """Every file at or below ``path``, in one listing.

    Returns:
        Name relative to ``path`` ("" for itself) -> bytes, and what changes when it is written anew.
    """
    if is_remote(path):
        root = cast(UPath, path).path
        found = store(path).find(str(path), detail=True).items()
        return {name.removeprefix(root).lstrip("/"): (info["size"], store_version(info)) for name, info in found}
    if path.is_file():
        return {"": _file_version(path.stat())}
    return {
        os.path.relpath(os.path.join(folder, name), path): _file_version(os.stat(os.path.join(folder, name)))
        for folder, _, names in os.walk(path)
        for name in names
    }


def store_version(info: dict[str, Any]) -> str:
    """Of a file of a store, as fsspec describes it: what changes when it is written anew."""
    known = next((info[key] for key in ("ETag", "etag", "md5Hash", "checksum") if info.get(key)), "")
    changed = next((info[key] for key in ("LastModified", "last_modified", "updated", "mtime", "created") if info.get(key)), "")
    return f"{info['size']} {known} {changed}"


def remove(path: Path) -> None:
    """Remove the file or folder at ``path``, if there is one."""
    if is_remote(path):
        if path.exists():
            store(path).rm(str(path), recursive=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _file_version(stat: os.stat_result) -> tuple[int, str]:
    return stat.st_size, f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process of this machine is in the block for ``folder`` at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
