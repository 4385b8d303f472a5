"""Files that are either whole or not there: written beside, then renamed into place; on a store, put there at once.

A file on a store (``s3://...``, see ``csm.locations``) is a ``Path`` as any other; who needs a real file asks ``local``.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from csm.errors import InputError
from csm.locations import cache, is_remote, listing, local, read_bytes, store
from csm.parameters import expected

T = TypeVar("T")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; when the block ends well, it replaces ``path`` in one step, else it is removed.

    Two writers of one path do not disturb each other: the temporary name holds host and process id, and the last rename wins. For a
    path on a store the temporary file is one of this machine, which is then put there as a whole.

    Raises:
        OSError: the system refused to write (a full disk, ...), also where the library that wrote put that into an error of its own.
    """
    remote = is_remote(path)
    temporary = _beside(path) if remote else path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if remote:
            store(path).put_file(str(temporary), str(path))
        else:
            os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write does not know what it writes to
        raise
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))  # as polars and safetensors, which are written in Rust, put it
        if told is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def placing(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, whose files are those of ``folder`` when the block ends well: itself, or a temporary one for a store.

    For libraries that write folders; files that it had before stay.
    """
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        yield Path(temporary)
        names = list(listing(Path(temporary)))
        store(folder).put([str(Path(temporary) / name) for name in names], [str(folder / name) for name in names])


def _beside(path: Path) -> Path:
    """A name of this machine that nobody else has, for what goes to ``path``."""
    folder = cache() / "writing"
    folder.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(suffix=f".{path.name}", dir=folder)
    os.close(number)
    return Path(name)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value in ``path``; ``InputError`` names a file that is missing or damaged."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): remove it and run again") from None


def read_record(path: Path, kind: type[T]) -> T:
    """Return the JSON object in ``path`` as the dataclass ``kind``; ``InputError`` names a file that is damaged or of another form.

    Fields of a tuple type come back as tuples; keys that ``kind`` does not have are left out.
    """
    value = read_json(path)
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise InputError(f"{path} is not a {kind.__name__} ({where}: {expected(first)}): remove it and run again") from None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write ``tensors`` as safetensors to ``path`` atomically (moved to the CPU, made contiguous)."""
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors lets nobody else read it


def _umask() -> int:
    """What this process takes from the rights of new files; there is no way to read it but to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; ``InputError`` names a file that is missing or damaged."""
    try:
        return load_file(local(path))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): remove it and run again") from None


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state (nested dicts and lists of tensors, numbers and strings) to ``path`` atomically."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def read_state(path: Path) -> dict[str, Any]:
    """Return what ``write_state`` wrote, without unpickling code; ``InputError`` names a damaged file.

    A damaged state is never replaced silently by a start from zero: the message asks the user to remove it.
    """
    try:
        with path.open("rb") as file:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file: RuntimeError, EOFError, UnpicklingError, ...
        raise InputError(f"{path} is a damaged training state ({type(error).__name__}): remove it to start from zero") from None
    return state


def digest(*values: Any) -> str:
    """16 hexadecimal digits of BLAKE2b over the canonical JSON of ``values`` (dataclasses must be dicts already)."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(canonical, digest_size=8).hexdigest()


def file_digest(path: Path) -> str:
    """16 hexadecimal digits of BLAKE2b over the bytes of ``path``."""
    with local(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def bytes_digest(*parts: bytes | memoryview) -> str:
    """16 hexadecimal digits of BLAKE2b over ``parts`` (a memoryview: of bytes), each preceded by its length."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()
