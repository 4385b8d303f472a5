"""The section `annotate` of a configuration: annotators and encoders by name, and which of them a run needs."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from csm.encoders import ENCODERS
from csm.errors import InputError
from csm.optimization import OptimizerConfig
from csm.parameters import STRICT, check_name, check_parameters
from csm.reannotation import CALIBRATORS, HEADS, POOLS, fit_ensemble
from flows.folders import folder_files

AUTO, ENSEMBLE = "auto", "ensemble"
RESERVED = (AUTO, "none", "mixed", "members", "encoders")  # they mean something else, some of them as folders


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """A key of ``ENCODERS`` and its settings."""

    kind: str
    parameters: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class AnnotatorConfig:
    """What annotates: a head on an encoder's features, or an ensemble, and how its labels are calibrated.

    Attributes:
        head: a key of ``HEADS``, ``parameters`` its settings; or "ensemble", whose one setting is ``pool``, a key of ``POOLS``.
        encoder: name in ``annotate.encoders``; none for a head that reads no features, and for ensembles.
        calibrator: a key of ``CALIBRATORS``; the default is temperature, or scale for a head that knows only the pair, or none for one
            that reads no features.
        scale: s of calibrator scale; none: fitted.
        pair: labels are restricted to the two classes of the mixture.
        members: annotators of an ensemble.
        description: one line for people.
    """

    head: str
    encoder: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    calibrator: str | None = None
    scale: float | None = Field(default=None, gt=0)
    pair: bool = False
    members: tuple[str, ...] = ()
    description: str = ""

    @property
    def knows_pair(self) -> bool:
        """Its labels give nothing outside the pair."""
        return self.pair or self.pair_head

    @property
    def pair_head(self) -> bool:
        return self.head in HEADS and HEADS[self.head].pair


@dataclass(frozen=True, config=STRICT)
class TeacherConfig:
    """How the teacher's classifiers are trained, where that is not as ``train`` says: labels then stay while ``train`` changes.

    Attributes:
        network: a key of ``NETWORKS``; None: that of ``train``.
        parameters: of the network; None: those of ``train``, or none for another network.
        optimizer: the whole section; None: that of ``train``.
        models: folders of finished classifiers, or globs of such folders, which are the members in place of ones that are trained here;
            the other settings then mean nothing.
    """

    network: str | None = None
    parameters: dict[str, Any] | None = None
    optimizer: OptimizerConfig | None = None
    models: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class AnnotateConfig:
    """Who says how confident a label is.

    Attributes:
        annotator: of methods that name none (``mixed.annotator``); "auto": the one of ``candidates`` with the least cross-fitted NLL on
            real validation images.
        annotators, encoders: by name.
        candidates: of "auto".
        members: number of classifiers that are trained for the teacher; the first is also the encoder ``classifier``.
        teacher: how they are trained.
        top: of each mixed image only so many of its most probable classes are stored; none: all of up to 100 classes, an eighth of more.
    """

    annotators: dict[str, AnnotatorConfig]
    encoders: dict[str, EncoderConfig]
    annotator: str = "teacher"
    candidates: tuple[str, ...] = ()
    members: int = Field(default=4, ge=1)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    top: int | None = Field(default=None, ge=1)

    def to_fit(self, names: Iterable[str]) -> tuple[str, ...]:
        """Annotators to fit for ``names``: the candidates in place of "auto", and members of ensembles, each before who needs it."""
        fitted: dict[str, None] = {}
        for name in names:
            needed = self.candidates if name == AUTO else self.annotators[name].members
            fitted |= dict.fromkeys(self.to_fit(needed))
            fitted |= {name: None} if name != AUTO else {}
        return tuple(fitted)

    def encoders_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """Encoders of ``names`` and their members."""
        encoders = (self.annotators[name].encoder for name in self.to_fit(names))
        return tuple(dict.fromkeys(encoder for encoder in encoders if encoder))

    def needs(self, names: Iterable[str]) -> frozenset[str]:
        """Fields of ``Sources`` that the encoders of ``names`` read."""
        return frozenset(need for encoder in self.encoders_of(names) for need in ENCODERS[self.encoders[encoder].kind].needs)


def check_annotators(config: AnnotateConfig) -> AnnotateConfig:
    """``config`` with parameters of the right types and calibrators filled in; ``InputError`` names the key that cannot be used."""
    encoders = {name: _check_encoder(f"annotate.encoders.{name}", name, encoder) for name, encoder in config.encoders.items()}
    annotators = {
        name: _check_annotator(f"annotate.annotators.{name}", name, annotator, config)
        for name, annotator in config.annotators.items()
    }
    for name in annotators:
        _check_cycle(config, name, ())
    return replace(config, encoders=encoders, annotators=annotators)


def check_asked(config: AnnotateConfig, where: str, name: str) -> None:
    """``InputError`` unless the annotator ``name``, which stands at ``where``, can be fitted: "auto" from its candidates."""
    check_name(where, name, (AUTO, *config.annotators))
    if name == AUTO and not config.candidates:
        raise InputError(f"annotate.candidates: empty; name annotators for {where}: auto to choose from")
    twice = [candidate for candidate in config.candidates if config.candidates.count(candidate) > 1]
    if twice:
        raise InputError(f"annotate.candidates: {twice[0]!r} is named more than once")
    for candidate in config.candidates if name == AUTO else ():
        check_name("annotate.candidates", candidate, config.annotators)
        if config.annotators[candidate].knows_pair:
            raise InputError(
                f"annotate.candidates: {candidate} knows only the pair, so it has no NLL over all classes to be chosen by; "
                "leave it out, or set annotate.annotator to it"
            )
    for fitted in config.to_fit([name]):
        for member in config.annotators[fitted].members:
            if config.annotators[member].knows_pair:
                raise InputError(
                    f"annotate.annotators.{fitted}.members: {member} gives nothing outside the pair and cannot be pooled; leave it out"
                )


def encoder_files(encoder: EncoderConfig) -> list[tuple[str, str, int]]:
    """``folder_files`` of its settings."""
    return folder_files(encoder.parameters)


def check_folder_name(where: str, name: str) -> None:
    """``InputError`` unless ``name``, given at the dotted key ``where``, may name a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"{where}: {name!r} cannot name a folder; use letters, digits, '.', '_' and '-'")


def _check_encoder(where: str, name: str, encoder: EncoderConfig) -> EncoderConfig:
    check_folder_name(where, name)
    check_name(f"{where}.kind", encoder.kind, ENCODERS)
    parameters = check_parameters(ENCODERS[encoder.kind].load, encoder.parameters, f"{where}.parameters")
    return replace(encoder, parameters=parameters)


def _check_annotator(where: str, name: str, annotator: AnnotatorConfig, config: AnnotateConfig) -> AnnotatorConfig:
    check_folder_name(where, name)
    if name in RESERVED:
        raise InputError(f"{where}: the name {name} is taken; choose another one")
    check_name(f"{where}.head", annotator.head, (*HEADS, ENSEMBLE))
    if annotator.head == ENSEMBLE:
        parameters = check_parameters(fit_ensemble, annotator.parameters, f"{where}.parameters")
        if "pool" in parameters:
            check_name(f"{where}.parameters.pool", parameters["pool"], POOLS)
        _check_members(where, annotator, config)
    else:
        parameters = check_parameters(HEADS[annotator.head].fit, annotator.parameters, f"{where}.parameters")
        if annotator.members:
            raise InputError(f"{where}.members: only an ensemble has members, not head {annotator.head}")
        if HEADS[annotator.head].encoder:
            check_name(f"{where}.encoder", annotator.encoder or "", config.encoders)
            kind, suited = config.encoders[annotator.encoder or ""].kind, HEADS[annotator.head].encoders
            if suited and kind not in suited:
                raise InputError(
                    f"{where}.encoder: head {annotator.head} needs an encoder of kind {' or '.join(suited)}, not {kind}"
                )
        elif annotator.encoder:
            raise InputError(f"{where}.encoder: head {annotator.head} reads no features; leave it out")
    if annotator.pair and annotator.pair_head:
        raise InputError(f"{where}.pair: head {annotator.head} knows only the pair as it is; leave it out")
    allowed = _calibrators(annotator)
    calibrator = annotator.calibrator or allowed[0]
    if calibrator not in allowed:
        raise InputError(f"{where}.calibrator: expected {' or '.join(allowed)} for head {annotator.head}, got {calibrator!r}")
    if annotator.scale is not None and calibrator != "scale":
        raise InputError(f"{where}.scale: goes with calibrator scale, not {calibrator}; leave it out")
    return replace(annotator, parameters=parameters, calibrator=calibrator)


def _calibrators(annotator: AnnotatorConfig) -> list[str]:
    """Names of the calibrators that the annotator may have, the default first."""
    if not annotator.pair_head:
        default, names = "temperature", [name for name, kind in CALIBRATORS.items() if kind.fit_posterior]
    elif HEADS[annotator.head].encoder:
        default, names = "scale", [name for name, kind in CALIBRATORS.items() if kind.fit_share]
    else:
        default, names = "none", ["none"]
    return sorted(names, key=lambda name: name != default)


def _check_members(where: str, annotator: AnnotatorConfig, config: AnnotateConfig) -> None:
    if annotator.encoder:
        raise InputError(f"{where}.encoder: an ensemble has none of its own, only its members do; leave it out")
    if len(set(annotator.members)) < max(2, len(annotator.members)):
        raise InputError(f"{where}.members: expected at least two different annotators, got {list(annotator.members)}")
    for member in annotator.members:
        check_name(f"{where}.members", member, config.annotators)


def _check_cycle(config: AnnotateConfig, name: str, above: tuple[str, ...]) -> None:
    if name in above:
        raise InputError(f"annotate.annotators.{name}.members: goes round in a circle ({' -> '.join((*above, name))})")
    for member in config.annotators[name].members:
        _check_cycle(config, member, (*above, name))
