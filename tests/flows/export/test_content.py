"""`csm export` on a workspace whose stages are real but whose images are drawn by the test."""

import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import polars as pl
import pytest
from PIL import Image

from cluster.shards import part_path, plan_shards, read_plan, write_part
from csm import storage, tables
from csm.datasets.real import build
from csm.export import CARD, FORMATS, WORK, encode
from csm.pairs import all_pairs
from csm.planning import write_plan
from csm.reannotation import Calibration
from flows import cli
from flows.annotate import _keys
from flows.artifacts import Workspace
from flows.config import load_config, plain
from flows.mix import mixed_keys
from flows.reuse import run_stage
from flows.run import STAGES
from flows.stages import Context, Made

SHAPE, NAMES = (6, 5, 3), ("black cat", "dog/wolf", "größe")
CALIBRATIONS = {
    "projection": Calibration("scale", pair=True, scale=4.0),
    "teacher": Calibration("temperature", images=30, nll_before=1.0, nll_after=0.9, temperature=1.7),
}
SETTINGS = (  # 45 rows in 8 shards of 6 (the last has 3)
    "plan.ratios=3", "plan.sets_per_pair=5", "plan.shard_rows=7", "annotate.annotator=auto", "annotate.candidates=[teacher]",
)  # fmt: skip


class NoTracker:
    """Keeps nothing."""

    def __getattr__(self, name):
        return lambda *arguments, **settings: ""


def prepare(context, record):
    draw = np.random.default_rng(0)
    splits = np.array(["train", "val", "test"] * 3)
    data = build("pets", draw.integers(0, 256, (9, *SHAPE), np.uint8), np.repeat([0, 1, 2], 3), splits, NAMES)
    data.save(context.workspace.root)
    return Made(9, data.info.digest)


def fit_generator(context, record):
    storage.write_json(context.workspace.generator / "generator.json", {"kind": "unet"})
    return Made(1, "generator")


def plan(context, record):
    labels = np.array([0, 1, 2])
    return Made(
        *write_plan(context.workspace.plan, all_pairs(3), record.inputs["prepare"], "generator", context.config.plan, labels)
    )


def mix(context, record):
    draw, keys = np.random.default_rng(1), mixed_keys(context.workspace, record)
    for shard in plan_shards(context.workspace.plan):
        rows = read_plan(context.workspace.plan, shard).reverse()
        images = [draw.integers(0, 256, SHAPE, np.uint8).tobytes() for _ in range(len(rows))]
        frame = rows.select("mix_id", image=pl.Series(images))
        write_part(frame, context.workspace.mixed, shard, tables.MIXED, keys[rows["kind"][0]])
    return Made(45, record.fingerprint)


def fit_teacher(context, record):
    for number in range(context.config.annotate.members):
        storage.write_json(context.workspace.teacher_member(number) / "run.json", {})
    return Made(4, "teacher")


def fit_annotators(context, record):
    for name, calibration in CALIBRATIONS.items():
        storage.write_json(context.workspace.annotator(name) / "calibration.json", asdict(calibration))
        storage.write_json(context.workspace.annotator(name) / "annotator.json", {"fingerprint": name})
    for name in ("classifier", "teacher"):
        context.workspace.encoder(name).mkdir(parents=True)
    storage.write_json(context.workspace.choice, {"chosen": "teacher", "reason": "", "candidates": {"teacher": 0.9}})
    return Made(2, "annotators")


def annotate(context, record):
    draw = np.random.default_rng(2)
    for name, calibration in CALIBRATIONS.items():
        keys = _keys(context.workspace, context.config, name)
        for shard, count in plan_shards(context.workspace.plan).items():
            rows = read_plan(context.workspace.plan, shard)
            posterior = np.log(draw.dirichlet(np.ones(3), count)).astype(np.float32)
            schema = tables.annotations(3)
            columns = {
                "mix_id": rows["mix_id"].shuffle(seed=shard),
                "lam_raw": pl.Series(draw.normal(size=count), dtype=pl.Float32),
                "log_posterior": pl.Series(
                    posterior if calibration.temperature else [None] * count, dtype=schema["log_posterior"]
                ),
            }
            write_part(pl.DataFrame(columns), context.workspace.annotations(name), shard, schema, keys[rows["kind"][0]])
    return Made(90, "annotations")


WORKERS = {
    "prepare": prepare, "generator": fit_generator, "fit-teacher": fit_teacher, "fit-annotators": fit_annotators, "plan": plan, "mix": mix,
    "annotate": annotate,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Path of the configuration with ``SETTINGS``."""
    path = tmp_path_factory.mktemp("config") / "pets.yaml"
    path.write_text(load_config("digits", SETTINGS).to_yaml().replace("name: digits", "name: pets"))
    return path


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """A workspace that is annotated; tests only read it."""
    root = tmp_path_factory.mktemp("made") / "w"
    stages = {name: replace(STAGES[name], run=run, check=lambda context: None) for name, run in WORKERS.items()}
    root.mkdir()
    context = Context(load_config(str(config)), Workspace(root), stages, _tracker=NoTracker())
    for name in stages:
        run_stage(context, name)
    return root


@pytest.fixture
def workspace(made, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "w")


@pytest.fixture
def call(config, made, capsys, monkeypatch, tmp_path):
    """``call(form, *options, output=, workspace=)`` runs `csm export`; gives exit code, stdout and stderr."""

    def run(form, *options, output=tmp_path / "out", workspace=made):
        arguments = ["export", "--config", config, "--workspace", workspace, "--format", form, "--output", output, *options]
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["csm", *arguments])
        try:
            cli.main(arguments)
        except SystemExit as ended:
            return (ended.code, *capsys.readouterr())
        return (0, *capsys.readouterr())

    return run


@pytest.fixture
def refused(call):
    """``refused(...)`` is the one line, without ``csm: ``, of an export that must be refused."""

    def run(*arguments, **places):
        code, out, err = call(*arguments, **places)
        assert (code, out) == (2, ""), err
        assert err.count("\n") == 1, err
        assert err.startswith("csm: ")
        return err.removeprefix("csm: ").rstrip("\n")

    return run


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


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


@contextmanager
def file_size_limit(size):
    """No file of this process may grow beyond ``size`` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


# Going on.


def test_a_finished_export_is_reused_and_not_written_again(call, snapshot, tmp_path):
    assert call("huggingface")[0] == 0
    before = snapshot(tmp_path / "out")
    code, out, err = call("huggingface", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["reused"] is True
    assert err == "export: reused, 45 images\n"
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("form", list(FORMATS))
def test_an_interrupted_export_goes_on_and_ends_as_if_undisturbed(call, form, monkeypatch, tmp_path):
    """Interrupted in the middle of the third piece; what was whole is not written again."""
    assert call(form, "--shard-rows", 10, output=tmp_path / "undisturbed")[0] == 0
    count = 0

    def interrupted(*arguments):
        nonlocal count
        for frame in encode(*arguments):
            count += 1
            if count == 6:
                raise KeyboardInterrupt
            yield frame

    out = tmp_path / "out"
    monkeypatch.setattr("flows.export.encode", interrupted)
    code, _, err = call(form, "--shard-rows", 10)
    assert code == 130
    assert err.splitlines()[-1] == "csm: interrupted; run the same command again to go on"
    assert not (out / CARD).exists()
    monkeypatch.undo()
    pieces = [out / FORMATS[form].piece(number, 5) for number in range(5)]
    assert [path.exists() for path in pieces] == [True, True, False, False, False]
    (pieces[0].parent / f".{pieces[2].name}.1.tmp").write_bytes(b"half")  # as a writer leaves it that was killed
    first = pieces[0]
    if form == "image-folder":  # whose pieces are gone in the end
        first = out / json.loads(pieces[0].read_text().split("\n")[0])["file_name"]
    written = first.stat().st_mtime_ns
    code, _, err = call(form, "--shard-rows", 10)
    assert code == 0
    assert err.startswith("export: going on\n")
    assert first.stat().st_mtime_ns == written
    assert files(out) == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("form", list(FORMATS))
def test_one_that_was_killed_while_it_finished_goes_on(call, form, monkeypatch, tmp_path):
    """Once before the card is written and once after, when only what is not needed any more is left to remove."""
    assert call(form, output=tmp_path / "undisturbed")[0] == 0

    write = storage.write_json

    def killed(*arguments, **settings):
        raise KeyboardInterrupt

    def killed_at_the_card(path, value):
        if path.parent.name != WORK:
            raise KeyboardInterrupt
        write(path, value)

    for name, end in (("shutil.rmtree", killed), ("storage.write_json", killed_at_the_card)):
        out = tmp_path / name
        monkeypatch.setattr(f"flows.export.{name}", end)
        assert call(form, output=out)[0] == 130
        monkeypatch.undo()
        assert (out / WORK).is_dir()
        assert call(form, output=out)[0] == 0
        assert files(out) == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("left", [[], [f"{WORK}"], [f"{WORK}/.{CARD}.1.tmp"]])
def test_an_empty_folder_or_one_killed_at_its_very_beginning_is_taken(call, left, tmp_path):
    (tmp_path / "out").mkdir()
    for name in left:
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name == WORK else path.touch()
    assert call("webdataset")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CARD, "mixed-000000.tar"}


@pytest.mark.slow
def test_sigterm_stops_it_as_ctrl_c_does(config, made, tmp_path):
    slow = (
        "import time, csm.export as e; w = e.Image.Image.save; e.Image.Image.save = lambda *a, **k: (time.sleep(0.5), w(*a, **k))"
    )
    program = f"{slow}; import sys; sys.argv[0] = 'csm'; from flows.cli import main; main()"
    options = [
        "--config",
        config,
        "--workspace",
        made,
        "--output",
        tmp_path / "out",
        "--format",
        "image-folder",
        "--shard-rows",
        6,
    ]
    arguments = [sys.executable, "-c", program, "export", *map(str, options)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if line == "export: started\n":
                break
        while not any((tmp_path / "out").rglob("*.png")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "csm: interrupted; run the same command again to go on"


# What is refused.


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


@pytest.mark.parametrize("form", list(FORMATS))
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(call, form, tmp_path):
    assert call(form, "--shard-rows", 10, output=tmp_path / "undisturbed")[0] == 0
    with file_size_limit(1500):
        code, _, err = call(form, "--shard-rows", 10)
    assert code == 2
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"csm: {tmp_path / 'out'}")
    assert "free space or change permissions, then run the same command again to go on" in err
    assert not (tmp_path / "out" / CARD).exists()
    assert call(form, "--shard-rows", 10)[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def undone(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "done": False}))


# Kinds.


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


def test_a_kind_that_is_not_planned_is_refused(refused):
    assert refused("huggingface", "--kind", "pixel") == "--kind: unknown 'pixel'; one of semantic"
