"""The stage evaluate on predictions that were written by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from csm import storage, tables
from csm.datasets.real import build
from csm.errors import InputError
from csm.metrics import METRICS, evaluate
from csm.posthoc import apply_posthoc, fit_posthoc, fit_temperature
from flows.artifacts import StageRecord, Workspace
from flows.config import load_config
from flows.evaluate import STAGE, compared, device, posthoc_names, training_cost
from flows.run import STAGES, results_tables
from flows.stages import Context

CLASSES, IMAGES = 4, 30  # of each class in each split
RECORD = StageRecord("evaluate", "f", {}, 2, {})
RUNS = [(method, seed) for method in ("cross-entropy", "focal") for seed in (0, 1)]
Evaluate = Callable[..., Context]

pytestmark = pytest.mark.usefixtures("one_thread")


class NoTracker:
    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.files: list[str] = []

    def log_metrics(self, key: str, values: dict[str, float]) -> None:
        self.metrics |= values

    def log_file(self, key: str, path: Path) -> None:
        self.files.append(path.name)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **settings: ""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two methods with two seeds: focal's logits are a third of what they should be."""
    labels = np.tile(np.arange(CLASSES), 3 * IMAGES)
    images = np.zeros((len(labels), 2, 2, 1), np.uint8)
    images[::2] = 200
    splits = np.repeat(tables.SPLITS, CLASSES * IMAGES)
    build("toy", images, labels, splits, ["ant", "bee", "cat", "dog"]).save(tmp_path)
    draw = np.random.default_rng(0)
    seen = splits != "train"
    for method, seed in RUNS:
        logits = (2 * np.eye(CLASSES)[labels] + draw.normal(size=(len(labels), CLASSES))) / (3 if method == "focal" else 1)
        run = f"{method}-seed{seed}"
        schema = tables.predictions(CLASSES)
        columns = {
            "run": [run] * seen.sum(),
            "split": splits[seen],
            "image_id": np.arange(len(labels))[seen],
            "label": labels[seen],
            "logits": logits[seen].astype(np.float32),
        }
        folder = Workspace(tmp_path).run(run)
        frame = pl.DataFrame({name: pl.Series(name, values, dtype=schema[name]) for name, values in columns.items()})
        tables.write(frame, folder / "predictions.parquet", schema)
        storage.write_json(folder / "run.json", {"seconds": 10.0 + seed})
    return tmp_path


@pytest.fixture
def run(root: Path) -> Evaluate:
    def stage(*overrides: str) -> Context:
        asked = ["train.compare=[cross-entropy, focal]", "train.seeds=2", "evaluate.draws=200", *overrides]
        context = Context(load_config("demo", asked), Workspace(root), STAGES, _tracker=NoTracker())  # type: ignore[arg-type]
        STAGE.run(context, RECORD)
        return context

    return stage


def split(root: Path, run: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    frame = pl.read_parquet(root / "runs" / run / "predictions.parquet").filter(pl.col("split").cast(pl.String) == name)
    return torch.from_numpy(frame["logits"].to_numpy().copy()), torch.from_numpy(frame["label"].to_numpy().astype(np.int64))


def values(context: Context, **which: object) -> dict[str, float]:
    frame = tables.read(context.workspace.metrics, tables.METRICS).filter(**which)
    return dict(frame.select("metric", "value").iter_rows())


def test_each_posthoc_method_is_fitted_on_validation_and_measured_on_both_splits(run: Evaluate, root: Path) -> None:
    context = run("evaluate.posthoc=[temperature, vector]")
    metrics = tables.read(context.workspace.metrics, tables.METRICS)
    assert len(metrics) == len(RUNS) * 2 * 3 * len(METRICS)
    for method, seed in RUNS:
        name = f"{method}-seed{seed}"
        val, (logits, labels) = split(root, name, "val"), split(root, name, "test")
        temperature = fit_temperature(*val)
        said = metrics.filter(run=name).select("posthoc", "temperature").unique().sort("posthoc").rows()
        assert said == [("none", 1.0), ("temperature", pytest.approx(temperature, rel=1e-6)), ("vector", 1.0)]
        which = {"run": name, "split": "test"}
        assert values(context, **which, posthoc="none") == evaluate(logits, labels)
        assert values(context, **which, posthoc="temperature") == pytest.approx(evaluate(logits, labels, temperature), rel=1e-6)
        vector = apply_posthoc(logits, fit_posthoc("vector", *val))
        assert values(context, **which, posthoc="vector") == evaluate(vector, labels)


def test_the_comparison_holds_every_method_after_every_posthoc_method(run: Evaluate) -> None:
    context = run()
    comparison = tables.read(context.workspace.comparison, tables.COMPARISON)
    assert comparison.select("posthoc", "method").unique(maintain_order=True).rows() == [
        (posthoc, method) for posthoc in ("none", "temperature") for method in ("cross-entropy", "focal")
    ]
    nll = comparison.filter(method="focal", metric="nll")
    assert nll["difference"][0] > 0.1  # its logits are too small ...
    assert nll["p_holm"][0] < 0.05
    assert abs(nll["difference"][1]) < 0.1  # ... which the temperature mends
    seeds = [values(context, run=f"focal-seed{seed}", split="test", posthoc="none")["nll"] for seed in (0, 1)]
    assert nll["mean"][0] == pytest.approx(np.mean(seeds))


def test_tracking_names_what_was_applied(run: Evaluate) -> None:
    tracker: Any = run("evaluate.posthoc=[temperature, histogram]").tracker
    assert {"test_ece", "test_ece_temperature", "val_nll_histogram", "temperature"} <= set(tracker.metrics)
    assert {"focal.ece", "focal.ece_temperature", "focal.nll_histogram", "focal.temperature_temperature"} <= set(tracker.metrics)
    assert tracker.files == ["metrics.parquet", "comparison.parquet"]


def test_nothing_but_none_may_be_asked_for(run: Evaluate) -> None:
    context = run("evaluate.posthoc=[]")
    assert tables.read(context.workspace.metrics, tables.METRICS)["posthoc"].unique().to_list() == ["none"]
    assert posthoc_names(load_config("demo", ["evaluate.posthoc=[vector, none, vector]"])) == ("none", "vector")


def test_wrong_names_and_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"evaluate\.posthoc: unknown 'plat'; one of none, temperature"):
        load_config("demo", ["evaluate.posthoc=[temperature, plat]"])
    with pytest.raises(InputError, match=r"evaluate\.draws: .*100"):
        load_config("demo", ["evaluate.draws=99"])


def test_cost_is_in_device_seconds(run: Evaluate) -> None:
    context = run("resources.train.cpus=2")
    assert training_cost(context.workspace, context.config) == {"cross-entropy": 21.0, "focal": 21.0}  # 2 x the mean of 10 and 11
    gpus = load_config("demo", ["train.compare=[focal]", "train.seeds=1", "resources.train.gpus=0.25"])
    assert training_cost(context.workspace, gpus) == {"focal": 2.5}
    assert (device(context.config), device(gpus)) == ("core s", "GPU s")


def test_the_tables_of_a_workspace(run: Evaluate) -> None:
    context = run()
    assert len(results_tables(context.config, context.workspace.root)) == 1
    context = run("evaluate.posthoc=[temperature, vector]")
    assert len(results_tables(context.config, context.workspace.root)) == 2


def test_methods_say_which_is_ours_and_which_the_baseline() -> None:
    methods = {method.name: (method.is_ours, method.is_baseline) for method in compared(load_config("demo"))}
    assert methods["csm"] == (True, False)
    assert methods["cross-entropy"] == (False, True)
    assert methods["mixup"] == (False, False)
