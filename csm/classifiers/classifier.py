"""A classifier that takes pixels: the network together with its normalisation, saved and loaded as one."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from csm import storage
from csm.errors import InputError


class Network(Protocol):
    """What a classifier needs of its network."""

    def features(self, x: torch.Tensor) -> torch.Tensor: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class ClassifierSpec:
    """Everything but the weights: enough to build the classifier again (``model.json``).

    ``members``: networks whose probabilities are averaged; what was saved before there were ensembles has one.
    """

    network: str
    parameters: dict[str, Any]
    channels: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    members: int = 1


class Classifier(nn.Module):
    """Logits and features of uint8 images.

    ``forward(images)`` gives logits float32 (N, K) and ``features(images)`` the penultimate layer (N, F), from images uint8 or float
    (N, C, H, W) in the range 0..255 (float images come from augmentation).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, spec: ClassifierSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1) * 255.0)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1) * 255.0)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        network: Network = self.network  # type: ignore[assignment]
        return network.features(self._normalise(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(self._normalise(images))
        return logits

    def save(self, directory: Path) -> None:
        """Write ``model.safetensors`` and ``model.json`` to ``directory``."""
        storage.write_tensors(directory / "model.safetensors", self.state_dict())
        storage.write_json(directory / "model.json", asdict(self.spec))

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] != self.spec.channels:
            raise ValueError(f"images must be (N, {self.spec.channels}, H, W), got {tuple(images.shape)}")
        return (images.float() - self.mean) / self.std


@torch.no_grad()
def in_batches(function: Any, images: torch.Tensor, batch_size: int = 512) -> torch.Tensor:
    """Concatenate ``function(batch)`` over ``images`` (N, ...) in batches; gradients off. The result has N rows, on the CPU."""
    return torch.cat([function(batch).cpu() for batch in images.split(batch_size)])


def load_weights(module: nn.Module, path: Path) -> None:
    """Load ``path`` strictly into ``module``; ``InputError`` if a tensor is missing, unexpected or of another shape."""
    try:
        module.load_state_dict(storage.read_tensors(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} holds the weights of another network: {reason}") from None
