"""Population-based training: a trial that does badly goes on from the state of one that does well, with values a little different."""

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm import storage
from csm.errors import InputError
from csm.locations import location
from csm.runs import RunSpec

SHARE = 0.25  # of the trials are bad, and as many good
FACTORS = (0.8, 1.2)
_NUMBERS = ("train.optimizer.learning_rate", "train.optimizer.clip", "method.mixed.weight", "method.mixed.temperature")
_BELOW = ("method.parameters.", "method.mixing.parameters.")


@dataclass(frozen=True)
class Donor:
    """Whose state a trial goes on from.

    Attributes:
        number: of that trial.
        directory: of its run.
        epoch: of the state.
        values: to go on with: the donor's, a little different.
        fallback: the donor's own, for the case that those cannot be used.
        history: epochs of the trial that takes the state, up to ``epoch``.
    """

    number: int
    directory: str
    epoch: int
    values: dict[str, Any]
    fallback: dict[str, Any]
    history: list[dict[str, float]]


def check_pbt(keys: Collection[str]) -> None:
    """``InputError`` unless a running training can change each of these keys of a space."""
    for key in keys:
        if key not in _NUMBERS and not key.startswith(_BELOW):
            raise InputError(
                f"tune.space.{key}: pbt changes trainings that run, so it can search only {', '.join(_NUMBERS)} and what is below "
                f"{', '.join(_BELOW)}; take another tune.scheduler.kind"
            )


def perturb(values: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
    """Every number of ``values`` times 0.8 or 1.2, whole ones rounded; what is no number stays (Jaderberg et al. 2017, section 4.1.1)."""
    changed = {}
    for key, value in values.items():
        factor = draw.choice(FACTORS)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        changed[key] = type(value)(round(value * factor) if isinstance(value, int) else value * factor) if number else value
    return changed


def snapshot_path(directory: str | Path, epoch: int) -> Path:
    """Where a run of a population keeps its state after ``epoch``."""
    return location(directory) / f"state-{epoch:06d}.pt"


def population_history(directory: Path) -> list[dict[str, Any]]:
    """What the run in ``directory`` took over: epoch, donor (a number) and the values with which it went on, in order."""
    path = directory / "population.json"
    return list(storage.read_json(path)) if path.is_file() else []


def take_over(spec: RunSpec, donor: Donor, values: Mapping[str, Any]) -> None:
    """Let the run of ``spec`` go on from the state of ``donor``, unless it did before."""
    taken = population_history(spec.directory)
    if taken and taken[-1]["epoch"] >= donor.epoch:
        return
    state = storage.read_state(snapshot_path(donor.directory, donor.epoch))
    state |= {"fingerprint": spec.fingerprint, "history": donor.history}
    storage.write_state(spec.directory / "state.pt", state)
    record = {"epoch": donor.epoch, "donor": donor.number, "values": dict(values)}
    storage.write_json(spec.directory / "population.json", [*taken, record])
