"""The trainings of a trial as its process reads them from a file, so that it needs neither the configuration nor MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm import storage
from csm.runs import RunSpec


@dataclass(frozen=True)
class TrialSpecs:
    """What ``specs.json`` of a trial holds: a ``RunSpec`` for each seed."""

    specs: tuple[RunSpec, ...]


def trial_folder(trials: Path, number: int) -> Path:
    """Folder of trial ``number``."""
    return trials / f"{number:04d}"


@dataclass(frozen=True)
class ReadSpecs:
    """``cluster.tuning.Build`` of a sweep whose trials lie in ``trials``, an absolute path."""

    trials: Path

    def __call__(self, number: int, values: Mapping[str, Any]) -> tuple[RunSpec, ...]:
        return storage.read_record(trial_folder(self.trials, number) / "specs.json", TrialSpecs).specs
