"""Sources of real images: each name gives a function ``(**parameters) -> RealDataset``."""

import inspect
from collections.abc import Callable
from typing import Any

from csm.datasets.digits import digits, digits_hard
from csm.datasets.gaussians import gaussians
from csm.datasets.image_folder import image_folder, source_files
from csm.datasets.real import DatasetInfo, RealDataset
from csm.errors import InputError
from csm.storage import digest

DATASETS: dict[str, Callable[..., RealDataset]] = {
    "digits": digits,
    "digits-hard": digits_hard,
    "image-folder": image_folder,
    "gaussians": gaussians,
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
    if source != "image-folder":
        return ""
    files = source_files(parameters.get("path", ""))
    return f"{len(files)} files, {digest(files)}"


__all__ = ["DATASETS", "DatasetInfo", "RealDataset", "load_dataset", "source_digest"]
