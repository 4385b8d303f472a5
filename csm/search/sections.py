"""Search spaces as they are written: sections within sections, or dotted keys; and one laid on another."""

from collections.abc import Mapping
from typing import Any

from csm.errors import InputError

ENTRY = ("values", "low", "high", "log", "step")  # a section with one of these keys says what a setting may be


def dotted(value: Any, where: str = "tune.space") -> dict[str, Any]:
    """Dotted key -> what the setting may be (or whatever else stands there), from sections within sections."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected a section with keys, got {value!r}")
    found: dict[str, Any] = {}
    for key, entry in value.items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise InputError(f"{where}: expected dotted keys, got {key!r}")
        section = isinstance(entry, Mapping) and entry and not any(word in entry for word in ENTRY)
        below = {f"{key}.{name}": item for name, item in dotted(entry, f"{where}.{key}").items()} if section else {key: entry}
        for name, item in below.items():
            if name in found:
                raise InputError(f"{where}.{name}: stands there twice; leave one of them")
            found[name] = item
    return found


def merge_spaces(base: Any, over: Any, where: str = "tune.space") -> dict[str, Any]:
    """``over`` laid on ``base``, as dotted keys.

    Null removes a key with those below it, or a choice. Ends of a range and conditional choices are changed one by one; whatever has
    another form than what was there replaces it.
    """
    merged = dotted(base, where)
    for key, entry in dotted(over, where).items():
        if entry is None:
            merged = {name: kept for name, kept in merged.items() if not f"{name}.".startswith(f"{key}.")}
        else:
            merged[key] = _merge_entries(merged.get(key), entry, f"{where}.{key}")
    return merged


def _merge_entries(below: Any, over: Any, where: str) -> Any:
    if not isinstance(below, Mapping) or not isinstance(over, Mapping) or ("values" in below) != ("values" in over):
        return over
    if "values" not in over:
        return {key: value for key, value in {**below, **over}.items() if value is not None}
    if not isinstance(below["values"], Mapping) or not isinstance(over["values"], Mapping):
        return over
    branches = dict(below["values"])
    for choice, branch in over["values"].items():
        if branch is None:
            branches.pop(choice, None)
        else:
            branches[choice] = merge_spaces(branches.get(choice) or {}, branch, f"{where}.values.{choice}")
    return {"values": branches}
