import json

import pytest
import torch
import yaml

from csm import tables, truth
from csm.errors import InputError
from csm.generators import load_truth
from csm.metrics import evaluate
from flows.bench.recipe import recipe
from flows.bench.recipe_plan import read_plan

FIRST = ["dataset", "method", "seeds", "accuracy", "ece", "nll", "brier", "tv", "nll_t", "brier_t", "device_seconds"]
MORE = {"kind", "ece_t", "tv_t", "temperature", "settings", "search_trials", "search_seconds", "bayes_accuracy", "recipe_minus"}
MORE |= {"generation_seconds", "annotation_seconds"}
METHODS = ("csm", "cross-entropy", "distillation", "csm-truth")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A plan of four methods, and data of three classes of 2x2 pixels trained for one epoch."""
    folder = tmp_path_factory.mktemp("files")
    data = {"source": "gaussians", "base": "synthetic", "classes": 3, "height": 2, "width": 2}
    values = {
        "data": {**data, "mean_scale": 1.0, "train": 90, "val": 60, "test": 150},
        "generator": {"kind": "gaussians"},
        "plan": {"ratios": 3, "sets_per_pair": 8, "shard_rows": 48},
        "annotate": {"members": 1, "annotator": "qda-pixels"},
        "train": {"optimizer": {"epochs": 1}},
        "evaluate": {"draws": 200},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(values))
    size = {"datasets": [str(folder / "small.yaml")], "trials": 2, "seeds": 2}
    plan = {
        "full": size,
        "quick": {**size, "trials": 1, "seeds": 1, "methods": ["csm", "cross-entropy"]},
        "settings": {"evaluate.posthoc": ["temperature"], "register.enabled": False},
        "common": {"optimizer.learning_rate": [0.01, 0.02]},
        "methods": {
            "csm": {"kind": "recipe", "space": {"mixed.weight": [1, 2]}},
            "cross-entropy": {"kind": "loss"},
            "distillation": {"kind": "ablation"},
            "csm-truth": {"kind": "ceiling", "like": "csm", "change": {"mixed.annotator": "truth"}},
        },
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder


def test_unknown_names_are_refused_before_anything_is_made(csm, tmp_path):
    done = csm("bench", "recipe", "--datasets", "nosuch", "--workspace", str(tmp_path / "w"))
    assert done.returncode == 2
    assert done.stderr.startswith("csm: --datasets nosuch: unknown; one of digits-hard, gaussians, gaussians-k4, gaussians-k30,")
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(InputError, match="--methods: unknown 'nope'; one of csm, paper, cross-entropy"):
        recipe(tmp_path / "w", read_plan(), ["digits-hard"], ["nope"])
    with pytest.raises(InputError, match="--datasets: digits-hard is named more than once"):
        recipe(tmp_path / "w", read_plan(), ["digits-hard", "mine/digits-hard.yaml"])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def proved(files, csm, ray_address, tmp_path_factory):
    root = tmp_path_factory.mktemp("bench") / "recipe"
    options = ["--plan", files / "plan.yaml", "--workspace", root, "--address", ray_address, "--json"]
    done = csm("bench", "recipe", *map(str, options))
    assert done.returncode == 0, done.stderr
    return root, done, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ray
def test_a_row_for_each_method(proved):
    root, done, rows = proved
    assert [row["method"] for row in rows] == list(METHODS)
    assert rows == json.loads((root / "recipe.json").read_text())
    model = load_truth(root / "small" / "truth")
    real = tables.read(root / "small" / "real" / "part-00000.parquet", tables.REAL).filter(split="test").sort("image_id")
    posterior = model.log_posterior(tables.to_images(real["image"], (2, 2, 1)).double() / 127.5 - 1).exp()
    for row in rows:
        assert list(row)[: len(FIRST)] == FIRST
        assert set(row) >= MORE
        assert (row["dataset"], row["seeds"]) == ("small", 2)
        found = []
        for seed in (0, 1):
            path = root / "small" / "runs" / f"{row['method']}-seed{seed}" / "predictions.parquet"
            frame = tables.read(path, tables.predictions(3)).filter(split="test").sort("image_id")
            logits, labels = torch.from_numpy(frame["logits"].to_numpy().copy()), torch.tensor(frame["label"].to_list())
            scores = evaluate(logits, labels, metrics=["accuracy", "ece", "nll", "brier"])
            found.append({**scores, "tv": truth.tv(logits.double().softmax(dim=1), posterior)})
        for figure in ("accuracy", "ece", "nll", "brier", "tv"):
            values = torch.tensor([each[figure] for each in found], dtype=torch.float64)
            assert row[figure] == pytest.approx(values.mean().item(), abs=1e-9)
            assert row[f"{figure}_sd"] == pytest.approx(values.std().item(), abs=1e-9)
    named = {row["method"]: row for row in rows}
    assert named["csm"]["recipe_minus"] is None
    for row in rows[1:]:
        for figure in ("nll", "brier_t"):
            difference, low, high = row["recipe_minus"][figure]
            assert difference == pytest.approx(named["csm"][figure] - row[figure], abs=1e-6)
            assert low <= difference <= high
    assert named["cross-entropy"]["annotation_seconds"] == 0.0
    assert named["csm"]["generation_seconds"] > 0
    assert named["csm-truth"]["settings"] == {**named["csm"]["settings"], "mixed.annotator": "truth"}
    assert "small, test split, 2 seeds, Bayes accuracy" in done.stdout
    assert "targets reached" in done.stdout
    assert {each["dataset"] for each in json.loads((root / "reach.json").read_text())} == {"small"}


@pytest.mark.ray
def test_the_search_had_the_same_budget_for_each_and_seeds_of_its_own(proved):
    root, done, rows = proved
    trials = json.loads((root / "small" / "search.json").read_text())
    assert [f"{trial['method']}.t{trial['number']}" for trial in trials] == [
        f"{name}.t{number}" for name in METHODS[:3] for number in (0, 1)
    ]
    folders = sorted(path.name for path in (root / "small" / "search").iterdir())
    assert folders == sorted(f"{trial['method']}.t{trial['number']}-seed2000" for trial in trials)
    for name in METHODS[:3]:
        of = [trial for trial in trials if trial["method"] == name]
        (chosen,) = [trial for trial in of if trial["chosen"]]
        assert chosen["nll"] == min(trial["nll"] for trial in of)
        row = next(row for row in rows if row["method"] == name)
        assert row["settings"] == chosen["values"]
        assert (row["search_trials"], row["search_seconds"]) == (2, pytest.approx(sum(trial["seconds"] for trial in of)))
    assert (
        "recipe: data set 1 of 1, small: phase 1 of 2, images and 6 trials of 3 methods; data sets after it: none" in done.stderr
    )
    assert "phase 2 of 2, 4 methods x 2 seeds" in done.stderr


@pytest.mark.ray
def test_again_nothing_is_done_and_a_changed_plan_trains_only_what_changed(proved, files, capfd):
    root, _, rows = proved
    again = recipe(root, read_plan(files / "plan.yaml"))
    assert (again.rows, again.failed) == (rows, {})
    said = capfd.readouterr().err
    assert "train: reused" in said
    assert "started" not in said
    before = {path: path.stat().st_mtime_ns for path in (root / "small" / "search").glob("*/run.json")}
    values = yaml.safe_load((files / "plan.yaml").read_text())
    values["methods"]["csm"]["space"]["mixed.weight"] = [8, 16]
    changed = files / "changed.yaml"
    changed.write_text(yaml.safe_dump(values))
    recipe(root, read_plan(changed), methods=["csm", "cross-entropy"])
    now = {path: path.stat().st_mtime_ns for path in (root / "small" / "search").glob("*/run.json")}
    assert {path.parent.name for path in now if now[path] != before[path]} == {"csm.t1-seed2000"}
    assert "mix: reused" in capfd.readouterr().err


@pytest.mark.ray
def test_quick_goes_below_a_folder_of_its_own(proved, files):
    root, _, _ = proved
    quick = recipe(root, read_plan(files / "plan.yaml"), quick=True, methods=["cross-entropy"])
    assert [(row["method"], row["seeds"]) for row in quick.rows] == [("cross-entropy", 1)]
    assert not (root / "quick" / "small" / "search").exists()
    assert (quick.rows[0]["nll_sd"], quick.rows[0]["settings"]) == (None, {})
    assert (root / "quick" / "recipe.json").is_file()
