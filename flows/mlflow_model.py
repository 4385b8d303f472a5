"""A finished model as an MLflow model: a folder that `mlflow models serve` and `mlflow.pyfunc.load_model` take. No pickle is in it."""

import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.models import ModelSignature
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

import csm
from csm import storage
from csm.calibrated import CalibratedClassifier
from csm.locations import is_remote, remove

SERVED = Path(__file__).with_name("served_model.py")  # which MLflow runs, and nothing here imports
# What csm.calibrated imports; csm itself lies in the folder.
PACKAGES = ("mlflow", "numpy", "pydantic", "safetensors", "scipy", "torch")


def save_mlflow(model: CalibratedClassifier, folder: Path, images: torch.Tensor) -> None:
    """Write ``model`` to ``folder``, whole or not at all; a folder that is there is replaced.

    Its signature is uint8 (-1, H, W, C) -> float32 (-1, K), with the parameter ``batch_size``.

    Args:
        model: the model.
        folder: of the MLflow model.
        images: uint8 (N, H, W, C), the input example.
    """
    if is_remote(folder):
        remove(folder)
        with storage.placing(folder) as here:
            _write(model, here, images)
        return
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    _write(model, unfinished, images)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def _write(model: CalibratedClassifier, folder: Path, images: torch.Tensor) -> None:
    """Write ``model`` to the empty or new ``folder`` of this machine."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    packages = PACKAGES + (("transformers", "huggingface_hub") if model.spec.network == "transformers" else ())
    with TemporaryDirectory() as parts:
        model.save(Path(parts))
        mlflow.pyfunc.save_model(
            folder,
            python_model=SERVED,
            code_paths=[str(Path(csm.__file__).parent)],
            artifacts={name: str(Path(parts) / name) for name in ("model.json", "model.safetensors")},
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, *model.spec.shape))]),
                outputs=Schema([TensorSpec(np.dtype("float32"), (-1, len(model.spec.class_names)))]),
                params=ParamSchema([ParamSpec("batch_size", "long", 256)]),
            ),
            input_example=images.numpy(),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in packages],
            metadata={"csm": csm.__version__, "class_names": list(model.spec.class_names), **model.spec.origin},
        )
