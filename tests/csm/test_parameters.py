from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from csm.errors import InputError
from csm.parameters import check_parameters


def function(
    data: torch.Tensor, path: str, rate: float = 0.5, steps: int = 3, loud: bool = False, where: Path | None = None
) -> None:
    """A function of data (two arguments) and of settings (four)."""


class Network:
    def __init__(self, channels: int, n_classes: int, width: int = 8, rate: float = 0.0) -> None:
        self.arguments = (channels, n_classes, width, rate)


def bare(value, size: int = 1):
    """``value`` has no annotation, so it is no setting."""


def test_settings_come_back_in_the_types_of_the_arguments() -> None:
    checked = check_parameters(function, {"path": "a", "rate": 1, "steps": "7", "loud": "true"}, "here")
    assert checked == {"path": "a", "rate": 1.0, "steps": 7, "loud": True}
    assert [type(value) for value in checked.values()] == [str, float, int, bool]


def test_defaults_are_left_to_the_function() -> None:
    assert check_parameters(function, {"path": "a"}, "here") == {"path": "a"}


@pytest.mark.parametrize("key", ["data", "where", "speed"], ids=["tensor", "path-object", "unknown"])
def test_what_is_no_setting_is_named_with_the_settings(key: str) -> None:
    with pytest.raises(InputError, match=rf"^data.x.{key}: no such setting; allowed: path, rate, steps, loud$"):
        check_parameters(function, {"path": "a", key: 1}, "data.x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 2.5),
        ("steps", "many"),
        ("steps", None),
        ("steps", True),
        ("rate", "fast"),
        ("rate", [1.0]),
        ("rate", False),
        ("loud", "perhaps"),
        ("path", 3),
    ],
)
def test_a_value_of_the_wrong_type_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^here.{key}: .*, got ") as caught:
        check_parameters(function, {"path": "a", key: value}, "here")
    assert str(caught.value).endswith(f"got {value!r}")
    assert "\n" not in str(caught.value)


def test_a_missing_value_without_default_is_named() -> None:
    with pytest.raises(InputError, match=r"^here.path: missing; set it, for example --set here.path=VALUE$"):
        check_parameters(function, {"steps": 3}, "here")


def test_a_class_is_called_through_its_init_and_reserved_arguments_are_the_callers() -> None:
    reserved = ("channels", "n_classes")
    checked = check_parameters(Network, {"width": "16"}, "train.parameters", reserved)
    assert Network(1, 2, **checked).arguments == (1, 2, 16, 0.0)
    with pytest.raises(InputError, match=r"train.parameters.channels: no such setting; allowed: width, rate"):
        check_parameters(Network, {"channels": 3}, "train.parameters", reserved)


def test_without_settings_none_is_allowed() -> None:
    with pytest.raises(InputError, match=r"here.value: no such setting; allowed: size"):
        check_parameters(bare, {"value": 1}, "here")
    assert check_parameters(bare, {}, "here") == {}


def ranged(data: torch.Tensor, share: Annotated[float, Field(ge=0, le=1)] = 0.5, count: Annotated[int, Field(ge=1)] = 1) -> None:
    """A function whose settings have ranges."""


@dataclass(frozen=True)
class Settings:
    """The same as a dataclass of the standard library."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    count: Annotated[int, Field(ge=1)] = 1
    kind: ClassVar[str] = "none"


@pydantic_dataclass(frozen=True)
class CheckedSettings(Settings):
    """And of pydantic, whose ``__init__`` has no hints; inherited fields are settings too."""

    label: str = ""


@pytest.mark.parametrize("target", [ranged, Settings, CheckedSettings])
def test_a_range_is_part_of_the_hint(target: Callable[..., object]) -> None:
    assert check_parameters(target, {"share": 1, "count": "3"}, "here") == {"share": 1.0, "count": 3}
    with pytest.raises(InputError, match=r"^here.share: expected a number less than or equal to 1, got 1.5$"):
        check_parameters(target, {"share": 1.5}, "here")
    with pytest.raises(InputError, match=r"^here.count: expected a number greater than or equal to 1, got 0$"):
        check_parameters(target, {"count": 0}, "here")
    with pytest.raises(InputError, match=r"^here.kind: no such setting; allowed: share, count"):
        check_parameters(target, {"kind": "some"}, "here")
