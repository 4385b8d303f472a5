"""What is wrong with a setting, in one line for the user."""

import dataclasses
from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from csm.parameters import expected


def explain(errors: Sequence[Any], config: Any) -> str:
    """One line for the first error of pydantic with the dataclass ``config``: dotted key and, for an unknown one, those allowed."""
    error = errors[0]
    path = [str(part) for part in error["loc"]]
    if error["type"] == "unexpected_keyword_argument":
        allowed = ", ".join(_keys(config, path[:-1]))
        return f"{'.'.join(path)}: no such setting; allowed: {allowed}"
    if error["type"] == "missing":
        return f"{'.'.join(path)}: missing; it must be set"
    # pydantic has an error for each alternative of a union, and ends its path with the alternative; the user knows only the key.
    while path and not _keys(config, path[:-1], path[-1]) and len(path) > 1:
        path.pop()
    alternatives = [expected(other) for other in errors if [str(part) for part in other["loc"][: len(path)]] == path]
    reason = " or ".join(dict.fromkeys(alternatives)).replace(" or expected ", " or ")
    return f"{'.'.join(path)}: {reason}, got {error['input']!r}"


def _keys(kind: Any, path: Sequence[str], last: str | None = None) -> list[str]:
    """Setting names of the section at ``path`` of ``kind``; with ``last``, only that one if it is a setting there."""
    for part in path:
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kind = _section(hints[part]) if part in hints else (_section(get_args(kind)[1]) if get_origin(kind) is dict else None)
    if not dataclasses.is_dataclass(kind):
        return [last] if last is not None and get_origin(kind) is dict else []
    names = [field.name for field in dataclasses.fields(kind)]
    return names if last is None else [name for name in names if name == last]


def _section(hint: Any) -> Any:
    """The dataclass in ``X | None``, or the hint itself."""
    if get_origin(hint) in (Union, UnionType):
        return next((item for item in get_args(hint) if dataclasses.is_dataclass(item)), hint)
    return hint
