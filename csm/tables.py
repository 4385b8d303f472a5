"""Every table of the product: its columns, a check, and reading and writing it as parquet (zstd).

A table is a polars frame. Whoever writes one checks it, whoever reads one checks it again, so a column has one meaning everywhere.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from csm.errors import InputError
from csm.locations import is_remote, local, read_bytes
from csm.storage import replacing

Schema: TypeAlias = Mapping[str, pl.DataType]

# polars panics, which is no Exception, for some damaged footers.
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowInvalid, OSError)

ROW_GROUP = 2048  # rows that a reader of some of a table decodes together

SPLITS = ("train", "val", "test")
SPLIT = pl.Enum(SPLITS)

REAL: Schema = {
    "image_id": pl.UInt32(),
    "split": SPLIT,
    "label": pl.UInt16(),
    "image": pl.Binary(),  # raw uint8, height x width x channels
}
KINDS = ("semantic", "unmixed", "pixel", "noised", "real")  # of planned images: the mixtures, and what they are compared with
KIND = pl.Enum(KINDS)
PLAN: Schema = {
    "mix_id": pl.String(),
    "shard": pl.UInt32(),
    "group": pl.UInt32(),  # index of the set within its pair; of a real image its place in the train split, by image_id
    "seed": pl.Int64(),  # of the initial noise: one per row; or (plan.noise: set) one per set, whose ratios all start from one noise
    "class_a": pl.UInt16(),
    "class_b": pl.UInt16(),  # above class_a, but of "real" the same
    "step": pl.UInt8(),
    "lam": pl.Float32(),  # share of class_a that goes in
    "kind": KIND,  # one for all rows of a shard
}
MIXED: Schema = {"mix_id": pl.String(), "image": pl.Binary()}
METRICS: Schema = {
    "run": pl.String(),
    "method": pl.String(),
    "seed": pl.Int64(),
    "split": SPLIT,
    "posthoc": pl.String(),  # method of csm.posthoc.POSTHOC, fitted on the validation split; "none": as trained
    "temperature": pl.Float32(),  # fitted by posthoc "temperature"; else 1
    "metric": pl.String(),
    "bins": pl.UInt16(),
    "value": pl.Float64(),
}
SHIFT: Schema = {
    "image_id": pl.UInt32(),  # place in the part; of a corruption set the same image at every severity
    "corruption": pl.String(),  # null out of distribution, as are the next two
    "severity": pl.UInt8(),
    "label": pl.UInt16(),
    "image": pl.Binary(),
}
COMPARISON: Schema = {  # on the test split
    "method": pl.String(),
    "posthoc": pl.String(),
    "metric": pl.String(),
    "mean": pl.Float64(),  # over seeds
    "low": pl.Float64(),  # ends of the 95 % bootstrap interval over seeds and images; over images alone with one seed
    "high": pl.Float64(),
    "difference": pl.Float64(),  # to the mean of the baseline; this and what follows is null for the baseline, and without one
    "difference_low": pl.Float64(),
    "difference_high": pl.Float64(),
    "p": pl.Float64(),
    "p_holm": pl.Float64(),  # corrected for the number of methods
}
SHIFT_METRICS: Schema = {
    "run": pl.String(),
    "method": pl.String(),
    "seed": pl.Int64(),
    "shift": pl.String(),  # name of the set in the configuration
    "corruption": pl.String(),  # null out of distribution, as is the next one
    "severity": pl.UInt8(),
    "posthoc": pl.String(),  # "none" or "temperature"
    "metric": pl.String(),
    "value": pl.Float64(),
}


TRIAL_STATUS = pl.Enum(("done", "stopped", "failed"))  # stopped: by the scheduler, before its last epoch


def sweep(parameters: Mapping[str, pl.DataType], metrics: Sequence[str]) -> Schema:
    """Columns of ``sweep.parquet``, one row for each trial: a configuration, trained with one or several seeds.

    ``parameters`` is dotted key -> Int64, Float64, Boolean or String: what was tried, null where a choice made it idle. For each of
    ``metrics`` there is the mean over seeds and the ends of its 95 % interval: on validation, and on test for chosen trials alone.
    """
    columns: dict[str, pl.DataType] = {
        "trial": pl.UInt32(),
        "status": TRIAL_STATUS,
        "error": pl.String(),  # null but for failed ones
        "run": pl.String(),  # MLflow's id, null without one
        "seeds": pl.UInt16(),  # trained to the end
        "epochs": pl.UInt32(),  # of the first seed
        "seconds": pl.Float64(),
        "rank": pl.UInt32(),  # by the first objective, from 1; null unless done
        "pareto": pl.Boolean(),  # no other trial is as good in every objective and better in one
    }
    columns |= {f"param.{key}": dtype for key, dtype in parameters.items()}
    names = [f"{split}.{metric}" for split in ("val", "test") for metric in metrics]
    return columns | {f"{name}{end}": pl.Float64() for name in names for end in ("", ".low", ".high")}


def annotations(n_classes: int, top: int | None = None) -> Schema:
    """Columns of ``annotations/ANNOTATOR/part-*``; what is of the posterior is null for annotators that know only the pair.

    With ``top`` no more than the most probable classes of each image are there, see ``csm.reannotation.truncation``.
    """
    own: dict[str, pl.DataType] = {"mix_id": pl.String(), "lam_raw": pl.Float32()}
    if top is None:
        return {**own, "log_posterior": pl.Array(pl.Float32(), n_classes)}
    truncated = {"classes": pl.Array(pl.UInt16(), top), "log_posterior": pl.Array(pl.Float32(), top), "log_rest": pl.Float32()}
    return own | truncated


def features(size: int) -> Schema:
    """Columns of ``annotators/encoders/ENCODER/part-*``, real images only."""
    return {"image_id": pl.UInt32(), "split": SPLIT, "label": pl.UInt16(), "feature": pl.Array(pl.Float32(), size)}


def predictions(n_classes: int) -> Schema:
    """Columns of ``runs/RUN/predictions.parquet``."""
    return {
        "run": pl.String(),
        "split": SPLIT,
        "image_id": pl.UInt32(),
        "label": pl.UInt16(),
        "logits": pl.Array(pl.Float32(), n_classes),
    }


def predicted(class_names: Sequence[str]) -> Schema:
    """Columns of what `csm predict` writes, one row for each image; of an image that could not be read all are null but the first and last.

    A column for each class, ``p_NAME``, is what a spreadsheet, pandas and polars take alike; where classes share a name, ``p_NUMBER``.
    """
    names = class_names if len(set(class_names)) == len(class_names) else range(len(class_names))
    return {
        "file": pl.String(),
        "class": pl.String(),  # the most probable one
        "label": pl.UInt16(),  # its number
        "confidence": pl.Float32(),  # its probability
        "entropy": pl.Float32(),  # nats, from 0 to log K
        **{f"p_{name}": pl.Float32() for name in names},
        "error": pl.String(),  # null but for bad images
    }


def calibrated(n_classes: int) -> Schema:
    """Columns of ``probabilities.parquet`` of `csm calibrate`, in the order of the logits that it was given."""
    return {"row": pl.UInt32(), "label": pl.UInt16(), **{f"p_{k}": pl.Float32() for k in range(n_classes)}}


def check(frame: pl.DataFrame, schema: Schema, where: str = "table") -> pl.DataFrame:
    """Return ``frame`` if its columns and dtypes are those of ``schema``, in order; else raise ``InputError`` naming the column."""
    if frame.columns != list(schema):
        raise InputError(f"{where}: expected columns {list(schema)}, got {frame.columns}")
    for name, dtype in schema.items():
        if frame.schema[name] != dtype:
            raise InputError(f"{where}: column {name!r} should be {dtype}, got {frame.schema[name]}")
    return frame


def write(frame: pl.DataFrame, path: Path, schema: Schema, metadata: dict[str, str] | None = None) -> None:
    """Check ``frame`` and write it to ``path`` atomically, with ``metadata`` in the file's footer."""
    check(frame, schema, str(path))
    with replacing(path) as temporary:
        write_file(frame, temporary, metadata)


def write_file(frame: pl.DataFrame, file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write ``frame``, which was checked, to a file of this machine that nobody reads yet."""
    frame.write_parquet(file, compression="zstd", metadata=metadata, row_group_size=ROW_GROUP)


@contextmanager
def in_pieces(path: Path, schema: Schema, metadata: Mapping[str, str] | None = None) -> Iterator[Callable[[pl.DataFrame], None]]:
    """Give a function that checks a frame and appends it as one row group; when the block ends well, ``path`` is there, whole.

    The footer gets ``metadata`` as it is then.
    """

    def arrow(frame: pl.DataFrame) -> Any:
        return check(frame, schema, str(path)).to_arrow(compat_level=pl.CompatLevel.oldest())

    # A dictionary pays for columns of few values; text and 64-bit numbers are nearly all different.
    repeated = [name for name, dtype in schema.items() if dtype not in (pl.String(), pl.Binary(), pl.Int64())]
    form = arrow(pl.DataFrame(schema=dict(schema))).schema
    with replacing(path) as temporary, pq.ParquetWriter(temporary, form, compression="zstd", use_dictionary=repeated) as writer:
        yield lambda frame: writer.write_table(arrow(frame), row_group_size=len(frame))
        writer.add_key_value_metadata(dict(metadata or {}))


def read(path: Path, schema: Schema, columns: Sequence[str] | None = None, rows: tuple[int, int] | None = None) -> pl.DataFrame:
    """Read and check the table at ``path``; ``InputError`` names a file that is missing, truncated or of another schema.

    Of the file no more is read than ``columns`` (in the order of ``schema``) and the row groups of ``rows`` (first, number), if given.
    From a store it comes as a whole: into memory, or for ``rows``, which are asked for again and again, by ``csm.locations.local``.
    """
    return check(_collect(path, columns, rows), {name: schema[name] for name in columns or schema}, str(path))


def read_annotations(path: Path, n_classes: int) -> pl.DataFrame:
    """The `annotations` table at ``path``, truncated or not; errors as of ``read``."""
    frame = _collect(path)
    classes = frame.schema.get("classes")
    return check(frame, annotations(n_classes, classes.shape[0] if isinstance(classes, pl.Array) else None), str(path))


def read_plan(path: Path, kind: str | None = None) -> pl.DataFrame:
    """The `plan` table at ``path``, or its rows of ``kind`` alone; errors as of ``read``."""
    return check(_collect(path, narrow=lambda scan: plan_rows(scan, kind)), PLAN, str(path))


def plan_rows(scan: pl.LazyFrame, kind: str | None = None) -> pl.LazyFrame:
    """The rows of a `plan` table, or those of ``kind`` alone. A plan of versions that knew no kinds is of semantic mixtures."""
    if "kind" not in scan.collect_schema():
        scan = scan.with_columns(kind=pl.lit("semantic", dtype=KIND))
    return scan if kind is None else scan.filter(pl.col("kind") == kind)


def read_sweep(path: Path) -> tuple[pl.DataFrame, list[str], list[str]]:
    """The `sweep` table at ``path``, its parameters and its metrics, the first objective first; errors as of ``read``."""
    frame = _collect(path)
    parameters = {name.removeprefix("param."): dtype for name, dtype in frame.schema.items() if name.startswith("param.")}
    metrics = [name.removeprefix("val.") for name in frame.columns if name.startswith("val.") and name.count(".") == 1]
    return check(frame, sweep(parameters, metrics), str(path)), list(parameters), metrics


def _collect(
    path: Path,
    columns: Sequence[str] | None = None,
    rows: tuple[int, int] | None = None,
    narrow: Callable[[pl.LazyFrame], pl.LazyFrame] = lambda scan: scan,
) -> pl.DataFrame:
    try:
        if not is_remote(path) and not path.is_file():
            raise FileNotFoundError
        scan = narrow(pl.scan_parquet(io.BytesIO(read_bytes(path)) if is_remote(path) and rows is None else local(path)))
        if columns is not None:
            scan = scan.select(columns)
        return (scan if rows is None else scan.slice(*rows)).collect()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is not a whole parquet file ({reason}): remove it and run again") from None


def metadata(path: Path) -> dict[str, str] | None:
    """Return the footer metadata of the parquet file at ``path``, or None if it is missing or not a whole parquet file."""
    try:
        if not is_remote(path):
            return dict(pl.read_parquet_metadata(path))
        with path.open("rb") as file:
            return {key.decode(): value.decode() for key, value in (pq.read_metadata(file).metadata or {}).items()}
    except _UNREADABLE:
        return None


def to_images(column: pl.Series, shape: tuple[int, int, int]) -> torch.Tensor:
    """Decode a Binary column of raw pixels: uint8 (N, C, H, W) from N cells of H * W * C bytes, ``shape`` = (H, W, C)."""
    height, width, channels = shape
    size = height * width * channels
    lengths = column.bin.size()
    if not lengths.eq_missing(size).all():
        raise InputError(f"image bytes: expected {size} per image for shape {shape}, got {lengths.unique().sort().to_list()[:5]}")
    images = torch.empty(len(column), channels, height, width, dtype=torch.uint8)
    for first in range(
        0, len(column), ROW_GROUP
    ):  # a part at a time, so that memory holds the images once more and not three times
        content = bytearray().join(column[first : first + ROW_GROUP].to_list())
        rows = torch.frombuffer(content, dtype=torch.uint8).view(-1, height, width, channels)
        images[first : first + ROW_GROUP] = rows.permute(0, 3, 1, 2)  # (rows, C, H, W)
    return images


def from_images(images: torch.Tensor) -> pl.Series:
    """Encode uint8 images (N, C, H, W) as the Binary column that ``to_images`` reads."""
    rows = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (N, H, W, C)
    return pl.Series("image", [row.tobytes() for row in rows], dtype=pl.Binary())
