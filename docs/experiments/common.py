"""What the experiments share: a finished workspace, labels of its annotators for any images, and a row for what was trained on them."""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import polars as pl
import torch
import torch.nn.functional as F

from csm import tables
from csm.classifiers import Classifier, ClassifierSpec, build_classifier, mean_log_probs
from csm.datasets import RealDataset
from csm.methods import Method, MixedTerm
from csm.metrics import evaluate
from csm.optimization import OptimizerConfig
from csm.planning import SEMANTIC
from csm.reannotation import Annotator, annotate, apply_calibration, fit_calibration, soft_labels
from csm.runs import MixedSource, read_mixed
from csm.schedules import MixedSet
from csm.training import fit, predict
from flows.artifacts import Workspace
from flows.config import load_config
from flows.features import encoder_spec
from flows.fit_annotators import annotator_spec, calibration_of, resolve
from flows.methods import teacher_training

METRICS = {"accuracy": "accuracy %", "nll": "NLL x100", "brier": "Brier x100"}
SEED = 3000  # the classifiers of the first row; those of the product's own comparisons have 0, 1, ...


class Experiment:
    """A workspace in which ``csm run`` came to its end.

    Attributes:
        train, val, test: images uint8 (N, C, H, W) and labels int64 (N,).
        annotator: name of the one whose labels the method `csm` trains on, as it was chosen.
    """

    def __init__(self, description: str) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("workspace", type=Path, help="in which `csm run` came to its end")
        parser.add_argument("--seeds", type=int, default=3, help="classifiers for each row (default: 3)")
        parser.add_argument("--epochs", type=int, help="of every classifier (default: as configured)")
        arguments = parser.parse_args()
        self.seeds, self.epochs, root = arguments.seeds, arguments.epochs, arguments.workspace
        self.workspace, self.config = Workspace(root), load_config(str(root / "config.yaml"))
        self.annotator = resolve(self.workspace, self.config.annotator_of(self.config.train.methods["csm"]))
        self.data = RealDataset.load(root)
        self.train, self.val, self.test = (self.data.split(split) for split in tables.SPLITS)
        self.n_classes, self.shape = self.data.info.n_classes, self.data.info.shape

    def mixed(self) -> MixedSet:
        """The semantic mixtures of the workspace, with the labels of ``annotator``."""
        place = self.workspace
        calibration = place.annotator(self.annotator) / "calibration.json"
        source = MixedSource(place.plan, place.mixed, place.annotations(self.annotator), calibration)
        return read_mixed(source, SEMANTIC, self.shape, self.n_classes)

    def labels(self, images: torch.Tensor) -> torch.Tensor:
        """What ``annotator`` says of ``images`` uint8 (N, C, H, W), calibrated: (N, K)."""
        spec = annotator_spec(self.workspace, self.config, self.annotator)
        encoders = {name: encoder_spec(self.workspace, self.config, name).load() for name in spec.encoders}
        ids = [str(number) for number in range(len(images))]
        # A pair has to stand there; it has no part in a label over all classes.
        plan = pl.DataFrame({"mix_id": ids, "class_a": [0] * len(ids), "class_b": [1] * len(ids), "lam": [0.5] * len(ids)})
        mixed = pl.DataFrame({"mix_id": ids}).with_columns(tables.from_images(images))
        said = annotate(plan, mixed, {"": Annotator(spec)}, encoders, self.shape, self.n_classes)[""]
        labels = soft_labels(plan, said, self.n_classes, calibration_of(self.workspace, self.annotator))
        return torch.from_numpy(labels["soft_label"].to_numpy().copy())

    def teacher(self, kept: torch.Tensor, seed: int) -> Classifier:
        """A classifier trained like the workspace's teacher, on the training images ``kept`` (Boolean (N,)) alone."""
        training = teacher_training(self.config.train, self.config.annotate)
        images, labels = self.train
        classifier = self._new(training.network, training.parameters, seed)
        return fit(classifier, (images[kept], labels[kept]), self.val, Method(), self._optimizer(training.optimizer), seed)

    def calibrated(self, members: list[Classifier], images: torch.Tensor) -> torch.Tensor:
        """Mean probabilities of ``members`` for ``images``, at the temperature that the validation images ask for: (N, K)."""
        on_val, on_images = (_said(members, part) for part in (self.val[0], images))
        calibration = fit_calibration("temperature", on_val, None, self.val[1])
        return apply_calibration(on_images, calibration).exp().float()

    def row(self, name: str, images: torch.Tensor, labels: torch.Tensor, weight: float = 16.0) -> None:
        """Print how good classifiers are that were trained like `csm`, on ``images`` and soft ``labels`` (N, K), drawn alike."""
        number, every = len(images), torch.zeros(len(images), dtype=torch.int64)
        drawn = MixedSet(images, labels, torch.arange(number)[:, None], every, every, torch.tensor([math.nan]))
        method = Method(mixed=MixedTerm(loss="kl", weight=weight, schedule="uniform"))
        train = self.config.train
        cells = []
        for seed in range(SEED, SEED + self.seeds):
            classifier = self._new(train.network, train.parameters, seed)
            fit(classifier, self.train, self.val, method, self._optimizer(train.optimizer), seed, mixed=drawn)
            cells.append([[evaluate(predict(classifier, x), y)[metric] for metric in METRICS] for x, y in (self.val, self.test)])
        figures = (100 * torch.tensor(cells)).flatten(1)  # (seeds, splits x metrics)
        written = [f"{value:.1f}" for value in figures.mean(dim=0).tolist()]
        if self.seeds > 1:
            written = [f"{value} ± {sd:.1f}" for value, sd in zip(written, figures.std(dim=0).tolist(), strict=True)]
        print("|", " | ".join([name, f"{number:,}", *written]), "|", flush=True)

    def head(self) -> None:
        """The table's head; standard deviations are over seeds."""
        names = [f"{split}: {name}" for split in ("validation", "test") for name in METRICS.values()]
        print("|", " | ".join(["trained on", "images", *names]), "|")
        print("|" + "---|" * (len(names) + 2))

    def _new(self, network: str, parameters: dict[str, object], seed: int) -> Classifier:
        info = self.data.info
        torch.manual_seed(seed)
        return build_classifier(ClassifierSpec(network, parameters, self.shape[2], info.class_names, info.mean, info.std))

    def _optimizer(self, optimizer: OptimizerConfig) -> OptimizerConfig:
        return replace(optimizer, epochs=self.epochs) if self.epochs else optimizer


def one_hot(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Labels int64 (N,) as float32 (N, K)."""
    return F.one_hot(labels, n_classes).float()


def _said(members: list[Classifier], images: torch.Tensor) -> torch.Tensor:
    return mean_log_probs(torch.stack([predict(member, images) for member in members]))
