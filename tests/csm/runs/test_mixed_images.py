"""Trainings on mixed images: how part files are found, joined, and read again."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from csm import storage, tables
from csm.classifiers import load_classifier
from csm.errors import InputError
from csm.methods import Method, MixedTerm
from csm.planning import PlanConfig, make_plan
from csm.reannotation.truncation import truncate
from csm.runs import fit_run, is_finished
from tests.csm.runs.conftest import CSM, contents, spec_of, write_mixed, write_real

MIXED = MixedTerm("teacher", schedule="uniform")


def test_mixed_images_are_joined_by_id_over_all_part_files(workspace: Path) -> None:
    straight = replace(spec_of(workspace, settings=CSM), directory=workspace / "straight")
    fit_run(straight)
    moved = Path(shutil.copytree(workspace, workspace.parent / "moved"))
    # All images but one in one file, shuffled; annotations in the other order.
    first, second = sorted((moved / "mixed").iterdir())
    images = pl.concat([tables.read(path, tables.MIXED) for path in (first, second)]).sample(fraction=1.0, shuffle=True, seed=1)
    tables.write(images.head(1), first, tables.MIXED)
    tables.write(images.slice(1), second, tables.MIXED)
    for path in (moved / "annotations").iterdir():
        tables.write(tables.read(path, tables.annotations(3)).reverse(), path, tables.annotations(3))
    shuffled = spec_of(moved, settings=CSM)
    fit_run(shuffled)
    assert contents(shuffled) == contents(straight)


@pytest.mark.parametrize("folder", ["mixed", "annotations"])
def test_missing_part_files_are_named(workspace: Path, folder: str) -> None:
    spec = spec_of(workspace, settings=CSM)
    (workspace / folder / "part-00000001.parquet").unlink()
    with pytest.raises(InputError, match="9 of 18 planned images are not mixed and annotated"):
        fit_run(spec)
    (workspace / folder / "part-00000000.parquet").unlink()
    with pytest.raises(InputError, match=f"{folder} holds no part file"):
        fit_run(spec)
    assert not is_finished(spec)


def test_files_that_changed_are_read_again(workspace: Path, separable: Callable[..., Any]) -> None:
    # A process may train, make the data anew in the same folder, and train again.
    before = replace(spec_of(workspace, settings=CSM), directory=workspace / "before")
    fit_run(before)
    other = Path(shutil.copytree(workspace, workspace.parent / "other"))
    for root in (workspace, other):
        write_real(root, *separable(16, seed=8))
    again, fresh = spec_of(workspace, settings=CSM, fingerprint="f1"), spec_of(other, settings=CSM, fingerprint="f1")
    fit_run(again)
    fit_run(fresh)
    assert contents(again) == contents(fresh)
    assert contents(again)["predictions"] != contents(before)["predictions"]
    for root in (workspace, other):
        write_mixed(root, *separable(4, seed=9))
    again, fresh = (replace(spec, directory=spec.directory / "later") for spec in (again, fresh))
    fit_run(again)
    fit_run(fresh)
    assert contents(again) == contents(fresh)
    assert contents(again)["weights"] != storage.file_digest(
        spec_of(workspace).directory / "model.safetensors"
    )  # of the first mixture


def test_a_run_on_truncated_annotations_is_that_on_what_they_stand_for(workspace: Path, tmp_path: Path) -> None:
    weights = {}
    for top in (None, 2):  # of three classes: the third has all that is left, so nothing is lost
        for part in (workspace / "annotations").glob("part-*"):
            frame = tables.read_annotations(part, 3)
            if top is not None:
                said = truncate(torch.from_numpy(frame["log_posterior"].to_numpy().copy()), top)
                columns = {name: pl.Series(value.numpy()) for name, value in said._asdict().items()}
                schema = tables.annotations(3, top)
                frame = frame.with_columns(**columns).select(pl.col(name).cast(dtype) for name, dtype in schema.items())
                tables.write(frame, part, schema)
        spec = spec_of(workspace, f"csm-{top}", CSM)
        fit_run(spec)
        weights[top] = load_classifier(spec.directory).state_dict()
    for name, tensor in weights[2].items():
        assert torch.allclose(tensor, weights[None][name], atol=1e-4), name


def test_a_training_reads_the_part_files_of_its_kind_alone(workspace: Path) -> None:
    """The folders of two kinds: the mixtures of the fixture, and the same pictures under the ids of pixel mixtures."""
    semantic, config = (
        tables.read_plan(workspace / "plan.parquet"),
        PlanConfig(kinds=("semantic", "pixel"), ratios=3, sets_per_pair=2, shard_rows=9),
    )
    both = make_plan(3, "data", "net", config)
    tables.write(both, workspace / "plan.parquet", tables.PLAN)
    first = 20_000_000  # the shards of pixel mixtures
    ids = dict(zip(semantic["mix_id"], both.filter(kind="pixel")["mix_id"], strict=True))
    for folder, schema in (("mixed", tables.MIXED), ("annotations", tables.annotations(3))):
        for shard in (0, 1):
            part = tables.read(workspace / folder / f"part-{shard:08d}.parquet", schema)
            other = part.with_columns(pl.col("mix_id").replace_strict(ids))
            tables.write(other, workspace / folder / f"part-{first + shard:08d}.parquet", schema)
            (workspace / folder / f"part-{shard:08d}.parquet").write_bytes(b"damaged")
    spec = spec_of(workspace, "csm", CSM)
    assert spec.mixed is not None
    fit_run(replace(spec, mixed=replace(spec.mixed, kinds=("pixel",))))
    with pytest.raises(InputError, match=r"part-00000000.parquet is not a whole parquet file"):
        fit_run(replace(spec, fingerprint="f1"))
    with pytest.raises(InputError, match=r"plan.parquet plans no real images: run csm plan again"):
        fit_run(replace(spec, fingerprint="f2", mixed=replace(spec.mixed, kinds=("real",))))


def test_a_run_on_several_kinds_sees_the_images_of_each(workspace: Path, separable: Callable[..., Any]) -> None:
    write_mixed(workspace, *separable(4, seed=1), kinds=("semantic", "unmixed", "noised"))
    ends = {}
    for kinds in (("semantic",), ("semantic", "noised"), ("noised", "semantic"), ("semantic", "unmixed")):
        spec = spec_of(workspace, "-".join(kinds), Method(mixed=replace(MIXED, images=kinds)))
        assert spec.mixed is not None
        fit_run(replace(spec, mixed=replace(spec.mixed, kinds=kinds)))
        ends[kinds] = contents(spec)["weights"]
    assert len(set(ends.values())) == 4
    missing = replace(spec_of(workspace, "missing", CSM), mixed=replace(spec.mixed, kinds=("semantic", "pixel")))
    with pytest.raises(InputError, match="plans no pixel images: run csm plan again"):
        fit_run(missing)
