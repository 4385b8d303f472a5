"""fit-annotators: fit heads and calibrators on the features of the real images, and choose among the annotators if asked to."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from csm import storage
from csm.datasets import RealDataset
from csm.encoders import FeatureTable
from csm.errors import InputError
from csm.reannotation import (
    HEADS,
    Annotator,
    AnnotatorSpec,
    Calibration,
    FitInputs,
    choose,
    ensemble_members,
    fit_calibration,
    fit_ensemble,
    fit_ensemble_calibration,
    held_out_shares,
)
from flows.annotators import AUTO, ENSEMBLE, encoder_files
from flows.artifacts import StageRecord, Workspace
from flows.calibration_lines import report
from flows.config import Config
from flows.features import NEEDS, check_encoders, encode, encoder_key, recorded_fingerprint
from flows.progress import say
from flows.stages import Context, Made, Stage


@dataclass(frozen=True)
class Choice:
    """What "auto" came to (``annotators/auto.json``).

    Attributes:
        chosen: name of the annotator, ``reason`` why.
        candidates: cross-fitted NLL on real validation images of each candidate, in nats, or why it was left out.
    """

    chosen: str
    reason: str
    candidates: dict[str, float | str]


def annotators(workspace: Workspace, config: Config) -> tuple[str, ...]:
    """Names of the annotators that are run; the one that was chosen stands for "auto", nothing before one was."""
    names = [resolve(workspace, name) for name in config.annotators if name != AUTO or workspace.choice.is_file()]
    return tuple(dict.fromkeys(name for name in names if name in config.annotate.annotators))  # one chosen once may be gone


def resolve(workspace: Workspace, name: str) -> str:
    """``name``, or that of the annotator which was chosen if it is "auto"."""
    return storage.read_record(workspace.choice, Choice).chosen if name == AUTO else name


def annotator_spec(workspace: Workspace, config: Config, name: str) -> AnnotatorSpec:
    """Where the fitted annotator ``name`` lies."""
    annotator = config.annotate.annotators[name]
    parts = tuple(annotator_spec(workspace, config, member) for member in pool_members(workspace, config, name))
    return AnnotatorSpec(name, annotator.head, workspace.annotator(name).absolute(), annotator.encoder, parts)


def pool_members(workspace: Workspace, config: Config, name: str) -> tuple[str, ...]:
    """Members of the ensemble ``name``, of a fitted one those that are in its pool: what was left out is not; () for other heads."""
    members = config.annotate.annotators[name].members
    pooled = members and (workspace.annotator(name) / "members.json").is_file() and ensemble_members(workspace.annotator(name))
    return tuple(member for member in members if member in pooled) if pooled else members


def fit_fingerprint(workspace: Workspace, name: str) -> str:
    """Identifies everything that the fitted annotator ``name`` depends on; "" if it is not fitted."""
    return recorded_fingerprint(workspace.annotator(name) / "annotator.json")


def calibration_of(workspace: Workspace, name: str) -> Calibration:
    """How the labels of the annotator ``name`` are calibrated."""
    return storage.read_record(workspace.annotator(name) / "calibration.json", Calibration)


def _run(context: Context, record: StageRecord) -> Made:
    workspace, config = context.workspace, context.config
    names = config.annotate.to_fit(config.annotators)
    required = config.annotate.to_fit(name for name in config.annotators if name != AUTO)
    failed = encode(context, record, names, required)
    calibrations: dict[str, Calibration] = {}
    left_out: dict[str, str] = {}
    for name in names:
        annotator = config.annotate.annotators[name]
        try:
            if annotator.encoder in failed:
                raise InputError(failed[annotator.encoder])
            calibrations[name] = _fit(context, record, name, _remaining(name, annotator.members, left_out), calibrations)
        except InputError as error:
            if name in required:
                raise InputError(f"annotate.annotators.{name}: {error}") from None
            left_out[name] = str(error)
            say(f"  {name}: left out: {error}")
        else:
            report(context, record, name, calibrations[name])
    if AUTO in config.annotators:
        _choose(context, record, calibrations, left_out)
    made = {name: [fit_fingerprint(workspace, name), asdict(calibrations[name])] for name in annotators(workspace, config)}
    return Made(len(calibrations), storage.digest(made))


def _remaining(name: str, members: Sequence[str], left_out: Collection[str]) -> tuple[str, ...]:
    """The members of the ensemble ``name`` that can be had; ``InputError`` if that is no pool any more."""
    lacking = [member for member in members if member in left_out]
    remaining = tuple(member for member in members if member not in left_out)
    if lacking and len(remaining) < 2:
        raise InputError(f"its member {lacking[0]} was left out" if len(lacking) == 1 else f"{', '.join(lacking)} were left out")
    if lacking:
        say(f"  {name}: pools {', '.join(remaining)} alone, without {', '.join(lacking)}")
    return remaining


def _fit(
    context: Context, record: StageRecord, name: str, members: Sequence[str], calibrations: Mapping[str, Calibration]
) -> Calibration:
    """Fit the annotator ``name`` and its calibrator, if they are not yet; ``calibrations`` has those of its ``members``."""
    workspace, config = context.workspace, context.config
    annotator, directory = config.annotate.annotators[name], workspace.annotator(name)
    info = RealDataset.load_info(workspace.root)
    parts = {member: [fit_fingerprint(workspace, member), asdict(calibrations[member])] for member in members}
    reads = encoder_key(context, record, annotator.encoder) if annotator.encoder else [record.inputs["prepare"], parts]
    fingerprint = storage.digest("annotator", record.code_version, annotator.head, annotator.parameters, info.class_names, reads)
    if fit_fingerprint(workspace, name) != fingerprint:
        (directory / "annotator.json").unlink(missing_ok=True)
        chosen: Mapping[str, float] | None = None
        if annotator.head == ENSEMBLE:
            chosen = fit_ensemble(directory, *_held_out_members(workspace, members, calibrations), **annotator.parameters)
            weights = ", ".join(f"{weight:.2f} {member}" for member, weight in chosen.items())
            say(f"  {name}: {annotator.parameters.get('pool', 'linear')} pool, {weights}")
        elif annotator.encoder:
            features, encoder = FeatureTable(workspace.encoder(annotator.encoder)), config.annotate.encoders[annotator.encoder]
            inputs = FitInputs(features, info.n_classes, info.class_names, encoder.parameters)
            chosen = HEADS[annotator.head].fit(directory, inputs, **annotator.parameters)
            if chosen:
                say(f"  {name}: {', '.join(f'{key} {value:g}' for key, value in chosen.items())}, by NLL on validation images")
            fitted = Annotator(annotator_spec(workspace, config, name))
            storage.write_tensors(directory / "held_out.safetensors", _held_out(fitted, features, info.n_classes))
        else:
            HEADS[annotator.head].fit(directory, None, **annotator.parameters)
        storage.write_json(
            directory / "annotator.json", {"head": annotator.head, "chosen": chosen or {}, "fingerprint": fingerprint}
        )

    file, key = directory / "calibration.json", storage.digest(fingerprint, annotator.calibrator, annotator.scale, annotator.pair)
    if recorded_fingerprint(file) == key:
        return calibration_of(workspace, name)
    assert annotator.calibrator is not None
    if annotator.head == ENSEMBLE:
        held_out = _held_out_members(workspace, members, calibrations)
        calibration = fit_ensemble_calibration(annotator.calibrator, *held_out, pair=annotator.pair, **annotator.parameters)
    else:
        said = storage.read_tensors(directory / "held_out.safetensors") if annotator.encoder else {}
        labels = said.get("labels", torch.empty(0, dtype=torch.int64))
        calibration = fit_calibration(
            annotator.calibrator,
            said.get("log_posterior"),
            said.get("shares"),
            labels,
            scale=annotator.scale,
            pair=annotator.pair,
        )
    storage.write_json(file, {**asdict(calibration), "fingerprint": key})
    return calibration


def _held_out(annotator: Annotator, features: FeatureTable, n_classes: int) -> dict[str, torch.Tensor]:
    """What ``annotator`` says of the validation images, before calibration, and their labels."""
    said, labels = [], []
    for batch, truth in features.batches("val"):
        by_encoder = {annotator.spec.encoder or "": batch}
        posterior = annotator.log_posterior(by_encoder)
        if posterior is not None and posterior.shape[1] != n_classes:
            raise InputError(f"it knows {posterior.shape[1]} classes, the data has {n_classes}")
        said.append(held_out_shares(annotator, by_encoder, truth, n_classes) if posterior is None else posterior)
        labels.append(truth)
    return {"shares" if annotator.pair else "log_posterior": torch.cat(said).float(), "labels": torch.cat(labels)}


def _held_out_members(
    workspace: Workspace, names: Sequence[str], calibrations: Mapping[str, Calibration]
) -> tuple[dict[str, torch.Tensor], dict[str, Calibration], torch.Tensor]:
    """Log-posteriors of the validation images by the members of an ensemble, the members' calibrations, and the labels."""
    said = {name: storage.read_tensors(workspace.annotator(name) / "held_out.safetensors") for name in names}
    posteriors = {name: tensors["log_posterior"] for name, tensors in said.items()}
    return posteriors, {name: calibrations[name] for name in names}, said[names[0]]["labels"]


def _choose(context: Context, record: StageRecord, calibrations: Mapping[str, Calibration], left_out: Mapping[str, str]) -> None:
    """Keep which of the candidates "auto" is, and say why."""
    scores: dict[str, float | str] = {}
    for name in context.config.annotate.candidates:
        nll = calibrations[name].nll if name in calibrations else None
        scores[name] = left_out.get(name, "its NLL is infinite") if nll is None else nll
    fitted = {name: calibrations[name] for name, score in scores.items() if not isinstance(score, str)}
    if not fitted:
        reasons = "; ".join(f"{name}: {score}" for name, score in scores.items())
        raise InputError(f"annotate.candidates: none of them can be chosen ({reasons})")
    chosen, reason = choose(fitted)
    storage.write_json(context.workspace.choice, asdict(Choice(chosen, reason, scores)))
    say(f"  auto: {reason}")
    for name in sorted(fitted, key=lambda name: scores[name]):
        say(f"    {name}: {scores[name]:.4f}")
    run = f"stage {record.name} {record.fingerprint}"
    context.tracker.log_metrics(run, {f"auto.{name}.nll": float(scores[name]) for name in fitted})
    context.tracker.log_file(run, context.workspace.choice)


def _settings(config: Config) -> dict[str, Any]:
    """What is fitted, and only that: other definitions have no part in the result."""
    annotate = config.annotate
    encoders = {name: annotate.encoders[name] for name in annotate.encoders_of(config.annotators)}
    return {
        "annotate": {
            "annotators": {name: _definition(config, name) for name in annotate.to_fit(config.annotators)},
            "encoders": {name: {**asdict(one), "files": storage.digest(encoder_files(one))} for name, one in encoders.items()},
            "run": list(config.annotators),
            "candidates": list(annotate.candidates) if AUTO in config.annotators else [],
        }
    }


def _definition(config: Config, name: str) -> dict[str, Any]:
    """What is set of it, without words for people."""
    return {key: value for key, value in asdict(config.annotate.annotators[name]).items() if value and key != "description"}


def _outputs(workspace: Workspace, config: Config) -> list[Path]:
    """Of candidates that were not chosen only what is there: it is removed with the rest, but they may have been left out."""
    names = _with_members(workspace, config, annotators(workspace, config))
    others = [name for name in config.annotate.to_fit(config.annotators) if name not in names]
    choice = [workspace.choice] if AUTO in config.annotators else []
    return choice + _files(workspace, config, names) + [path for path in _files(workspace, config, others) if path.exists()]


def _with_members(workspace: Workspace, config: Config, names: Collection[str]) -> list[str]:
    """``names``, and of ensembles all that is in their pools."""
    found: dict[str, None] = {}
    for name in names:
        found |= dict.fromkeys([*_with_members(workspace, config, pool_members(workspace, config, name)), name])
    return list(found)


def _files(workspace: Workspace, config: Config, names: Collection[str]) -> list[Path]:
    files = [workspace.annotator(name) / file for name in names for file in ("annotator.json", "calibration.json")]
    encoders = dict.fromkeys(config.annotate.annotators[name].encoder for name in names)
    return files + [workspace.encoder(encoder) for encoder in encoders if encoder]


STAGE = Stage(
    name="fit-annotators",
    unit="annotators",
    code_version=3,
    inputs=("prepare",),
    more_inputs=lambda config: tuple(
        dict.fromkeys(NEEDS[need] for need in sorted(config.annotate.needs(config.annotators)) if NEEDS[need] != "prepare")
    ),
    settings=_settings,
    outputs=_outputs,
    check=check_encoders,
    run=_run,
    incremental=True,
)
