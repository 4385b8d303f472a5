"""Exports that are refused, in one line, with nothing written."""

import json

import polars as pl
import pytest

from cluster.shards import part_path
from csm import tables
from csm.export import WORK
from csm.export_card import CARD
from tests.flows.export.conftest import files


def test_unknown_names_are_told_the_known_ones(refused, tmp_path):
    assert refused("zip") == "--format zip: unknown; one of image-folder, webdataset, huggingface, onnx, safetensors, mlflow"
    message = refused("webdataset", "--annotator", "clip")
    assert message == "--annotator clip: unknown; one of projection, auto, teacher, none"
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_refused_and_left_alone(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert refused("webdataset") == f"--output {tmp_path / 'out'}: is not empty; choose a new or empty folder"
    assert files(tmp_path / "out") == {"mine": b"mine"}


@pytest.mark.parametrize("finished", [True, False])
def test_another_export_is_refused_and_left_alone(call, refused, finished, snapshot, tmp_path):
    out = tmp_path / "out"
    assert call("webdataset")[0] == 0
    if not finished:
        (out / WORK).mkdir()
        (out / CARD).rename(out / WORK / CARD)
    before = snapshot(out)
    message = refused("webdataset", "--annotator", "projection")
    assert message.startswith(
        f"--output {out}: holds another export (annotator teacher -> projection; calibration.calibrator temperature -> scale;"
    )
    assert message.endswith("; choose a new or empty folder")
    assert "format webdataset -> huggingface" in refused("huggingface")
    assert "shard_rows 10000 -> 9" in refused("webdataset", "--shard-rows", 9)
    assert snapshot(out) == before


def test_a_damaged_card_is_named(call, refused, tmp_path):
    assert call("webdataset")[0] == 0
    for text, words in (("{", "is not valid JSON"), ("[]", "holds another export (its card is damaged)")):
        (tmp_path / "out" / CARD).write_text(text)
        assert words in refused("webdataset")


@pytest.mark.parametrize("below", ["file", "file/out"])
def test_a_path_that_cannot_be_a_folder(refused, below, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused("webdataset", output=tmp_path / below).startswith(
        {"file": f"--output {tmp_path}/file: is a file; choose", "file/out": f"{tmp_path}/file/out"}[below]
    )


def test_a_url_is_refused(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert refused("webdataset", output="s3://bucket/out").endswith("URLs are not supported yet; give a folder")
    assert not list(tmp_path.iterdir())


def test_no_workspace(refused, tmp_path):
    assert refused("webdataset", workspace=tmp_path / "none").startswith(f"--workspace {tmp_path / 'none'}: does not exist; run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda w: part_path(w / "mixed", 3).unlink(),
            "export needs mix, which lacks {w}/mixed/part-00000003.parquet: run `csm mix`",
        ),
        (
            lambda w: part_path(w / "annotations" / "teacher", 2).write_bytes(b"PAR1 cut"),
            "export needs annotate, which has a damaged {w}/annotations/teacher/part-00000002.parquet: run `csm annotate`",
        ),
        (lambda w: (w / "stages" / "annotate.json").unlink(), "export needs annotate, which was not run in this workspace: run"),
        (lambda w: undone(w / "stages" / "mix.json"), "export needs mix, which was interrupted: run `csm mix`"),
        (lambda w: (w / "plan.parquet").unlink(), "export needs plan, which lacks {w}/plan.parquet: run `csm plan`"),
    ],
)
def test_what_is_not_done_is_named_with_the_command_that_does_it(refused, workspace, damage, message, tmp_path):
    damage(workspace)
    assert refused("webdataset", workspace=workspace).startswith(message.format(w=workspace))
    assert not (tmp_path / "out").exists()


def test_other_settings_than_the_images_were_made_with(refused, tmp_path):
    message = refused("webdataset", "--set", "plan.ratios=4")
    assert message.startswith("export needs plan, which was run with other settings (plan.ratios 3 -> 4): run `csm plan`")


def test_a_part_that_lost_rows_is_named_and_nothing_is_finished(call, workspace, tmp_path):
    path = part_path(workspace / "annotations" / "teacher", 4)
    pl.read_parquet(path)[1:].write_parquet(path, metadata=tables.metadata(path))
    code, _, err = call("webdataset", "--shard-rows", 6, workspace=workspace)
    assert code == 2
    assert err.splitlines()[-1].startswith(
        "csm: shard 4: 1 of 6 planned images are not mixed and annotated: remove its part files"
    )
    assert len(list((tmp_path / "out").glob("*.tar"))) == 4
    assert not (tmp_path / "out" / CARD).exists()


def undone(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "done": False}))


def test_a_kind_that_is_not_planned_is_refused(refused):
    assert refused("huggingface", "--kind", "pixel") == "--kind: unknown 'pixel'; one of semantic"
