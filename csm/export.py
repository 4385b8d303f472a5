"""Mixed images as files that other programs read: image folder, WebDataset, Hugging Face parquet; each with its soft labels.

Images of another kind are written in the same way.
"""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from csm import tables
from csm.errors import InputError
from csm.export_card import Card
from csm.storage import replacing

WORK = ".csm-export"  # folder of what is needed only until the export is whole
ENCODE_ROWS = 256  # rows encoded at once, and of a parquet file's row group: bounds the memory for images of any size


class Format(NamedTuple):
    """How rows become files below a folder.

    Attributes:
        piece: (number, count) -> the file, relative to the folder, that is there when the rows of this piece of ``count`` are.
        write: (folder, piece, frames of ``rows`` with PNG images, card); afterwards the piece is there, whole.
        finish: (folder, pieces); writes what needs all of them. It may run twice.
    """

    piece: Callable[[int, int], str]
    write: Callable[[Path, str, Iterable[pl.DataFrame], Card], None]
    finish: Callable[[Path, Sequence[str]], None] = lambda directory, pieces: None


def rows(
    plan: pl.DataFrame, mixed: pl.DataFrame, labels: pl.DataFrame | None, class_names: Sequence[str], where: str = "plan"
) -> pl.DataFrame:
    """One row for each row of ``plan``, in its order, joined on ``mix_id``.

    Args:
        plan: rows of the `plan` table.
        mixed: their rows of the `mixed` table, in any order.
        labels: their soft labels (columns mix_id, soft_label), in any order, or None.
        class_names: K names.
        where: which rows these are, for the message.

    Returns:
        mix_id, class_a and class_b (numbers), name_a and name_b, lam (share of class_a that went in), image; with ``labels`` also
        soft_label Array(Float32, K) and label, the class of its largest entry.

    Raises:
        InputError: an image or a label is missing or stands twice, or a mix_id is no file name.
    """
    names = pl.Series(class_names)
    named = plan.select(
        "mix_id", "class_a", "class_b", name_a=names.gather(plan["class_a"]), name_b=names.gather(plan["class_b"])
    )
    table = named.with_columns(plan["lam"]).join(mixed, on="mix_id", how="left", maintain_order="left")
    columns = ["mix_id", "class_a", "class_b", "name_a", "name_b", "lam", "image"]
    if labels is not None:
        table = table.join(labels, on="mix_id", how="left", maintain_order="left")
        table = table.with_columns(pl.col("soft_label").arr.arg_max().cast(pl.Int64).alias("label"))
        columns[-1:] = ["label", "soft_label", "image"]
    if len(table) > len(plan):
        raise InputError(
            f"{where}: some mixed images or annotations stand twice: remove its part files, run csm mix and csm annotate"
        )
    missing = len(table) - len(table.drop_nulls())
    if missing:
        raise InputError(
            f"{where}: {missing} of {len(plan)} planned images are not mixed and annotated: remove its part files, "
            "run csm mix and csm annotate"
        )
    if not table["mix_id"].str.contains(r"^[A-Za-z0-9_-]+$").all():  # a dot would end the key of a WebDataset, a slash the folder
        raise InputError(f"{where}: a mix_id has other characters than letters, digits, _ and -: run csm plan again")
    return table.select(columns)


def encode(frame: pl.DataFrame, shape: tuple[int, int, int], pool: Executor) -> Iterator[pl.DataFrame]:
    """``frame`` in slices of at most ``ENCODE_ROWS`` rows, its raw images of ``shape`` (H, W, C) as PNG files.

    Raises:
        InputError: the images have neither 1 nor 3 channels.
    """
    if shape[2] not in (1, 3):
        raise InputError(f"export: images of {shape[2]} channels cannot be written as PNG; expected 1 or 3")
    for part in frame.iter_slices(ENCODE_ROWS):
        pixels = tables.to_images(part["image"], shape).permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
        pictures = pixels[..., 0] if shape[2] == 1 else pixels
        chunks = pool.map(_pngs, (pictures[first : first + 16] for first in range(0, len(pictures), 16)))
        yield part.with_columns(pl.Series("image", [image for chunk in chunks for image in chunk], dtype=pl.Binary()))


def safe_names(class_names: Sequence[str]) -> list[str]:
    """A different file name for each class, also where case does not count: letters, digits and _, at most 110 bytes.

    A name keeps its letters of any alphabet; if two would be equal, all end with their number.
    """
    names = [re.sub(r"\W+", "_", name).strip("_").encode()[:100].decode(errors="ignore") or "class" for name in class_names]
    if len({name.casefold() for name in names}) < len(names):
        return [f"{name}_{number}" for number, name in enumerate(names)]
    return names


def _pngs(pictures: np.ndarray) -> list[bytes]:
    """Encode several, so that small ones are worth a thread's while; the compression lets other threads run."""
    files = []
    for pixels in pictures:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        files.append(file.getvalue())
    return files


def _write_images(directory: Path, piece: str, frames: Iterable[pl.DataFrame], card: Card) -> None:
    """``images/A-B/MIX_ID.png``; the piece is their lines of ``metadata.jsonl``, so half of its images count for nothing."""
    names = safe_names(card.class_names)
    with replacing(directory / piece) as temporary, temporary.open("wb") as file:
        for frame in frames:
            folders = [f"images/{names[a]}-{names[b]}" for a, b in frame.select("class_a", "class_b").iter_rows()]
            for folder in set(folders):
                (directory / folder).mkdir(parents=True, exist_ok=True)
            paths = [f"{folder}/{mix_id}.png" for folder, mix_id in zip(folders, frame["mix_id"], strict=True)]
            for path, image in zip(paths, frame["image"], strict=True):
                (directory / path).write_bytes(image)
            file.write(frame.select(pl.Series("file_name", paths), pl.exclude("image")).write_ndjson().encode())


def _join_metadata(directory: Path, pieces: Sequence[str]) -> None:
    with replacing(directory / "metadata.jsonl") as temporary, temporary.open("wb") as file:
        for piece in pieces:
            with (directory / piece).open("rb") as part:
                shutil.copyfileobj(part, file)


def _write_tar(directory: Path, piece: str, frames: Iterable[pl.DataFrame], card: Card) -> None:
    """``MIX_ID.png`` and ``MIX_ID.json`` side by side; the same rows give the same bytes."""
    with replacing(directory / piece) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for frame in frames:
            lines = frame.drop("image").write_ndjson().removesuffix("\n").split("\n")
            for mix_id, image, line in zip(frame["mix_id"], frame["image"], lines, strict=True):
                _add(tar, f"{mix_id}.png", image)
                _add(tar, f"{mix_id}.json", line.encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0, owner 0
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_parquet(directory: Path, piece: str, frames: Iterable[pl.DataFrame], card: Card) -> None:
    """Columns and schema metadata as the `datasets` library has them, so that it decodes the images and knows the classes."""
    schema = _arrow_schema(card)
    image = pl.struct(pl.col("image").alias("bytes"), pl.format("{}.png", "mix_id").alias("path")).alias("image")
    with replacing(directory / piece) as temporary, temporary.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
        for frame in frames:
            writer.write_table(frame.with_columns(image).select(schema.names).to_arrow().cast(schema))


def _arrow_schema(card: Card) -> Any:
    """Arrow types, and as metadata the same columns in the words of the `datasets` library."""
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "image": (pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"_type": "Image"}),
        "class": (pa.int64(), {"names": list(card.class_names), "_type": "ClassLabel"}),
        "number": (pa.float32(), {"dtype": "float32", "_type": "Value"}),
        "text": (pa.string(), {"dtype": "string", "_type": "Value"}),
    }
    kinds["numbers"] = (pa.list_(pa.float32()), {"feature": kinds["number"][1], "_type": "Sequence"})
    columns = {"image": "image", "class_a": "class", "class_b": "class", "lam": "number", "mix_id": "text"}
    if card.annotator:
        columns |= {"label": "class", "soft_label": "numbers"}
    fields = {name: kinds[kind] for name, kind in columns.items()}
    features = {name: feature for name, (_, feature) in fields.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([(name, kind) for name, (kind, _) in fields.items()], metadata=metadata)


FORMATS: dict[str, Format] = {
    "image-folder": Format(lambda number, count: f"{WORK}/metadata-{number:06d}.jsonl", _write_images, _join_metadata),
    "webdataset": Format(lambda number, count: f"mixed-{number:06d}.tar", _write_tar),
    "huggingface": Format(lambda number, count: f"data/train-{number:05d}-of-{count:05d}.parquet", _write_parquet),
}
