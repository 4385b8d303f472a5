"""export of the finished model: ONNX, safetensors and JSON, or an MLflow model, for other programs to run."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from csm import __version__, storage
from csm.calibrated import CalibratedClassifier
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.export_card import CARD
from csm.onnx_export import export_onnx
from flows.artifacts import Workspace, differences, is_url
from flows.config import plain
from flows.mlflow_model import save_mlflow
from flows.model import real_images
from flows.models import open_model
from flows.progress import say

REAL_IMAGES = 64  # on which an ONNX model is checked, where the workspace has them


def export_model(
    root: Path, model: str | None, format_name: str, output: Path, tracking_uri: str | None = None
) -> dict[str, Any]:
    """Write a finished model to the folder ``output`` and return what ``--json`` prints.

    Args:
        root: the workspace, of which real images are taken.
        model: see ``open_model``; None: that of the workspace.
        format_name: of ``MODEL_FORMATS``.
        output: new or empty, or what an export of the same model left there.
        tracking_uri: see ``open_model``.

    Raises:
        InputError: there is no such model, it cannot be had in this format, or ``output`` holds something else.
    """
    name = str(root) if model is None else model
    if is_url(output):
        raise InputError(f"--output {output}: URLs are not supported yet; give a folder")
    opened = open_model(name, tracking_uri)
    card = {"csm": __version__, "format": format_name, "model": plain(asdict(opened.spec))}
    result = {"output": str(output), "format": format_name, "model": name, "run": opened.spec.origin.get("run")}
    if _holds(output, card):
        say("export: reused")
        return {**result, "reused": True}
    unfinished = output.with_name(f".{output.name}.csm-export")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    try:
        more = MODEL_FORMATS[format_name](opened, unfinished, _real_images(Workspace(root), opened.spec.shape))
        storage.write_json(unfinished / CARD, card)
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished.replace(output)  # an empty folder may be there
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    say("export: done")
    return {**result, "reused": False, **more}


def _holds(output: Path, card: dict[str, Any]) -> bool:
    """Whether ``output`` is an export with this card; ``InputError`` if it is anything else but an empty folder."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; choose a new or empty folder")
    if not output.is_dir() or not any(output.iterdir()):
        return False
    found = storage.read_json(output / CARD) if (output / CARD).is_file() else None
    if found == card:
        return True
    changed = "; ".join(differences(found, card)[:4]) if isinstance(found, dict) else "files of something else"
    raise InputError(f"--output {output}: is not empty ({changed}); choose a new or empty folder")


def _real_images(workspace: Workspace, shape: tuple[int, int, int]) -> torch.Tensor:
    """Some of the workspace's images uint8 (N, H, W, C), if they have this shape."""
    if not workspace.real.is_file() or RealDataset.load_info(workspace.root).shape != shape:
        return torch.empty(0, *shape, dtype=torch.uint8)
    return real_images(workspace, shape, REAL_IMAGES)


def _onnx(model: CalibratedClassifier, folder: Path, images: torch.Tensor) -> dict[str, Any]:
    """``model.onnx``, and what it is in ``model.json``."""
    difference = export_onnx(model, folder / "model.onnx", images)
    storage.write_json(folder / "model.json", asdict(model.spec))
    return {"difference": difference}


def _safetensors(model: CalibratedClassifier, folder: Path, images: torch.Tensor) -> dict[str, Any]:
    model.save(folder)
    return {}


def _mlflow(model: CalibratedClassifier, folder: Path, images: torch.Tensor) -> dict[str, Any]:
    save_mlflow(model, folder, images[:2] if len(images) else torch.zeros(1, *model.spec.shape, dtype=torch.uint8))
    return {}


MODEL_FORMATS: dict[str, Callable[[CalibratedClassifier, Path, torch.Tensor], dict[str, Any]]] = {
    "onnx": _onnx,
    "safetensors": _safetensors,
    "mlflow": _mlflow,
}
