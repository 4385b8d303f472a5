"""Which classifier becomes the finished model, what is kept of it, and when it is made again."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from mlflow.tracking import MlflowClient

from csm.calibrated import load_calibrated
from csm.datasets import RealDataset
from csm.errors import InputError
from flows.artifacts import Workspace
from flows.config import load_config
from flows.model import check_registry, choose, posthoc_name, registry_name
from flows.run import run_verb
from flows.tracking import store_uri
from flows.train import run_specs
from tests.flows.finished_model import context_of, run_stages

RUNS = [f"{method}-seed{seed}" for method in ("cross-entropy", "label-smoothing") for seed in (0, 1)]


def nll_at_best_temperature(root, run, split="val"):
    """By brute force: (NLL, T)."""
    frame = pl.read_parquet(root / "runs" / run / "predictions.parquet").filter(pl.col("split").cast(pl.String) == split)
    logits, labels = frame["logits"].to_numpy().astype(np.float64), frame["label"].to_numpy()
    best = (np.inf, 0.0)
    for temperature in np.exp(np.linspace(-3, 3, 1501)):
        scaled = logits / temperature
        top = scaled.max(axis=1)
        log_norm = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        best = min(best, ((log_norm - scaled[np.arange(len(labels)), labels]).mean(), temperature))
    return best


def versions(root, name="csm-small"):
    return MlflowClient(store_uri(root)).search_model_versions(f"name = '{name}'")


@pytest.fixture
def copy(modelled, tmp_path):
    root = tmp_path / "workspace"
    shutil.copytree(modelled, root)
    return root


def test_chosen_is_the_best_method_on_average_then_its_best_run(modelled):
    model = load_calibrated(modelled / "model")
    found = {run: nll_at_best_temperature(modelled, run) for run in RUNS}
    means = {
        method: sum(found[f"{method}-seed{seed}"][0] for seed in (0, 1)) / 2 for method in ("cross-entropy", "label-smoothing")
    }
    method = min(means, key=means.get)
    run = min((run for run in RUNS if run.startswith(method)), key=found.get)
    assert model.spec.origin["run"] == run
    assert model.spec.posthoc.name == "temperature"
    assert model.spec.posthoc.values["temperature"] == pytest.approx(found[run][1], rel=5e-3)
    assert model.spec.origin["validation"]["nll"] == pytest.approx(found[run][0], abs=1e-4)
    assert model.spec.origin["dataset_digest"] == RealDataset.load_info(modelled).digest


def test_its_probabilities_are_those_of_the_run_after_temperature(modelled):
    model, data = load_calibrated(modelled / "model"), RealDataset.load(modelled)
    frame = pl.read_parquet(modelled / "runs" / model.spec.origin["run"] / "predictions.parquet")
    for split in ("val", "test"):
        logits = torch.from_numpy(frame.filter(pl.col("split").cast(pl.String) == split)["logits"].to_numpy().copy())
        expected = (logits.double() / model.spec.posthoc.values["temperature"]).softmax(dim=1)
        found = model.predict(data.split(split)[0].permute(0, 2, 3, 1))
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_test_images_have_no_say(copy):
    """The runs' answers on the test split are replaced by nonsense."""
    specs = run_specs(context_of(copy))
    before = choose(specs, 10)
    for spec in specs:
        path = spec.directory / "predictions.parquet"
        frame = pl.read_parquet(path)
        wrong = (9 - pl.col("label").cast(pl.Int16)).cast(pl.UInt16)
        is_test = pl.col("split").cast(pl.String) == "test"
        frame.with_columns(pl.when(is_test).then(wrong).otherwise(pl.col("label")).alias("label")).write_parquet(path)
    assert choose(specs, 10).run == before.run


def test_it_is_reused_while_nothing_changes_and_registered_once(copy, snapshot):
    before = snapshot(copy / "model")
    assert run_stages(context_of(copy), "model") == {"model": True}
    assert snapshot(copy / "model") == before
    shutil.rmtree(copy / "model" / "mlflow")
    assert run_stages(context_of(copy), "model") == {"model": False}
    assert (copy / "model" / "mlflow" / "MLmodel").is_file()
    (version,) = versions(copy)
    assert (int(version.version), version.status) == (1, "READY")
    model = load_calibrated(copy / "model")
    assert version.tags["csm.run"] == model.spec.origin["run"]
    assert version.tags["csm.method"] == model.spec.origin["method"]
    assert "validation images: accuracy 0." in version.description


def test_a_workspace_without_one_gets_it_and_no_leftovers(copy):
    shutil.rmtree(copy / "model")
    (copy / "stages" / "model.json").unlink()
    (copy / "model").mkdir()
    (copy / "model" / ".mlflow").mkdir()  # as a writer leaves it that was killed
    assert run_stages(context_of(copy, "register.enabled=false"), "prepare", "train", "model") == {
        "prepare": True,
        "train": True,
        "model": False,
    }
    assert sorted(path.name for path in (copy / "model").iterdir()) == ["mlflow", "model.json", "model.safetensors"]
    assert len(versions(copy)) == 1  # that of before


def test_one_method_alone_replaces_it_and_says_what_it_was(copy, capsys):
    """Until it is there, the model before is; and without train.loss that one comes back."""
    before = load_calibrated(copy / "model")
    other = "cross-entropy" if before.spec.origin["method"] == "label-smoothing" else "label-smoothing"
    settings = (f"train.loss={other}", "register.enabled=false")
    run_stages(context_of(copy, *settings), "train")
    assert load_calibrated(copy / "model").spec == before.spec
    run_stages(context_of(copy, *settings), "model")
    assert load_calibrated(copy / "model").spec.origin["method"] == other
    was = f"{before.spec.origin['run']} (nll {before.spec.origin['validation']['nll']:.3f})"
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "replaced" in line]
    assert told == f"  model: replaced, it was {was}; without train.loss the same command chooses among all methods again"
    now = load_calibrated(copy / "model").spec.origin["run"]
    run_stages(context_of(copy), "train", "model")
    assert load_calibrated(copy / "model").spec == before.spec
    assert f"  model: replaced, it was {now} (nll " in capsys.readouterr().err


def test_the_same_classifier_again_replaces_nothing(copy, capsys):
    run_stages(context_of(copy, "evaluate.posthoc=[isotonic, vector]"), "model")
    run_stages(context_of(copy, forced=("model",)), "model")
    (copy / "model" / "model.json").write_text("{")
    run_stages(context_of(copy, "evaluate.posthoc=[isotonic, vector]"), "model")
    assert "replaced" not in capsys.readouterr().err


def test_another_calibration_is_another_version(copy):
    run_stages(context_of(copy, "evaluate.posthoc=[isotonic, vector]"), "model")
    assert load_calibrated(copy / "model").spec.posthoc.name == "vector"
    assert len(versions(copy)) == 2


def test_a_name_that_is_taken_is_refused_before_anything_is_trained(copy):
    client = MlflowClient(store_uri(copy))
    client.create_registered_model("theirs")
    client.create_registered_model("csm-small-2", tags={"csm.made_by": "csm"})
    settings = ("register.name=theirs", "train.optimizer.epochs=2")
    with pytest.raises(InputError, match="theirs"):
        run_verb("train", context_of(copy, *settings).config, copy)
    assert Workspace(copy).record("train").settings["train"]["optimizer"]["epochs"] == 1
    with pytest.raises(InputError, match="theirs"):
        run_verb("run", context_of(copy, *settings).config, copy)
    assert Workspace(copy).record("train").settings["train"]["optimizer"]["epochs"] == 1
    check_registry(context_of(copy, "register.name=csm-small-2"))
    check_registry(context_of(copy, "register.name=theirs", "register.enabled=false"))


def test_names_in_the_registry():
    assert registry_name(load_config("demo")) == "csm-demo"
    assert registry_name(load_config("demo", ["register.name=mine"])) == "mine"
    assert registry_name(load_config("demo", ["name=a/b:c"])) == "csm-a-b-c"
    assert registry_name(load_config("demo", ["register.enabled=false"])) is None
    with pytest.raises(InputError, match=r"register\.name: expected a name without / : % ' \", got 'a/b'"):
        load_config("demo", ["register.name=a/b"])


def test_calibration_is_the_first_that_every_format_can_hold():
    assert posthoc_name(load_config("demo")) == "temperature"
    assert posthoc_name(load_config("demo", ["evaluate.posthoc=[histogram, dirichlet, vector]"])) == "dirichlet"
    assert posthoc_name(load_config("demo", ["evaluate.posthoc=[isotonic]"])) == "temperature"
    assert posthoc_name(load_config("demo", ["evaluate.posthoc=[]"])) == "temperature"


def test_its_files_are_plain(modelled):
    """Nothing of it has to be unpickled."""
    names = {path.name for path in (modelled / "model").rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pyc"))]
    record = json.loads((modelled / "model" / "model.json").read_text())
    assert (record["shape"], record["channels"], len(record["class_names"])) == ([8, 8, 1], 1, 10)
