"""Images of several kinds in one workspace, from the plan to the report."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from cluster.shards import part_path, plan_shards
from csm import storage, tables
from csm.datasets import RealDataset
from flows.artifacts import Workspace
from flows.config import load_config
from flows.reuse import refuse_replacing, stale
from flows.run import STAGES, verb_stages
from flows.stages import Context

pytestmark = pytest.mark.ray
ABLATIONS = ("csm-unmixed", "csm-endpoints", "csm-pixel", "csm-noised", "distillation", "one-hot-synthetic")


def test_a_workspace_of_a_version_without_kinds_keeps_its_images(finished, tmp_path) -> None:
    workspace = Workspace(Path(shutil.copytree(finished.root, tmp_path / "workspace")))
    pl.read_parquet(workspace.plan).drop("kind").write_parquet(workspace.plan)
    for stage in ("plan", "mix"):
        record = json.loads((workspace.root / "stages" / f"{stage}.json").read_text())
        assert "kinds" not in record["settings"].get("plan", {})
        assert "strength" not in record["settings"].get("mix", {})
    config = load_config(str(finished.config))
    context = Context(config, workspace, STAGES)
    refuse_replacing(context, verb_stages("run", config))
    assert [stale(context, stage) for stage in ("plan", "mix", "annotate", "train")] == [None] * 4


def test_another_kind_does_not_replace_images_unasked(finished, csm, snapshot, tmp_path) -> None:
    root = Path(shutil.copytree(finished.root, tmp_path / "workspace"))
    before = snapshot(root)
    command = ["run", "--config", finished.config, "--workspace", root]
    done = csm(*command, "--set", "plan.kinds=[semantic, pixel]")
    assert done.returncode == 2
    assert "mix was made by another configuration there (plan.kinds None -> ['semantic', 'pixel']); choose another" in done.stderr
    assert snapshot(root) == before


@pytest.mark.slow
def test_every_kind_goes_from_the_plan_to_the_report_and_on_after_a_loss(finished, csm, write_config, tmp_path) -> None:
    root = Path(shutil.copytree(finished.root, tmp_path / "workspace"))
    methods = {name: {"mixed": {"annotator": "teacher"}} for name in ("csm", *ABLATIONS) if name != "one-hot-synthetic"}
    config = write_config(
        plan={"kinds": list(tables.KINDS)},
        train={"compare": ["cross-entropy", "csm", *ABLATIONS], "methods": methods, "optimizer": {"epochs": 1}},
    )
    command = ["run", "--config", config, "--workspace", root, "--json"]
    done = csm(*command, "--force", "mix")
    assert done.returncode == 0, done.stderr
    workspace, info = Workspace(root), RealDataset.load_info(root)
    assert f"each {', '.join(tables.KINDS[:-1])} and {info.counts['train']:,} real ones" in done.stderr
    kept = pl.read_parquet(finished.root / "mixed" / "*.parquet")
    shards = plan_shards(workspace.plan, "semantic")
    assert pl.concat([tables.read(part_path(workspace.mixed, shard), tables.MIXED) for shard in shards]).equals(kept)
    digests = {path.name: storage.file_digest(path) for path in workspace.mixed.iterdir()}
    lost = [next(iter(plan_shards(workspace.plan, kind))) for kind in tables.KINDS]
    for shard in lost:
        part_path(workspace.mixed, shard).unlink()
    done = csm(*command)
    assert done.returncode == 0, done.stderr
    assert "mix: going on" in done.stderr
    assert "train: reused" in done.stderr
    assert {path.name: storage.file_digest(path) for path in workspace.mixed.iterdir()} == digests
    page = workspace.report.read_text()
    assert page.count('class="own-tag">CSM</span><small>') == 1
