"""Pickles of EDM networks, read without running anything; what their records mean is for ``csm.generators.edm.checkpoints`` to say."""

import mmap
from pathlib import Path
from typing import Any, BinaryIO, cast

from csm import pickles
from csm.errors import InputError

# What EDM's own pickles name besides containers.
_MODULES = ("dnnlib", "torch.nn", "torch_utils", "training")
_NAMES = frozenset(
    [
        *(f"builtins.{name}" for name in ("bool", "complex", "dict", "float", "int", "list", "object", "slice", "str", "tuple")),
        *("copyreg._reconstructor", "collections.defaultdict"),
        *(f"numpy.{name}" for name in ("dtype", "ndarray", "bool_", "float32", "float64", "int32", "int64", "uint8")),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
        *(f"torch.{name}" for name in ("Size", "device")),
        *(f"torch.{name}" for name in ("bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8")),
        *(f"torch._utils.{name}" for name in ("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_tensor_v2")),
        "torch.storage._load_from_bytes",
    ]
)


def read_pickle(path: Path) -> Any:
    """What the pickle at ``path`` holds, see ``csm.pickles``.

    Raises:
        InputError: the file is missing, damaged, or names what no EDM network is made of.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return pickles.read_pickle(cast(BinaryIO, content), str(path), _known, "an EDM network")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:  # an empty file cannot be mapped
        raise InputError(f"{path} is not a whole pickle of an EDM network ({type(error).__name__}): get it again") from None


def _known(name: str) -> bool:
    return name in _NAMES or name.startswith(tuple(f"{package}." for package in _MODULES))
