"""The network in an EDM pickle: its settings and its tensors, of the records that ``read_pickle`` gives."""

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError

from csm.errors import InputError
from csm.generators.edm.pickles import read_pickle
from csm.generators.edm.preconditioning import PRECONDITIONINGS, Preconditioning
from csm.generators.edm.unets import DhariwalUNetSettings, SongUNetSettings
from csm.parameters import check_parameters, expected
from csm.pickles import Record

UNETS: dict[str, type[SongUNetSettings] | type[DhariwalUNetSettings]] = {
    "SongUNet": SongUNetSettings,
    "DhariwalUNet": DhariwalUNetSettings,
}
_ATTRIBUTES = {"VPPrecond": ("beta_d", "beta_min", "M"), "iDDPMPrecond": ("C_1", "C_2", "M"), "EDMPrecond": ("sigma_data",)}
_TRAINING_ONLY = ("dropout", "label_dropout")
_DEPTH = 8  # of modules in modules; EDM's networks have 4


@dataclass(frozen=True)
class Checkpoint:
    """A network as it was saved.

    Attributes:
        preconditioning: its class, a key of ``PRECONDITIONINGS``, and its settings.
        sigma_range: lowest and highest noise level that it says it knows.
        tensors: records of its tensors, by name.
    """

    path: Path
    preconditioning: Preconditioning
    parameters: dict[str, Any]
    sigma_range: tuple[float, float]
    unet: SongUNetSettings | DhariwalUNetSettings
    tensors: dict[str, Record]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor ``name``, as the file says; nothing is read."""
        return _layout(self.path, name, self.tensors[name])[2]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor ``name``, float32; ``InputError`` if it is damaged or no plain tensor of floating-point numbers."""
        content, offset, shape, stride = _layout(self.path, name, self.tensors[name])
        try:
            storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # many types for damaged bytes
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            if named:
                raise InputError(
                    f"{self.path} holds {named[1]} in {name}, which is not part of an EDM network: nothing was run"
                ) from None
            raise _damaged(self.path, name) from None
        if not isinstance(storage, torch.storage.TypedStorage) or not storage.dtype.is_floating_point:
            raise _damaged(self.path, name)
        values = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
        if math.prod(shape) > len(values):  # a stride of 0 would make any number of values of one
            raise _damaged(self.path, name)
        try:
            return values.as_strided(shape, stride, offset).float().contiguous()
        except RuntimeError:  # beyond the end of the storage
            raise _damaged(self.path, name) from None


def read_checkpoint(path: Path) -> Checkpoint:
    """The network in ``path``: the entry ``ema`` of a dictionary, or all there is.

    Raises:
        InputError: the file is missing, damaged, would run something, or holds no class-conditional network of EDM.
    """
    value = read_pickle(path)
    network = value.get("ema") if isinstance(value, dict) else value
    name, state = _module(network)
    if name not in PRECONDITIONINGS:
        found = "no network" if not name else f"a {name}"
        raise InputError(f"{path} holds {found} as its averaged network (ema); expected {_or(PRECONDITIONINGS)}")
    modules = state.get("_modules")
    unet_name, unet = _module(modules.get("model") if isinstance(modules, dict) else None)
    if unet_name not in UNETS:
        raise InputError(f"{path}: the model of its {name} is {unet_name or 'no network'!r}; expected {_or(UNETS)}")
    if state.get("label_dim") == 0:
        raise InputError(f"{path}: the model knows no classes (label_dim 0); expected one that was trained with labels (cond)")
    parameters = {key: _number(state.get(key)) for key in _ATTRIBUTES.get(name, ())}
    low, high = _number(state.get("sigma_min")), _number(state.get("sigma_max"))
    if not (isinstance(low, float | int) and isinstance(high, float | int) and 0 <= low < high):
        raise InputError(f"{path}: sigma_min {low!r} and sigma_max {high!r} are no range of noise levels")
    return Checkpoint(
        path,
        cast(Preconditioning, name),
        check_parameters(PRECONDITIONINGS[name], parameters, f"{path}: {name}"),
        (low, high),
        _settings(path, unet_name, unet),
        dict(_tensors(path, state, "", 0)),
    )


def _module(value: Any) -> tuple[str, dict[str, Any]]:
    """Class and attributes of a module: EDM's own say both in one dictionary, torch's are plain objects. Empty if it is none."""
    if not isinstance(value, Record):
        return "", {}
    if value.name == "torch_utils.persistence._reconstruct_persistent_obj":
        meta = value.arguments[0] if len(value.arguments) == 1 else None
        name, state = (meta.get("class_name"), meta.get("state")) if isinstance(meta, dict) else (None, None)
    else:
        name, state = value.name.rpartition(".")[2], value.state
    return (name, state) if isinstance(name, str) and isinstance(state, dict) else ("", {})


def _settings(path: Path, name: str, state: dict[str, Any]) -> SongUNetSettings | DhariwalUNetSettings:
    """The settings with which the U-Net was made."""
    given = state.get("_init_kwargs")
    if not isinstance(given, dict) or state.get("_init_args"):
        raise InputError(f"{path}: the {name} does not say by name with which settings it was made (_init_kwargs)")
    settings = {key: _plain(value) for key, value in given.items() if key not in _TRAINING_ONLY}
    try:
        return TypeAdapter(UNETS[name]).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where} of its {name}: {expected(first)}, got {str(first['input'])[:100]!r}") from None


def _tensors(path: Path, state: dict[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, Record]]:
    """Names and records of the parameters and buffers of a module and all modules in it."""
    if depth > _DEPTH:
        raise InputError(f"{path}: {prefix[:-1]} lies deeper than any module of an EDM network")
    for kind in ("_parameters", "_buffers"):
        for key, value in _dictionary(path, state, kind, prefix).items():
            if value is not None:
                yield f"{prefix}{key}", value
    for key, value in _dictionary(path, state, "_modules", prefix).items():
        if value is not None:
            name, inner = _module(value)
            if not name:
                raise InputError(f"{path}: {prefix}{key} is no module")
            yield from _tensors(path, inner, f"{prefix}{key}.", depth + 1)


def _dictionary(path: Path, state: dict[str, Any], kind: str, prefix: str) -> dict[Any, Any]:
    value = state.get(kind, {})
    if not isinstance(value, dict):
        raise InputError(f"{path}: {prefix}{kind} is no dictionary")
    return value


def _layout(path: Path, name: str, value: Any) -> tuple[bytes, int, tuple[int, ...], tuple[int, ...]]:
    """Bytes of the storage, offset, shape and strides of a tensor's record."""
    if isinstance(value, Record) and value.name.startswith("torch._utils._rebuild_parameter") and value.arguments:
        value = value.arguments[0]
    if not isinstance(value, Record) or value.name != "torch._utils._rebuild_tensor_v2" or len(value.arguments) < 4:
        raise _damaged(path, name)
    storage, offset, shape, stride = value.arguments[:4]
    if not isinstance(storage, Record) or storage.name != "torch.storage._load_from_bytes" or len(storage.arguments) != 1:
        raise _damaged(path, name)
    content = storage.arguments[0]
    sizes_are_whole = all(isinstance(sizes, tuple) and all(type(size) is int for size in sizes) for sizes in (shape, stride))
    if not isinstance(content, bytes) or type(offset) is not int or not sizes_are_whole:
        raise _damaged(path, name)
    return content, offset, shape, stride


def _damaged(path: Path, name: str) -> InputError:
    return InputError(f"{path}: {name} is damaged, or no plain tensor of floating-point numbers")


def _number(value: Any) -> Any:
    """The Python number in a record of numpy's scalar, else ``value`` itself."""
    if not isinstance(value, Record) or not value.name.endswith(".multiarray.scalar") or len(value.arguments) != 2:
        return value
    kind, content = value.arguments
    code = kind.arguments[0] if isinstance(kind, Record) and kind.arguments else None
    formats = {"f4": torch.float32, "f8": torch.float64, "i4": torch.int32, "i8": torch.int64}
    if code not in formats or not isinstance(content, bytes) or len(content) != int(code[1]):
        return value
    return torch.frombuffer(bytearray(content), dtype=formats[code]).item()


def _plain(value: Any) -> Any:
    """``value`` with Python's numbers in place of numpy's, lists as tuples."""
    return tuple(map(_number, value)) if isinstance(value, list | tuple) else _number(value)


def _or(names: Any) -> str:
    return " or ".join(names)
