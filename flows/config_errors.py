"""Settings as dataclasses, and what is wrong with one in one line for the user."""

import dataclasses
import difflib
from collections.abc import Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from csm.errors import InputError
from csm.parameters import check_numbers, expected

T = TypeVar("T")


def checked(kind: type[T], values: Any) -> T:
    """``values``, as read from YAML, as the dataclass ``kind``; ``InputError`` names the dotted key that is wrong."""
    try:
        made = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise InputError(explain(error.errors(), kind)) from None
    check_numbers(values, made, "")
    return made


def explain(errors: Sequence[Any], config: Any, where: str = "") -> str:
    """One line for the first error of pydantic with the dataclass ``config``, which stands at ``where``.

    It has the dotted key and, for an unknown one, those allowed there, or the one below that section which was probably meant.
    """
    error = errors[0]
    path = [str(part) for part in error["loc"]]
    if error["type"] == "unexpected_keyword_argument":
        near, allowed = _nearest(config, path), ", ".join(_keys(config, path[:-1]))
        meant = f"did you mean {_dotted(where, near)}? Allowed in its place" if near else "allowed"
        return f"{_dotted(where, path)}: no such setting; {meant}: {allowed}"
    if error["type"] == "missing":
        return f"{_dotted(where, path)}: missing; it must be set"
    # pydantic has an error for each alternative of a union, and ends its path with the alternative; the user knows only the key.
    while path and not _keys(config, path[:-1], path[-1]) and len(path) > 1:
        path.pop()
    alternatives = [expected(other) for other in errors if [str(part) for part in other["loc"][: len(path)]] == path]
    reason = " or ".join(dict.fromkeys(alternatives)).replace(" or expected ", " or ")
    return f"{_dotted(where, path)}: {reason}, got {error['input']!r}"


def _dotted(where: str, path: Sequence[str]) -> str:
    return ".".join([where, *path] if where else path)


def _nearest(config: Any, path: Sequence[str]) -> list[str]:
    """Path of the setting, in the section in which ``path`` stands or anywhere below it, whose name is most like the last of ``path``."""
    *section, name = path
    found: dict[str, list[str]] = {}  # name -> its path, of those that are alike the one least far down
    level = [(section, _at(config, section))]
    while level:
        place, kind = level.pop(0)
        for key, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(kind) else ():
            found.setdefault(key, [*place, key])
            level.append(([*place, key], _section(hint)))
    close = difflib.get_close_matches(name, found, n=1, cutoff=0.75)
    return found[close[0]] if close else []


def _at(kind: Any, path: Sequence[str]) -> Any:
    """What stands at ``path`` of ``kind``."""
    for part in path:
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kind = _section(hints[part]) if part in hints else (_section(get_args(kind)[1]) if get_origin(kind) is dict else None)
    return kind


def _keys(kind: Any, path: Sequence[str], last: str | None = None) -> list[str]:
    """Setting names of the section at ``path`` of ``kind``; with ``last``, only that one if it is a setting there."""
    kind = _at(kind, path)
    if not dataclasses.is_dataclass(kind):
        return [last] if last is not None and get_origin(kind) is dict else []
    names = [field.name for field in dataclasses.fields(kind)]
    return names if last is None else [name for name in names if name == last]


def _section(hint: Any) -> Any:
    """The dataclass in ``X | None``, or the hint itself."""
    if get_origin(hint) in (Union, UnionType):
        return next((item for item in get_args(hint) if dataclasses.is_dataclass(item)), hint)
    return hint
