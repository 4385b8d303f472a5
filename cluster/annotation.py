"""Encoding of real images and annotation of mixed ones over an actor pool; an actor loads weights once, each when first needed."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch

from cluster.attempts import Standing
from cluster.pools import ShardWorker, Step, Watch, make_receipt, run_steps
from cluster.resources import Pool
from cluster.shards import Receipt, part_path, read_plan, write_part
from csm import tables
from csm.encoders import ENCODERS, Encoder, Sources, encode_table
from csm.errors import InputError
from csm.locations import local
from csm.reannotation import Annotator, AnnotatorSpec, annotate

SLICE_ROWS = tables.ROW_GROUP  # of the real table: the unit of work of encoding


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder: its name, a key of ``ENCODERS``, what it is made from, and settings."""

    name: str
    kind: str
    sources: Sources
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def load(self, device: str = "cpu") -> Encoder:
        """Ready on ``device``; ``InputError`` names the encoder that cannot be loaded."""
        try:
            return ENCODERS[self.kind].load(self.sources, **self.parameters).to(torch.device(device))
        except InputError as error:
            raise InputError(f"annotate.encoders.{self.name}: {error}") from None


@dataclass(frozen=True)
class EncodeJob:
    """What an actor needs to encode real images with one encoder; all paths are on storage that every node sees.

    ``real`` is the `real` table and ``features`` the folder of the part files; ``shards`` are slices of the table, see ``real_slices``.
    """

    encoder: EncoderSpec
    real: Path
    features: Path
    key: str
    shape: tuple[int, int, int]
    shards: frozenset[int]
    device: str = "cpu"


@dataclass(frozen=True)
class AnnotateJob:
    """What an annotation actor needs for one annotator; ``encoders`` are those of ``spec``, ``top`` is one for all jobs of an actor."""

    name: str
    spec: AnnotatorSpec
    encoders: Mapping[str, EncoderSpec]
    plan: Path
    mixed: Path
    annotations: Path
    key: str
    shape: tuple[int, int, int]
    n_classes: int
    shards: frozenset[int]
    device: str = "cpu"
    top: int | None = None


class EncodeShards(ShardWorker):
    """Actor: slice of the real table -> one part file of features for each encoder; the images are read once."""

    def __init__(self, jobs: Sequence[EncodeJob], threads: int, watch: Watch | None = None) -> None:
        super().__init__(threads, watch)
        self.jobs = jobs
        self._encoders: dict[str, Encoder] = {}

    def work(self, shard: int) -> list[dict[str, Any]]:
        jobs = [job for job in self.jobs if shard in job.shards]
        real = read_slice(jobs[0].real, shard)
        receipts = []
        for job in jobs:
            name = job.encoder.name
            if name not in self._encoders:
                self._encoders[name] = job.encoder.load(job.device)
            started = time.monotonic()
            try:
                frame = encode_table(self._encoders[name], real, job.shape, job.device)
            except InputError as error:
                raise InputError(
                    f"annotate.encoders.{name}: {error} (images from row {shard * SLICE_ROWS} of {job.real})"
                ) from None
            seconds = time.monotonic() - started
            written = write_part(frame, job.features, shard, frame.schema, job.key)
            receipts.append(make_receipt(f"encoders/{name}", shard, len(frame), written, job.key, seconds))
        return receipts


class AnnotateShards(ShardWorker):
    """Actor: part file of mixed images -> one part file of annotations for each annotator; the images are read once, if at all."""

    def __init__(self, jobs: Sequence[AnnotateJob], threads: int, watch: Watch | None = None) -> None:
        super().__init__(threads, watch)
        self.jobs = jobs
        self._encoders: dict[str, Encoder] = {}
        self._annotators: dict[str, Annotator] = {}

    def work(self, shard: int) -> list[dict[str, Any]]:
        jobs = [job for job in self.jobs if shard in job.shards]
        if not jobs:
            return []
        self._load(jobs)
        first, path = jobs[0], part_path(jobs[0].mixed, shard)
        plan = read_plan(first.plan, shard)
        mixed = tables.read(path, tables.MIXED, None if any(job.spec.encoders for job in jobs) else ["mix_id"])
        annotators = {job.name: self._annotators[job.name] for job in jobs}
        started = time.monotonic()
        try:
            frames = annotate(plan, mixed, annotators, self._encoders, first.shape, first.n_classes, first.device, first.top)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        seconds = (time.monotonic() - started) / len(jobs)  # the annotators share the encoders' work
        receipts = []
        for job in jobs:
            frame = frames[job.name]
            written = write_part(frame, job.annotations, shard, tables.annotations(job.n_classes, job.top), job.key)
            receipts.append(make_receipt(job.name, shard, len(frame), written, job.key, seconds))
        return receipts

    def _load(self, jobs: Sequence[AnnotateJob]) -> None:
        """Load what ``jobs`` need and is not there yet."""
        for job in jobs:
            for name, encoder in job.encoders.items():
                if name not in self._encoders:
                    self._encoders[name] = encoder.load(job.device)
            if job.name not in self._annotators:
                self._annotators[job.name] = Annotator(job.spec, job.device)


def encode_shards(
    jobs: Sequence[EncodeJob],
    pool: Pool,
    on_receipt: Callable[[Receipt], None],
    on_standing: Callable[[Standing], None] = lambda standing: None,
) -> None:
    """Encode the slices that are asked for, each read once for all encoders.

    Needs a Ray session. Raises as ``run_steps`` does.

    Args:
        jobs: one for each encoder.
        pool: size.
        on_receipt: called in the driver for every part file, as they are finished; ``part`` is "encoders/NAME".
        on_standing: called in the driver, from another thread, every few seconds.
    """
    shards = frozenset[int]().union(*(job.shards for job in jobs))
    run_steps([Step("annotate", EncodeShards, {"jobs": tuple(jobs)}, pool)], sorted(shards), on_receipt, on_standing)


def real_slices(real: Path) -> dict[int, int]:
    """Slice of the `real` table at ``real`` -> its images of the train and validation split; those without any are left out."""
    slices = pl.scan_parquet(local(real)).select("split").with_row_index("row").filter(pl.col("split") != "test")
    counts = slices.group_by(pl.col("row") // SLICE_ROWS).len().sort("row").collect()
    return dict(zip(counts["row"].to_list(), counts["len"].to_list(), strict=True))


def read_slice(real: Path, number: int, splits: Collection[str] = ("train", "val")) -> pl.DataFrame:
    """Rows of ``splits`` in slice ``number`` of the `real` table at ``real``; only the row groups that hold it are read."""
    rows = tables.read(real, tables.REAL, rows=(number * SLICE_ROWS, SLICE_ROWS))
    return rows.filter(pl.col("split").is_in(splits))
