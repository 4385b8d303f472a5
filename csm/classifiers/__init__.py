"""Networks by name: each is called as ``(channels, n_classes, **parameters)``."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from csm import storage
from csm.classifiers.classifier import Classifier, ClassifierSpec, in_batches, load_weights
from csm.classifiers.small_cnn import SmallCNN
from csm.errors import InputError

NETWORKS: dict[str, Callable[..., nn.Module]] = {"small-cnn": SmallCNN}


def build_classifier(spec: ClassifierSpec) -> Classifier:
    """Return a classifier with new weights, drawn from torch's global generator."""
    if spec.network not in NETWORKS:
        raise InputError(f"train.network: unknown {spec.network!r}; one of {', '.join(NETWORKS)}")
    return Classifier(NETWORKS[spec.network](spec.channels, len(spec.class_names), **spec.parameters), spec)


def load_classifier(directory: Path) -> Classifier:
    """Return the classifier that ``Classifier.save`` wrote to ``directory``, in evaluation mode."""
    spec = storage.read_record(directory / "model.json", ClassifierSpec)
    classifier = build_classifier(spec)
    load_weights(classifier, directory / "model.safetensors")
    return classifier.eval()


__all__ = ["NETWORKS", "Classifier", "ClassifierSpec", "build_classifier", "in_batches", "load_classifier"]
