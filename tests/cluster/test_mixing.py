"""The oracle: rows that come through Ray equal those of a direct `csm` call on the same plan."""

import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pyarrow as pa
import pytest

from cluster.annotation import AnnotateJob, EncoderSpec
from cluster.mixing import MixJob, MixShards, process_shards
from cluster.resources import Pool
from cluster.shards import finished_shards, part_path, plan_shards, read_plan, write_part
from csm import storage, tables
from csm.datasets import RealDataset
from csm.encoders import Sources
from csm.errors import InputError
from csm.generators import load_generator
from csm.generators.unet import UNetGenerator, UNetSpec
from csm.mixing import mix, start_mixing
from csm.planning import PlanConfig, make_plan
from csm.reannotation import Annotator, AnnotatorSpec, annotate
from csm.sampling import SamplerConfig
from csm.training_images import TrainingImages
from flows.artifacts import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session", "one_thread")]

NAMES = ("projection", "teacher")
HEADS = {"projection": ("projection", "classifier"), "teacher": ("posterior", "teacher")}
ONE = Pool(max_actors=1, cpus=0.5)


def jobs(finished, root: Path, plan: Path, mixed: Path, steps=8):
    """Jobs for every shard of ``plan``."""
    info = RealDataset.load_info(finished.root)
    shards = frozenset(plan_shards(plan))
    mix_job = MixJob(plan, finished.root / "generator", mixed, "mixed-key", info.shape, SamplerConfig(steps=steps), 4, shards)
    sources = Sources(root, (finished.root / "annotators" / "members" / "00",))
    return mix_job, [
        AnnotateJob(
            name=name,
            spec=AnnotatorSpec(name, head, finished.root / "annotators" / name, encoder),
            encoders={encoder: EncoderSpec(encoder, encoder, sources)},
            plan=plan,
            mixed=mixed,
            annotations=root / name,
            key=f"{name}-key",
            shape=info.shape,
            n_classes=info.n_classes,
            shards=shards,
        )
        for name, (head, encoder) in HEADS.items()
    ]


def annotate_directly(job, plan: pl.DataFrame, mixed: pl.DataFrame) -> pl.DataFrame:
    encoders = {name: spec.load() for name, spec in job.encoders.items()}
    return annotate(plan, mixed, {job.name: Annotator(job.spec)}, encoders, job.shape, job.n_classes)[job.name]


def write_plan(path: Path, sets: int) -> Path:
    plan = make_plan(10, "data", "generator", PlanConfig(pairs=((0, 1), (2, 3)), ratios=3, sets_per_pair=sets, shard_rows=6))
    tables.write(plan, path, tables.PLAN)
    return path


def times(directory: Path, shards) -> dict[int, int]:
    return {shard: part_path(directory, shard).stat().st_mtime_ns for shard in shards}


class Done(NamedTuple):
    """Shards 0-4 made by a first call, with both annotators; the rest by a second one."""

    mix_job: MixJob
    annotate_jobs: list[AnnotateJob]
    first: list
    second: list
    times_before: dict[int, int]


@pytest.fixture(scope="module")
def done(finished, tmp_path_factory, ray_session, one_thread):
    root = tmp_path_factory.mktemp("mixing")
    mix_job, annotate_jobs = jobs(finished, root, write_plan(root / "plan.parquet", 8), root / "mixed")
    first, second = [], []
    some = frozenset(range(5))
    process_shards(replace(mix_job, shards=some), [replace(job, shards=some) for job in annotate_jobs], ONE, ONE, first.append)
    before = times(mix_job.mixed, some)
    rows = plan_shards(mix_job.plan)
    todo = mix_job.shards - finished_shards(mix_job.mixed, mix_job.key, rows)
    # the first annotator has missed nothing, the second one has yet to do what is mixed now
    process_shards(replace(mix_job, shards=todo), [replace(annotate_jobs[1], shards=todo)], ONE, ONE, second.append)
    return Done(mix_job, annotate_jobs, first, second, before)


def test_mixed_rows_equal_those_of_a_direct_call(done):
    job, generator = done.mix_job, load_generator(done.mix_job.generator)
    for shard in plan_shards(job.plan):
        direct = mix(read_plan(job.plan, shard), generator, job.shape, job.sampler, job.batch_size)
        assert tables.read(part_path(job.mixed, shard), tables.MIXED).equals(direct, null_equal=False)


def test_mixed_images_differ_so_that_equality_says_something(done):
    images = pl.concat(
        [tables.read(part_path(done.mix_job.mixed, shard), tables.MIXED) for shard in plan_shards(done.mix_job.plan)]
    )
    assert images["image"].n_unique() == len(images) == 48


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_annotations_equal_those_of_a_direct_call(done, number):
    job = done.annotate_jobs[number]
    for shard in range(5):
        mixed = tables.read(part_path(job.mixed, shard), tables.MIXED)
        direct = annotate_directly(job, read_plan(job.plan, shard), mixed)
        part = tables.read(part_path(job.annotations, shard), tables.annotations(job.n_classes))
        assert part.equals(direct)
        assert part["log_posterior"].null_count() == (len(part) if job.name == "projection" else 0)


def test_a_shard_is_annotated_while_later_ones_are_mixed(done):
    mixed = times(done.mix_job.mixed, range(5))
    annotated = times(done.annotate_jobs[0].annotations, range(5))
    assert min(annotated.values()) < max(mixed.values())
    assert all(annotated[shard] > mixed[shard] for shard in range(5))


def test_every_part_has_one_receipt_that_is_true(done):
    said = [(receipt.part, receipt.shard) for receipt in done.first]
    assert sorted(said) == sorted((part, shard) for part in ("mixed", *NAMES) for shard in range(5))
    folders = {"mixed": done.mix_job.mixed, **{job.name: job.annotations for job in done.annotate_jobs}}
    for receipt in done.first + done.second:
        path = part_path(folders[receipt.part], receipt.shard)
        assert receipt.checksum == storage.file_digest(path)
        assert receipt.rows == 6
        assert receipt.seconds >= 0
        assert receipt.node


def test_a_second_call_makes_only_what_is_missing(done):
    assert sorted((receipt.part, receipt.shard) for receipt in done.second) == sorted(
        (part, shard) for part in ("mixed", "teacher") for shard in (5, 6, 7)
    )
    assert times(done.mix_job.mixed, range(5)) == done.times_before
    assert finished_shards(done.mix_job.mixed, "mixed-key", plan_shards(done.mix_job.plan)) == set(range(8))
    assert finished_shards(done.annotate_jobs[0].annotations, "projection-key", plan_shards(done.mix_job.plan)) == set(range(5))


def test_no_temporary_file_is_left(done):
    folders = [done.mix_job.mixed, *(job.annotations for job in done.annotate_jobs)]
    assert not [path for folder in folders for path in folder.iterdir() if not path.name.startswith("part-")]


def test_nothing_to_do_is_done_at_once(done):
    process_shards(replace(done.mix_job, shards=frozenset()), [], ONE, ONE, pytest.fail)
    process_shards(None, [], ONE, ONE, pytest.fail)


def test_pools_that_do_not_fit_are_refused_before_work(done):
    with pytest.raises(InputError, match=r"mix 1 x 64 = 64 CPU, but the cluster has 2"):
        process_shards(done.mix_job, [], Pool(cpus=64), ONE, pytest.fail)


def test_what_a_worker_refuses_reaches_the_driver_as_it_was_raised(done, finished, tmp_path):
    """A shard cut short after it was mixed: the message names the file, and no wrapper of Ray's stands around it."""
    rows = plan_shards(done.mix_job.plan)
    (tmp_path / "mixed").mkdir()
    for shard in rows:
        part_path(tmp_path / "mixed", shard).write_bytes(
            part_path(done.mix_job.mixed, shard).read_bytes()[: -1 if shard == 2 else None]
        )
    job = replace(done.annotate_jobs[0], mixed=tmp_path / "mixed", annotations=tmp_path / "annotations")
    receipts = []
    with pytest.raises(InputError, match=r"part-00000002\.parquet is not a whole parquet file") as caught:
        process_shards(None, [job], ONE, ONE, receipts.append)
    assert type(caught.value) is InputError
    assert {receipt.shard for receipt in receipts} <= set(rows) - {2}
    assert finished_shards(job.annotations, job.key, rows) >= {receipt.shard for receipt in receipts}
    assert 2 not in finished_shards(job.annotations, job.key, rows)


@pytest.mark.slow
def test_an_annotator_that_cannot_be_loaded_is_named(done, tmp_path):
    job = done.annotate_jobs[0]
    job = replace(job, spec=replace(job.spec, directory=tmp_path / "none"), annotations=tmp_path / "annotations")
    with pytest.raises(InputError, match=r"none/prototypes\.safetensors does not exist"):
        process_shards(None, [job], ONE, ONE, pytest.fail)


def test_receipts_come_while_others_are_mixed(done):
    """All eight shards could be one block; the driver hears of each when it is done."""
    order = [(receipt.part, receipt.shard) for receipt in done.first]
    for name in NAMES:
        assert order.index((name, order[0][1])) < max(index for index, (part, _) in enumerate(order) if part == "mixed")


@pytest.mark.slow
def test_blocks_of_several_shards_lose_and_repeat_nothing(done, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.pools.block_lengths", lambda shards, actors: [3, 3, 2])
    job = replace(done.mix_job, mixed=tmp_path / "mixed")
    receipts = []
    process_shards(
        job, [replace(done.annotate_jobs[1], mixed=job.mixed, annotations=tmp_path / "teacher")], ONE, ONE, receipts.append
    )
    assert sorted((receipt.part, receipt.shard) for receipt in receipts) == sorted(
        (part, shard) for part in ("mixed", "teacher") for shard in range(8)
    )
    for shard in range(8):
        assert part_path(job.mixed, shard).read_bytes() == part_path(done.mix_job.mixed, shard).read_bytes()


def test_a_shard_that_a_lost_worker_had_finished_is_not_made_again(done, tmp_path, monkeypatch):
    """Called as Ray calls it, with a block of which the first shard is there."""
    monkeypatch.setattr("cluster.pools._node", lambda: "here")
    job = replace(done.mix_job, mixed=tmp_path)
    shutil.copy(part_path(done.mix_job.mixed, 0), tmp_path)
    before = times(tmp_path, [0])
    block = pa.Table.from_pylist([{"shard": shard, "receipts": [], "failure": None} for shard in (0, 1)])
    rows = [row for table in MixShards(job, 1)(block) for row in table.to_pylist()]
    assert [row["failure"] for row in rows] == [None, None]
    receipts = [row["receipts"][0] for row in rows]
    assert [receipt["checksum"] for receipt in receipts] == [storage.file_digest(part_path(tmp_path, shard)) for shard in (0, 1)]
    assert receipts[0]["seconds"] == 0 < receipts[1]["seconds"]
    assert times(tmp_path, [0]) == before


def test_a_worker_guides_its_generator(done, tmp_path):
    generator = UNetGenerator(UNetSpec((8, 8, 1), 10, 0.5, (8, 16), 1, 0.0, label_dropout=0.1))
    generator.save(tmp_path)
    job = replace(done.mix_job, generator=tmp_path)
    assert [MixShards(replace(job, guidance=scale), 1).generator.guidance for scale in (None, 3.0)] == [1.0, 3.0]


def test_a_shard_is_written_while_the_next_one_is_denoised(done, tmp_path, monkeypatch):
    """Two calls at once: the write of the first waits until the network of the second is at work, and ends before it."""
    monkeypatch.setattr("cluster.pools._node", lambda: "here")
    at_work, written, begun, at_writing = threading.Event(), threading.Event(), [], []

    def watched(*arguments):
        begun.append(arguments)
        if len(begun) == 2:
            at_work.set()
            assert written.wait(60)
        return start_mixing(*arguments)

    def slow_write(frame, directory, shard, schema, key):
        at_writing.append(shard)
        if len(at_writing) == 1:
            assert at_work.wait(60)
        checksum = write_part(frame, directory, shard, schema, key)
        written.set()
        return checksum

    monkeypatch.setattr("cluster.mixing.start_mixing", watched)
    monkeypatch.setattr("cluster.mixing.write_part", slow_write)
    actor = MixShards(replace(done.mix_job, mixed=tmp_path), 1)
    blocks = [pa.Table.from_pylist([{"shard": shard, "receipts": [], "failure": None}]) for shard in (0, 1)]
    with ThreadPoolExecutor(2) as calls:
        rows = [table.to_pylist()[0] for call in calls.map(lambda block: list(actor(block)), blocks) for table in call]
    assert [row["failure"] for row in rows] == [None, None]
    for shard in (0, 1):
        assert part_path(tmp_path, shard).read_bytes() == part_path(done.mix_job.mixed, shard).read_bytes()


@pytest.mark.slow
def test_a_killed_worker_loses_and_repeats_nothing(finished, tmp_path, ray_head, processes):
    job, _ = jobs(finished, tmp_path, write_plan(tmp_path / "plan.parquet", 12), tmp_path / "mixed", steps=20)
    rows = plan_shards(job.plan)
    raylet = ray_head.all_processes["raylet"][0].process.pid
    receipts, killed = [], []

    def on_receipt(receipt):
        receipts.append(receipt)
        if not killed:
            assert len(list(job.mixed.glob("part-*"))) < len(rows)
            killed.extend(
                pid for pid in processes.descendants(raylet) if "MapWorker(MapBatches(MixShards))" in processes.name(pid)
            )
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    process_shards(job, [], ONE, ONE, on_receipt)
    assert killed
    assert processes.left(killed, 5) == []
    assert {receipt.shard for receipt in receipts} == set(rows)
    assert len(receipts) == len(rows)
    made = pl.concat([tables.read(path, tables.MIXED) for path in sorted(job.mixed.iterdir())])
    direct = mix(tables.read(job.plan, tables.PLAN), load_generator(job.generator), job.shape, job.sampler, job.batch_size)
    assert made.equals(direct)  # every mix_id once, in plan order; shards are a multiple of no batch, so batches differ too


KINDS = ("unmixed", "pixel", "noised", "real")


@pytest.fixture(scope="module")
def of_kinds(finished, tmp_path_factory):
    """A job for shards of every kind but mixtures, and the training images."""
    root, real = tmp_path_factory.mktemp("kinds"), Workspace(finished.root).real
    images = TrainingImages(real, RealDataset.load_info(finished.root).shape)
    config = PlanConfig(pairs=((0, 1),), ratios=3, sets_per_pair=2, shard_rows=6, kinds=KINDS)
    tables.write(make_plan(10, "data", "generator", config, labels=images.labels[:10]), root / "plan.parquet", tables.PLAN)
    job, (annotate_job, _) = jobs(finished, root, root / "plan.parquet", root / "mixed")
    return replace(job, real=real, strength=2.0, keys={"pixel": "pixel-key"}), annotate_job, images


def test_rows_of_every_kind_equal_those_of_a_direct_call(of_kinds):
    job, annotate_job, images = of_kinds
    rows, receipts = plan_shards(job.plan), []
    annotating = [replace(annotate_job, kind=kind, shards=frozenset(plan_shards(job.plan, kind))) for kind in KINDS]
    process_shards(job, annotating, ONE, ONE, receipts.append)
    expected = {
        (f"{part}/{kind}", shard) for part in ("mixed", "projection") for kind in KINDS for shard in plan_shards(job.plan, kind)
    }
    assert {(receipt.part, receipt.shard) for receipt in receipts} == expected
    assert len(rows) == 5
    assert {receipt.key for receipt in receipts if receipt.part == "mixed/pixel"} == {"pixel-key"}
    assert {receipt.key for receipt in receipts if receipt.part == "mixed/real"} == {"mixed-key"}
    for kind in KINDS:
        shards = plan_shards(job.plan, kind)
        assert finished_shards(job.mixed, "pixel-key" if kind == "pixel" else "mixed-key", shards) == set(shards)
    generator = load_generator(job.generator)
    for shard in rows:
        plan = read_plan(job.plan, shard)
        direct = mix(plan, generator, job.shape, job.sampler, job.batch_size, real=images, strength=2.0)
        mixed = tables.read(part_path(job.mixed, shard), tables.MIXED)
        assert mixed.equals(direct, null_equal=False)
        part = tables.read(part_path(annotate_job.annotations, shard), tables.annotations(annotate_job.n_classes))
        assert part.equals(annotate_directly(annotate_job, plan, mixed))
    assert {kind: len(plan_shards(job.plan, kind)) for kind in KINDS} == {"unmixed": 1, "pixel": 1, "noised": 1, "real": 2}


def test_what_is_made_of_real_images_loads_no_generator(of_kinds, tmp_path, monkeypatch):
    job, _, _ = of_kinds
    monkeypatch.setattr("cluster.pools._node", lambda: "here")
    actor = MixShards(replace(job, mixed=tmp_path, generator=tmp_path / "none"), 1)
    shards = [*plan_shards(job.plan, "pixel"), *plan_shards(job.plan, "real")]
    block = pa.Table.from_pylist([{"shard": shard, "receipts": [], "failure": None} for shard in shards])
    assert [row["failure"] for table in actor(block) for row in table.to_pylist()] == [None] * 3
