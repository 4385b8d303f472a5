"""What a training leaves: its files, predictions and record."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl
import pytest
import torch

from csm import storage
from csm.classifiers import load_classifier
from csm.datasets import RealDataset
from csm.methods import Method
from csm.runs import fit_run, is_finished
from tests.csm.runs.conftest import CSM, OPTIMIZER, contents, predictions_of, spec_of


def test_a_run_leaves_its_files_and_nothing_else(workspace: Path, settings: Method) -> None:
    spec = spec_of(workspace, settings=settings)
    spec = replace(spec, mixed=replace(spec.mixed, labels="of then") if spec.mixed else None)
    assert not is_finished(spec)
    fit_run(spec)
    assert is_finished(spec)
    names = sorted(path.name for path in spec.directory.iterdir())
    assert names == ["history.json", "model.json", "model.safetensors", "predictions.parquet", "run.json"]
    record = storage.read_json(spec.directory / "run.json")
    assert (record["run"], record["method"], record["seed"], record["fingerprint"]) == ("ce-seed0", "ce", 0, "f0")
    assert record["labels"] == ("of then" if settings.mixed else "")
    assert record["seconds"] > 0
    assert record["optimizer"] == json.loads(json.dumps(asdict(OPTIMIZER)))
    assert [row["epoch"] for row in storage.read_json(spec.directory / "history.json")] == [1, 2, 3, 4]


def test_predictions_are_those_of_the_saved_model_on_every_held_out_image(workspace: Path, settings: Method) -> None:
    spec = spec_of(workspace, settings=settings)
    fit_run(spec)
    frame = predictions_of(spec)
    data = RealDataset.load(workspace)
    model = load_classifier(spec.directory)
    held_out = data.frame.filter(pl.col("split") != "train")
    assert len(held_out) == 18
    assert (
        frame.select("split", "image_id", "label")
        .sort("image_id")
        .equals(held_out.select("split", "image_id", "label").sort("image_id"))
    )
    assert frame["run"].unique().to_list() == ["ce-seed0"]
    logits = {row["image_id"]: row["logits"] for row in frame.rows(named=True)}
    for name in ("val", "test"):
        images, _ = data.split(name)
        ids = sorted(data.frame.filter(pl.col("split") == name)["image_id"])
        with torch.no_grad():
            assert torch.equal(torch.tensor([logits[number] for number in ids]), model(images))


def test_held_out_images_are_normalised_by_the_train_split(workspace: Path) -> None:
    spec = spec_of(workspace)
    fit_run(spec)
    data = RealDataset.load(workspace)
    pixels = data.split("train")[0].double() / 255
    saved = load_classifier(spec.directory).spec
    assert saved.mean == pytest.approx([pixels.mean().item()], abs=1e-9)
    assert saved.std == pytest.approx([pixels.std(correction=0).item()], abs=1e-9)


def test_a_run_is_a_function_of_its_spec(workspace: Path, settings: Method) -> None:
    first, second = (replace(spec_of(workspace, settings=settings), directory=workspace / name) for name in ("one", "two"))
    fit_run(first)
    torch.manual_seed(77)
    fit_run(second)
    assert contents(first) == contents(second)


def test_the_record_can_be_read_by_other_tools(workspace: Path) -> None:
    fit_run(spec_of(workspace, settings=CSM))
    record = json.loads((workspace / "runs" / "ce" / "run.json").read_text())
    assert record["settings"]["mixed"]["annotator"] == "teacher"
