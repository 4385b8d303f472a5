import json

import pytest
import torch
import yaml

from csm import tables, truth
from csm.errors import InputError
from csm.generators import load_truth
from csm.metrics import evaluate
from flows.bench import recipe_search
from flows.bench.recipe import recipe
from flows.bench.recipe_plan import read_plan

FIRST = ["dataset", "method", "seeds", "accuracy", "ece", "nll", "brier", "tv", "nll_t", "brier_t", "device_seconds"]
MORE = {"kind", "ece_t", "tv_t", "temperature", "settings", "search_trials", "search_seconds", "bayes_accuracy", "recipe_minus"}
MORE |= {"generation_seconds", "annotation_seconds", "ece_chance"}
SMALL = {  # three classes of 2x2 pixels, trained for one epoch
    "data": {
        "source": "gaussians", "base": "synthetic", "classes": 3, "height": 2, "width": 2, "mean_scale": 1.0,
        "train": 90, "val": 60, "test": 150,
    },
    "generator": {"kind": "gaussians"},
    "plan": {"ratios": 3, "sets_per_pair": 8, "shard_rows": 48},
    "annotate": {"members": 1, "annotator": "qda-pixels"},
    "train": {"optimizer": {"epochs": 1}},
    "evaluate": {"draws": 200},
}  # fmt: skip
RATES = {"optimizer.learning_rate": [0.01, 0.02]}


def write(folder, methods, common=RATES):
    """A plan of ``methods`` on the small data, and its quick size: one seed, one trial."""
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    size = {"datasets": [str(folder / "small.yaml")], "trials": 2, "seeds": 2}
    plan = {
        "full": size,
        "quick": {**size, "trials": 1, "seeds": 1, "settings": {"evaluate.bins": 7}},
        "settings": {"evaluate.posthoc": ["temperature"], "register.enabled": False},
        "common": common,
        "methods": methods,
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder / "plan.yaml"


def test_unknown_names_are_refused_before_anything_is_made(refused, call, tmp_path):
    said = refused("bench", "recipe", "--datasets", "nosuch", "--workspace", tmp_path / "w")
    assert said.startswith("--datasets: unknown 'nosuch'; give a .yaml file or one of annotators, cifar10,")
    for option in ("--methods", "--workspace"):
        code, _, said = call("bench", "recipe", "--workspace", tmp_path / "w", option, "")
        assert (code, f"'{option}': it is empty" in said) == (2, True)
    with pytest.raises(InputError, match=r"--methods: unknown 'nope'; one of csm, paper, cross-entropy"):
        recipe(tmp_path / "w", read_plan(), ["digits-hard"], ["nope"])
    with pytest.raises(InputError, match=r"--datasets: digits-hard is named more than once"):
        recipe(tmp_path / "w", read_plan(), ["digits-hard", "mine/digits-hard.yaml"])
    with pytest.raises(InputError, match=r"plan.sets: no such setting"):
        recipe(tmp_path / "w", read_plan(), ["digits-hard"], overrides=["plan.sets=3"])
    assert not list(tmp_path.iterdir())


LOSSES = {  # no mixed images: what the benchmark does with trainings, whatever they are
    "brier": {"kind": "recipe"},
    "cross-entropy": {"kind": "loss"},
    "focal": {"kind": "ablation", "space": {"parameters.gamma": [1, 2]}},
    "label-smoothing": {"kind": "ablation", "like": "cross-entropy", "change": {"optimizer.epochs": 2}},
}


@pytest.fixture(scope="module")
def proved(serial, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    path = write(folder, LOSSES)
    return folder / "recipe", path, recipe(folder / "recipe", read_plan(path)), list(serial)


def test_a_row_for_each_method(proved):
    root, _, proof, _ = proved
    assert proof.failed == {}
    assert [row["method"] for row in proof.rows] == list(LOSSES)
    assert json.loads(json.dumps(proof.rows)) == json.loads((root / "recipe.json").read_text())
    model = load_truth(root / "small" / "truth")
    real = tables.read(root / "small" / "real" / "part-00000.parquet", tables.REAL).filter(split="test").sort("image_id")
    posterior = model.log_posterior(tables.to_images(real["image"], (2, 2, 1)).double() / 127.5 - 1).exp()
    named = {row["method"]: row for row in proof.rows}
    for name, row in named.items():
        assert list(row)[: len(FIRST)] == FIRST
        assert set(row) >= MORE
        assert (row["dataset"], row["seeds"], row["kind"]) == ("small", 2, LOSSES[name]["kind"])
        found = []
        for seed in (0, 1):
            path = root / "small" / "runs" / f"{name}-seed{seed}" / "predictions.parquet"
            frame = tables.read(path, tables.predictions(3)).filter(split="test").sort("image_id")
            logits, labels = torch.from_numpy(frame["logits"].to_numpy().copy()), torch.tensor(frame["label"].to_list())
            scores = evaluate(logits, labels, metrics=["accuracy", "ece", "nll", "brier"])
            found.append({**scores, "tv": truth.tv(logits.double().softmax(dim=1), posterior)})
        for figure in ("accuracy", "ece", "nll", "brier", "tv"):
            values = torch.tensor([each[figure] for each in found], dtype=torch.float64)
            assert row[figure] == pytest.approx(values.mean().item(), abs=1e-9)
            assert row[f"{figure}_sd"] == pytest.approx(values.std().item(), abs=1e-9)
        assert (row["generation_seconds"], row["annotation_seconds"]) == (0.0, 0.0)
        assert 0.3 < row["bayes_accuracy"] < 1
        assert 0 < row["ece_chance"] < 0.2
        if name == "brier":
            assert row["recipe_minus"] is None
            continue
        for figure in ("nll", "brier_t"):
            difference, low, high = row["recipe_minus"][figure]
            assert difference == pytest.approx(named["brier"][figure] - row[figure], abs=1e-6)
            assert low <= difference <= high
    assert {each["dataset"] for each in json.loads((root / "reach.json").read_text())} == {"small"}


def test_the_search_had_the_same_budget_for_each_and_seeds_of_its_own(proved):
    root, _, proof, trained = proved
    trials = json.loads((root / "small" / "search.json").read_text())
    searched = ("brier", "cross-entropy", "focal")
    runs = [f"{name}.t{number}-seed2000" for name in searched for number in (0, 1)]
    assert [f"{trial['method']}.t{trial['number']}-seed2000" for trial in trials] == runs == trained[:6]
    assert sorted(path.name for path in (root / "small" / "search").iterdir()) == sorted(runs)
    named = {row["method"]: row for row in proof.rows}
    for name in searched:
        of = [trial for trial in trials if trial["method"] == name]
        (chosen,) = [trial for trial in of if trial["chosen"]]
        assert chosen["nll"] == min(trial["nll"] for trial in of)
        assert named[name]["settings"] == chosen["values"]
        assert (named[name]["search_trials"], named[name]["search_seconds"]) == (
            2, pytest.approx(sum(trial["seconds"] for trial in of)),
        )  # fmt: skip
    like = named["label-smoothing"]
    assert like["settings"] == {**named["cross-entropy"]["settings"], "optimizer.epochs": 2}


def test_again_nothing_is_trained_and_of_a_changed_plan_what_changed(proved, serial, capfd):
    root, path, proof, _ = proved
    serial.clear()
    again = recipe(root, read_plan(path))
    assert (again.rows, again.failed, serial) == (proof.rows, {}, [])
    assert "phase 1 of 2, images and 6 trials of 3 methods; data sets after it: none" in capfd.readouterr().err
    changed = {**LOSSES, "focal": {"kind": "ablation", "space": {"parameters.gamma": [4, 5]}}}
    recipe(root, read_plan(write(path.parent, changed)), methods=["brier", "focal"])
    assert serial[0] == "focal.t1-seed2000"
    assert set(serial[1:]) <= {"focal-seed0", "focal-seed1"}


def test_epochs_are_doubled_as_long_as_it_gets_better(serial, tmp_path, monkeypatch):
    found = {"brier.t0": 0.5, "brier.t1": 0.6, "brier.t0x2": 0.4, "brier.t0x4": 0.3}
    found |= {"cross-entropy.t0": 0.6, "cross-entropy.t1": 0.5, "cross-entropy.t1x2": 0.55}
    monkeypatch.setattr(
        recipe_search, "_measure", lambda specs, *_: {spec.method: {"nll": found[spec.method], "seconds": 1.0} for spec in specs}
    )
    serial.clear()
    methods = {name: LOSSES[name] for name in ("brier", "cross-entropy", "label-smoothing")}
    proof = recipe(tmp_path / "w", read_plan(write(tmp_path, methods)), doublings=2)
    assert serial[:7] == [f"{name}-seed2000" for name in (
        "brier.t0", "brier.t1", "cross-entropy.t0", "cross-entropy.t1", "brier.t0x2", "cross-entropy.t1x2", "brier.t0x4",
    )]  # fmt: skip
    trials = json.loads((tmp_path / "w" / "small" / "search.json").read_text())
    assert [(each["method"], each["number"], each["times"]) for each in trials if each["chosen"]] == [
        ("brier", 0, 4), ("cross-entropy", 1, 1)
    ]  # fmt: skip
    assert [each["method"] for each in trials] == ["brier"] * 4 + ["cross-entropy"] * 3
    named = {row["method"]: row for row in proof.rows}
    assert named["brier"]["settings"] == {"optimizer.epochs": "4x"}
    assert (named["brier"]["search_trials"], named["brier"]["search_seconds"]) == (4, 4.0)
    assert "optimizer.epochs" not in named["cross-entropy"]["settings"]
    config = yaml.safe_load((tmp_path / "w" / "small" / "config.yaml").read_text())
    assert config["train"]["methods"]["brier"]["optimizer"]["epochs"] == 4
    serial.clear()
    recipe(tmp_path / "w", read_plan(write(tmp_path, methods)), trials=1, doublings=2)
    assert not [run for run in serial if "seed2000" in run]  # as they stand: no search


def test_quick_goes_below_a_folder_of_its_own(proved, serial):
    root, path, _, _ = proved
    serial.clear()
    quick = recipe(root, read_plan(path), quick=True, methods=["cross-entropy"])
    assert serial == ["cross-entropy-seed0"]  # one trial needs no training
    bins = [yaml.safe_load((root / size / "small" / "config.yaml").read_text())["evaluate"]["bins"] for size in ("", "quick")]
    assert bins == [15, 7]
    assert [(row["method"], row["seeds"], row["nll_sd"], row["settings"]) for row in quick.rows] == [
        ("cross-entropy", 1, None, {})
    ]
    assert (root / "quick" / "recipe.json").is_file()


@pytest.mark.parametrize(
    ("space", "told"),
    [
        (
            {"optimizer.learning_rate": [0.1, "fast"]},
            "methods.cross-entropy.space, or common: optimizer.learning_rate: expected a number",
        ),
        ({"optimizer.rate": [1]}, "methods.cross-entropy.space, or common: optimizer.rate: no such setting"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_made(tmp_path, space, told):
    path = write(tmp_path, {"cross-entropy": {"kind": "recipe", "space": space}}, {})
    with pytest.raises(InputError, match=f"the plan: {told}"):
        recipe(tmp_path / "w", read_plan(path))
    assert not (tmp_path / "w").exists()


def test_a_plan_of_ones_own_needs_no_quick_size(tmp_path):
    path = write(tmp_path, {"cross-entropy": {"kind": "recipe"}}, {})
    path.write_text(yaml.safe_dump({key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "quick"}))
    with pytest.raises(InputError, match="--quick: the plan has no size 'quick'"):
        recipe(tmp_path / "w", read_plan(path), quick=True)


def test_a_trial_that_fails_is_not_chosen(serial, tmp_path):
    methods = {"entropy-penalty": {"kind": "recipe", "space": {"parameters.weight": [1.0e39]}}, "cross-entropy": {"kind": "loss"}}
    proof = recipe(tmp_path / "w", read_plan(write(tmp_path, methods, {})))
    trials = json.loads((tmp_path / "w" / "small" / "search.json").read_text())
    assert [(trial["chosen"], "FloatingPointError" in trial["error"]) for trial in trials] == [
        (True, False), (False, True), (True, False)
    ]  # fmt: skip
    assert proof.failed == {}


@pytest.mark.slow
@pytest.mark.ray
def test_with_mixed_images_over_ray(csm, ray_address, tmp_path):
    methods = {
        "csm": {"kind": "recipe", "space": {"mixed.weight": [1, 2]}},
        "cross-entropy": {"kind": "loss"},
        "distillation": {"kind": "ablation"},
        "csm-truth": {"kind": "ceiling", "like": "csm", "change": {"mixed.annotator": "truth"}},
    }
    options = ["--plan", write(tmp_path, methods), "--workspace", tmp_path / "w", "--address", ray_address, "--json"]
    done = csm("bench", "recipe", *map(str, options))
    assert done.returncode == 0, done.stderr
    named = {row["method"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    assert list(named) == list(methods)
    assert named["cross-entropy"]["annotation_seconds"] == 0.0
    assert min(named["csm"]["annotation_seconds"], named["distillation"]["generation_seconds"]) > 0
    assert named["csm-truth"]["settings"] == {**named["csm"]["settings"], "mixed.annotator": "truth"}
    assert "small, test split, 2 seeds, Bayes accuracy" in done.stdout
    assert "targets reached" in done.stdout
