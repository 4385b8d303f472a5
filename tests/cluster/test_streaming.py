"""The oracle: the table itself; every training image comes once, to one worker."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cluster.streaming import RealStream, open_stream, shuffle
from csm import tables
from csm.datasets import RealDataset
from csm.datasets.real import build
from csm.errors import InputError
from csm.world import ALONE, World

SHAPE = (4, 4, 1)
TRAIN = 50


def make(folder: Path, splits: np.ndarray, group: int = 7) -> Path:
    """A data set whose image number n has n in its first two pixels and label n % 3, in two part files of small row groups."""
    images = np.zeros((len(splits), *SHAPE), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(len(splits)), 256)
    build("numbers", images, np.arange(len(splits)) % 3, splits, ["a", "b", "c"]).save(folder)
    first = folder / "real" / "part-00000.parquet"
    rows = tables.read(first, tables.REAL)
    half = len(rows) // 2
    rows[half:].write_parquet(folder / "real" / "part-00001.parquet", row_group_size=group)
    rows[:half].write_parquet(first, row_group_size=group)
    return folder


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0].int() * 256 + images[:, 0, 0, 1].int()).tolist()


def epoch_of(stream: RealStream, epoch: int = 0, size: int = 4) -> list[list[int]]:
    """The numbers of the images of every batch; shapes, dtypes and labels are checked on the way."""
    batches = []
    for images, labels in stream.batches(epoch, size):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (1, 4, 4)
        assert labels.dtype == torch.int64
        batches.append(numbers(images))
        assert labels.tolist() == [number % 3 for number in batches[-1]]
    return batches


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = np.array((["train"] * 5 + ["val"] * 2 + ["test"]) * 10)
    return make(tmp_path_factory.mktemp("numbers"), splits)


@pytest.fixture(scope="module")
def train(data: Path) -> set[int]:
    frame = pl.concat([tables.read(path, tables.REAL) for path in sorted((data / "real").iterdir())])
    return set(frame.filter(pl.col("split") == "train")["image_id"].to_list())


def open_all(data: Path, workers: int, seed: int = 3) -> list[RealStream]:
    return [open_stream(data, seed, World(rank, workers)) for rank in range(workers)]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_shares_are_equal_and_disjoint_whatever_the_batches(data: Path, train: set[int], workers: int, size: int) -> None:
    streams = open_all(data, workers)
    assert [stream.rows for stream in streams] == [TRAIN] * workers
    shares = [stream.share(0, size) for stream in streams]
    counts = {sum(piece.count for piece in share) for share in shares}
    assert counts == {TRAIN // (size * workers) * size or TRAIN // workers}
    rows = Counter()
    for piece in (piece for share in shares for piece in share):
        assert piece.count > 0
        rows.update((piece.path, piece.start, row) for row in range(piece.first, piece.first + piece.count))
    assert set(rows.values()) == {1}
    assert len(rows) == counts.pop() * workers


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
class TestThroughRay:
    def test_every_training_image_comes_once_but_a_remainder(self, data: Path, train: set[int]) -> None:
        batches = epoch_of(open_stream(data, 3, ALONE))
        assert [len(batch) for batch in batches] == [4] * 12
        seen = [number for batch in batches for number in batch]
        assert len(set(seen)) == 48
        assert set(seen) < train

    def test_the_order_is_a_function_of_seed_and_epoch(self, data: Path) -> None:
        first = epoch_of(open_stream(data, 3, ALONE))
        assert epoch_of(open_stream(data, 3, ALONE)) == first
        others = [epoch_of(open_stream(data, 3, ALONE), epoch=1), epoch_of(open_stream(data, 4, ALONE))]
        assert first not in others
        assert others[0] != others[1]
        flat = [number for batch in first for number in batch]
        assert np.abs(np.corrcoef(np.arange(48), flat)[0, 1]) < 0.5

    def test_a_small_buffer_shuffles_too_and_loses_nothing(self, data: Path) -> None:
        stream = open_stream(data, 3, ALONE, buffer_bytes=10 * 16)
        assert stream.buffer == 10
        batches = epoch_of(stream)
        assert epoch_of(stream) == batches
        assert sorted(number for batch in batches for number in batch) == sorted(
            number for batch in epoch_of(open_stream(data, 3, ALONE)) for number in batch
        )

    def test_two_workers_see_different_images(self, data: Path) -> None:
        first, second = (epoch_of(stream) for stream in open_all(data, 2))
        assert len(first) == len(second) == 6
        assert not {number for batch in first for number in batch} & {number for batch in second for number in batch}

    def test_fewer_images_than_a_batch_are_one_batch(self, data: Path, train: set[int]) -> None:
        (batch,) = epoch_of(open_stream(data, 3, ALONE), size=64)
        assert set(batch) == train

    def test_what_cannot_be_read_any_more_is_said(self, data: Path, tmp_path: Path) -> None:
        splits = np.array(["train"] * 8 + ["val", "test"])
        stream = open_stream(make(tmp_path, splits), 0, ALONE)
        (tmp_path / "real" / "part-00001.parquet").unlink()
        with pytest.raises(OSError, match=r"training images cannot be streamed: .*part-00001\.parquet does not exist"):
            list(stream.batches(0, 2))


@pytest.mark.parametrize("buffer", [1, 5, 8, 1000])
@pytest.mark.parametrize("blocks", [[], [0], [3], [2, 9, 0, 1, 12], [24]])
def test_the_buffer_gives_back_what_went_in(buffer: int, blocks: list[int]) -> None:
    def read() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        start = 0
        for count in blocks:
            labels = torch.arange(start, start + count)
            yield labels.view(-1, 1, 1, 1).to(torch.uint8), labels
            start += count

    batches = list(shuffle(read(), buffer, 4, seed=0))
    assert all(torch.equal(images.flatten().long(), labels) for images, labels in batches)
    assert sorted(label for _, labels in batches for label in labels.tolist()) == list(range(sum(blocks)))
    assert [len(labels) for _, labels in batches[:-1]] == [4] * (len(batches) - 1)


def test_no_image_waits_in_vain_and_none_comes_before_it_is_read() -> None:
    """A buffer of 20 in blocks of 10: the first batches are of the first 20, and mixed."""
    blocks = ((torch.zeros(10, 1, 1, 1, dtype=torch.uint8), torch.arange(start, start + 10)) for start in range(0, 100, 10))
    order = [label for _, labels in shuffle(blocks, 20, 5, seed=0) for label in labels.tolist()]
    assert max(order[:10]) < 20
    assert min(order[:10]) < 10 < max(order[:10])
    assert order != sorted(order)


def test_what_is_missing_or_damaged_is_said_first(data: Path, tmp_path: Path) -> None:
    make(tmp_path, np.array(["train"] * 8 + ["val", "test"]))
    (tmp_path / "real" / "part-00001.parquet").unlink()
    with pytest.raises(InputError, match="holds 5 training images, expected 8: run csm prepare again"):
        open_stream(tmp_path, 0, ALONE)
    (tmp_path / "real" / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-00001\.parquet is not a whole parquet file"):
        open_stream(tmp_path, 0, ALONE)


def test_more_workers_than_images(tmp_path: Path) -> None:
    make(tmp_path, np.array(["train"] * 3 + ["val", "test"]))
    with pytest.raises(InputError, match=r"train\.workers: 4 workers cannot share 3 training images"):
        open_stream(tmp_path, 0, World(0, 4))


def test_a_data_set_without_its_training_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5000, 2, 2, 1), dtype=np.uint8)
    splits = np.array((["train"] * 3 + ["val", "test"]) * 1000)
    whole = build("noise", images, np.arange(5000) % 2, splits, ["a", "b"])
    whole.save(tmp_path)
    held_out = RealDataset.load(tmp_path, ("val", "test"))
    assert held_out.info == whole.info
    assert len(held_out.frame) == 2000
    for split in ("val", "test"):
        for mine, all_of_it in zip(held_out.split(split), whole.split(split), strict=True):
            assert torch.equal(mine, all_of_it)
