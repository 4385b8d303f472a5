"""The methods of a comparison: what the configuration says of them, checked against the registries."""

from dataclasses import asdict, replace
from typing import Any

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from csm.classifiers import NETWORKS
from csm.errors import InputError
from csm.losses import HARD, SOFT, build_loss
from csm.methods import Method, MixedTerm
from csm.optimization import OptimizerConfig
from csm.parameters import STRICT, check_name, check_numbers, check_parameters
from csm.pixel_mixing import build_pixel_mixing
from csm.planning import REAL
from csm.schedules import OF_PAIRS, SCHEDULES, WITHOUT_PAIRS
from csm.tables import KINDS
from flows.annotators import AnnotateConfig, TeacherConfig, check_asked, check_folder_name
from flows.config_errors import explain


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Classifiers to train: every method of ``compare`` (empty: all of ``methods``) with seeds 0..seeds-1.

    Attributes:
        loss: train one method alone: the one of this name, or plain training with the loss of this name.
        workers: that train each classifier together, sharing its batches; with one, each trains classifiers of its own.
    """

    methods: dict[str, Method]
    compare: tuple[str, ...] = ()
    loss: str | None = None
    workers: int = Field(default=1, ge=1)
    seeds: int = Field(default=3, ge=1, le=1000)  # from 1000 on they are the teacher's, see flows/fit_teacher.py
    network: str = "small-cnn"
    parameters: dict[str, Any] = Field(default_factory=dict)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)

    @property
    def chosen(self) -> dict[str, Method]:
        if self.loss is not None:
            return {self.loss: self.methods.get(self.loss, Method(description=f"Loss {self.loss}", loss=self.loss))}
        return {name: self.methods[name] for name in self.compare or self.methods}

    def optimizer_of(self, method: Method) -> OptimizerConfig:
        """How ``method`` is trained: as all are, but for what it says itself."""
        return OptimizerConfig(**{**asdict(self.optimizer), **method.optimizer}) if method.optimizer else self.optimizer


def teacher_training(train: TrainConfig, annotate: AnnotateConfig) -> TrainConfig:
    """``train`` as the teacher's classifiers are trained."""
    teacher = annotate.teacher
    network = teacher.network or train.network
    own = train.parameters if network == train.network else {}
    parameters = own if teacher.parameters is None else teacher.parameters
    return replace(train, network=network, parameters=parameters, optimizer=teacher.optimizer or train.optimizer)


def check_teacher(train: TrainConfig, annotate: AnnotateConfig) -> AnnotateConfig:
    """``annotate`` with the teacher's parameters in their types; ``InputError`` names the key that cannot be used.

    Of a teacher of finished classifiers nothing else is kept: a configuration that says how to train one need not be changed for it.
    """
    if annotate.teacher.models:
        return replace(annotate, teacher=TeacherConfig(models=annotate.teacher.models))
    training = teacher_training(train, annotate)
    parameters = _check_network(training, "annotate.teacher")
    if annotate.teacher.optimizer:
        _check_optimizer(training, "annotate.teacher.optimizer")
    return (
        annotate
        if annotate.teacher.parameters is None
        else replace(annotate, teacher=replace(annotate.teacher, parameters=parameters))
    )


def check_train(train: TrainConfig, annotate: AnnotateConfig) -> TrainConfig:
    """``train`` with the network's parameters in their types; ``InputError`` names the key that is unknown or does not fit the others."""
    parameters = _check_network(train, "train")
    for name in train.compare:
        check_name("train.compare", name, train.methods)
    if train.loss is not None:
        check_name("train.loss", train.loss, {**train.methods, **HARD})
    twice = [name for name in train.compare if train.compare.count(name) > 1]
    if twice:
        raise InputError(f"train.compare: {twice[0]!r} is named more than once")
    _check_optimizer(train, "train.optimizer")
    for name, method in (train.methods | train.chosen).items():
        _check_method(train, name, method, annotate)
    _check_epochs(train)
    return replace(train, parameters=parameters)


def _check_network(train: TrainConfig, where: str) -> dict[str, Any]:
    """The network's parameters in their types."""
    check_name(f"{where}.network", train.network, NETWORKS)
    network = NETWORKS[train.network]
    return check_parameters(network, train.parameters, f"{where}.parameters", reserved=("channels", "n_classes"))


def _check_optimizer(train: TrainConfig, where: str) -> None:
    """Settings that do not fit together."""
    optimizer, epochs = train.optimizer, train.optimizer.epochs
    if optimizer.schedule == "multi-step":
        if not optimizer.milestones:
            raise InputError(f"{where}.milestones: missing; schedule multi-step needs the epochs after which the rate falls")
        if list(optimizer.milestones) != sorted({*optimizer.milestones}) or not 0 < optimizer.milestones[-1] < epochs:
            raise InputError(
                f"{where}.milestones: expected rising epochs below the {epochs} of {where}.epochs, got {list(optimizer.milestones)}"
            )
    if optimizer.warmup >= epochs:
        raise InputError(f"{where}.warmup: expected fewer than the {epochs} epochs of the training, got {optimizer.warmup}")
    if optimizer.batch_size % train.workers:
        raise InputError(
            f"train.workers: {train.workers} workers cannot share batches of {optimizer.batch_size} images evenly; "
            f"change it or {where}.batch_size"
        )


def _check_epochs(train: TrainConfig) -> None:
    """Epochs at which mixed images start or end, against those of the training."""
    for name, method in train.chosen.items():
        term, epochs = method.mixed, train.optimizer_of(method).epochs
        if term is None:
            continue
        if term.warm_start >= epochs:
            raise InputError(
                f"train.methods.{name}.mixed.warm_start: expected fewer than the {epochs} epochs of the training, got {term.warm_start}"
            )
        if term.off_after is not None and 0 < term.off_after <= term.warm_start:
            raise InputError(
                f"train.methods.{name}.mixed.off_after: expected more than the {term.warm_start} epochs of warm_start, "
                f"got {term.off_after}"
            )


def _check_method(train: TrainConfig, name: str, method: Method, annotate: AnnotateConfig) -> None:
    where = f"train.methods.{name}"
    check_folder_name(where, name)  # of its classifiers
    build_loss(HARD, method.loss, dict(method.parameters), where + (".parameters" if method.loss in HARD else ".loss"))
    if method.optimizer:
        try:
            own = train.optimizer_of(method)
        except ValidationError as error:
            raise InputError(explain(error.errors(), OptimizerConfig, f"{where}.optimizer")) from None
        check_numbers(method.optimizer, own, f"{where}.optimizer")
        if name in train.chosen:
            _check_optimizer(replace(train, optimizer=own), f"{where}.optimizer")
    if method.mixing:
        build_pixel_mixing(method.mixing.kind, method.mixing.parameters, f"{where}.mixing")
    if method.mixed:
        _check_mixed(method.mixed, f"{where}.mixed")
        if name in train.chosen and method.mixed.annotator is not None:
            check_asked(annotate, f"{where}.mixed.annotator", method.mixed.annotator)


def _check_mixed(term: MixedTerm, where: str) -> None:
    check_name(f"{where}.loss", term.loss, SOFT)
    check_name(f"{where}.schedule", term.schedule, SCHEDULES)
    for kind in term.kinds:
        check_name(f"{where}.images", kind, KINDS)
    if not term.kinds or len(set(term.kinds)) < len(term.kinds):
        raise InputError(f"{where}.images: expected different kinds of images, at least one, got {list(term.kinds)}")
    if REAL in term.kinds and len(term.kinds) > 1:
        raise InputError(f"{where}.images: real images have no ratios, so no other kind can be drawn with them; leave real out")
    alone = next((kind for kind in term.kinds if kind in WITHOUT_PAIRS), None)
    if alone and term.schedule in OF_PAIRS:
        raise InputError(
            f"{where}.schedule: {alone} images are no mixtures of pairs: take "
            f"{' or '.join(name for name in SCHEDULES if name not in OF_PAIRS)}, not {term.schedule}"
        )
