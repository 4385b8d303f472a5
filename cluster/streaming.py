"""Training images that do not fit in memory: from the `real` table on disk over Ray Data, in an order of its own for each epoch."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from csm import tables
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.locations import local, location
from csm.training import Split
from csm.world import World

BUFFER_BYTES = 2**28  # of pixels that wait in a worker, to be shuffled
AHEAD = 2  # row groups that are read at once, and batches that are decoded, while the network works


class Piece(NamedTuple):
    """Of the row group of ``length`` rows from row ``start`` of the file ``path``: ``count`` training images from the ``first`` on."""

    path: str
    start: int
    length: int
    first: int
    count: int


@dataclass(frozen=True)
class RealStream:
    """The training images of a `real` table, as ``csm.training.Stream``; needs a Ray session.

    An epoch puts the row groups in an order of its own. Worker r of n takes the r-th of n equal shares of the images in that order,
    which cuts a row group in two where a share ends, so that no image comes twice and all workers have equally many batches. It draws
    them from a buffer, see ``shuffle``. All of it is a pure function of (seed, epoch, number of workers). So the shuffle is full if a
    share fits in the buffer; else images that lie far apart in an epoch's order of row groups do not come into the same batch.

    Attributes:
        groups: the row groups that hold training images.
        shape: (H, W, C).
        seed: of the orders.
        world: this worker and the others.
        buffer: images that wait to be drawn, at least.
    """

    groups: tuple[Piece, ...]
    shape: tuple[int, int, int]
    seed: int
    world: World
    buffer: int

    @property
    def rows(self) -> int:
        return sum(group.count for group in self.groups)

    def batches(self, epoch: int, size: int) -> Iterator[Split]:
        """This worker's batches of ``epoch``: images uint8 (``size``, C, H, W) and labels int64, all of its share but a remainder.

        If the workers together have fewer than ``size`` times their number, one batch of what there is.

        Raises:
            OSError: a part file cannot be read any more, on this rank alone.
        """
        pieces = self.share(epoch, size)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        numbers = ray.data.from_items(list(range(len(pieces))), override_num_blocks=len(pieces))
        # Reading takes no CPU of the cluster: all of them may be the workers', which wait for it.
        data = numbers.map_batches(
            partial(_read, pieces),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=AHEAD),
        )
        blocks = data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=AHEAD)
        draw = int(np.random.default_rng([self.seed, epoch, self.world.rank]).integers(2**63))
        try:
            yield from shuffle((_decode(block, self.shape) for block in blocks), self.buffer, size, draw)
        except (ray.exceptions.RayError, InputError) as error:
            # Ray's error may be an InputError too, which would say that every rank raised it.
            raise OSError(f"training images cannot be streamed: {_first_cause(error)}") from error

    def share(self, epoch: int, size: int) -> list[Piece]:
        """What this worker reads of ``epoch`` in batches of ``size``, in order."""
        rank, workers = self.world
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))
        count = max(self.rows // (size * workers) * size, min(size, self.rows // workers))
        return list(_cut([self.groups[number] for number in order], rank * count, count))


def open_stream(directory: Path, seed: int, world: World, buffer_bytes: int = BUFFER_BYTES) -> RealStream:
    """The training images of the data set in ``directory``; of the table only the splits are read.

    Raises:
        InputError: a part file is missing or damaged, or there are fewer images than workers.
    """
    info = RealDataset.load_info(directory)
    groups = [group for path in sorted((directory / "real").glob("part-*.parquet")) for group in _groups(path)]
    stream = RealStream(tuple(groups), info.shape, seed, world, max(1, buffer_bytes // int(np.prod(info.shape))))
    if stream.rows != info.counts["train"]:
        raise InputError(
            f"{directory / 'real'} holds {stream.rows} training images, expected {info.counts['train']}: run csm prepare again"
        )
    if stream.rows < world.size:
        raise InputError(f"train.workers: {world.size} workers cannot share {stream.rows} training images")
    return stream


def shuffle(blocks: Iterable[Split], buffer: int, size: int, seed: int) -> Iterator[Split]:
    """Batches of ``size`` of the images in ``blocks``; the last may be smaller.

    As soon as ``buffer`` images are there, half of them, drawn at random, make batches; the others wait for more. While half of a buffer
    is put aside, three times a buffer is in memory.
    """
    draw = torch.Generator().manual_seed(seed)
    pool: list[Split] = []
    for block in chain(blocks, [None]):
        if block is not None:
            pool.append(block)
        waiting = sum(len(labels) for _, labels in pool)
        if waiting == 0 or (block is not None and waiting < buffer):
            continue
        images, labels = torch.cat([images for images, _ in pool]), torch.cat([labels for _, labels in pool])
        order = torch.randperm(waiting, generator=draw)
        take = waiting if block is None else waiting // 2 // size * size
        rest = order[take:]
        pool = [(images[rest], labels[rest])]
        for rows in order[:take].split(size):
            if len(rows):
                yield images[rows], labels[rows]


def _decode(block: pa.Table, shape: tuple[int, int, int]) -> Split:
    frame = pl.DataFrame(pl.from_arrow(block))
    return tables.to_images(frame["image"], shape), torch.from_numpy(frame["label"].to_numpy().astype(np.int64))


def _first_cause(error: BaseException) -> str:
    """The first error in the traceback that came back from a task: what comes after it is what Ray made of it."""
    found = re.search(r"^[\w.]+Error: (.*)$", str(error), re.MULTILINE)
    return found[1] if found else str(error)


def _groups(path: Path) -> Iterator[Piece]:
    """The row groups of a part file that have training images."""
    train = (tables.read(path, tables.REAL, columns=["split"])["split"] == "train").to_numpy()
    metadata = pq.read_metadata(local(path))
    start = 0
    for number in range(metadata.num_row_groups):
        length = metadata.row_group(number).num_rows
        if count := int(train[start : start + length].sum()):
            yield Piece(str(path), start, length, 0, count)
        start += length


def _cut(groups: Sequence[Piece], first: int, count: int) -> Iterator[Piece]:
    """Images ``first`` to ``first + count`` of those in ``groups``."""
    for group in groups:
        low, high = max(first, 0), min(first + count, group.count)
        if low < high:
            yield group._replace(first=low, count=high - low)
        first -= group.count


def _read(pieces: Sequence[Piece], batch: pa.Table) -> pa.Table:
    """Labels and images of the piece whose number is in ``batch``."""
    path, start, length, first, count = pieces[batch["item"][0].as_py()]
    group = tables.read(location(path), tables.REAL, ["split", "label", "image"], rows=(start, length))
    own = group.filter(pl.col("split") == "train").slice(first, count).select("label", "image")
    return own.to_arrow(compat_level=pl.CompatLevel.oldest())
