"""`csm predict`, `csm check` and `csm calibrate` as a user calls them, on a small model with known answers."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from csm import storage, tables
from csm.calibrated import calibrated, load_calibrated
from csm.classifiers import ClassifierSpec, build_classifier, load_classifier
from csm.posthoc import Posthoc, apply_posthoc

pytestmark = pytest.mark.usefixtures("one_thread")  # small arrays: threads that wait for each other cost more than they save

NAMES = ("cat", "dog [big]", "owl")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier of 8 x 8 grey images with random weights, and a temperature."""
    torch.manual_seed(0)
    classifier = build_classifier(ClassifierSpec("small-cnn", {}, 1, NAMES, (0.5,), (0.25,)))
    with torch.no_grad():
        for parameter in classifier.network.head.parameters():
            parameter.mul_(12)  # so that confidences differ
    folder = tmp_path_factory.mktemp("model") / "model"
    calibrated(classifier.eval(), (8, 8, 1), Posthoc("temperature", {"temperature": 1.5}), {"run": "test"}).save(folder)
    return folder


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, pictures):
    """Six of them as files, and one that is none."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for row in range(6):
        Image.fromarray(pictures[row, ..., 0]).save(tmp_path / "images" / ("deep" if row % 2 else ".") / f"{row}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"nonsense")
    return tmp_path / "images"


def last(out):
    return json.loads(out.splitlines()[-1])


def labelled(path, model, pictures, wrong=0.0):
    """An npz whose labels are drawn from the model's own probabilities, a share of them replaced by class 0."""
    draw = np.random.default_rng(1)
    probs = load_calibrated(model).predict(torch.from_numpy(pictures)).double().numpy()
    labels = np.array([draw.choice(3, p=p / p.sum()) for p in probs])
    labels[draw.random(len(labels)) < wrong] = 0
    np.savez(path, images=pictures, labels=labels)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_predict_writes_what_the_model_says_and_lists_bad_files(call, model, folder, pictures, suffix):
    output = folder.parent / f"out.{suffix}"
    code, out, err = call("predict", folder, "--model", model, "--output", output, "--batch-size", "2", "--json")
    assert code == 0, err
    assert "1 of 7 images could not be read" in err
    assert {key: last(out)[key] for key in ("images", "failed", "output")} == {"images": 7, "failed": 1, "output": str(output)}
    read = {"parquet": pl.read_parquet, "csv": pl.read_csv, "jsonl": pl.read_ndjson}[suffix]
    frame = read(output)
    assert frame.columns == ["file", "class", "label", "confidence", "entropy", *(f"p_{name}" for name in NAMES), "error"]
    assert frame["error"].drop_nulls().to_list()[0].startswith(f"cannot read image {folder}/bad.png")
    assert frame.filter(pl.col("error").is_not_null())["class"].to_list() == [None]
    good = frame.filter(pl.col("error").is_null())
    rows = [int(re.search(r"(\d)\.png", name)[1]) for name in good["file"]]
    assert rows == [0, 2, 4, 1, 3, 5]  # a folder's own files come first
    probs = load_calibrated(model).predict(torch.from_numpy(pictures[rows])).numpy()
    np.testing.assert_allclose(good.select(f"p_{name}" for name in NAMES).to_numpy(), probs, atol=1e-6)
    np.testing.assert_allclose(good["confidence"].to_numpy(), probs.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(good["entropy"].to_numpy(), -(probs * np.log(probs)).sum(axis=1), atol=1e-5)
    assert good["class"].to_list() == [NAMES[k] for k in probs.argmax(axis=1)]
    assert good["label"].to_list() == probs.argmax(axis=1).tolist()


def test_predict_without_output_shows_the_first_rows(call, model, tmp_path, pictures):
    np.savez(tmp_path / "a.npz", images=pictures[:30])
    code, out, _ = call("predict", tmp_path / "a.npz", "--model", model)
    assert code == 0
    assert "The first 20 of 30 images" in out
    assert "images[19]" in out
    assert "images[20]" not in out


def test_predict_takes_names_from_stdin_and_strict_fails(call, model, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{folder}/0.png\n\n{folder}/bad.png\n{folder}/gone.png\n"))
    code, out, err = call("predict", "-", "--model", model, "--strict", "--json")
    assert code == 1
    assert (last(out)["images"], last(out)["failed"]) == (3, 2)
    assert "gone.png" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{folder}/bad.png"], "cannot read image"),
        (["{folder}/bad.png", "{folder}/gone.png", "--output", "{folder}/x.csv"], "not one of 2 images could be read"),
        (["{folder}", "--output", "{folder}/x.txt"], r"expected the name of a file that ends in .parquet, .csv, .jsonl"),
        (["{folder}", "--device", "cuda"], "torch finds no GPU here"),
        (["{folder}", "--model", "{folder}"], r"model\.json"),
    ],
)
def test_what_predict_refuses_in_one_line(call, model, folder, arguments, said):
    if "cuda" in arguments and torch.cuda.is_available():
        said, arguments = "no image below", ["{folder}/deep/deeper"]
    arguments = [argument.format(folder=folder) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(model)]
    code, out, err = call("predict", *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(said, err)
    assert not (folder / "x.csv").exists()


def test_check_passes_labels_drawn_from_the_model_and_writes_the_report(call, model, tmp_path, pictures):
    data = labelled(tmp_path / "a.npz", model, pictures)
    output = tmp_path / "report"
    code, out, err = call("check", "--model", model, "--data", data, "--output", output, "--draws", "200", "--json")
    assert code == 0, err
    result = last(out)
    assert (result["passed"], result["images"], result["classes"]) == (True, 300, 3)
    assert result["metrics"]["ece"]["low"] == 0
    assert result["chance"]["low"] < result["metrics"]["ece"]["value"] < 2 * result["chance"]["high"]
    assert "by chance alone" in out
    assert storage.read_json(output / "check.json")["metrics"] == result["metrics"]
    assert Image.open(output / "reliability.png").size[0] > 200
    page = (output / "report.html").read_text()
    assert "Is this model calibrated?" in page
    assert "by chance alone" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)  # nothing is loaded from elsewhere


def test_check_fails_with_a_sentence_where_the_ece_is_surely_above(call, model, tmp_path, pictures):
    data = labelled(tmp_path / "a.npz", model, pictures, wrong=0.9)
    code, out, _ = call("check", "--model", model, "--data", data, "--draws", "200", "--json")
    assert code == 1
    assert "Not calibrated: the ECE is at least" in out
    assert last(out)["state"] == "above"
    assert last(out)["metrics"]["ece"]["low"] > 0.05
    code, out, _ = call("check", "--model", model, "--data", data, "--draws", "200", "--threshold", "1")
    assert code == 0
    assert "Calibrated within the threshold" in out


def test_check_matches_classes_by_name(call, model, tmp_path, pictures):
    for row, name in enumerate(("owl", "cat", "owl", "owl")):
        (tmp_path / "d" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[row, ..., 0]).save(tmp_path / "d" / name / f"{row}.png")
    code, out, _ = call("check", "--model", model, "--data", tmp_path / "d", "--json", "--draws", "100", "--threshold", "1")
    assert code == 0
    top = load_calibrated(model).predict(torch.from_numpy(pictures[:4])).argmax(dim=1).numpy()
    assert last(out)["metrics"]["accuracy"]["value"] == (top == [2, 0, 2, 2]).mean()
    (tmp_path / "d" / "emu").mkdir()
    Image.fromarray(pictures[0, ..., 0]).save(tmp_path / "d" / "emu" / "0.png")
    code, out, err = call("check", "--model", model, "--data", tmp_path / "d")
    assert (code, out) == (2, "")
    assert "has class 'emu', which the model does not know; it knows cat, dog [big], owl" in err


def test_what_check_refuses(call, model, tmp_path, pictures, folder):
    np.savez(tmp_path / "b.npz", images=pictures[:2], labels=[0, 3])
    (folder / "deep" / "bad.png").write_bytes(b"nonsense")
    for arguments, said in (
        (["--data", tmp_path / "b.npz"], "class 3, which the model does not know"),
        (["--data", tmp_path / "gone"], "does not exist"),
        (["--data", tmp_path / "b.npz", "--threshold", "5"], "--threshold 5.0: expected a fraction"),
        (["--data", tmp_path / "b.npz", "--output", tmp_path / "b.npz"], "is a file"),
        (["--data", folder], "cannot read image|does not know"),
    ):
        code, out, err = call("check", "--model", model, *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert re.search(said, err)


@pytest.fixture(scope="module")
def logits():
    """Twice too large logits, and labels drawn from half of them."""
    draw = np.random.default_rng(2)
    half = draw.normal(0, 1.5, (240, 3))
    probs = torch.from_numpy(half).softmax(dim=1).numpy()
    return 2 * half, np.array([draw.choice(3, p=p) for p in probs])


def test_calibrate_finds_the_temperature_and_measures_out_of_fold(call, tmp_path, logits):
    np.savez(tmp_path / "l.npz", logits=logits[0], labels=logits[1])
    output = tmp_path / "out"
    arguments = (
        "--logits",
        tmp_path / "l.npz",
        "--posthoc",
        "temperature,isotonic",
        "--draws",
        "100",
        "--output",
        output,
        "--json",
    )
    code, out, err = call("calibrate", *arguments)
    assert code == 0, err
    result = last(out)
    assert (result["chosen"], list(result["methods"])) == ("temperature", ["none", "temperature", "isotonic"])
    before, after = (result["methods"][name]["metrics"]["nll"] for name in ("none", "temperature"))
    assert before["value"] == pytest.approx(
        torch.nn.functional.cross_entropy(torch.from_numpy(logits[0]), torch.from_numpy(logits[1])).item()
    )
    assert after["value"] < before["value"]
    assert re.search(
        r"temperature has the least cross-fitted NLL\. Before and after: NLL \S+ → \S+ nats, ECE .*, accuracy \S+ % as before",
        out,
    )
    posthoc = storage.read_record(output / "calibration.json", Posthoc)
    assert posthoc.values["temperature"] == pytest.approx(2, rel=0.25)
    frame = pl.read_parquet(output / "probabilities.parquet")
    assert frame.columns == ["row", "label", "p_0", "p_1", "p_2"]
    assert (frame["row"].to_list(), frame["label"].to_list()) == (list(range(240)), logits[1].tolist())
    probs = frame.select("p_0", "p_1", "p_2").to_numpy()
    nll = -np.log(probs[range(240), logits[1]]).mean()
    assert nll == pytest.approx(after["value"], rel=1e-5)
    on_itself = -apply_posthoc(torch.from_numpy(logits[0]), posthoc)[range(240), logits[1]].mean().item()
    assert on_itself < nll  # what is measured was not fitted to
    page = (output / "report.html").read_text()
    assert "chosen" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)


def test_calibrate_measures_on_a_test_file_or_split(call, tmp_path, logits):
    scores, labels = logits
    np.savez(tmp_path / "val.npz", logits=scores[:160], labels=labels[:160])
    np.savez(tmp_path / "test.npz", probs=torch.from_numpy(scores[160:]).softmax(dim=1).numpy(), labels=labels[160:])
    split = pl.DataFrame({"split": ["val"] * 160 + ["test"] * 80, "label": labels, "logits": scores.tolist()})
    split.write_parquet(tmp_path / "both.parquet")
    options = ("--posthoc", "temperature", "--draws", "100", "--json")
    _, out, _ = call("calibrate", "--logits", tmp_path / "val.npz", "--test", tmp_path / "test.npz", *options)
    _, same, _ = call("calibrate", "--logits", tmp_path / "both.parquet", "--output", tmp_path / "out", *options)
    one, two = last(out), last(same)
    assert (one["fitted_on"], one["measured_on"], two["test"]) == (160, 80, "split test")
    for name in ("none", "temperature"):
        assert one["methods"][name]["metrics"]["nll"]["value"] == pytest.approx(two["methods"][name]["metrics"]["nll"]["value"])
    assert pl.read_parquet(tmp_path / "out" / "probabilities.parquet")["row"].to_list() == list(range(160, 240))


def test_calibrate_leaves_out_what_few_rows_cannot_tell(call, tmp_path, logits):
    np.savez(tmp_path / "l.npz", logits=logits[0][:11], labels=logits[1][:11])
    code, out, err = call("calibrate", "--logits", tmp_path / "l.npz", "--draws", "100", "--json")
    assert code == 0
    assert list(last(out)["methods"]) == ["none", "temperature", "ensemble-temperature"]
    assert "left out, as 11 rows are too few: vector, matrix" in err


def test_what_calibrate_refuses(call, tmp_path, logits):
    scores, labels = logits
    np.savez(tmp_path / "l.npz", logits=scores[:11], labels=labels[:11])
    np.savez(tmp_path / "one.npz", logits=scores, labels=np.zeros(240, dtype=int))
    np.savez(tmp_path / "wide.npz", logits=np.zeros((5, 4)), labels=np.zeros(5, dtype=int))
    np.savez(tmp_path / "nan.npz", logits=np.full((5, 4), np.nan), labels=np.zeros(5, dtype=int))
    file = tmp_path / "l.npz"
    for arguments, said in (
        (["--logits", tmp_path / "gone.npz"], "does not exist"),
        (["--logits", tmp_path / "nan.npz"], "nan or inf in 5 of 5 rows"),
        (["--logits", tmp_path / "one.npz"], "all 240 labels are 0: at least 2 classes"),
        (["--logits", file, "--test", tmp_path / "wide.npz"], "logits of 4 classes; .* has 3"),
        (["--logits", file, "--posthoc", "platt"], "--posthoc: unknown 'platt'; one of none, temperature"),
        (["--logits", file, "--posthoc", "vector"], "11 rows are too few to fit and measure vector"),
        (["--logits", file, "--output", file], "is a file"),
    ):
        code, out, err = call("calibrate", *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert re.search(said, err)


def test_calibrate_starts_neither_ray_nor_mlflow():
    code = "import flows.calibrate, flows.check, flows.predict, sys; print([m for m in ('ray', 'mlflow', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_three_on_the_results_of_a_run(call, finished, tmp_path):
    run = finished.root / "runs" / "cross-entropy-seed0"
    classifier = load_classifier(run)
    calibrated(classifier, (8, 8, 1), Posthoc("none", {}), {"run": "cross-entropy-seed0"}).save(tmp_path / "model")
    code, out, err = call("check", "--model", tmp_path / "model", "--data", finished.root, "--draws", "100", "--json")
    assert code in (0, 1), err
    checked = last(out)["metrics"]
    measured = tables.read(finished.root / "metrics.parquet", tables.METRICS).filter(
        run="cross-entropy-seed0", split="test", posthoc="none"
    )
    for name, value in measured.select("metric", "value").iter_rows():
        assert checked[name]["value"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    options = ("--posthoc", "temperature", "--draws", "100", "--json")
    code, out, err = call("calibrate", "--logits", run / "predictions.parquet", *options)
    assert code == 0, err
    assert last(out)["measured_on"] == last(out)["methods"]["none"]["images"]
    assert last(out)["methods"]["none"]["metrics"]["nll"]["value"] == pytest.approx(checked["nll"]["value"], rel=1e-4)
    code, out, err = call("predict", finished.root, "--model", tmp_path / "model", "--output", tmp_path / "all.parquet")
    assert code == 0, err
    info = storage.read_json(finished.root / "dataset.json")
    assert len(pl.read_parquet(tmp_path / "all.parquet")) == sum(info["counts"].values())
