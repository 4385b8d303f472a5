"""The stage fit-annotators on a small workspace, with the pool's work done in this process."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.annotation import EncodeShards
from cluster.shards import plan_shards
from csm import tables
from csm.classifiers import ClassifierSpec, build_classifier
from csm.datasets.real import build
from csm.planning import make_plan
from flows import features
from flows.annotate import annotate_jobs
from flows.artifacts import StageRecord, Workspace
from flows.config import load_config
from flows.fit_annotators import STAGE
from flows.run import STAGES
from flows.stages import Context

CLASSES, IMAGES = 4, 12  # of each class in each split
RECORD = StageRecord("fit-annotators", "f", {}, 2, {"prepare": "data", "fit-teacher": "members"})
COMPARE = "train.compare=[paper, csm]"
Fit = Callable[..., Context]


class NoTracker:
    """Keeps what is measured."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, key: str, values: dict[str, float]) -> None:
        self.metrics |= values

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **settings: ""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace up to the mixed images: noisy pictures of four classes, a teacher that was never trained."""
    draw = np.random.default_rng(0)
    labels = np.tile(np.arange(CLASSES), 3 * IMAGES)
    images = draw.integers(0, 120, (len(labels), 6, 6, 1)) + 25 * labels[:, None, None, None]
    data = build("toy", images.astype(np.uint8), labels, np.repeat(tables.SPLITS, CLASSES * IMAGES), ["ant", "bee", "cat", "dog"])
    data.save(tmp_path)
    workspace = Workspace(tmp_path)
    for number in range(2):
        torch.manual_seed(number)
        spec = ClassifierSpec("small-cnn", {"width": 4}, 1, data.info.class_names, data.info.mean, data.info.std)
        build_classifier(spec).save(workspace.teacher_member(number))
    plan = make_plan(CLASSES, "data", "net", load_config("demo", ["plan.ratios=3", "plan.sets_per_pair=1"]).plan)
    tables.write(plan, workspace.plan, tables.PLAN)
    workspace.write_record(StageRecord("mix", "mixed", {"mix": {}}, 1, {"plan": "plan"}, True, "mixed"))
    return tmp_path


@pytest.fixture
def encoded() -> list[tuple[str, int]]:
    """(encoder, slice) of everything that was encoded."""
    return []


@pytest.fixture
def fit(root: Path, encoded: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> Fit:
    """``fit(*overrides)`` runs the stage, with the pool's work done in this process."""
    monkeypatch.setattr("cluster.pools._node", lambda: "here")

    def encode_shards(jobs: Any, pool: Any, on_receipt: Any, on_standing: Any) -> None:
        for shard in sorted(frozenset().union(*(job.shards for job in jobs))):
            block = pa.Table.from_pylist([{"shard": shard, "receipts": [], "failure": None}])
            for row in [row for table in EncodeShards(jobs, 1)(block) for row in table.to_pylist()]:
                if row["failure"] is not None:
                    raise pickle.loads(row["failure"])
                encoded.extend((receipt["part"].removeprefix("encoders/"), shard) for receipt in row["receipts"])

    monkeypatch.setattr(features, "encode_shards", encode_shards)

    def run(*overrides: str, record: StageRecord = RECORD) -> Context:
        config = load_config("demo", ["annotate.members=2", "annotate.annotator=teacher", COMPARE, *overrides])
        context = Context(config, Workspace(root), STAGES, _tracker=NoTracker(), _connected=True)  # type: ignore[arg-type]
        STAGE.run(context, record)
        return context

    return run


def files(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in (root / "annotators").rglob("*") if path.is_file()}


def changed(root: Path, before: dict[str, int]) -> set[str]:
    return {name.removeprefix("annotators/") for name, time in files(root).items() if before.get(name) != time}


def keys(context: Context) -> dict[str, str]:
    return {job.name: job.key for job in annotate_jobs(context, frozenset(plan_shards(context.workspace.plan)))}
