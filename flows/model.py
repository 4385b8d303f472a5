"""model: of all classifiers the one that knows the validation images best, with what calibrates it, as one finished model."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from csm import __version__, storage, tables
from csm.calibrated import CalibratedClassifier, CalibratedSpec, calibrated
from csm.classifiers import load_classifier
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.locations import remove
from csm.metrics import evaluate as measure
from csm.onnx_export import EXPORTABLE
from csm.posthoc import apply_posthoc, fit_posthoc
from csm.runs import RunSpec
from flows.artifacts import StageRecord, Workspace
from flows.config import REGISTRY_FORBIDS, Config
from flows.evaluate import split_logits
from flows.mlflow_model import save_mlflow
from flows.progress import say
from flows.reuse import stale
from flows.stages import Context, Made, Stage
from flows.summary import TEMPERATURE
from flows.train import run_specs

METRICS = ("accuracy", "ece", "nll", "brier")  # of the validation images, kept with the model
EXAMPLES = 2  # images of the input example


class Finished(NamedTuple):
    """What ``finish`` made of which run; ``replaced`` says which other classifier the model before was, "" if there was none."""

    spec: RunSpec
    model: CalibratedClassifier
    digest: str
    replaced: str


def finish(context: Context, specs: Sequence[RunSpec], directory: Path, key: str, name: str | None) -> Finished:
    """Choose among finished runs, calibrate the chosen classifier, and write it to ``directory`` and the registry.

    Chosen is the method of least mean NLL over its runs, and of these the best: on validation images, after temperature scaling. Test
    images have no say.

    Args:
        context: of the command.
        specs: finished runs on the workspace's data, of one or several methods.
        directory: for ``model.json``, ``model.safetensors`` and ``mlflow/``; those of another model stay until then.
        key: of the MLflow run that the registered model belongs to, open or not.
        name: in the registry; None: do not register.

    Raises:
        InputError: a file is missing or damaged, there are too few validation images, or the name is taken in the registry.
    """
    config, info = context.config, RealDataset.load_info(context.workspace.root)
    spec = choose(specs, info.n_classes)
    logits, labels = split_logits(spec, "val", info.n_classes)
    posthoc = fit_posthoc(posthoc_name(config), logits, labels, where=spec.run)
    metrics = measure(apply_posthoc(logits, posthoc), labels, n_bins=config.evaluate.bins, metrics=METRICS)
    origin: dict[str, Any] = {
        "csm": __version__,
        "config": config.name,
        "run": spec.run,
        "method": spec.method,
        "seed": spec.seed,
        "fingerprint": spec.fingerprint,
        "dataset": info.name,
        "dataset_digest": info.digest,
        "validation": {**metrics, "images": len(labels), "bins": config.evaluate.bins},
    }
    model = calibrated(load_classifier(spec.directory), info.shape, posthoc, origin)
    replaced = _other_model(directory, spec)
    remove(directory / "model.json")  # it must not stand beside other weights
    model.save(directory)
    save_mlflow(model, directory / "mlflow", real_images(context.workspace, info.shape, EXAMPLES))
    values = ", ".join(f"{metric} {metrics[metric]:.3f}" for metric in METRICS)
    what = f"{spec.run} after {posthoc.name}; on {len(labels):,} validation images: {values}"
    digest = storage.digest(asdict(model.spec), storage.file_digest(directory / "model.safetensors"))
    if name is not None:
        tags = {"csm.run": spec.run, "csm.method": spec.method, "csm.seed": str(spec.seed), "csm.dataset": info.name}
        context.tracker.register_model(key, directory / "mlflow", name, what, {**tags, "csm.digest": digest})
    say(f"  {what}" + (f"; goes to the registry as {name}" if name else ""))
    return Finished(spec, model, digest, replaced)


def choose(specs: Sequence[RunSpec], n_classes: int) -> RunSpec:
    """The run of least validation NLL after temperature scaling, of the method whose runs have the least on average."""
    by_method: dict[str, list[tuple[float, RunSpec]]] = {}
    for spec in specs:
        by_method.setdefault(spec.method, []).append((_scaled_nll(*split_logits(spec, "val", n_classes)), spec))
    best = min(by_method.values(), key=lambda runs: sum(nll for nll, _ in runs) / len(runs))
    return min(best, key=lambda run: run[0])[1]


def real_images(workspace: Workspace, shape: tuple[int, int, int], number: int) -> torch.Tensor:
    """The first ``number`` images of the workspace, uint8 (N, H, W, C) of this ``shape``."""
    rows: pl.DataFrame = tables.read(workspace.real, tables.REAL, ["image"], (0, number))
    return tables.to_images(rows["image"], shape).permute(0, 2, 3, 1).contiguous()


def posthoc_name(config: Config) -> str:
    """The first of ``evaluate.posthoc`` that every format can hold, else temperature scaling."""
    return next((name for name in config.evaluate.posthoc if name in EXPORTABLE), TEMPERATURE)


def registry_name(config: Config) -> str | None:
    """The model's name in the registry; None if it is not to be registered."""
    if not config.register.enabled:
        return None
    return config.register.name or "csm-" + re.sub(f"[{REGISTRY_FORBIDS}]", "-", config.name)


def check_registry(context: Context) -> None:
    """``InputError`` if a model is to be registered under a name that somebody else has."""
    name = registry_name(context.config)
    if name and stale(context, "model"):
        context.tracker.check_model_name(name)


def _other_model(directory: Path, spec: RunSpec) -> str:
    """The run of the finished model in ``directory`` with its validation NLL, for people; "" if that is ``spec``, or none can be read."""
    try:
        origin = storage.read_record(directory / "model.json", CalibratedSpec).origin
    except InputError:
        return ""
    return "" if origin["fingerprint"] == spec.fingerprint else f"{origin['run']} (nll {origin['validation']['nll']:.3f})"


def _scaled_nll(logits: Tensor, labels: Tensor) -> float:
    scaled = apply_posthoc(logits, fit_posthoc(TEMPERATURE, logits, labels))
    return measure(scaled, labels, metrics=("nll",))["nll"]


def _run(context: Context, record: StageRecord) -> Made:
    key = f"stage model {record.fingerprint}"
    done = finish(context, run_specs(context), context.workspace.model, key, registry_name(context.config))
    if done.replaced:
        again = "; without train.loss the same command chooses among all methods again" if context.config.train.loss else ""
        say(f"  model: replaced, it was {done.replaced}{again}")
    return Made(1, done.digest)


STAGE = Stage(
    name="model",
    unit="model",
    code_version=1,
    inputs=("prepare", "train"),
    settings=lambda config: {"posthoc": posthoc_name(config), "bins": config.evaluate.bins, "register": registry_name(config)},
    outputs=lambda workspace, config: [
        workspace.model / "model.json",
        workspace.model / "model.safetensors",
        workspace.model / "mlflow",
    ],
    check=check_registry,
    run=_run,
    incremental=True,
)
