"""A node that is lost while mixing and annotation stream, on a cluster whose every CPU the pools take."""

import polars as pl
import pytest

from cluster.annotation import AnnotateJob, EncoderSpec
from cluster.mixing import MixJob, process_shards
from cluster.resources import Pool
from cluster.session import session
from cluster.shards import part_path, plan_shards, read_plan
from csm import storage, tables
from csm.datasets import RealDataset
from csm.encoders import Sources
from csm.generators import load_generator
from csm.mixing import mix
from csm.planning import PlanConfig, make_plan
from csm.reannotation import Annotator, AnnotatorSpec, annotate
from csm.sampling import SamplerConfig
from tests.nodes import STORE, start_head

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def nodes():
    """(cluster, the node to lose): the driver's with one CPU and two of two CPUs."""
    cluster = start_head(cpus=1)
    lost, _ = (cluster.add_node(num_cpus=2, **STORE) for _ in range(2))
    cluster.wait_for_nodes()
    yield cluster, lost
    cluster.shutdown()


@pytest.mark.timeout(600)
def test_a_lost_node_loses_and_repeats_nothing(nodes, finished, tmp_path):
    cluster, lost = nodes
    info = RealDataset.load_info(finished.root)
    plan = make_plan(10, "data", "generator", PlanConfig(pairs=((0, 1), (2, 3)), ratios=3, sets_per_pair=40, shard_rows=6))
    tables.write(plan, tmp_path / "plan.parquet", tables.PLAN)
    shards = frozenset(plan_shards(tmp_path / "plan.parquet"))
    job = MixJob(
        plan=tmp_path / "plan.parquet",
        generator=finished.root / "generator",
        mixed=tmp_path / "mixed",
        key="key",
        shape=info.shape,
        sampler=SamplerConfig(steps=30),
        batch_size=4,
        shards=shards,
    )
    sources = Sources(tmp_path, (finished.root / "annotators" / "members" / "00",))
    follower = AnnotateJob(
        name="teacher",
        spec=AnnotatorSpec("teacher", "posterior", finished.root / "annotators" / "teacher", "teacher"),
        encoders={"teacher": EncoderSpec("teacher", "teacher", sources)},
        plan=job.plan,
        mixed=job.mixed,
        annotations=tmp_path / "teacher",
        key="key",
        shape=info.shape,
        n_classes=info.n_classes,
        shards=shards,
    )
    receipts, mixed_when_first_annotated, removed = [], [], []

    def on_receipt(receipt):
        receipts.append(receipt)
        if receipt.part == "teacher" and not mixed_when_first_annotated:
            mixed_when_first_annotated.append(len(list(job.mixed.glob("part-*"))))
        if len({receipt.node for receipt in receipts}) > 1 and not removed and lost.node_id in {r.node for r in receipts}:
            cluster.remove_node(lost, allow_graceful=False)
            removed.append(len(receipts))

    with session(cluster.address):
        process_shards(job, [follower], Pool(), Pool(max_actors=1), on_receipt)  # 4 and 1 actors on 5 CPUs

    assert removed
    assert removed[0] < len(receipts)
    assert mixed_when_first_annotated[0] < len(shards)  # annotation started before generation had ended
    assert sorted((receipt.part, receipt.shard) for receipt in receipts) == sorted(
        (part, shard) for part in ("mixed", "teacher") for shard in shards
    )
    folders = {"mixed": job.mixed, "teacher": follower.annotations}
    for receipt in receipts:
        assert receipt.checksum == storage.file_digest(part_path(folders[receipt.part], receipt.shard))
    generator = load_generator(job.generator)
    annotators, encoders = {"teacher": Annotator(follower.spec)}, {"teacher": follower.encoders["teacher"].load()}
    for shard in sorted(shards):
        rows = read_plan(job.plan, shard)
        made = tables.read(part_path(job.mixed, shard), tables.MIXED)
        assert made.equals(mix(rows, generator, job.shape, job.sampler, job.batch_size))
        labelled = tables.read(part_path(follower.annotations, shard), tables.annotations(info.n_classes))
        assert labelled.equals(annotate(rows, made, annotators, encoders, info.shape, info.n_classes)["teacher"])
    mixed = pl.concat([tables.read(path, tables.MIXED) for path in job.mixed.iterdir()])
    assert mixed["mix_id"].sort().equals(plan["mix_id"].sort())
