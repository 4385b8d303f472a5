import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from csm import tables
from csm.errors import InputError
from csm.generators import load_truth
from flows.bench import truth
from flows.tracking import store_uri
from flows.tracking_address import EXPERIMENT

pytestmark = pytest.mark.ray
KEYS = ["annotator", "generator", "seed", "method", *truth.MEASURES, "bayes_accuracy"]
TERM = {"loss": "kl", "weight": 4.0, "schedule": "uniform"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three classes of 2x2 pixels, one epoch."""
    data = {"source": "gaussians", "base": "synthetic", "classes": 3, "height": 2, "width": 2}
    values = {
        "data": {**data, "mean_scale": 1.0, "train": 90, "val": 60, "test": 150},
        "plan": {"ratios": 3, "sets_per_pair": 8, "shard_rows": 48},
        "annotate": {"members": 1, "annotator": "auto", "candidates": ["lda-pixels", "qda-pixels"]},
        "train": {
            "seeds": 2,
            "optimizer": {"epochs": 1},
            "compare": ["cross-entropy", *(f"csm-{name}" for name in ("ratio", "lda-pixels", "qda-pixels", "truth"))],
            "methods": {"csm-lda-pixels": {"mixed": {"annotator": "lda-pixels", **TERM}}},
        },
    }
    base = yaml.safe_load((Path(truth.__file__).parents[1] / "configs" / "gaussians.yaml").read_text())
    values["train"]["methods"] = {**base["train"]["methods"], **values["train"]["methods"]}
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def benched(config, csm, ray_address, tmp_path_factory):
    root = tmp_path_factory.mktemp("bench") / "truth"
    options = ["--config", config, "--workspace", root, "--address", ray_address, "--seeds", 1]
    done = csm("bench", "truth", "--generator", "oracle", "--json", *map(str, options))
    assert done.returncode == 0, done.stderr
    return root, done, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_row_for_each_method_and_one_for_auto(benched):
    root, done, rows = benched
    assert all(list(row) == KEYS for row in rows)
    assert rows == json.loads((root / "truth.json").read_text())
    named = {row["annotator"]: row for row in rows}
    assert set(named) == {"none", "ratio", "lda-pixels", "qda-pixels", "truth", "auto"}
    chosen = json.loads((root / "oracle-seed0" / "annotators" / "auto.json").read_text())["chosen"]
    assert {**named["auto"], "annotator": chosen} == named[chosen]
    assert [named["none"][name] for name in truth.LABELS] == [None] * 5
    assert named["truth"]["tv"] == pytest.approx(0, abs=1e-6)
    assert named["truth"]["kl"] == pytest.approx(0, abs=1e-6)
    assert named["ratio"]["kl"] is None  # two classes: infinite
    assert named["ratio"]["outside_mass"] == pytest.approx(0, abs=1e-6)
    assert named["truth"]["tv"] < named[chosen]["tv"] < named["ratio"]["tv"]
    assert (root / "labels-oracle.png").stat().st_size > 10_000
    shown = done.stdout
    assert "oracle generator, 1 data sets, Bayes accuracy" in shown
    assert "cross-entropy" in shown


@pytest.mark.slow
def test_the_figures_are_those_of_the_files(benched):
    root, _, rows = benched
    folder = root / "oracle-seed0"
    model = load_truth(folder / "truth")
    real = tables.read(folder / "real" / "part-00000.parquet", tables.REAL).filter(split="test").sort("image_id")
    posterior = model.log_posterior(tables.to_images(real["image"], (2, 2, 1)).double() / 127.5 - 1).exp().numpy()
    expected = []
    for seed in (0, 1):
        frame = tables.read(folder / "runs" / f"csm-ratio-seed{seed}" / "predictions.parquet", tables.predictions(3))
        said = torch.from_numpy(frame.filter(split="test").sort("image_id")["logits"].to_numpy().copy()).softmax(dim=1).numpy()
        expected.append(0.5 * np.abs(said - posterior).sum(axis=1).mean())
    ratio = next(row for row in rows if row["annotator"] == "ratio")
    assert ratio["tv_classifier"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert ratio["bayes_accuracy"] == pytest.approx((posterior.argmax(axis=1) == real["label"].to_numpy()).mean())
    plan = tables.read(folder / "plan.parquet", tables.PLAN)
    parts = [tables.read(part, tables.MIXED) for part in sorted((folder / "mixed").glob("part-*"))]
    mixed = plan.join(pl.concat(parts), on="mix_id", maintain_order="left")
    truths = model.log_posterior(tables.to_images(mixed["image"], (2, 2, 1)).double() / 127.5 - 1).exp().numpy()
    labels = np.zeros_like(truths)
    row = np.arange(len(plan))
    labels[row, plan["class_a"]] = plan["lam"]
    labels[row, plan["class_b"]] = 1 - plan["lam"].to_numpy()
    assert ratio["tv"] == pytest.approx(0.5 * np.abs(labels - truths).sum(axis=1).mean(), abs=1e-6)


@pytest.mark.slow
def test_again_it_only_measures(benched, config, capfd):
    root, _, rows = benched
    assert truth.measure(root, str(config), seeds=1, generators=["oracle"]) == rows
    said = capfd.readouterr().err
    assert "train: reused" in said
    assert "started" not in said


@pytest.mark.slow
def test_mlflow_has_a_run_for_each_row_below_one_with_the_picture(benched):
    root, _, rows = benched
    client = MlflowClient(store_uri(root))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if MLFLOW_PARENT_RUN_ID not in run.data.tags)
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["labels-seed0.png"]
    children = {run.data.params["annotator"]: run for run in runs if run is not parent}
    assert len(runs) == len(rows) + 1  # after the test above: measured again, no run is made again
    assert all(run.data.tags[MLFLOW_PARENT_RUN_ID] == parent.info.run_id for run in children.values())
    for row in rows:
        assert children[row["annotator"]].data.metrics["nll"] == pytest.approx(row["nll"])


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(InputError, match="--generator nope: unknown; one of fitted, oracle"):
        truth.measure(tmp_path, generators=["nope"])
    with pytest.raises(InputError, match="nobody knows the true posterior of digits-hard; use gaussians"):
        truth.measure(tmp_path, config="demo", overrides=["generator.kind=unet"])
    assert not list(tmp_path.iterdir())
