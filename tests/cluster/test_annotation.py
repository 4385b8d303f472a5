"""Encoding and annotation over the pool equal the direct `csm` calls; what is finished is kept, what cannot be used is named."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from cluster import annotation
from cluster.annotation import (
    AnnotateJob,
    AnnotateShards,
    EncodeJob,
    EncoderSpec,
    EncodeShards,
    encode_shards,
    read_slice,
    real_slices,
)
from cluster.resources import Pool
from cluster.shards import finished_shards, part_path, plan_shards, read_plan, write_part
from csm import storage, tables
from csm.classifiers import ClassifierSpec, build_classifier
from csm.encoders import FeatureTable, Sources, encode_table
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan
from csm.reannotation import Annotator, AnnotatorSpec, FitInputs, annotate, fit_ensemble
from csm.reannotation.calibrators import Calibration
from csm.reannotation.projection import fit_projection

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, CLASSES, ROWS = (4, 4, 1), 3, 20
ONE = Pool(max_actors=1, cpus=0.5)


@pytest.fixture
def here(monkeypatch):
    """Actors are called in this process."""
    monkeypatch.setattr("cluster.pools._node", lambda: "here")
    monkeypatch.setattr(annotation, "SLICE_ROWS", 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_thread) -> Path:
    """A `real` table of 20 images, a plan of 3 shards with its mixed images, and a classifier that was never trained."""
    root, draw = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    real = pl.DataFrame(
        {
            "image_id": np.arange(ROWS, dtype=np.uint32),
            "split": pl.Series((["train"] * 8 + ["test"] * 6 + ["val"] * 6), dtype=tables.SPLIT),
            "label": (np.arange(ROWS) % CLASSES).astype(np.uint16),
            "image": [draw.bytes(16) for _ in range(ROWS)],
        }
    )
    tables.write(real, root / "real.parquet", tables.REAL)
    plan = make_plan(CLASSES, "data", "net", PlanConfig(ratios=3, sets_per_pair=2, shard_rows=6))
    tables.write(plan, root / "plan.parquet", tables.PLAN)
    for shard in plan_shards(root / "plan.parquet"):
        ids = read_plan(root / "plan.parquet", shard).select("mix_id")
        mixed = ids.with_columns(pl.Series("image", [draw.bytes(16) for _ in range(len(ids))], dtype=pl.Binary))
        write_part(mixed, root / "mixed", shard, tables.MIXED, "mixed-key")
    torch.manual_seed(0)
    build_classifier(ClassifierSpec("small-cnn", {"width": 4}, 1, ("a", "b", "c"), (0.5,), (0.2,))).save(root / "member")
    return root


def encoders(root: Path) -> dict[str, EncoderSpec]:
    sources = Sources(root, (root / "member",))
    kinds = {"pixels": "pixels", "features": "classifier", "teacher": "teacher"}
    return {name: EncoderSpec(name, kind, sources) for name, kind in kinds.items()}


def encode_jobs(root: Path, output: Path, *names: str) -> list[EncodeJob]:
    real = root / "real.parquet"
    shards = frozenset(real_slices(real))
    return [EncodeJob(encoders(root)[name], real, output / name, f"{name}-key", SHAPE, shards) for name in names]


def annotate_job(root: Path, output: Path, spec: AnnotatorSpec) -> AnnotateJob:
    return AnnotateJob(
        name=spec.name, spec=spec, encoders={name: encoders(root)[name] for name in spec.encoders}, plan=root / "plan.parquet",
        mixed=root / "mixed", annotations=output / spec.name, key=f"{spec.name}-key", shape=SHAPE, n_classes=CLASSES,
        shards=frozenset(plan_shards(root / "plan.parquet")),
    )  # fmt: skip


def specs(root: Path, output: Path) -> list[AnnotatorSpec]:
    """One annotator of each sort: without encoder, with a pair head, with a posterior, and an ensemble of two."""
    real = tables.read(root / "real.parquet", tables.REAL).filter(pl.col("split") != "test")
    table = encode_table(encoders(root)["features"].load(), real, SHAPE)
    write_part(table, output / "table", 0, table.schema, "key")
    fit_projection(output / "fitted", FitInputs(FeatureTable(output / "table"), CLASSES, ("a", "b", "c")))
    uniform = torch.full((6, CLASSES), 1 / CLASSES).log()
    calibrations = {"teacher": Calibration("none"), "again": Calibration("temperature", temperature=2.0)}
    fit_ensemble(output / "pool", dict.fromkeys(calibrations, uniform), calibrations, torch.zeros(6, dtype=torch.int64))
    teacher = AnnotatorSpec("teacher", "posterior", output, "teacher")
    return [
        AnnotatorSpec("ratio", "ratio", output),
        AnnotatorSpec("projection", "projection", output / "fitted", "features"),
        teacher,
        AnnotatorSpec("pool", "ensemble", output / "pool", None, (teacher, replace(teacher, name="again"))),
    ]


def call(actor, *shards: int) -> list:
    """Receipts of an actor that is called as Ray calls it; raises what it would have sent to the driver."""
    block = pa.Table.from_pylist([{"shard": shard, "receipts": [], "failure": None} for shard in shards])
    rows = [row for table in actor(block) for row in table.to_pylist()]
    for row in rows:
        if row["failure"] is not None:
            raise pickle.loads(row["failure"])
    return [receipt for row in rows for receipt in row["receipts"]]


def test_slices_are_those_that_hold_images_to_encode(made, monkeypatch):
    real = made / "real.parquet"
    monkeypatch.setattr(annotation, "SLICE_ROWS", 3)
    assert real_slices(real) == {0: 3, 1: 3, 2: 2, 4: 1, 5: 3, 6: 2}  # rows 9-11 are all of the test split
    assert read_slice(real, 2)["image_id"].to_list() == [6, 7]
    assert read_slice(real, 4, ["train"]).is_empty()
    monkeypatch.setattr(annotation, "SLICE_ROWS", 2048)
    assert real_slices(real) == {0: 14}


def test_the_features_of_every_slice_are_those_of_a_direct_call(made, tmp_path, here):
    jobs = encode_jobs(made, tmp_path, "pixels", "teacher")
    receipts = call(EncodeShards(jobs, 1), *jobs[0].shards)
    assert sorted((receipt["part"], receipt["shard"], receipt["rows"]) for receipt in receipts) == sorted(
        (f"encoders/{name}", shard, rows) for name in ("pixels", "teacher") for shard, rows in {0: 6, 1: 2, 2: 4, 3: 2}.items()
    )
    real = tables.read(made / "real.parquet", tables.REAL)
    for job in jobs:
        table = FeatureTable(job.features)
        for split in ("train", "val"):
            features, labels = table.matrix(split)
            rows = real.filter(pl.col("split") == split)
            direct = encode_table(job.encoder.load(), rows, SHAPE)
            assert np.array_equal(features.numpy(), direct["feature"].to_numpy())
            assert labels.tolist() == rows["label"].to_list()
    receipt = receipts[0]
    assert receipt["checksum"] == storage.file_digest(part_path(tmp_path / receipt["part"].split("/")[1], receipt["shard"]))


def test_each_image_is_read_once_for_all_encoders(made, tmp_path, here, monkeypatch):
    read = []
    monkeypatch.setattr(annotation, "read_slice", lambda real, number: (read.append(number), read_slice(real, number))[1])
    jobs = encode_jobs(made, tmp_path, "pixels", "features", "teacher")
    call(EncodeShards([jobs[0], replace(jobs[1], shards=frozenset({1, 2})), jobs[2]], 1), 0, 1, 2, 3)
    assert read == [0, 1, 2, 3]
    assert set(finished_shards(jobs[1].features, jobs[1].key, real_slices(jobs[1].real))) == {1, 2}


@pytest.mark.slow
@pytest.mark.ray
def test_encoding_that_was_interrupted_goes_on_and_keeps_what_was_finished(made, tmp_path, ray_session):
    """Over the pool, on slices as large as the product's: stopped after the first part, then one part is cut short."""
    rows = 2 * annotation.SLICE_ROWS + 5
    images = np.random.default_rng(0).integers(0, 256, (rows, 16), np.uint8)
    real = pl.DataFrame(
        {"image_id": range(rows), "split": ["train"] * rows, "label": [0] * rows, "image": [image.tobytes() for image in images]},
        schema=tables.REAL,
    )
    tables.write(real, tmp_path / "real.parquet", tables.REAL)
    jobs = [replace(job, real=tmp_path / "real.parquet") for job in encode_jobs(made, tmp_path, "pixels", "teacher")]
    slices = real_slices(jobs[0].real)
    assert slices == {0: annotation.SLICE_ROWS, 1: annotation.SLICE_ROWS, 2: 5}

    def todo():
        left = [replace(job, shards=frozenset(slices) - finished_shards(job.features, job.key, slices)) for job in jobs]
        return [job for job in left if job.shards]

    def stop(receipt):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_shards([replace(job, shards=frozenset(slices)) for job in jobs], ONE, stop)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/part-*.parquet")}
    assert kept
    path = part_path(jobs[1].features, 0)
    cut = path.read_bytes()[:-50]
    kept.pop(path)
    path.write_bytes(cut)
    assert [0 in job.shards for job in todo()][-1]

    encode_shards(todo(), ONE, lambda receipt: None)
    assert todo() == []
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for job in jobs:
        direct = encode_table(job.encoder.load(), real, SHAPE)
        assert np.allclose(FeatureTable(job.features).matrix("train")[0].numpy(), direct["feature"].to_numpy(), atol=1e-6)


@pytest.mark.parametrize("top", [None, 2])
def test_annotations_are_those_of_a_direct_call(made, tmp_path, here, top):
    jobs = [replace(annotate_job(made, tmp_path, spec), top=top) for spec in specs(made, tmp_path)]
    receipts = call(AnnotateShards(jobs, 1), *jobs[0].shards)
    assert len(receipts) == len(jobs) * len(jobs[0].shards) == 12
    loaded = {name: spec.load() for name, spec in encoders(made).items()}
    for shard in jobs[0].shards:
        mixed, plan = tables.read(part_path(made / "mixed", shard), tables.MIXED), read_plan(made / "plan.parquet", shard)
        for job in jobs:
            direct = annotate(plan, mixed, {"a": Annotator(job.spec)}, loaded, SHAPE, CLASSES, top=top)["a"]
            part = tables.read(part_path(job.annotations, shard), tables.annotations(CLASSES, top))
            assert part.equals(direct, null_equal=True)
            assert part["log_posterior"].null_count() == (len(part) if job.name in ("ratio", "projection") else 0)


def test_weights_are_loaded_once_and_only_those_that_are_needed(made, tmp_path, here, monkeypatch):
    ratio, projection, teacher, pool = (annotate_job(made, tmp_path, spec) for spec in specs(made, tmp_path))
    loads = []
    load = EncoderSpec.load
    monkeypatch.setattr(EncoderSpec, "load", lambda spec, device: (loads.append(spec.name), load(spec, device))[1])
    call(AnnotateShards([ratio], 1), 0, 1, 2)
    assert loads == []
    actor = AnnotateShards([ratio, replace(projection, shards=frozenset({2})), teacher, pool], 1)
    call(actor, 0, 1)
    assert loads == ["teacher"]
    call(actor, 2)
    assert loads == ["teacher", "features"]


def test_the_ratio_reads_no_image(made, tmp_path, here, monkeypatch):
    ratio, _, teacher, _ = (annotate_job(made, tmp_path, spec) for spec in specs(made, tmp_path))
    columns = []
    read = tables.read
    monkeypatch.setattr(annotation.tables, "read", lambda path, *rest: (columns.append(rest[1:]), read(path, *rest))[1])
    call(AnnotateShards([ratio], 1), 0)
    call(AnnotateShards([ratio, replace(teacher, shards=frozenset({1}))], 1), 0, 1)
    assert columns == [(["mix_id"],), (["mix_id"],), (None,)]


@pytest.fixture
def teacher(made, tmp_path) -> AnnotateJob:
    return annotate_job(made, tmp_path, AnnotatorSpec("teacher", "posterior", tmp_path, "teacher"))


def test_a_part_of_another_plan_is_named(made, tmp_path, here, teacher):
    foreign = tables.read(part_path(made / "mixed", 1), tables.MIXED)  # of the same plan, but another shard
    write_part(foreign, tmp_path / "mixed", 0, tables.MIXED, "mixed-key")
    with pytest.raises(
        InputError, match=r"mixed/part-00000000\.parquet: annotate: a mixed image is not in the plan: its part file"
    ):
        call(AnnotateShards([replace(teacher, mixed=tmp_path / "mixed")], 1), 0)


def test_an_annotator_of_another_number_of_classes_is_named(here, teacher):
    with pytest.raises(InputError, match="annotator teacher knows 3 classes, the data has 4: fit it again"):
        call(AnnotateShards([replace(teacher, n_classes=4)], 1), 0)


@pytest.mark.parametrize("actor", ["encode", "annotate"])
def test_a_feature_that_is_not_finite_is_named(made, tmp_path, here, teacher, actor):
    weights = storage.read_tensors(made / "member" / "model.safetensors")
    weights[next(name for name in weights if name.endswith("bias"))].fill_(torch.nan)
    storage.write_tensors(tmp_path / "member" / "model.safetensors", weights)
    (tmp_path / "member" / "model.json").write_bytes((made / "member" / "model.json").read_bytes())
    spec = EncoderSpec("teacher", "teacher", Sources(tmp_path, (tmp_path / "member",)))
    (job,) = encode_jobs(made, tmp_path, "teacher")
    if actor == "encode":
        work = EncodeShards([replace(job, encoder=spec)], 1)
        said = r"^annotate\.encoders\.teacher: the feature of image 0 of 4 is not finite: .*images from row 12 of .*real\.parquet"
    else:
        work = AnnotateShards([replace(teacher, encoders={"teacher": spec})], 1)
        said = r"mixed/part-00000002\.parquet: encoder teacher: the feature of image 0 of 6 is not finite"
    with pytest.raises(InputError, match=said):
        call(work, 2)


@pytest.mark.parametrize("actor", [EncodeShards, AnnotateShards])
def test_an_encoder_that_lacks_a_file_is_named(made, tmp_path, here, teacher, actor):
    spec = EncoderSpec("mine", "classifier", Sources(tmp_path, (tmp_path / "empty",)))
    (job,) = encode_jobs(made, tmp_path, "teacher")
    job = replace(job, encoder=spec) if actor is EncodeShards else replace(teacher, encoders={"teacher": spec})
    with pytest.raises(InputError, match=r"^annotate\.encoders\.mine: .*empty/model\.json does not exist"):
        call(actor([job], 1), 0)
