"""Trainings of three classes that take a moment: their methods, settings and first weights."""

from collections.abc import Callable

import torch

from csm.classifiers import Classifier, ClassifierSpec, build_classifier
from csm.methods import Method, MixedTerm, PixelTerm
from csm.optimization import OptimizerConfig

Split = tuple[torch.Tensor, torch.Tensor]
Separable = Callable[..., Split]

RATIOS = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0])
OPTIMIZER = OptimizerConfig(epochs=4, batch_size=8, learning_rate=0.05, shift=1)
MIXED_TERM = MixedTerm(annotator="teacher", loss="kl", weight=2.0)
METHODS = {
    "ce": Method(),
    "mixup": Method(mixing=PixelTerm("mixup", {"alpha": 0.4})),
    "csm": Method(mixed=MIXED_TERM),
    "csm with focal and mixup": Method(
        loss="focal",
        parameters={"gamma": 2.0},
        mixing=PixelTerm("mixup"),
        mixed=MixedTerm("teacher", schedule="uniform", per_real=1),
    ),
}


def classifier(seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_classifier(ClassifierSpec("small-cnn", {"width": 4}, 1, ("a", "b", "c"), (0.4,), (0.25,)))


def weights(model: Classifier) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
