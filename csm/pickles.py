"""Pickles of other programs, read without running anything that they ask for.

A pickle is a program: it names functions and classes of any module and has them called. Here no name is ever looked up. Each becomes a
class of inert records, which keep what they are "called" with; only empty containers and bytes, which protocol 2 spells as calls, are
made at once. What the records mean, and which names there may be, is for those to say who know the files.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

from csm.errors import InputError


class Record:
    """Stands for an object of another program: ``name`` of what would have made it, its ``arguments`` and ``state``."""

    name: ClassVar[str]
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any, **_: Any) -> Self:
        record = object.__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of a mapping; no record that matters has any."""

    def extend(self, values: Iterable[Any]) -> None:
        """Items of a list; no record that matters has any."""


class Items(dict[Any, Any]):
    """OrderedDict and EasyDict: their items; attributes that somebody gave them are left out."""

    def __setstate__(self, state: Any) -> None:
        """Left out."""


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as protocol 2 writes them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes as {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


# What calls give at once: nothing that can hold more than the file does.
_CONTAINERS: dict[str, Any] = {
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
    "collections.OrderedDict": Items,
    "dnnlib.util.EasyDict": Items,
}

_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocol 2 writes them

# Left out: buffers outside the file or of a size that nothing backs, names by number or by somebody else's rule.
_REFUSED = (
    pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.PERSID,
    pickle.BINPERSID,
)


def _build(reader: Any) -> None:
    """Give a record its state. Python's own rule also sets attributes of classes and functions, of which some here are ours."""
    state = reader.stack.pop()
    if not isinstance(reader.stack[-1], Record | Items):
        raise pickle.UnpicklingError("a state of what has none")
    reader.stack[-1].__setstate__(state)


class _Reader(pickle._Unpickler):
    """Python's own reader in Python: the one in C reserves memory for any length or number that a file claims."""

    dispatch: ClassVar[Any] = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _REFUSED},
        pickle.BUILD[0]: _build,
    }

    def __init__(self, file: BinaryIO, where: str, known: Callable[[str], bool], content: str, encoding: str) -> None:
        super().__init__(file, fix_imports=False, encoding=encoding)
        self.where, self.known, self.content = where, known, content
        self.classes: dict[str, Any] = dict(_CONTAINERS)

    def find_class(self, module_name: str, global_name: str) -> Any:
        """The class of records of a global, or what is in its place; ``InputError`` if the content does not name it."""
        name = f"{_OLD_MODULES.get(module_name, module_name)}.{global_name}"
        if name not in self.classes:
            if not self.known(name):
                shown = name if name.isprintable() and len(name) <= 100 else f"{name[:100]!r}"
                raise InputError(f"{self.where} holds {shown}, which is not part of {self.content}: nothing was run")
            self.classes[name] = type("Record", (Record,), {"name": name})
        return self.classes[name]


def read_pickle(file: BinaryIO, where: str, known: Callable[[str], bool], content: str, encoding: str = "ASCII") -> Any:
    """What a pickle (protocols 0 to 5) holds: containers, numbers, texts and bytes as they are, all else as ``Record``.

    Takes no more memory than some times the size of the file.

    Args:
        file: the pickle.
        where: its name, for messages.
        known: whether "module.name" may be named. Reading any name is harmless; one that does not belong says that the file is another.
        content: what the pickle is of, for messages: "an EDM network".
        encoding: of texts that Python 2 wrote; "bytes": they come as bytes.

    Raises:
        InputError: the pickle is damaged, or names what is not ``known``.
    """
    try:
        return _Reader(file, where, known, content, encoding).load()
    except InputError:
        raise
    except Exception as error:  # a damaged file makes any: EOFError, KeyError, TypeError, RecursionError, MemoryError, ...
        raise InputError(f"{where} is not a whole pickle of {content} ({type(error).__name__}): get it again") from None


def not_plain(file: Path, error: Exception) -> str:
    """Why numpy could not read ``file`` as arrays without pickles, for a message that begins with its name."""
    reason: object = error
    if "allow_pickle" in str(error):  # what numpy also says of any other file
        reason = "it holds pickled objects, which are never read" if zipfile.is_zipfile(file) else "it is no zip archive"
    return f"is no whole file of plain numpy arrays ({reason}): write it again with numpy.savez"
