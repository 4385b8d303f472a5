"""shift: corruption sets and sets out of distribution, in the shape of the data, one part file for each corruption and severity."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl

from cluster.shards import part_path, write_part
from csm import storage, tables
from csm.datasets import RealDataset
from csm.datasets.shifts import ShiftConfig, ShiftPart, shift_digest, shift_parts
from csm.errors import InputError
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.progress import say
from flows.stages import Context, Made, Stage

CODE_VERSION = 1


@dataclass(frozen=True)
class ShiftRecord:
    """What ``shift/NAME/shift.json`` holds, written last.

    Attributes:
        key: of everything that the set depends on.
        rows: images.
        checksums: of its part files.
    """

    key: str
    rows: int
    checksums: tuple[str, ...]


def shift_record(workspace: Workspace, name: str) -> ShiftRecord:
    """The record of the set ``name``; ``InputError`` if it is not there."""
    return storage.read_record(workspace.shift(name) / "shift.json", ShiftRecord)


def shift_files(workspace: Workspace, name: str) -> tuple[Path, ...]:
    """Part files of the set ``name``."""
    return tuple(part_path(workspace.shift(name), number) for number in range(len(shift_record(workspace, name).checksums)))


def _run(context: Context, record: StageRecord) -> Made:
    workspace, shifts = context.workspace, context.config.evaluate.shifts
    data = RealDataset.load(workspace.root)
    records = {name: _make(workspace, name, shift, data) for name, shift in shifts.items()}
    return Made(
        sum(made.rows for made in records.values()), storage.digest({name: made.checksums for name, made in records.items()})
    )


def _make(workspace: Workspace, name: str, shift: ShiftConfig, data: RealDataset) -> ShiftRecord:
    """Make the set ``name``, unless it is there as it should be."""
    directory = workspace.shift(name)
    key = storage.digest(CODE_VERSION, asdict(shift), shift_digest(shift), data.info.digest)
    done = directory / "shift.json"
    if done.is_file():
        made = shift_record(workspace, name)
        if made.key == key and all(tables.metadata(path) is not None for path in shift_files(workspace, name)):
            return made
        done.unlink()
    checksums, rows = [], 0
    try:
        for part in shift_parts(shift, data):
            frame = part_frame(part)
            checksums.append(write_part(frame, directory, len(checksums), tables.SHIFT, key).checksum)
            rows += len(frame)
    except (InputError, ValueError) as error:  # ValueError: a value that a source does not take
        raise InputError(f"evaluate.shifts.{name}: {error}") from None
    made = ShiftRecord(key, rows, tuple(checksums))
    for path in set(directory.glob("part-*.parquet")) - {part_path(directory, number) for number in range(len(checksums))}:
        path.unlink()  # of the set that was there before
    storage.write_json(done, asdict(made))
    say(f"  {name}: {rows:,} images in {len(checksums)} parts")
    return made


def part_frame(part: ShiftPart) -> pl.DataFrame:
    """The `shift` table of a part."""
    columns = {
        "image_id": np.arange(len(part.images), dtype=np.uint32),
        "corruption": [part.corruption] * len(part.images),
        "severity": [part.severity] * len(part.images),
        "label": [None] * len(part.images) if part.labels is None else part.labels.numpy().astype(np.uint16),
        "image": tables.from_images(part.images),
    }
    return pl.DataFrame(columns, schema=dict(tables.SHIFT))


def _check(context: Context) -> None:
    """What can be seen without reading images."""
    data = RealDataset.load(context.workspace.root)
    for name, shift in context.config.evaluate.shifts.items():
        try:
            shift_parts(shift, data)
        except InputError as error:
            raise InputError(f"evaluate.shifts.{name}: {error}") from None


def _outputs(workspace: Workspace, config: Config) -> list[Path]:
    outputs = []
    for name in config.evaluate.shifts:
        done = workspace.shift(name) / "shift.json"
        outputs += [done, *(shift_files(workspace, name) if done.is_file() else ())]
    return outputs


STAGE = Stage(
    name="shift",
    code_version=CODE_VERSION,
    inputs=("prepare",),
    settings=lambda config: {
        "shifts": {name: asdict(shift) for name, shift in config.evaluate.shifts.items()},
        "files": {name: shift_digest(shift) for name, shift in config.evaluate.shifts.items()},
    },
    outputs=_outputs,
    check=_check,
    run=_run,
    incremental=True,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
