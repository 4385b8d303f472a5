"""Settings of a registered function, checked against its signature before anything runs."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from csm.errors import InputError

# Of dataclasses that are read from YAML.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def expected(error: Any) -> str:
    """What one of pydantic's ``errors()`` says, in the words of a user: "expected a whole number"."""
    kind, message = error["type"], error["msg"]
    for prefix, name in _EXPECTED.items():
        if kind.startswith(prefix):
            hint = (
                " (YAML reads 1e9 as text: write 1.0e+9)" if prefix in ("int_", "float_") and _is_number(error["input"]) else ""
            )
            return f"expected {name}{hint}"
    text: str = message.replace("Input should be ", "expected ")
    return text.replace("expected greater", "expected a number greater").replace("expected less", "expected a number less")


_EXPECTED = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "text",
    "dict_type": "a section with keys",
    "dataclass_type": "a section with keys",
    "tuple_type": "a list",
}


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def check_name(where: str, name: str, names: Collection[str]) -> None:
    """``InputError`` unless ``name``, the value of the dotted key ``where``, is one of ``names``."""
    if name not in names:
        raise InputError(f"{where}: unknown {name!r}; one of {', '.join(names)}")


def check_numbers(given: Any, checked: Any, where: str) -> None:
    """``InputError`` if true or false stands in ``given``, at the dotted key ``where``, and a number in ``checked``, which pydantic made
    of it: it takes them for 1 and 0."""
    if isinstance(given, bool):
        if isinstance(checked, (int, float)) and not isinstance(checked, bool):
            raise InputError(f"{where}: expected a {'whole ' if isinstance(checked, int) else ''}number, got {given!r}")
    elif isinstance(given, Mapping):
        for key, value in given.items():
            below = checked.get(key) if isinstance(checked, Mapping) else getattr(checked, str(key), None)
            check_numbers(value, below, f"{where}.{key}" if where else str(key))
    elif isinstance(given, (list, tuple)) and isinstance(checked, (list, tuple)):
        for value, made in zip(given, checked, strict=True):
            check_numbers(value, made, where)


def check_parameters(
    function: Callable[..., Any], parameters: Mapping[str, Any], where: str, reserved: Sequence[str] = ()
) -> dict[str, Any]:
    """Return ``parameters`` converted to the types of ``function``'s arguments.

    Settings are the arguments of a simple type (int, float, str, bool); the others are the function's data. A range is part of
    the hint: ``Annotated[float, Field(ge=0)]``.

    Args:
        function: a registered function or class, for instance a loss.
        parameters: setting -> value, as read from YAML.
        where: the dotted key of the section, for the message.
        reserved: simple arguments that the caller passes itself.

    Raises:
        InputError: unknown setting (the allowed ones are listed), a value of the wrong type or out of range, or a missing one without
            a default.
    """
    signature = inspect.signature(function).parameters
    # A dataclass keeps its hints on the class: pydantic's __init__ has none.
    annotated = function.__init__ if inspect.isclass(function) and not is_dataclass(function) else function
    hints = get_type_hints(annotated, include_extras=True)
    simple = [name for name, hint in get_type_hints(annotated).items() if name in signature and hint in (int, float, str, bool)]
    settable = [name for name in simple if name not in reserved]
    checked = {}
    for key, value in parameters.items():
        if key not in settable:
            raise InputError(f"{where}.{key}: no such setting; allowed: {', '.join(settable) or 'none'}")
        try:
            checked[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise InputError(f"{where}.{key}: {expected(error.errors()[0])}, got {value!r}") from None
        check_numbers(value, checked[key], f"{where}.{key}")
        if isinstance(checked[key], float) and not math.isfinite(checked[key]):
            raise InputError(f"{where}.{key}: expected a finite number, got {value!r}")
    for name in settable:
        if signature[name].default is inspect.Parameter.empty and name not in parameters:
            raise InputError(f"{where}.{name}: missing; set it, for example --set {where}.{name}=VALUE")
    return checked
