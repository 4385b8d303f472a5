"""What an export holds: every image once with its label, in every format and of every kind."""

import io
import json
import shutil
import tarfile
from dataclasses import asdict, replace

import numpy as np
import polars as pl
import pytest
from PIL import Image

from csm import tables
from csm.export import FORMATS, WORK
from csm.export_card import CARD
from flows.artifacts import Workspace
from flows.config import load_config, plain
from flows.reuse import run_stage
from flows.run import STAGES
from flows.stages import Context
from tests.flows.export.conftest import CALIBRATIONS, NAMES, SHAPE, WORKERS, NoTracker, files


def exported(form, root):
    """mix_id -> (PNG, row), read with none of csm's code; every mix_id once."""
    if form == "image-folder":
        rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
        samples = [((root / row["file_name"]).read_bytes(), row) for row in rows]
        assert len(list((root / "images").rglob("*.*"))) == len(rows)
    elif form == "webdataset":
        samples = []
        for path in sorted(root.glob("*.tar")):
            with tarfile.open(path) as tar:
                content = [tar.extractfile(member).read() for member in tar]
            samples += [(png, json.loads(text)) for png, text in zip(content[::2], content[1::2], strict=True)]
    else:
        rows = pl.read_parquet(sorted((root / "data").glob("*.parquet"))).to_dicts()
        samples = [(row["image"]["bytes"], row) for row in rows]
    found = {row["mix_id"]: (png, row) for png, row in samples}
    assert len(found) == len(samples)
    return found


def sigmoid_or_softmax(root, annotator):
    """mix_id -> soft label, from the definitions, row by row."""
    pairs = {row["mix_id"]: (row["class_a"], row["class_b"]) for row in pl.read_parquet(root / "plan.parquet").to_dicts()}
    labels = {}
    for mix_id, share, posterior in pl.read_parquet(root / "annotations" / annotator / "*.parquet").iter_rows():
        label = np.zeros(3)
        if annotator == "teacher":
            label = np.exp(np.float64(posterior) / 1.7)
            label /= label.sum()
        else:
            a, b = pairs[mix_id]
            label[a] = 1 / (1 + np.exp(-4.0 * (np.float64(np.float32(share)) - 0.5)))
            label[b] = 1 - label[a]
        labels[mix_id] = label
    return labels


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("annotator", ["teacher", "projection"])
def test_every_image_is_exported_once_with_its_own_label(call, made, form, annotator, tmp_path):
    code, out, err = call(form, "--annotator", annotator, "--shard-rows", 10, "--json")
    assert code == 0, err
    images = dict(pl.read_parquet(made / "mixed" / "*.parquet").iter_rows())
    labels = sigmoid_or_softmax(made, annotator)
    found = exported(form, tmp_path / "out")
    assert set(found) == set(images)
    for mix_id, (png, row) in found.items():
        assert np.asarray(Image.open(io.BytesIO(png))).tobytes() == images[mix_id]
        np.testing.assert_allclose(row["soft_label"], labels[mix_id], rtol=1e-6)
        assert row["label"] == labels[mix_id].argmax()
    result = json.loads(out.splitlines()[-1])
    assert result.pop("seconds") >= 0
    assert result == {
        "workspace": str(made), "output": str(tmp_path / "out"), "format": form, "annotator": annotator, "rows": 45,
        "kind": "semantic", "reused": False,
    }  # fmt: skip


@pytest.mark.parametrize("form", list(FORMATS))
def test_the_card_says_where_it_comes_from(call, form, tmp_path):
    assert call(form)[0] == 0
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert (card["format"], card["rows"], card["shard_rows"], card["config"]) == (form, 45, 10000, "pets")
    assert (card["dataset"], card["shape"], card["class_names"]) == ("pets", list(SHAPE), list(NAMES))
    assert (card["generator"], card["annotator"]) == ("unet", "teacher")
    assert card["calibration"] == plain(asdict(CALIBRATIONS["teacher"]))
    assert card["plan"]["ratios"] == 3
    assert set(card["digests"]) == {"prepare", "generator", "plan", "mix", "fit-annotators", "annotate"}
    assert not (tmp_path / "out" / WORK).exists()


def test_auto_is_the_one_that_was_chosen(call, tmp_path):
    for number, options in enumerate([(), ("--annotator", "auto"), ("--annotator", "teacher")]):
        code, out, err = call("huggingface", *options, "--json", output=tmp_path / str(number))
        assert code == 0, err
        assert json.loads(out.splitlines()[-1])["annotator"] == "teacher"
    assert files(tmp_path / "0") == files(tmp_path / "1") == files(tmp_path / "2")


def test_the_ratio_alone_needs_no_annotation(call, workspace, tmp_path):
    shutil.rmtree(workspace / "annotations")
    shutil.rmtree(workspace / "annotators")
    assert call("webdataset", "--annotator", "none", workspace=workspace)[0] == 0
    _, row = next(iter(exported("webdataset", tmp_path / "out").values()))
    assert set(row) == {"mix_id", "class_a", "class_b", "name_a", "name_b", "lam"}
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert (card["annotator"], card["calibration"]) == (None, None)
    assert set(card["digests"]) == {"prepare", "generator", "plan", "mix"}


@pytest.mark.parametrize("rows", [1, 6, 7, 44, 45, 46])
def test_files_of_any_size_hold_the_same_rows_in_the_same_order(call, made, rows, tmp_path):
    assert call("webdataset", "--annotator", "none", "--shard-rows", rows)[0] == 0
    assert len(list((tmp_path / "out").glob("*.tar"))) == -(-45 // rows)
    planned = pl.read_parquet(made / "plan.parquet")["mix_id"].to_list()
    assert list(exported("webdataset", tmp_path / "out")) == planned


def test_only_mixtures_are_exported_unless_another_kind_is_asked_for(call, config, tmp_path):
    root, kinds = tmp_path / "w", "plan.kinds=[semantic, pixel, real]"
    root.mkdir()
    stages = {name: replace(STAGES[name], run=run, check=lambda context: None) for name, run in WORKERS.items()}
    context = Context(load_config(str(config), [kinds]), Workspace(root), stages, _tracker=NoTracker())
    for name in stages:
        run_stage(context, name)
    planned = tables.read_plan(root / "plan.parquet")
    for kind, count in [("semantic", 45), ("pixel", 45), ("real", 3)]:
        asked = ["--kind", kind] if kind != "semantic" else []
        output = tmp_path / kind
        code, out, err = call("huggingface", "--set", kinds, "--json", *asked, output=output, workspace=root)
        assert code == 0, err
        result = json.loads(out.splitlines()[-1])
        assert (result["kind"], result["rows"]) == (kind, count)
        assert set(exported("huggingface", output)) == set(planned.filter(kind=kind)["mix_id"])
        assert ("made by semantic mixing" in (output / "README.md").read_text()) == (kind == "semantic")
    assert "# Real images of pets" in (tmp_path / "real" / "README.md").read_text()
