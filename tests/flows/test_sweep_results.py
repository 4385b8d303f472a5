import math
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from csm import tables
from csm.metrics import evaluate
from csm.posthoc import apply_posthoc, fit_posthoc
from csm.search.space import parse_space
from flows.sweep_records import TrialRecord
from flows.sweep_results import front, measure, ranking, short_names, sweep_table
from flows.sweeps import TuneConfig

IMAGES, CLASSES = 120, 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three seeds of a classifier: logits and labels of each split, and their specs."""
    draw = np.random.default_rng(0)
    labels = {split: draw.integers(0, CLASSES, IMAGES) for split in ("val", "test")}
    specs, logits = [], []
    for _ in range(3):
        folder = tmp_path_factory.mktemp("run")
        of_seed = {
            split: (draw.normal(size=(IMAGES, CLASSES)) + 2 * np.eye(CLASSES)[labels[split]]).astype(np.float32)
            for split in labels
        }
        schema = tables.predictions(CLASSES)
        rows = [
            pl.DataFrame(
                {
                    "run": ["r"] * IMAGES,
                    "split": [split] * IMAGES,
                    "image_id": range(IMAGES),
                    "label": labels[split],
                    "logits": of_seed[split],
                },
                schema=dict(schema),
            )
            for split in labels
        ]
        tables.write(pl.concat(rows), folder / "predictions.parquet", schema)
        specs.append(SimpleNamespace(run="r", directory=folder))
        logits.append({split: torch.from_numpy(values) for split, values in of_seed.items()})
    return specs, logits, {split: torch.from_numpy(values) for split, values in labels.items()}


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("posthoc", ["none", "temperature"])
def test_metrics_are_means_over_seeds_with_what_was_fitted_on_validation(trained, split, posthoc):
    specs, logits, labels = trained
    tune = TuneConfig(objectives=("ks", "ece"), posthoc=posthoc)
    found = measure(specs, split, tune, 10, CLASSES)
    assert list(found) == ["ks", "ece", "accuracy", "nll", "brier"]
    fitted = [fit_posthoc(posthoc, of_seed["val"], labels["val"]) for of_seed in logits]
    scores = [apply_posthoc(of_seed[split], values) for of_seed, values in zip(logits, fitted, strict=True)]
    seeds = [evaluate(score, labels[split], n_bins=10) for score in scores]
    for name, (mean, low, high) in found.items():
        values = [seed[name] for seed in seeds]
        assert mean == pytest.approx(np.mean(values), abs=1e-9)
        assert low < mean < high
    values = [seed["ks"] for seed in seeds]
    assert found["ks"][1:] == pytest.approx(stats.t.interval(0.95, 2, np.mean(values), stats.sem(values)))


def test_one_seed_has_an_interval_over_images_where_they_can_be_resampled(trained):
    specs, _, _ = trained
    found = measure(specs[:1], "val", TuneConfig(objectives=("ks",)), 15, CLASSES)
    assert found["ks"][1:] == (None, None)
    share = found["accuracy"][0]
    half = 1.96 * math.sqrt(share * (1 - share) / IMAGES)
    assert found["accuracy"][1:] == pytest.approx((share - half, share + half), abs=0.02)


def trial(number, accuracy=0.5, ece=0.1, status="done", **fields):
    val = {name: (value, None, None) for name, value in (("accuracy", accuracy), ("ece", ece), ("nll", ece), ("brier", ece))}
    values = fields.pop("values", {})
    return TrialRecord(number, values, status, val=val if status == "done" else {}, **fields)


TRIALS = [
    trial(0, 0.8, 0.3, values={"a": 1, "b": "x", "c": True}),
    trial(1, status="failed", error="no memory", values={"a": 2.5, "b": None}),
    trial(2, 0.9, 0.2, values={"a": 3, "b": 7, "c": False}),
    trial(3, 0.7, 0.1, values={"a": 4, "b": "y"}),
    trial(4, status="stopped", epochs=3, values={"a": 4, "b": "y"}),
    trial(5, 0.7, 0.1, values={"a": 5, "b": "y"}),
]


def test_the_first_objective_ranks_and_the_earlier_of_equals_comes_first():
    assert [record.number for record in ranking(TRIALS, TuneConfig(objectives=("ece",)))] == [3, 5, 2, 0]
    assert [record.number for record in ranking(TRIALS, TuneConfig(objectives=("accuracy", "ece")))] == [2, 0, 3, 5]
    assert ranking([TRIALS[1]], TuneConfig()) == []


def test_the_front_is_of_accuracy_and_ece_unless_there_are_several_objectives():
    assert front(TRIALS, TuneConfig(objectives=("nll",))) == {2, 3, 5}
    assert front(TRIALS, TuneConfig(objectives=("ece", "nll"))) == {3, 5}
    assert front([TRIALS[1]], TuneConfig()) == set()


def test_the_table_has_a_row_for_each_trial_and_test_figures_of_the_chosen_alone(tmp_path):
    space = parse_space({"a": {"low": 1, "high": 9.5}, "b": {"values": {"x": {"c": [True, False]}, "y": {}}}})
    tune = TuneConfig(objectives=("ece",), seeds=3)
    frame, schema = sweep_table(TRIALS, space, tune, {2: {"ece": (0.25, 0.2, 0.3)}}, {0: "id"})
    tables.write(frame, tmp_path / "sweep.parquet", schema)
    assert tables.read(tmp_path / "sweep.parquet", schema).equals(frame)
    assert frame["trial"].to_list() == [0, 1, 2, 3, 4, 5]
    assert frame["rank"].to_list() == [4, None, 3, 1, None, 2]
    assert frame["pareto"].to_list() == [False, False, True, True, False, True]
    assert frame["error"].to_list() == [None, "no memory", None, None, None, None]
    assert frame["seeds"].to_list() == [3, 0, 3, 3, 0, 3]
    assert frame["run"].to_list() == ["id", *[None] * 5]
    assert frame["param.a"].to_list() == [1.0, 2.5, 3.0, 4.0, 4.0, 5.0]
    assert frame["param.b"].to_list() == ["x", None, "7", "y", "y", "y"]
    assert frame["param.c"].to_list() == [True, None, False, None, None, None]
    assert frame["val.ece"].to_list() == [0.3, None, 0.2, 0.1, None, 0.1]
    assert frame["test.ece.high"].to_list() == [None, None, 0.3, None, None, None]


def test_settings_are_named_by_as_few_parts_as_tell_them_apart():
    keys = ["train.optimizer.weight", "method.mixed.weight", "method.loss", "method"]
    assert short_names(keys) == dict(zip(keys, ["optimizer.weight", "mixed.weight", "loss", "method"], strict=True))
    assert short_names(["a.x", "b.x", "c.y"]) == {"a.x": "a.x", "b.x": "b.x", "c.y": "y"}
    assert short_names(["x", "a.x"]) == {"x": "x", "a.x": "a.x"}
