"""What the report says of cost, of how to do it again, and of the finished model."""

import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cluster.ledger import part_name, read_receipts, spent
from cluster.shards import plan_shards
from csm import __version__, storage
from csm.calibrated import CalibratedSpec
from flows.artifacts import Workspace
from flows.config import Config
from flows.evaluate import training_spent
from flows.fit_annotators import annotators

PACKAGES = ("torch", "ray", "mlflow", "diffusers", "polars", "numpy")


@dataclass(frozen=True)
class Repeat:
    """How to do it again: (what for, command), versions by name, (what, its digest)."""

    commands: Sequence[tuple[str, str]]
    versions: Mapping[str, str]
    digests: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class FinishedModel:
    """The finished model: figures of ``validation`` as texts, ``uses`` as (what for, command)."""

    run: str
    method: str
    seed: str
    posthoc: str
    shape: tuple[int, int, int]
    validation: Sequence[tuple[str, str]]
    images: str
    uses: Sequence[tuple[str, str]]


def machine() -> str:
    """What the driver runs on, in a line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{cores} CPU cores, {memory:.0f} GiB, {gpu}; {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, csm {__version__}"
    )


def device_seconds(workspace: Workspace, config: Config) -> dict[str, float]:
    """Stage -> seconds that its workers were busy, times their devices."""
    found = {"train": training_spent(workspace, config)}
    if config.mixes and workspace.plan.is_file():
        receipts = read_receipts(workspace.root)
        shards = {kind: plan_shards(workspace.plan, kind) for kind in config.plan.kinds}

        def busy(part: str) -> float:
            return sum(spent(receipts, part_name(part, kind), shards[kind]) for kind in shards)

        found["mix"] = busy("mixed")
        found["annotate"] = sum(busy(name) for name in annotators(workspace, config))
    return {stage: seconds for stage, seconds in found.items() if seconds > 0}


def repeat(workspace: Workspace, stages: Sequence[str], command: str, data_digest: str) -> Repeat:
    """Commands, versions and digests by which this result can be made again and be told from another."""
    root = shlex.quote(str(workspace.root))
    commands = [
        ("What was typed", command),
        ("All of it again, from nothing", f"csm run --config {root}/config.yaml --workspace again"),
    ]
    if (workspace.root / "best.yaml").is_file():
        commands.append(("The best configuration of the sweep", f"csm run --config {root}/best.yaml --workspace best"))
    records = [(name, workspace.record(name)) for name in stages]
    digests = [
        ("data set", data_digest),
        *((name, record.digest) for name, record in records if record is not None and record.done),
    ]
    return Repeat([entry for entry in commands if entry[1]], versions(), digests)


def versions() -> dict[str, str]:
    """Of Python, csm (with its git commit, if it runs from a checkout) and what computes."""
    found = {"csm": __version__, "Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    with suppress(OSError, subprocess.CalledProcessError):
        folder = Path(__file__).resolve().parent
        git = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
        found["csm"] += f", git {subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()}"
    return found


def finished_model(workspace: Workspace) -> FinishedModel | None:
    """The model in ``workspace/model``, or None if none was made; ``InputError`` if it is damaged."""
    folder = workspace.root / "model"
    if not (folder / "model.json").is_file():
        return None
    spec = storage.read_record(folder / "model.json", CalibratedSpec)
    measured: dict[str, Any] = dict(spec.origin.get("validation", {}))
    temperature = spec.posthoc.values.get("temperature")
    where = shlex.quote(str(folder))
    percent = (("accuracy", "Accuracy", " %"), ("ece", "ECE", " %"), ("nll", "NLL ×100", ""), ("brier", "Brier ×100", ""))
    return FinishedModel(
        run=str(spec.origin.get("run", "")),
        method=str(spec.origin.get("method", "")),
        seed=str(spec.origin.get("seed", "")),
        posthoc=spec.posthoc.name + ("" if temperature is None else f" (T = {float(temperature):.2f})"),
        shape=spec.shape,
        validation=[(label, f"{100 * measured[key]:.1f}{unit}") for key, label, unit in percent if key in measured],
        images=f"{measured['images']:,}" if "images" in measured else "",
        uses=[
            ("Class and confidence of images", f"csm predict IMAGES_OR_FOLDER --model {where} --output table.csv"),
            ("An HTTP service", f"csm serve --model {where}"),
            ("Is it calibrated on other data?", f"csm check --model {where} --data DATA --threshold 0.05"),
            ("For other programs", f"csm export --format onnx --output exported --workspace {shlex.quote(str(workspace.root))}"),
        ],
    )
