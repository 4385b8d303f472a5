"""`csm export` on a workspace whose stages are real but whose images are drawn here."""

import shutil
import sys
from dataclasses import asdict, replace

import numpy as np
import polars as pl
import pytest

from cluster.shards import plan_shards, read_plan, write_part
from csm import storage, tables
from csm.datasets.real import build
from csm.pairs import all_pairs
from csm.planning import write_plan
from csm.reannotation import Calibration
from flows import cli
from flows.annotate import _keys
from flows.artifacts import Workspace
from flows.config import load_config
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


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """Path of the configuration with ``SETTINGS``."""
    path = tmp_path_factory.mktemp("config") / "pets.yaml"
    path.write_text(load_config("digits", SETTINGS).to_yaml().replace("name: digits", "name: pets"))
    return path


@pytest.fixture(scope="session")
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
