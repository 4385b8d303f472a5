"""Networks by name: each is called as ``(channels, n_classes, **parameters)``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csm import storage
from csm.classifiers.classifier import Classifier, ClassifierSpec, in_batches, load_weights
from csm.classifiers.densenet import densenet121
from csm.classifiers.ensemble import NetworkEnsemble, mean_log_probs
from csm.classifiers.resnet import resnet18, resnet50, resnet101
from csm.classifiers.small_cnn import SmallCNN
from csm.classifiers.transformers import TransformersClassifier, check_transformers
from csm.classifiers.wide_resnet import wide_resnet_26_10, wide_resnet_28_10
from csm.errors import InputError

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": SmallCNN,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "wide-resnet-28-10": wide_resnet_28_10,
    "wide-resnet-26-10": wide_resnet_26_10,
    "densenet121": densenet121,
    "transformers": TransformersClassifier,
}


def build_classifier(spec: ClassifierSpec) -> Classifier:
    """Return a classifier with new weights, drawn from torch's global generator; that of an ensemble is made of as many networks."""
    if spec.network not in NETWORKS:
        raise InputError(f"train.network: unknown {spec.network!r}; one of {', '.join(NETWORKS)}")
    networks = [NETWORKS[spec.network](spec.channels, len(spec.class_names), **spec.parameters) for _ in range(spec.members)]
    network = networks[0]
    complete = network.complete(spec) if isinstance(network, TransformersClassifier) else spec
    return Classifier(network if spec.members == 1 else NetworkEnsemble(networks), complete)


def build_ensemble(members: Sequence[Classifier]) -> Classifier:
    """The deep ensemble of ``members``, which have one spec, in evaluation mode; its networks are theirs."""
    networks = [member.network for member in members]
    return Classifier(NetworkEnsemble(networks), replace(members[0].spec, members=len(networks))).eval()


def check_network(
    network: str, parameters: Mapping[str, Any], shape: tuple[int, int, int] | None = None, where: str = "train"
) -> None:
    """Look at what a configuration asks for, before hours of other work; no weights are made or read.

    Args:
        network: a key of ``NETWORKS``.
        parameters: its settings, of the right types.
        shape: (height, width, channels) of the images, if they are known.
        where: the section of the configuration, for the message.

    Raises:
        InputError: the network does not take such settings or such images, or the files that it is read from are not there.
    """
    height, width, channels = shape or (64, 64, 3)
    try:
        if network == "transformers":
            check_transformers(channels, **parameters)
        else:
            with torch.device("meta"):
                NETWORKS[network](channels, 2, **parameters).eval()(torch.empty(1, channels, height, width))
    except InputError as error:
        raise InputError(f"{where}.network {network}: {error}") from None


def load_classifier(directory: Path) -> Classifier:
    """Return the classifier that ``Classifier.save`` wrote to ``directory``, in evaluation mode."""
    spec = storage.read_record(directory / "model.json", ClassifierSpec)
    classifier = build_classifier(spec)
    load_weights(classifier, directory / "model.safetensors")
    return classifier.eval()


__all__ = [
    "NETWORKS",
    "Classifier",
    "ClassifierSpec",
    "build_classifier",
    "build_ensemble",
    "check_network",
    "in_batches",
    "load_classifier",
    "load_weights",
    "mean_log_probs",
]
