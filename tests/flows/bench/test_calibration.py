import json

import polars as pl
import pytest
import torch
import yaml

from cluster.training import TrainingError
from csm import tables
from csm.errors import InputError
from csm.metrics import evaluate
from flows.bench import calibration
from flows.bench.calibration import calibrate, configure
from flows.config import load_config
from flows.run import STAGES

pytestmark = pytest.mark.ray
KEYS = ["method", "seed", "accuracy", "ece", "aece", "nll", "brier", "temperature", "ece_t", "nll_t", "seconds"]
METHODS = ["cross-entropy", "brier", "broken", "mixup", "csm"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Three classes of 2x2 pixels, one epoch, and a method whose loss is infinite."""
    data = {"source": "gaussians", "base": "synthetic", "classes": 3, "height": 2, "width": 2}
    values = {
        "data": {**data, "mean_scale": 1.0, "train": 90, "val": 60, "test": 150},
        "generator": {"kind": "gaussians"},
        "plan": {"ratios": 3, "sets_per_pair": 8, "shard_rows": 48},
        "annotate": {"members": 1, "annotator": "qda-pixels"},
        "train": {
            "seeds": 2,
            "optimizer": {"epochs": 1},
            "compare": METHODS,
            "methods": {"broken": {"loss": "entropy-penalty", "parameters": {"weight": 1e39}}},
        },
        "evaluate": {"draws": 200},
    }
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def benched(path, csm, ray_address, tmp_path_factory):
    root = tmp_path_factory.mktemp("bench") / "calibration"
    done = csm("bench", "calibration", "--config", str(path), "--workspace", str(root), "--address", ray_address, "--json")
    return root, done, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_row_for_each_method_and_seed_that_could_be_trained(benched):
    root, _, rows = benched
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in METHODS if m != "broken" for s in (0, 1)]
    assert all(list(row) == KEYS for row in rows)
    assert rows == json.loads((root / "calibration.json").read_text())
    for row in rows:
        run = root / "runs" / f"{row['method']}-seed{row['seed']}"
        frame = tables.read(run / "predictions.parquet", tables.predictions(3)).filter(split="test")
        logits, labels = torch.from_numpy(frame["logits"].to_numpy().copy()), torch.tensor(frame["label"].to_list())
        before, after = evaluate(logits, labels), evaluate(logits, labels, row["temperature"])
        assert {name: row[name] for name in KEYS[2:7]} == {name: before[name] for name in KEYS[2:7]}
        assert (row["ece_t"], row["nll_t"]) == pytest.approx((after["ece"], after["nll"]), rel=1e-5)
        assert row["seconds"] == json.loads((run / "run.json").read_text())["seconds"]
    assert (root / "report.html").is_file()


@pytest.mark.slow
def test_what_failed_is_told_at_the_end_and_stops_nothing_else(benched):
    _, done, _ = benched
    assert done.returncode == 1
    told = done.stderr.splitlines()[-3:]
    assert sorted(line.split(": ")[2] for line in told[:2]) == ["broken-seed0", "broken-seed1"]
    assert all(line.startswith("csm: failed: ") for line in told[:2])
    assert "FloatingPointError: training: loss is" in told[0]
    assert "going on without broken" in done.stderr
    assert "broken" not in done.stdout
    assert "† differs from cross-entropy" in done.stdout


@pytest.mark.slow
def test_again_it_trains_nothing_that_is_done(benched, path, capfd):
    root, _, rows = benched
    outcome = calibrate(configure(str(path), methods="cross-entropy,brier,mixup,csm"), root)
    assert (outcome.rows, outcome.failed) == (rows, {})
    said = capfd.readouterr().err
    assert "train: reused" in said
    assert "started" not in said


@pytest.mark.slow
def test_fewer_methods_and_seeds_need_no_training_either(benched, path, capfd):
    root, _, rows = benched
    outcome = calibrate(configure(str(path), methods="brier, cross-entropy", seeds=1), root)
    assert [(row["method"], row["seed"]) for row in outcome.rows] == [("brier", 0), ("cross-entropy", 0)]
    assert outcome.rows[0] == next(row for row in rows if row["method"] == "brier")
    assert "ray:" not in capfd.readouterr().err
    calibrate(configure(str(path), methods="cross-entropy,brier,mixup,csm"), root)
    assert pl.read_parquet(root / "metrics.parquet")["method"].n_unique() == 4


def fail(*runs):
    def run_verb(*arguments):
        raise TrainingError({run: "FloatingPointError: loss is inf" for run in runs}, 4)

    return run_verb


def test_nothing_left_to_compare(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "run_verb", fail("csm-seed0", "brier-seed0"))
    outcome = calibrate(configure("digits-hard", methods="brier,csm", seeds=1), tmp_path)
    assert (outcome.rows, outcome.config) == ([], None)
    assert list(outcome.failed) == ["csm-seed0", "brier-seed0"]


def test_what_all_methods_need_is_not_gone_on_without(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "run_verb", fail("teacher-00"))
    with pytest.raises(TrainingError, match="1 of 4 trainings failed; teacher-00"):
        calibrate(configure("digits-hard", seeds=1), tmp_path)


def test_methods_by_group_and_by_name():
    known = load_config("digits-hard").train.methods
    planned = [name for name, method in known.items() if not method.mixed or method.mixed.images == "semantic"]
    assert list(configure("digits-hard", methods="all").train.chosen) == planned
    losses, mixing = (list(configure("digits-hard", methods=group).train.chosen) for group in ("losses", "mixing"))
    assert {"cross-entropy", "focal", "mmce"} <= set(losses)
    assert {"cross-entropy", "mixup", "regmixup", "csm"} <= set(mixing)
    assert set(losses) & set(mixing) == {"cross-entropy"}
    assert set(losses) | set(mixing) == {name for name in planned if known[name].members == 1}
    named = configure("digits-hard", ["train.loss=focal"], "csm, focal,csm", 7).train
    assert (list(named.chosen), named.seeds) == (["csm", "focal"], 7)
    assert configure("digits-hard").train.seeds == 5


@pytest.mark.parametrize(("methods", "told"), [("nope", "--methods: unknown 'nope'"), ("csm,all", "--methods: unknown 'all'")])
def test_unknown_methods_are_refused(methods, told):
    with pytest.raises(InputError, match=told):
        configure("digits-hard", methods=methods)


def test_the_configuration_goes_on_from_a_workspace_of_the_demo():
    demo, hard = load_config("demo"), load_config("digits-hard")
    for name in ("prepare", "generator", "plan", "mix"):
        assert STAGES[name].settings(demo) == STAGES[name].settings(hard)
    assert hard.train.optimizer == demo.train.optimizer
