import json
import shutil
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from cluster.shards import KEY, part_path
from csm import storage, tables
from csm.errors import InputError
from csm.metrics import evaluate
from csm.posthoc import fit_temperature
from csm.reannotation import Calibration
from flows import comparison
from flows.artifacts import Workspace
from flows.cli import cli
from flows.compare import BINS, SCHEMA, as_json, compare
from flows.compare_views import difference_cell, label, notes, page
from flows.label_digests import label_digest
from flows.run_names import changed_settings, find
from flows.sweep_records import SweepFolder
from tests.flows.chromium import Page

CLASSES, IMAGES, DRAWS = 3, 300, 400


def labels_of(seed=0):
    return {
        split: np.random.default_rng(seed + number).integers(0, CLASSES, IMAGES) for number, split in enumerate(("val", "test"))
    }


def write_run(folder, method, seed, signal, labels=None, loss="cross-entropy", learning_rate=0.1, mixed=None):
    """A finished run whose logits point to the label with strength ``signal``, the noise the same for every method."""
    labels = labels or labels_of()
    parts = []
    for number, split in enumerate(("val", "test")):
        noise = np.random.default_rng(10 * seed + number).normal(size=(IMAGES, CLASSES))
        logits = (3 * (signal * np.eye(CLASSES)[labels[split]] + noise)).astype(np.float32)
        columns = {
            "run": [folder.name] * IMAGES,
            "split": [split] * IMAGES,
            "image_id": range(IMAGES),
            "label": labels[split],
            "logits": logits,
        }
        parts.append(pl.DataFrame(columns, schema=tables.predictions(CLASSES)))
    tables.write(pl.concat(parts), folder / "predictions.parquet", tables.predictions(CLASSES))
    model = {"network": "small-cnn", "parameters": {"width": 8}, "class_names": ["a", "b", "c"]}
    storage.write_json(folder / "model.json", model)
    settings = {"description": f"{method} in words", "loss": loss, "parameters": {}, "mixed": mixed, "members": 1}
    record = {"run": folder.name, "method": method, "seed": seed, "seconds": 10.0 + seed, "settings": settings}
    storage.write_json(folder / "run.json", {**record, "optimizer": {"epochs": 2, "learning_rate": learning_rate}})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Three methods; ``better`` sees the labels more clearly, ``same`` is the baseline again. A sweep, trial 1 is chosen."""
    root = tmp_path_factory.mktemp("compare")
    for seed in range(3):
        write_run(root / "runs" / f"ce-seed{seed}", "ce", seed, 1.0)
        write_run(root / "runs" / f"same-seed{seed}", "same", seed, 1.0)
        mixed = {"annotator": "teacher", "weight": 4.0, "ramp": None}
        write_run(root / "runs" / f"better-seed{seed}", "better", seed, 2.0, mixed=mixed, learning_rate=0.2)
    write_run(root / "runs" / "short-seed1", "short", 1, 1.0)
    for trial in range(3):
        write_run(root / "tune" / "trials" / f"{trial:04d}" / "seed0", "csm", 0, 1.0 + trial, learning_rate=0.1 * (trial + 1))
    (root / "tune" / "trials" / "0003").mkdir()
    schema = tables.sweep({}, ("nll",))
    measured = {"trial": [0, 1, 2], "val.nll": [0.9, 0.7, 0.8], "test.nll": [None, 0.7, None]}
    sweep = pl.DataFrame({name: measured.get(name, [None] * 3) for name in schema}, schema=dict(schema))
    tables.write(sweep, SweepFolder(root).table, schema)
    return root


@pytest.fixture(scope="module")
def compared(workspace):
    return compare(["ce", "same", "better"], workspace, DRAWS)


def logits(workspace, method, split="test"):
    frames = [pl.read_parquet(workspace / "runs" / f"{method}-seed{seed}" / "predictions.parquet") for seed in range(3)]
    frames = [frame.filter(pl.col("split") == split) for frame in frames]
    return [
        (torch.from_numpy(f["logits"].to_numpy().copy()), torch.from_numpy(f["label"].to_numpy().astype(np.int64)))
        for f in frames
    ]


def test_means_are_those_of_the_metrics(workspace, compared):
    assert dict(compared.metrics.schema) == SCHEMA
    for method in ("ce", "better"):
        measured = [evaluate(scores, labels, n_bins=BINS) for scores, labels in logits(workspace, method)]
        for metric in ("accuracy", "ece", "smooth_ece", "aurc"):
            expected = np.mean([seed[metric] for seed in measured])
            assert compared.row(method, metric, "none")["mean"] == pytest.approx(expected)


def test_intervals_and_p_values_are_those_of_csm_evaluate(workspace, compared):
    runs = {name: [(s.double().log_softmax(1), y) for s, y in logits(workspace, name)] for name in ("ce", "same", "better")}
    expected = comparison.compare(runs, "none", "ce", BINS, DRAWS, seeds=3)
    for row in expected.filter(pl.col("method") != "ce").iter_rows(named=True):
        own = compared.row(row["method"], row["metric"], "none")
        for name in ("low", "high", "difference", "difference_low", "difference_high"):
            assert own[name] == pytest.approx(row[name], abs=1e-9)
        assert own["p"] == row["p_holm"]


def test_the_temperature_is_fitted_on_validation(workspace, compared):
    fitted = [fit_temperature(scores, labels) for scores, labels in logits(workspace, "ce", "val")]
    assert compared.temperatures[0] == pytest.approx(np.mean(fitted), rel=1e-6)
    scaled = [evaluate(s, y, t, BINS)["nll"] for (s, y), t in zip(logits(workspace, "ce"), fitted, strict=True)]
    assert compared.row("ce", "nll", "temperature")["mean"] == pytest.approx(np.mean(scaled))


def test_what_is_equal_and_what_is_better(compared):
    same, better = (difference_cell(compared, name, "nll", "none") for name in ("same", "better"))
    assert (same.value, same.verdict, same.p) == ("+0.00", "", "1.000")
    assert better.verdict == "better"
    assert difference_cell(compared, "better", "accuracy", "none").verdict == "better"
    assert difference_cell(compared, "better", "mce", "none")[1:] == ("", "", "")
    assert [label(name) for name in ("ece", "l2_ce_debiased", "brier_resolution")] == [
        "ECE ↓",
        "L2 CE debiased ↓",
        "Brier resolution ↑",
    ]


def test_settings_that_differ_and_no_others(compared):
    assert compared.settings == {
        "method": ["ce", "same", "better"],
        "mixed.annotator": [None, None, "teacher"],
        "mixed.weight": [None, None, "4.0"],
        "optimizer.learning_rate": ["0.1", "0.1", "0.2"],
    }


def test_one_run_of_each_and_a_path_to_a_folder(workspace):
    folder = str(workspace / "runs" / "better-seed2")
    compared = compare(["ce-seed0", folder], workspace, DRAWS)
    assert compared.seeds == ((0,), (2,))
    assert compared.split == "test"
    assert 0 < compared.row(folder, "nll", "none")["p"] < 0.05


def test_seeds_that_all_have_are_compared(workspace):
    assert compare(["ce", "short"], workspace, DRAWS).seeds == ((1,), (1,))


def test_a_trial_that_was_not_chosen_is_compared_on_validation(workspace):
    compared = compare(["trial-0", "trial-1"], workspace, DRAWS)
    assert compared.split == "val"
    assert "validation" in page(compared)
    folder = workspace / "tune" / "trials" / "0002" / "seed0"
    measured = pl.read_parquet(folder / "predictions.parquet").filter(pl.col("split") == "val")
    scores, labels = (
        torch.from_numpy(measured["logits"].to_numpy().copy()),
        torch.from_numpy(measured["label"].to_numpy().astype(np.int64)),
    )
    row = compare(["ce-seed0", str(folder)], workspace, DRAWS).row(str(folder), "ece", "none")
    assert row["mean"] == pytest.approx(evaluate(scores, labels, n_bins=BINS)["ece"])


def test_a_chosen_trial_is_compared_on_test(workspace):
    assert compare(["ce-seed0", "trial-1"], workspace, DRAWS).split == "test"
    assert find("trial-1", workspace).settings["optimizer.learning_rate"] == 0.2


def test_a_table_of_trials_that_was_cut_short_is_one_line(workspace, tmp_path):
    shutil.copytree(workspace / "tune", tmp_path / "tune")
    SweepFolder(tmp_path).table.write_bytes(SweepFolder(workspace).table.read_bytes()[:200])
    with pytest.raises(InputError, match=r"sweep\.parquet is not a whole parquet file"):
        find("trial-1", tmp_path)


def test_another_workspace_and_its_data_settings(workspace, tmp_path):
    write_run(tmp_path / "runs" / "ce-seed0", "ce", 0, 1.5)
    (tmp_path / "config.yaml").write_text("plan: {sets_per_pair: 4}\nresources: {mix: {cpus: 1}}\n")
    trained = [find("ce-seed0", workspace), find(f"{tmp_path}:ce", workspace)]
    assert changed_settings(trained) == {"plan.sets_per_pair": [None, "4"]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ce"], "two or more"),
        (["ce", "ce"], "ce is given twice"),
        (["ce", "focal"], "focal: no finished method, run or trial of that name"),
        (["ce", "trial-3"], "holds no finished training"),
        (["ce", "nowhere:ce"], "nowhere is not a folder"),
        (["ce-seed0", "trial-9"], "there are better, ce, same, short, trial-0"),
    ],
)
def test_names_that_cannot_be_compared(workspace, names, message):
    with pytest.raises(InputError, match=message):
        compare(names, workspace, DRAWS)


def test_no_seed_in_common(workspace, tmp_path):
    for seed in (5, 6):
        write_run(tmp_path / "runs" / f"ce-seed{seed}", "ce", seed, 1.0)
    with pytest.raises(InputError, match=r"no seed in common: ce has 0, 1, 2; .* has 5, 6"):
        compare(["ce", f"{tmp_path}:ce"], workspace, DRAWS)


def test_runs_of_one_method_with_other_settings(workspace, tmp_path):
    write_run(tmp_path / "runs" / "ce-seed0", "ce", 0, 1.0)
    write_run(tmp_path / "runs" / "ce-seed1", "ce", 1, 1.0, learning_rate=0.3)
    with pytest.raises(InputError, match=r"ce-seed1 has other settings than ce-seed0 \(optimizer.learning_rate 0.1 -> 0.3\)"):
        compare([f"{tmp_path}:ce", "ce"], workspace, DRAWS)


def test_runs_of_other_data_are_refused(workspace, tmp_path):
    write_run(tmp_path / "runs" / "ce-seed0", "ce", 0, 1.0, labels_of(7))
    with pytest.raises(InputError, match="was measured on other test images or labels than ce-seed0"):
        compare(["ce-seed0", f"{tmp_path}:ce-seed0"], workspace, DRAWS)


def test_labels_that_were_made_anew_since_are_told(workspace, tmp_path):
    """Of ``better`` the seeds 0 and 2, of ``other`` all; nothing is known of ``same``, and trials have labels of their own."""
    root = tmp_path / "workspace"
    shutil.copytree(workspace, root)
    schema, there, now = tables.annotations(CLASSES), Workspace(root), Calibration("none")
    tables.write(pl.DataFrame(schema=dict(schema)), part_path(there.annotations("teacher"), 0), schema, {KEY: "now"})
    storage.write_json(there.annotator("teacher") / "calibration.json", asdict(now))
    mixed = {"annotator": "teacher", "images": "semantic"}
    for seed in range(3):
        write_run(root / "runs" / f"other-seed{seed}", "other", seed, 1.0, mixed=mixed)
        write_run(root / "runs" / f"better-seed{seed}", "better", seed, 2.0, mixed=mixed)
        for method, key in (("other", "then"), ("better", "now" if seed == 1 else "then")):
            add(root / "runs" / f"{method}-seed{seed}", labels=label_digest(key, now))
    write_run(root / "tune" / "trials" / "0000" / "seed0", "csm", 0, 1.0, mixed=mixed)
    add(root / "tune" / "trials" / "0000" / "seed0", labels="then")
    compared = compare(["ce", "same", "better", "other"], root, DRAWS)
    told = "trained on soft labels that were made anew since: better (seed 0, 2), other; csm train trains on the new ones"
    assert told in notes(compared)
    assert told in page(compared)
    assert [run["old_labels"] for run in as_json(compared)["runs"]] == [[], [], [0, 2], [0, 1, 2]]
    assert not any("anew" in line for line in notes(compare(["ce-seed0", "better-seed1", "trial-0"], root, DRAWS)))
    shutil.rmtree(there.annotations("teacher"))
    assert not any("anew" in line for line in notes(compare(["ce", "other"], root, DRAWS)))


def add(folder, **values):
    storage.write_json(folder / "run.json", {**storage.read_json(folder / "run.json"), **values})


def test_the_page_escapes_names_and_loads_nothing(compared, workspace, tmp_path):
    odd = tmp_path / "<b>odd"
    write_run(odd, "ce", 0, 1.0)
    html = page(compare(["ce-seed0", str(odd)], workspace, DRAWS))
    assert "&lt;b&gt;odd" in html
    assert "<b>odd" not in html
    assert "http" not in html
    assert page(compared).count('role="img"') == 3


def test_the_command_line(workspace, tmp_path):
    file = tmp_path / "new" / "compare.html"
    run = CliRunner().invoke(cli, ["compare", "ce", "better", "--workspace", str(workspace), "--html", str(file), "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["baseline"], result["split"], result["images"]) == ("ce", "test", IMAGES)
    assert result["configuration"]["optimizer.learning_rate"] == ["0.1", "0.2"]
    assert [each["seeds"] for each in result["runs"]] == [[0, 1, 2], [0, 1, 2]]
    assert "better against ce: 300 test images, 3 seeds" in run.stdout
    assert file.is_file()


def test_values_for_programs_are_json(compared):
    assert json.loads(json.dumps(as_json(compared)))["runs"][0]["seconds"] == 11.0


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_the_page_in_a_browser(compared, tmp_path, width, dark):
    file = tmp_path / "compare.html"
    file.write_text(page(compared))
    with Page(tmp_path / "profile", width, dark=dark) as browser:
        browser.open(file.as_uri())
        browser.wait("document.querySelectorAll('figure svg').length === 3")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(16, 23, 30)" if dark else "rgb(255, 255, 255)")
        assert browser.errors == []
