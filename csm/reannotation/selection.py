"""Settings that a head chooses by itself, on the held-out images."""

import torch

from csm.encoders import FeatureTable
from csm.errors import InputError
from csm.metrics import evaluate
from csm.posthoc import fit_temperature
from csm.reannotation.heads import PosteriorHead
from csm.reannotation.moments import finite


@torch.no_grad()
def held_out_nll(head: PosteriorHead, features: FeatureTable, where: str) -> float:
    """NLL in nats of the held-out images at the temperature of least NLL: what calibration leaves of it.

    Raises:
        InputError: there is no held-out image, or a feature is not finite; ``where`` begins the message.
    """
    said = [(head(x), labels) for x, labels in finite(features.batches("val"), where)]
    if not sum(len(labels) for _, labels in said):
        raise InputError(f"{where}: there is no validation image to choose its settings by: set them, or change data.val")
    log_posterior, labels = (torch.cat(values) for values in zip(*said, strict=True))
    return evaluate(log_posterior, labels, fit_temperature(log_posterior, labels, quiet=True), metrics=["nll"])["nll"]
