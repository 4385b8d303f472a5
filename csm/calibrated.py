"""The finished model: a classifier together with what calibrates it, from uint8 images to calibrated probabilities.

It is a folder of safetensors and JSON: ``model.safetensors`` holds the weights, ``model.json`` all the rest.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from csm import storage
from csm.classifiers import Classifier, ClassifierSpec, build_classifier, load_weights
from csm.errors import InputError
from csm.posthoc import Posthoc, apply_posthoc
from csm.world import CPU, to_device


@dataclass(frozen=True)
class CalibratedSpec(ClassifierSpec):
    """Everything but the weights (``model.json``).

    Attributes:
        shape: (height, width, channels) of the images.
        posthoc: fitted on validation logits.
        origin: where it comes from, for people and tools: run, method, seed, data set and its digest, validation metrics.
    """

    shape: tuple[int, int, int] = (0, 0, 0)
    posthoc: Posthoc = field(default_factory=lambda: Posthoc("none", {}))
    origin: dict[str, Any] = field(default_factory=dict)


class CalibratedClassifier(nn.Module):
    """Calibrated probabilities of images as they come from a file.

    ``forward(images)`` takes uint8 (N, H, W, C) in 0..255 and gives float32 (N, K), rows that sum to 1.
    """

    def __init__(self, classifier: Classifier, spec: CalibratedSpec) -> None:
        super().__init__()
        self.classifier = classifier
        self.spec = spec

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(images.permute(0, 3, 1, 2))
        return apply_posthoc(logits, self.spec.posthoc).exp().float()

    @torch.no_grad()
    def predict(
        self, images: torch.Tensor | NDArray[np.uint8], batch_size: int = 512, device: torch.device = CPU
    ) -> torch.Tensor:
        """Probabilities float32 (N, K) on the CPU of images uint8 (N, H, W, C), in batches; float64 would keep nothing more.

        Raises:
            InputError: the images are not of the model's shape, or not uint8.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != self.spec.shape:
            height, width, channels = self.spec.shape
            raise InputError(
                f"images: expected uint8 (N, {height}, {width}, {channels}), got {str(images.dtype).removeprefix('torch.')} "
                f"{tuple(images.shape)}"
            )
        self.eval().to(device)
        parts = [self(to_device(batch, device)).cpu() for batch in images.split(batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.spec.class_names))

    def save(self, directory: Path) -> None:
        """Write ``model.safetensors`` and, last, ``model.json`` to ``directory``."""
        storage.write_tensors(directory / "model.safetensors", self.classifier.state_dict())
        storage.write_json(directory / "model.json", asdict(self.spec))


def calibrated(
    classifier: Classifier, shape: tuple[int, int, int], posthoc: Posthoc, origin: Mapping[str, Any]
) -> CalibratedClassifier:
    """``classifier`` with what calibrates it; ``shape`` is (height, width, channels)."""
    spec = CalibratedSpec(**{**vars(classifier.spec), "shape": shape, "posthoc": posthoc, "origin": dict(origin)})
    return CalibratedClassifier(classifier, spec).eval()


def load_calibrated(directory: Path) -> CalibratedClassifier:
    """What ``CalibratedClassifier.save`` wrote to ``directory``, in evaluation mode; nothing is unpickled.

    Raises:
        InputError: a file is missing, damaged, or that of a classifier without calibration.
    """
    spec = storage.read_record(directory / "model.json", CalibratedSpec)
    if spec.shape[0] == 0:
        raise InputError(
            f"{directory}: a classifier as it was trained, which nothing calibrates; give the folder `model` of a workspace"
        )
    classifier = build_classifier(spec)
    load_weights(classifier, directory / "model.safetensors")
    return CalibratedClassifier(classifier, spec).eval()
