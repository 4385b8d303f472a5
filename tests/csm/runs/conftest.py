"""Tiny data with its mixed and annotated images, as the stages leave them, and trainings on them."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from csm import storage, tables
from csm.datasets.real import build
from csm.methods import Method, MixedTerm
from csm.optimization import OptimizerConfig
from csm.planning import PlanConfig, make_plan
from csm.reannotation import Calibration
from csm.runs import MixedSource, RunSpec

OPTIMIZER = OptimizerConfig(epochs=4, batch_size=8, learning_rate=0.05)
CE = Method()
CSM = Method(mixed=MixedTerm("teacher"))


def write_real(root: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    splits = np.array((["train"] * 5 + ["val"] * 2 + ["test"]) * 6)
    build("tiny", images.permute(0, 2, 3, 1).numpy(), labels.numpy(), splits, ("a", "b", "c")).save(root)


def write_mixed(root: Path, images: torch.Tensor, labels: torch.Tensor, kinds: tuple[str, ...] = ("semantic",)) -> None:
    """Blends and annotations in two part files of each kind, as the stages leave them."""
    plan = make_plan(3, "data", "net", PlanConfig(ratios=3, sets_per_pair=2, shard_rows=9, kinds=kinds))
    tables.write(plan, root / "plan.parquet", tables.PLAN)
    for (shard,), rows in plan.group_by("shard"):
        pictures, posterior = [], []
        for row in rows.rows(named=True):
            a, b = (images[labels == row[name]][row["group"]].float() for name in ("class_a", "class_b"))
            blend = (row["lam"] * a + (1 - row["lam"]) * b).to(torch.uint8)
            pictures.append(blend if row["kind"] == "semantic" else 255 - blend)  # kinds can be told apart
            probs = [0.02] * 3
            probs[row["class_a"]] += 0.94 * row["lam"]
            probs[row["class_b"]] += 0.94 * (1 - row["lam"])
            posterior.append(np.log(probs))
        mixed = rows.select("mix_id").with_columns(tables.from_images(torch.stack(pictures)))
        tables.write(mixed, root / "mixed" / f"part-{shard:08d}.parquet", tables.MIXED)
        annotations = rows.select(
            "mix_id",
            pl.col("lam").alias("lam_raw"),
            pl.Series("log_posterior", np.array(posterior, dtype=np.float32), dtype=pl.Array(pl.Float32, 3)),
        )
        tables.write(annotations, root / "annotations" / f"part-{shard:08d}.parquet", tables.annotations(3))
    storage.write_json(root / "calibration.json", asdict(Calibration("temperature", temperature=1.5)))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, separable: Callable[..., Any]) -> Path:
    root = tmp_path_factory.mktemp("workspace")
    write_real(root, *separable(16))
    write_mixed(root, *separable(4, seed=1))
    return root


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "workspace"))


def spec_of(workspace: Path, name: str = "ce", settings: Method = CE, seed: int = 0, fingerprint: str = "f0") -> RunSpec:
    source = None
    if settings.mixed:
        parts = (workspace / part for part in ("plan.parquet", "mixed", "annotations", "calibration.json"))
        source = MixedSource(*parts)
    return RunSpec(
        run=f"{name}-seed{seed}", method=name, seed=seed, directory=workspace / "runs" / name, data=workspace, mixed=source,
        network="small-cnn", parameters={"width": 4}, settings=settings, optimizer=OPTIMIZER, fingerprint=fingerprint,
    )  # fmt: skip


def predictions_of(spec: RunSpec) -> pl.DataFrame:
    return tables.read(spec.directory / "predictions.parquet", tables.predictions(3))


def contents(spec: RunSpec) -> dict[str, Any]:
    """What must not depend on interruptions."""
    record = storage.read_json(spec.directory / "run.json")
    del record["seconds"]
    return {
        "weights": storage.file_digest(spec.directory / "model.safetensors"),
        "predictions": predictions_of(spec).rows(),
        "history": storage.read_json(spec.directory / "history.json"),
        "record": record,
    }


@pytest.fixture(params=["ce", "csm"])
def settings(request: pytest.FixtureRequest) -> Method:
    return CSM if request.param == "csm" else CE
