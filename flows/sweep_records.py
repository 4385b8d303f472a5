"""What a sweep keeps on disk: which sweep it is, and how each trial ended."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from csm import storage
from csm.errors import InputError
from csm.locations import remove
from csm.runs import RunSpec
from csm.search.sections import dotted
from flows.artifacts import LEFT_OUT, differences
from flows.config import Config, plain
from flows.masking import masked
from flows.sweep_specs import TrialSpecs, trial_folder
from flows.sweeps import trial_config

Estimate = tuple[float, float | None, float | None]  # mean over seeds, and the ends of its 95 % interval if it can be told

# Settings that older sweeps do not have, with what these did.
LATER = (("generator", "label_dropout", 0.0), ("mix", "guidance", None), ("plan", "noise", LEFT_OUT["plan.noise"]))


@dataclass(frozen=True)
class TrialRecord:
    """What ``trial.json`` holds.

    Attributes:
        number: of the trial, from 0.
        values: dotted key -> what it tries.
        status: "stopped" by the scheduler, before its last epoch.
        error: why it failed, one line.
        fingerprint: of its trainings: with another one, its results are of other data or code.
        epochs: of the first seed.
        seconds: that its trainings took, summed over seeds.
        last: what it tried at its end, where a population changed ``values`` on the way; else empty.
        val: metric -> mean over seeds on validation, and the ends of its interval.
    """

    number: int
    values: dict[str, Any]
    status: Literal["running", "done", "stopped", "failed"] = "running"
    error: str = ""
    fingerprint: str = ""
    epochs: int = 0
    seconds: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)
    val: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepRecord:
    """What ``sweep.json`` holds: the settings that all trials share, and when it was begun, which tells two sweeps of one kind apart."""

    settings: dict[str, Any]
    began: str

    @property
    def key(self) -> str:
        """Key of its MLflow run."""
        return f"sweep {storage.digest(self.settings)} {self.began}"


@dataclass(frozen=True)
class SweepFolder:
    """Paths of the sweep in the workspace ``root``."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "tune" / "sweep.json"

    @property
    def trials(self) -> Path:
        return (self.root / "tune" / "trials").absolute()

    @property
    def inputs(self) -> Path:
        """Of the workspaces of trials that need images or labels of their own."""
        return self.root / "tune" / "inputs"

    @property
    def plots(self) -> Path:
        return self.root / "tune" / "plots"

    @property
    def importance(self) -> Path:
        """How much each setting mattered, for the report."""
        return self.root / "tune" / "importance.json"

    @property
    def model(self) -> Path:
        """The best trial as a finished model."""
        return self.root / "tune" / "model"

    @property
    def table(self) -> Path:
        return self.root / "sweep.parquet"

    @property
    def best(self) -> Path:
        return self.root / "best.yaml"

    def trial(self, number: int) -> Path:
        return trial_folder(self.trials, number)

    def records(self) -> Iterator[TrialRecord]:
        """Those of all trials that were ever asked, by number."""
        for path in sorted(self.trials.glob("*/trial.json")):
            yield storage.read_record(path, TrialRecord)

    def write_trial(self, record: TrialRecord) -> None:
        shown = replace(record, error=masked(record.error))
        storage.write_json(self.trial(record.number) / "trial.json", plain(asdict(shown)))

    def write_specs(self, record: TrialRecord, specs: Sequence[RunSpec]) -> None:
        storage.write_json(self.trial(record.number) / "specs.json", plain(asdict(TrialSpecs(record.values, tuple(specs)))))

    def drop(self) -> None:
        """Remove the sweep, but not the images that it needed."""
        self.settings.unlink(missing_ok=True)
        for path in (self.trials, self.plots, self.model, self.importance, self.table, self.best):
            remove(path)

    def open(self, config: Config) -> SweepRecord:
        """The record of the sweep of ``config``, which is made if there is none.

        Raises:
            InputError: trials of another sweep are here.
        """
        settings = sweep_settings(config)
        known = storage.read_record(self.settings, SweepRecord) if self.settings.is_file() else None
        if known is not None and known.settings != settings and any(self.records()):
            changed = differences(known.settings, settings)
            some = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise InputError(
                f"--workspace {self.root}: holds trials of another sweep ({some}); choose another --workspace, "
                "or drop them with --force tune"
            )
        if known is None or known.settings != settings:
            known = SweepRecord(settings, storage.digest(time.time_ns()))
            storage.write_json(self.settings, asdict(known))
        return known


def sweep_settings(config: Config) -> dict[str, Any]:
    """What all trials of a sweep share, as JSON: not how many there are, nor how many at a time."""
    values: Mapping[str, Any] = plain(asdict(config))
    methods = {
        method for _, corner in config.tune.search_space.corners() for method in trial_config(config, corner).train.compare
    }
    chosen = {name: {**values["train"]["methods"][name], "description": ""} for name in sorted(methods or {config.tune.method})}
    tune = {key: value for key, value in values["tune"].items() if key not in ("trials", "concurrent")}
    train = {key: values["train"][key] for key in ("network", "parameters", "optimizer", "workers")}
    sections = {key: dict(values[key]) for key in ("data", "generator", "plan", "mix", "annotate")}
    for section, key, default in LATER:
        if sections[section][key] == default:
            del sections[section][key]
    bins = {"bins": values["evaluate"]["bins"]}
    space = dotted(tune["space"])
    settings = {"tune": {**tune, "space": space}, **sections, "train": {**train, "methods": chosen}, "evaluate": bins}
    return dict(json.loads(json.dumps(settings)))  # choices that are numbers or true are keys, which JSON writes as text
