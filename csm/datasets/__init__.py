"""Sources of real images: each name gives a function ``(**parameters) -> RealDataset``."""

import inspect
from collections.abc import Callable
from typing import Any

from csm.datasets.cifar import cifar10, cifar100
from csm.datasets.digits import digits, digits_degraded, digits_hard
from csm.datasets.gaussians import gaussians
from csm.datasets.huggingface import SUFFIXES as PARQUET_SUFFIXES
from csm.datasets.huggingface import huggingface
from csm.datasets.image_folder import SUFFIXES as IMAGE_SUFFIXES
from csm.datasets.image_folder import image_folder
from csm.datasets.npz import npz
from csm.datasets.real import DatasetInfo, RealDataset
from csm.datasets.source_files import stamps
from csm.datasets.tiny_imagenet import tiny_imagenet
from csm.datasets.webdataset import SUFFIXES as TAR_SUFFIXES
from csm.datasets.webdataset import webdataset
from csm.errors import InputError
from csm.storage import digest

DATASETS: dict[str, Callable[..., RealDataset]] = {
    "digits": digits,
    "digits-hard": digits_hard,
    "digits-degraded": digits_degraded,
    "image-folder": image_folder,
    "gaussians": gaussians,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny-imagenet": tiny_imagenet,
    "huggingface": huggingface,
    "npz": npz,
    "webdataset": webdataset,
}

# What the files of a source, those that its setting `path` names, end with.
_SUFFIXES: dict[str, tuple[str, ...]] = {
    "image-folder": IMAGE_SUFFIXES,
    "huggingface": PARQUET_SUFFIXES,
    "tiny-imagenet": (".jpeg", ".txt"),
    "webdataset": TAR_SUFFIXES,
}


def load_dataset(source: str, **parameters: Any) -> RealDataset:
    """Return the data set named ``source``; ``InputError`` names an unknown source or parameter and the allowed ones."""
    if source not in DATASETS:
        raise InputError(f"data.source: unknown {source!r}; one of {', '.join(DATASETS)}")
    allowed = list(inspect.signature(DATASETS[source]).parameters)
    for key in parameters:
        if key not in allowed:
            raise InputError(f"data.{key}: source {source!r} has no such setting; allowed: {', '.join(allowed)}")
    return DATASETS[source](**parameters)


def source_digest(source: str, **parameters: Any) -> str:
    """What must be unchanged outside the configuration for ``load_dataset`` to give the same again; "" if nothing."""
    paths = [parameters[key] for key in ("path", "class_names") if parameters.get(key)]
    if not paths:
        return ""
    files = [stamp for path in paths for stamp in stamps(path, _SUFFIXES.get(source, ("",)))]
    return f"{len(files)} files, {digest(files)}"


__all__ = ["DATASETS", "DatasetInfo", "RealDataset", "load_dataset", "source_digest"]
