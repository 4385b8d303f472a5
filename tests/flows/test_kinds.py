"""Images of several kinds in one workspace, from the plan to the report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from cluster.shards import part_path, plan_shards
from csm import storage, tables
from csm.datasets import RealDataset
from csm.errors import InputError
from flows.artifacts import Workspace
from flows.config import load_config, plain
from flows.mix import mixed_keys
from flows.reuse import refuse_replacing, stale
from flows.run import STAGES, verb_stages
from flows.stages import Context

pytestmark = pytest.mark.ray
ABLATIONS = ("csm-unmixed", "csm-endpoints", "csm-pixel", "csm-noised", "csm-unmixed-noised", "distillation", "one-hot-synthetic")


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


def test_kinds_are_added_to_a_workspace_and_nothing_else_is(finished, tmp_path) -> None:
    workspace = Workspace(Path(shutil.copytree(finished.root, tmp_path / "workspace")), {})
    keys = mixed_keys(workspace, workspace.record("mix"))
    assert keys == {"semantic": workspace.record("mix").fingerprint}

    def context(*overrides: str) -> Context:
        return Context(load_config(str(finished.config), overrides), workspace, STAGES)

    grown = context("plan.kinds=[real, semantic, noised]")
    refuse_replacing(grown, verb_stages("mix", grown.config))
    planned = STAGES["plan"].run(grown, workspace.record("plan"))
    mix = workspace.record("mix")
    wanted = replace(mix, settings=plain(STAGES["mix"].settings(grown.config)), inputs={**mix.inputs, "plan": planned.digest})
    more = mixed_keys(workspace, wanted)
    assert list(more) == ["semantic", "noised", "real"]
    assert more["semantic"] == keys["semantic"]
    assert len(set(more.values())) == 3
    assert STAGES["mix"].keeps(grown, wanted)
    assert set(mixed_keys(workspace, replace(wanted, code_version=0)).values()).isdisjoint(more.values())
    assert not STAGES["mix"].keeps(grown, replace(wanted, code_version=0))
    with pytest.raises(InputError, match=r"mix was made by another configuration there \(.*plan.seed 0 -> 1"):
        refuse_replacing(other := context("plan.kinds=[semantic, noised]", "plan.seed=1"), verb_stages("mix", other.config))


@pytest.mark.slow
def test_every_kind_goes_from_the_plan_to_the_report_and_on_after_a_loss(finished, csm, write_config, snapshot, tmp_path) -> None:
    root = Path(shutil.copytree(finished.root, tmp_path / "workspace"))
    methods = {name: {"mixed": {"annotator": "teacher"}} for name in ("csm", *ABLATIONS) if name != "one-hot-synthetic"}
    methods["several"] = {"mixed": {"annotator": "teacher", "images": ["semantic", "unmixed", "noised"], "schedule": "uniform"}}
    config = write_config(
        plan={"kinds": list(tables.KINDS)},
        train={"compare": ["cross-entropy", "csm", *ABLATIONS, "several"], "methods": methods},
    )
    command = ["run", "--config", config, "--workspace", root, "--json"]
    images, runs = (snapshot(finished.root / name) for name in ("mixed", "runs/csm-seed0"))
    done = csm(*command)
    assert done.returncode == 0, done.stderr
    workspace, info = Workspace(root), RealDataset.load_info(root)
    assert f"each {', '.join(tables.KINDS[:-1])} and {info.counts['train']:,} real ones" in done.stderr
    assert images.items() < snapshot(workspace.mixed).items()
    assert snapshot(workspace.root / "runs/csm-seed0") == runs  # its images and labels are the same
    assert pl.read_parquet(workspace.mixed / "*.parquet")["mix_id"].n_unique() == len(tables.read_plan(workspace.plan))
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
    assert page.count('class="own-tag">CSM</span><small>') == 2  # csm and several
