"""The trainings of a trial as its process reads them from a file, so that it needs neither the configuration nor MLflow."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from csm import storage
from csm.errors import InputError
from csm.losses import HARD, build_loss
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.parameters import expected
from csm.pixel_mixing import build_pixel_mixing
from csm.runs import RunSpec


@dataclass(frozen=True)
class TrialSpecs:
    """What ``specs.json`` of a trial holds: what it tries, and a ``RunSpec`` for each seed."""

    values: dict[str, Any]
    specs: tuple[RunSpec, ...]


def trial_folder(trials: Path, number: int) -> Path:
    """Folder of trial ``number``."""
    return trials / f"{number:04d}"


@dataclass(frozen=True)
class ReadSpecs:
    """``cluster.tuning.Build`` of a sweep whose trials lie in ``trials``, an absolute path."""

    trials: Path

    def __call__(self, number: int, values: Mapping[str, Any]) -> tuple[RunSpec, ...]:
        """The specs of trial ``number``; with other ``values`` than it began with where a population changed them.

        Raises:
            InputError: a value is out of its range.
        """
        trial = storage.read_record(trial_folder(self.trials, number) / "specs.json", TrialSpecs)
        changed = {key: value for key, value in values.items() if value != trial.values[key]}
        return tuple(_changed(spec, changed) for spec in trial.specs) if changed else trial.specs


def _changed(spec: RunSpec, changed: Mapping[str, Any]) -> RunSpec:
    """``spec`` with other settings of the optimizer (``train.optimizer.X``) and the method (``method.X``)."""
    settings = {"train": {"optimizer": asdict(spec.optimizer)}, "method": asdict(spec.settings)}
    for key, value in changed.items():
        *sections, name = key.split(".")
        section: dict[str, Any] = settings
        for part in sections:
            section = section[part]
        section[name] = value
    try:
        optimizer = TypeAdapter(OptimizerConfig).validate_python(settings["train"]["optimizer"])
        method = TypeAdapter(Method).validate_python(settings["method"])
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {expected(first)}, got {first['input']!r}") from None
    build_loss(HARD, method.loss, dict(method.parameters), "method.parameters")
    if method.mixing:
        build_pixel_mixing(method.mixing.kind, method.mixing.parameters, "method.mixing")
    fingerprint = storage.digest("changed", spec.fingerprint, dict(changed))
    return replace(spec, optimizer=optimizer, settings=method, fingerprint=fingerprint)
