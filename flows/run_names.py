"""What a user calls a trained classifier, or several that differ in the seed alone, and where their folders are."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from pydantic import TypeAdapter, ValidationError

from csm import storage, tables
from csm.errors import InputError
from csm.locations import location
from csm.methods import Method
from flows.artifacts import Workspace, differences
from flows.label_digests import present_labels
from flows.sweep_records import SweepFolder
from flows.tracking import flatten

SHOWN = 12  # names that a refusal lists
DATA_SECTIONS = ("data", "generator", "plan", "mix", "annotate")  # of a workspace's configuration: what its classifiers saw


@dataclass(frozen=True)
class Trained:
    """Classifiers of one configuration.

    Attributes:
        name: as the user wrote it.
        workspace: the folder that they were trained in.
        folders: run folder of each, by seed.
        settings: flat, dotted keys: method, network, loss, optimiser, ...
        split: which images they may be measured on: ``test``, or ``val`` of a trial that a sweep has not chosen.
        seconds: of training, for each.
        old_labels: seeds of those whose mixed images have been given other soft labels in the workspace since.
    """

    name: str
    workspace: Path
    folders: Mapping[int, Path]
    settings: Mapping[str, Any]
    split: str
    seconds: Mapping[int, float]
    old_labels: frozenset[int] = frozenset()


def find(name: str, workspace: Path) -> Trained:
    """Resolve ``name``: a method, a run, ``trial-N`` of a sweep, ``WORKSPACE:`` with one of them, or a path to a folder of these.

    Raises:
        InputError: there is none of that name, it is not finished, or runs of a method have different settings.
    """
    path = location(name)
    if (path / "run.json").is_file() or list(path.glob("seed*/run.json")):
        return _trained(name, path.absolute())
    where, colon, rest = name.rpartition(":")
    if colon and not rest.startswith("//"):
        if not location(where).is_dir():
            raise InputError(f"{name}: {where} is not a folder; write WORKSPACE:NAME")
        workspace = location(where)
    workspace = workspace.absolute()
    if not workspace.is_dir():
        raise InputError(f"--workspace {workspace}: does not exist; run `csm run --workspace {workspace}` first")
    runs = {record.parent: storage.read_json(record) for record in sorted(workspace.glob("runs/*/run.json"))}
    by_name = {folder.name: [folder] for folder in runs}
    for folder, record in runs.items():
        by_name.setdefault(str(record["method"]), []).append(folder)
    trials = {f"trial-{int(folder.name)}": folder for folder in sorted(workspace.glob("tune/trials/[0-9]*"))}
    if rest in trials:
        return _trained(name, trials[rest])
    if rest not in by_name:
        methods = sorted({str(record["method"]) for record in runs.values()})
        known = [*methods, *trials, *(folder.name for folder in runs)]
        raise InputError(
            f"{name}: no finished method, run or trial of that name in {workspace}; "
            + (f"there are {', '.join(known[:SHOWN])}{', ...' if len(known) > SHOWN else ''}" if known else "it has none")
        )
    return _of_runs(name, workspace, {folder: runs[folder] for folder in by_name[rest]}, "test")


def _trained(name: str, folder: Path) -> Trained:
    """Of the folder of a run or of a trial."""
    records = [folder / "run.json"] if (folder / "run.json").is_file() else sorted(folder.glob("seed*/run.json"))
    if not records:
        raise InputError(f"{name}: {folder} holds no finished training")
    trial = next((place for place in (folder, folder.parent) if place.parent.name == "trials"), None)
    workspace = trial.parents[2] if trial else folder.parents[1]
    chosen = trial is None or _is_chosen(workspace, int(trial.name))
    return _of_runs(
        name, workspace, {record.parent: storage.read_json(record) for record in records}, "test" if chosen else "val"
    )


def _is_chosen(workspace: Path, trial: int) -> bool:
    """Whether the sweep measured that trial on the test split: those of the others are never looked at, or they would be chosen by it."""
    sweep = SweepFolder(workspace).table
    if not sweep.is_file():
        return False
    rows = tables.read_sweep(sweep)[0].filter(pl.col("trial") == trial)
    tested = [name for name in rows.columns if name.startswith("test.")]
    return any(rows[name].count() > 0 for name in tested)


def _of_runs(name: str, workspace: Path, records: Mapping[Path, Mapping[str, Any]], split: str) -> Trained:
    folders, seconds = {}, {}
    settings: dict[str, Any] = {}
    first = ""
    for folder, record in records.items():
        own = _settings(folder, record)
        changed = differences(settings, own) if first else []
        if changed:
            raise InputError(f"{name}: {folder.name} has other settings than {first} ({changed[0]}): name one of them alone")
        settings, first = own, first or folder.name
        folders[int(record["seed"])], seconds[int(record["seed"])] = folder, float(record["seconds"])
    old_labels = frozenset(seed for seed, folder in folders.items() if _has_old_labels(workspace, folder, records[folder]))
    return Trained(name, workspace, dict(sorted(folders.items())), settings, split, seconds, old_labels)


def _has_old_labels(workspace: Path, folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a run was trained on other labels than its annotator's in the workspace now. Trials have images of their own."""
    term, labels = record["settings"].get("mixed"), record.get("labels")
    if not term or not labels or folder.parent != workspace / "runs":
        return False
    images = term["images"]
    now = present_labels(Workspace(workspace), term["annotator"], [images] if isinstance(images, str) else images)
    return now is not None and now != labels


def _settings(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    model = storage.read_json(folder / "model.json")
    try:
        settings = asdict(TypeAdapter(Method).validate_python(record["settings"]))  # with what was no setting yet at that time
    except ValidationError:
        settings = record["settings"]  # of a version that has others
    method = {name: value for name, value in settings.items() if name != "description"}
    network = {"network": model["network"], "network_parameters": model["parameters"]}
    return flatten({"method": record["method"], **network, **method, "optimizer": record["optimizer"]})


def data_settings(workspace: Path) -> dict[str, Any]:
    """What the configuration of a workspace says of data, generator, mixing and annotators, flat."""
    file = workspace / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return flatten({section: config[section] for section in DATA_SECTIONS if isinstance(config, dict) and section in config})


def changed_settings(trained: list[Trained]) -> dict[str, list[str | None]]:
    """Settings that are not the same for all, as text, each in the order of ``trained``; None where one has none or null."""
    values = [dict(each.settings) for each in trained]
    if len({each.workspace for each in trained}) > 1:
        values = [{**of, **data_settings(each.workspace)} for of, each in zip(values, trained, strict=True)]
    keys = dict.fromkeys(key for of in values for key in of)
    rows = {key: [_text(of.get(key)) for of in values] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def predictions(folder: Path, split: str) -> pl.DataFrame:
    """Rows image_id, label, logits of a run on ``split``, by image_id."""
    n_classes = len(storage.read_json(folder / "model.json")["class_names"])
    frame = tables.read(folder / "predictions.parquet", tables.predictions(n_classes))
    return frame.filter(pl.col("split") == split).select("image_id", "label", "logits").sort("image_id")
