import logging
import sys

import polars as pl
import pytest
import torch

from csm import micro_batches
from csm.errors import InputError
from csm.micro_batches import in_micro_batches

ROWS = pl.DataFrame({"row": range(50)})


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not run out of memory yet."""
    monkeypatch.setattr(micro_batches, "_most", sys.maxsize)


class Device:
    """Doubles every row; it has room for ``most`` rows and notes what it was given and what it did."""

    def __init__(self, most: int, kind: str = "cuda") -> None:
        self.most, self.kind = most, kind
        self.asked: list[int] = []
        self.done: list[int] = []

    def __call__(self, rows: pl.DataFrame) -> torch.Tensor:
        self.asked.append(len(rows))
        if len(rows) > self.most:
            if self.kind == "cpu":
                torch.empty(2**60, dtype=torch.uint8)  # what torch itself says where memory cannot be had
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.done.append(len(rows))
        return rows["row"].to_torch() * 2


def values(device: Device, size: int, rows: pl.DataFrame = ROWS) -> list[int]:
    return [value for batch in in_micro_batches(rows, size, device) for value in batch.tolist()]


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("most", "size", "done"),
    [
        (100, 16, [16, 16, 16, 2]),  # it fits
        (16, 16, [16, 16, 16, 2]),
        (15, 16, [8, 8, 8, 8, 8, 8, 2]),
        (3, 16, [2] * 25),
        (1, 16, [1] * 50),
        (1, 1, [1] * 50),
        (49, 1000, [25, 25]),
        (12, 1000, [12, 12, 12, 12, 2]),  # 50 -> 25 -> 12
    ],
)
def test_no_row_is_lost_doubled_or_moved(kind: str, most: int, size: int, done: list[int]) -> None:
    device = Device(most, kind)
    assert values(device, size) == [2 * row for row in range(50)]
    assert device.done == done


def test_the_size_that_fits_is_remembered() -> None:
    values(Device(5), 16)
    later = Device(5)
    assert values(later, 16) == values(Device(100), 3)
    assert later.asked == later.done == [4] * 12 + [2]


def test_memory_that_gets_scarce_later_halves_what_was_left() -> None:
    device = Device(100)
    batches = in_micro_batches(ROWS, 20, device)
    first = next(batches).tolist()
    device.most = 6
    assert first + [value for batch in batches for value in batch.tolist()] == [2 * row for row in range(50)]
    assert device.done == [20, 5, 5, 5, 5, 5, 5]


def test_a_size_below_what_fits_is_kept() -> None:
    values(Device(8), 16)
    device = Device(8)
    values(device, 3)
    assert device.asked == [3] * 16 + [2]


def test_it_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        values(Device(2), 32)
        values(Device(1), 32)
    assert [record.getMessage() for record in caplog.records] == [
        "mixing: 32 rows do not fit the memory of the device, going on with fewer (mix.batch_size)"
    ]


def test_a_single_row_that_does_not_fit_is_told_in_one_line() -> None:
    device = Device(0)
    with pytest.raises(InputError, match="a single image does not fit the memory of the device; put fewer workers on it"):
        values(device, 8)
    assert device.asked == [8, 4, 2, 1]


def test_who_annotates_is_told_its_own_settings(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"annotating: a single image .*\(resources.annotate\)"):
        list(in_micro_batches(ROWS, 2, Device(0), "annotating"))
    assert (
        "annotating: 2 rows do not fit the memory of the device, going on with fewer (batch_size of the encoder)" in caplog.text
    )


def test_nothing_is_held_of_an_attempt_that_failed() -> None:
    """The traceback of the error would keep the tensors of the attempt, and the smaller one would not fit either."""
    alive: list[bool] = []
    kept: list[object] = []

    class Buffer:
        def __del__(self) -> None:
            kept.append(self.__class__)

    def work(rows: pl.DataFrame) -> torch.Tensor:
        alive.append(len(kept) == len(alive))
        buffer = Buffer()
        if len(rows) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        del buffer
        return rows["row"].to_torch()

    list(in_micro_batches(ROWS, 50, work))
    assert alive == [True] * len(alive)
    assert len(alive) > 3


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no"), MemoryError()])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    def work(rows: pl.DataFrame) -> torch.Tensor:
        raise error

    with pytest.raises(type(error)) as caught:
        list(in_micro_batches(ROWS, 8, work))
    assert caught.value is error


def test_no_rows_are_no_batches() -> None:
    assert values(Device(1), 8, ROWS.head(0)) == []
