"""The network of the classifiers, whose settings may name a folder."""

from dataclasses import replace
from typing import Any

from csm import storage
from csm.classifiers import check_network
from csm.datasets import RealDataset
from csm.errors import InputError
from flows.folders import folder_files
from flows.methods import TrainConfig
from flows.stages import Context


def network_settings(train: TrainConfig) -> dict[str, Any]:
    """``train.parameters`` and, where they name a folder, what identifies the files in it: all that a new classifier depends on."""
    files = folder_files(train.parameters)
    return {**train.parameters, **({"files": storage.digest(files)} if files else {})}


def check_train(context: Context) -> None:
    """``check_training`` of the classifiers that are compared."""
    train = context.config.train
    check_training(context, train, "train")
    for name, method in train.chosen.items():
        if method.optimizer:
            check_training(context, replace(train, optimizer=train.optimizer_of(method)), f"train.methods.{name}")


def check_training(context: Context, train: TrainConfig, where: str) -> None:
    """``InputError`` if the network cannot be built for these images, or augmentation leaves nothing of them.

    Of the data set only what is prepared already is asked. The message starts with ``where``, the section of ``train``'s settings.
    """
    workspace = context.workspace
    shape = RealDataset.load_info(workspace.root).shape if workspace.dataset.is_file() else None
    check_network(train.network, train.parameters, shape, where)
    for key in ("shift", "cutout"):
        pixels = getattr(train.optimizer, key)
        if shape is not None and pixels >= min(shape[:2]):
            size = f"{shape[0]}x{shape[1]}"
            raise InputError(
                f"{where}.optimizer.{key}: {pixels} pixels leave nothing of images of {size}: take less than {min(shape[:2])}"
            )
