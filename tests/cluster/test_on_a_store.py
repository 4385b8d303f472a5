"""What workers read and write on a store is what they read and write in a folder. They are called in this process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster import annotation
from cluster.annotation import AnnotateJob, AnnotateShards, EncodeJob, EncoderSpec, EncodeShards, real_slices
from cluster.mixing import MixJob, MixShards
from cluster.session import records_in
from cluster.shards import finished_shards, part_path, plan_shards
from cluster.streaming import open_stream
from cluster.tuning_trials import Standing, note_stop, stopped_history
from csm import tables
from csm.classifiers import load_classifier
from csm.datasets import RealDataset
from csm.encoders import FeatureTable, Sources
from csm.errors import InputError
from csm.generators import load_generator
from csm.generators.fitting import FitJob, GeneratorConfig, fit_job
from csm.locations import listing, store
from csm.methods import Method, MixedTerm
from csm.optimization import OptimizerConfig
from csm.reannotation import AnnotatorSpec
from csm.runs import MixedSource, RunSpec, fit_run, is_finished
from csm.sampling import SamplerConfig
from csm.world import ALONE

pytestmark = pytest.mark.usefixtures("here", "one_thread")


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr("cluster.pools._node", lambda: "here")


@pytest.fixture
def both(finished, bucket):
    """The finished workspace in a folder, and on a store."""
    names = [name for name in listing(finished.root) if not name.startswith(("ray/", "mlartifacts/", "mlflow"))]
    store(bucket).put([str(finished.root / name) for name in names], [str(bucket / name) for name in names])
    return finished.root, bucket


def same_parts(first: Path, second: Path, shards) -> bool:
    return all(part_path(first, shard).read_bytes() == part_path(second, shard).read_bytes() for shard in shards)


def test_mixing_and_annotation(both, tmp_path):
    made = []
    for root in both:
        info, rows = RealDataset.load_info(root), plan_shards(root / "plan.parquet")
        out = tmp_path / "out" if root is both[0] else root / "out"
        job = MixJob(
            root / "plan.parquet", root / "generator", out / "mixed", "m", info.shape, SamplerConfig(steps=2), 4, frozenset(rows)
        )
        mixing = MixShards(job, 1)
        receipts = [receipt for shard in rows for receipt in mixing._mix(shard)]
        assert [receipt["rows"] for receipt in receipts] == list(rows.values())
        assert finished_shards(out / "mixed", "m", rows) == set(rows)
        sources = Sources(root, (root / "annotators" / "members" / "00",))
        spec = AnnotatorSpec("teacher", "posterior", root / "annotators" / "teacher", "teacher")
        encoders = {"teacher": EncoderSpec("teacher", "teacher", sources)}
        files = (root / "plan.parquet", out / "mixed", out / "teacher")
        annotating = AnnotateShards([AnnotateJob("teacher", spec, encoders, *files, "a", info.shape, 10, frozenset(rows))], 1)
        checksums = [receipt["checksum"] for shard in rows for receipt in annotating._annotate(shard)]
        made.append((out, [receipt["checksum"] for receipt in receipts], checksums))
    (folder, *sums), (remote, *others) = made
    assert sums == others
    for name in ("mixed", "teacher"):
        assert same_parts(folder / name, remote / name, rows)


def test_encoding(both, tmp_path, monkeypatch):
    monkeypatch.setattr(annotation, "SLICE_ROWS", 500)
    tables_of = []
    for root in both:
        out, shards = (tmp_path if root is both[0] else root) / "features", real_slices(root / "real" / "part-00000.parquet")
        encoder = EncoderSpec("pca", "pixels", Sources(root, ()))
        shape = RealDataset.load_info(root).shape
        job = EncodeJob(encoder, root / "real" / "part-00000.parquet", out, "e", shape, frozenset(shards))
        actor = EncodeShards([job], 1)
        for shard in shards:
            actor._encode(shard)
        tables_of.append(FeatureTable(out).matrix("val"))
    assert torch.equal(tables_of[0][0], tables_of[1][0])
    assert torch.equal(tables_of[0][1], tables_of[1][1])
    with pytest.raises(InputError, match="holds no features"):
        FeatureTable(both[1] / "none").matrix("val")


def test_a_generator_is_fitted_and_goes_on_from_its_state(both, tmp_path):
    config = GeneratorConfig(block_channels=(8, 16), steps=4, batch_size=16, checkpoint_steps=2)
    for root, out in ((both[0], tmp_path / "g"), (both[1], both[1] / "g")):
        job, steps = FitJob(root, out, config, "f"), []

        def stop(step, loss, steps=steps):
            steps.append(step)
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit_job(job, stop)
        assert (out / "state.pt").is_file()
        fit_job(job, lambda step, loss, steps=steps: steps.append(step))
        assert steps == [1, 2, 3, 1, 2, 3, 4]
    fitted = [load_generator(folder).network.state_dict() for folder in (tmp_path / "g", both[1] / "g")]
    assert all(torch.equal(tensor, fitted[1][name]) for name, tensor in fitted[0].items())


def test_a_classifier_is_trained_once(both, tmp_path):
    written = []
    for root in both:
        source = MixedSource(
            root / "plan.parquet",
            root / "mixed",
            root / "annotations" / "teacher",
            root / "annotators" / "teacher" / "calibration.json",
        )
        out = (tmp_path if root is both[0] else root) / "runs" / "soft"
        method = Method(mixed=MixedTerm("teacher", loss="kl", schedule="interior"))
        spec = RunSpec("soft", "m", 1, out, root, "small-cnn", {"width": 8}, method, OptimizerConfig(epochs=2), source, "soft")
        fit_run(spec)
        assert is_finished(spec)
        assert not is_finished(replace(spec, fingerprint="other"))
        assert not (out / "state.pt").exists()
        written.append(out)
        fit_run(spec, on_epoch=lambda *_: pytest.fail("it is trained again"))
        note_stop(Standing(str(out), "soft", [{"epoch": 1.0}], {}))
        assert stopped_history(spec) == [{"epoch": 1.0}]
    first, second = (tables.read(out / "predictions.parquet", tables.predictions(10)) for out in written)
    assert first.equals(second)
    weights = [load_classifier(out).state_dict() for out in written]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_stream_names_the_same_row_groups(both):
    folder, remote = (open_stream(root, 0, ALONE).groups for root in both)
    assert [piece[1:] for piece in folder] == [piece[1:] for piece in remote]
    assert all(piece.path.startswith("s3://") for piece in remote)


def test_ray_keeps_its_records_on_the_store_too(bucket, tmp_path):
    assert records_in(tmp_path) == {"storage_path": str(tmp_path)}
    kept = records_in(bucket / "ray")
    with kept["storage_filesystem"].open_output_stream(kept["storage_path"] + "/mark") as file:
        file.write(b"ray")
    assert (bucket / "ray" / "mark").read_bytes() == b"ray"


def test_a_training_without_parts_says_what_to_run(both, tmp_path):
    root = both[1]
    source = MixedSource(
        root / "plan.parquet", root / "none", root / "none", root / "annotators" / "teacher" / "calibration.json"
    )
    method = Method(mixed=MixedTerm("teacher"))
    spec = RunSpec("r", "m", 1, root / "r", root, "small-cnn", {"width": 8}, method, OptimizerConfig(epochs=1), source, "f")
    with pytest.raises(InputError, match=r"s3://.*/none holds no part file: run csm mix"):
        fit_run(spec)
