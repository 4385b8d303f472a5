"""fit-annotators: fit heads and calibrators on the features of the real images, and choose among the annotators if asked to."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from csm import storage
from csm.datasets import RealDataset
from csm.encoders import FeatureTable
from csm.errors import InputError
from csm.locations import local
from csm.reannotation import (
    HEADS,
    Annotator,
    AnnotatorSpec,
    Calibration,
    FitInputs,
    choose,
    describe,
    fit_calibration,
    fit_ensemble,
    fit_ensemble_calibration,
    held_out_shares,
)
from flows.annotators import AUTO, ENSEMBLE, encoder_files
from flows.artifacts import StageRecord, Workspace
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
    parts = tuple(annotator_spec(workspace, config, member) for member in annotator.members)
    return AnnotatorSpec(name, annotator.head, workspace.annotator(name).absolute(), annotator.encoder, parts)


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
            for member in set(annotator.members) & set(left_out):
                raise InputError(f"its member {member} was left out")
            calibrations[name] = _fit(context, record, name, calibrations)
        except InputError as error:
            if name in required:
                raise InputError(f"annotate.annotators.{name}: {error}") from None
            left_out[name] = str(error)
            say(f"  {name}: left out: {error}")
        else:
            _report(context, record, name, calibrations[name])
    if AUTO in config.annotators:
        _choose(context, record, calibrations, left_out)
    made = {name: [fit_fingerprint(workspace, name), asdict(calibrations[name])] for name in annotators(workspace, config)}
    return Made(len(calibrations), storage.digest(made))


def _fit(context: Context, record: StageRecord, name: str, calibrations: Mapping[str, Calibration]) -> Calibration:
    """Fit the annotator ``name`` and its calibrator, if they are not yet; ``calibrations`` has those of its members."""
    workspace, config = context.workspace, context.config
    annotator, directory = config.annotate.annotators[name], workspace.annotator(name)
    info = RealDataset.load_info(workspace.root)
    parts = {member: [fit_fingerprint(workspace, member), asdict(calibrations[member])] for member in annotator.members}
    reads = encoder_key(context, record, annotator.encoder) if annotator.encoder else [record.inputs["prepare"], parts]
    fingerprint = storage.digest("annotator", record.code_version, annotator.head, annotator.parameters, info.class_names, reads)
    if fit_fingerprint(workspace, name) != fingerprint:
        (directory / "annotator.json").unlink(missing_ok=True)
        if annotator.head == ENSEMBLE:
            weights = fit_ensemble(directory, *_held_out_members(workspace, annotator.members, calibrations))
            say(f"  {name}: {', '.join(f'{weight:.2f} {member}' for member, weight in weights.items())}")
        elif annotator.encoder:
            features, encoder = FeatureTable(workspace.encoder(annotator.encoder)), config.annotate.encoders[annotator.encoder]
            inputs = FitInputs(features, info.n_classes, info.class_names, encoder.parameters)
            HEADS[annotator.head].fit(directory, inputs, **annotator.parameters)
            fitted = Annotator(annotator_spec(workspace, config, name))
            storage.write_tensors(directory / "held_out.safetensors", _held_out(fitted, features, info.n_classes))
        else:
            HEADS[annotator.head].fit(directory, None, **annotator.parameters)
        storage.write_json(directory / "annotator.json", {"head": annotator.head, "fingerprint": fingerprint})

    file, key = directory / "calibration.json", storage.digest(fingerprint, annotator.calibrator, annotator.scale, annotator.pair)
    if recorded_fingerprint(file) == key:
        return calibration_of(workspace, name)
    assert annotator.calibrator is not None
    if annotator.head == ENSEMBLE:
        held_out = _held_out_members(workspace, annotator.members, calibrations)
        calibration = fit_ensemble_calibration(annotator.calibrator, *held_out, pair=annotator.pair)
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


def _report(context: Context, record: StageRecord, name: str, calibration: Calibration) -> None:
    """A line on the terminal; the fitted numbers, and all of it as a file, in MLflow."""
    run = f"stage {record.name} {record.fingerprint}"
    names = ("scale", "temperature", "nll_before", "nll_after", "nll")
    values = {key: value for key in names if (value := getattr(calibration, key)) is not None}
    note = f" ({calibration.note})" if calibration.note else ""
    say(f"  {name}: labels {describe(calibration)}{_nll(context, name, calibration)}{note}")
    context.tracker.log_metrics(run, {f"{name}.{key}": value for key, value in values.items()})
    context.tracker.log_file(run, context.workspace.annotator(name) / "calibration.json", name)


def _nll(context: Context, name: str, calibration: Calibration) -> str:
    """The NLL on validation images without calibrator, and of those that the calibrator was not fitted on."""
    if not calibration.images:
        return ""
    pair_head = context.config.annotate.annotators[name].pair_head
    before, after = ("infinite" if value is None else f"{value:.3f}" for value in (calibration.nll_before, calibration.nll))
    text = f"; {'NLL within pairs' if pair_head else 'NLL'} {before} -> {after}"
    shares = torch.tensor(list(_class_counts(context.workspace).values()), dtype=torch.float64)
    ignorant = torch.distributions.Categorical(shares).entropy().item()
    if not pair_head and calibration.nll is not None and calibration.nll > 0.99 * ignorant:
        text += f", no better than knowing the classes' shares alone ({ignorant:.3f}): check its encoder"
    return text


def _class_counts(workspace: Workspace) -> dict[int, int]:
    """Images of each class in the validation split."""
    labels = pl.scan_parquet(local(workspace.real)).filter(pl.col("split") == "val").select("label").collect()["label"]
    return dict(labels.value_counts().iter_rows())


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
    names = config.annotate.to_fit(annotators(workspace, config))
    others = [name for name in config.annotate.to_fit(config.annotators) if name not in names]
    choice = [workspace.choice] if AUTO in config.annotators else []
    return choice + _files(workspace, config, names) + [path for path in _files(workspace, config, others) if path.exists()]


def _files(workspace: Workspace, config: Config, names: Collection[str]) -> list[Path]:
    files = [workspace.annotator(name) / file for name in names for file in ("annotator.json", "calibration.json")]
    return files + [workspace.encoder(name) for name in config.annotate.encoders_of(names)]


STAGE = Stage(
    name="fit-annotators",
    unit="annotators",
    code_version=2,
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
