"""Layers of a configuration: YAML files and overrides, laid one over the other as plain values."""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from csm.errors import InputError
from csm.locations import location
from csm.search.sections import merge_spaces

SPACE = "space"  # of the section tune: its keys are dotted keys of the configuration


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: YAML forbids it, PyYAML silently keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} stands there twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node


def load_yaml(text: str) -> Any:
    """What a user's YAML says, as plain values.

    Raises:
        yaml.YAMLError: it is not valid, or a key stands twice in one mapping.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def config_names() -> list[str]:
    """Names of the bundled configurations."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files("flows.configs").iterdir() if entry.name.endswith(".yaml"))


def read(name: str) -> dict[str, Any]:
    """What stands in configuration ``name``, or in the file of that path; ``InputError`` if it cannot be read."""
    path = location(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"--config {name}: {'is a folder, not a file' if path.is_dir() else 'the file does not exist'}")
        return _parse(path.read_text(encoding="utf-8", errors="replace"), name)
    if name == "default" or name not in config_names():
        if path.is_file():
            raise InputError(f"--config {name}: expected a file that ends in .yaml or .yml")
        names = ", ".join(known for known in config_names() if known != "default")
        raise InputError(f"--config {name}: unknown configuration; give a .yaml file or one of {names}")
    return read_bundled(name)


def read_bundled(name: str) -> dict[str, Any]:
    """What stands in the bundled configuration ``name``, which is there."""
    return deepcopy(_parse_bundled(name))


def parse_override(override: str) -> dict[str, Any]:
    """The layer that ``dotted.key=value`` asks for."""
    key, separator, text = override.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise InputError(f"--set {override}: expected dotted.key=value")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        twice = f": {error.problem}" if isinstance(error, yaml.composer.ComposerError) else ""
        raise InputError(f"--set {override}: the value is not valid YAML{twice}") from None
    return nested(key, value)


def nested(key: str, value: Any) -> dict[str, Any]:
    """``value`` below the sections of a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, mapping by mapping; null removes a key. ``data`` with another source replaces it whole."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif key == SPACE and isinstance(value, Mapping):
            merged[key] = merge_spaces(below or {}, value)
        elif isinstance(below, Mapping) and isinstance(value, Mapping) and not _other_source(key, below, value):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def without_space(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``default`` without its search space if ``given`` has one."""
    tune = given.get("tune")
    return merge(default, {"tune": {SPACE: None}}) if isinstance(tune, Mapping) and SPACE in tune else dict(default)


def without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without the keys that are null because there was nothing below them to remove; in a search space null is a choice."""
    kept = {key: value for key, value in values.items() if value is not None}
    return {key: without_null(value) if isinstance(value, Mapping) and key != SPACE else value for key, value in kept.items()}


def without_defaults(default: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``merge`` has to lay on ``default`` to get ``values``: keys of ``default`` that ``values`` lacks are null."""
    over = {**values, **{key: None for key in default if key not in values}}
    for key, below in default.items():
        value = over[key]
        if isinstance(below, Mapping) and isinstance(value, Mapping) and key != SPACE and not _other_source(key, below, value):
            over[key] = without_defaults(below, value)
    return over


@cache
def _parse_bundled(name: str) -> dict[str, Any]:
    """Two thirds of the time of loading a configuration, of which a benchmark loads dozens."""
    return _parse(files("flows.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8"), name)


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"--config {name}: not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"--config {name}: expected a mapping of sections, got {type(value).__name__}")
    return value


def _other_source(key: str, below: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return key == "data" and "source" in value and value["source"] != below.get("source")
