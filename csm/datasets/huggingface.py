"""Parquet files as the `datasets` library of Hugging Face writes them: images as they were encoded, and labels."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csm.datasets.decoding import check_form, decode
from csm.datasets.real import RealDataset, Seed, build, complete_splits
from csm.datasets.source_files import number_classes, read_class_names, some_files, splits_of
from csm.errors import InputError

SUFFIXES = (".parquet",)
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
ROWS = 256  # read at once


def huggingface(
    path: str,
    image_column: str = "",
    label_column: str = "",
    class_names: str = "",
    size: int = 0,
    channels: int = 3,
    val: float = 0.1,
    test: float = 0.2,
    seed: Seed = 0,
) -> RealDataset:
    """Read parquet files; the first word of a file's name, or its folder's name, says the split (train, validation or valid or val, test).

    A missing validation or test split is cut from the training one with the fractions ``val`` and ``test``, stratified.

    Args:
        path: a file, a folder with such files anywhere below it, or a pattern (``data/*.parquet``).
        image_column: of encoded images, as bytes or as struct {bytes, path}; empty: ``image`` or ``img``.
        label_column: of whole numbers or names; empty: ``label``, ``fine_label`` or ``labels``.
        class_names: a text file with a name on each line; empty: those in the files' own metadata, else the numbers, else sorted names.
        size: height and width in pixels that all images are cropped and resized to; 0: as they are, all of one shape.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        InputError: no file, a damaged one, no such column, an image that cannot be read, a label that is missing or no class.
    """
    check_form(size, channels)
    files = some_files(path, SUFFIXES)
    parts = splits_of(files)
    tables = [open_parquet(file) for file in files]
    labels: list[int | str] = []
    counts = []
    for file, table in zip(files, tables, strict=True):
        column = _column(file, table, label_column, LABEL_COLUMNS, "label_column")
        found = [value for _, values in _batches(file, table, column) for value in values.to_pylist()]
        if None in found:
            raise InputError(f"{file}: row {found.index(None)} has no {column}: remove it, or choose another data.label_column")
        labels += found
        counts.append(len(found))
    names = read_class_names(class_names) or class_names_of(files[0], tables[0], label_column)
    targets, known = number_classes(labels, names, f"data.path: {path}")
    columns = [
        _column(file, table, image_column, IMAGE_COLUMNS, "image_column") for file, table in zip(files, tables, strict=True)
    ]
    images = decode(
        (image for file, table, column in zip(files, tables, columns, strict=True) for image in _images(file, table, column)),
        len(targets),
        size,
        channels,
    )
    splits = np.repeat(np.array(parts), counts)
    return build(Path(path).stem, images, targets, complete_splits(targets, splits, parts, val, test, seed), known)


def open_parquet(file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error) from None


def _batches(file: Path, table: Any, column: str) -> Iterator[tuple[int, Any]]:
    """Number of the first row, and the values of ``column`` of some rows."""
    first = 0
    for batch in plain_batches(file, table, [column]):
        yield first, batch.column(0)
        first += len(batch)


def plain_batches(file: Path, table: Any, columns: Sequence[str]) -> Iterator[Any]:
    """``columns`` of the open ``table``, some rows at a time.

    Raises:
        InputError: the file is damaged, or a column is of an extension type: to read a value of such a type runs code of whoever
            registered it, and Ray registers one that is unpickled.
    """
    for name in columns:
        if extension := _extension(table.schema_arrow.field(name).type):
            raise InputError(
                f"{file}: column {name} holds values of type {extension}, which are never read: write it as plain values"
            )
    try:
        yield from table.iter_batches(ROWS, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error) from None


def _extension(kind: Any) -> str | None:
    """Name of an extension type that is, or is part of, the Arrow type ``kind``."""
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    parts = [kind.value_type] if pa.types.is_dictionary(kind) else [kind.field(number).type for number in range(kind.num_fields)]
    return next((name for part in parts if (name := _extension(part))), None)


def _images(file: Path, table: Any, column: str) -> Iterator[tuple[str, bytes]]:
    """A name for messages and the encoded bytes of every row."""
    for first, values in _batches(file, table, column):
        for row, value in enumerate(values.to_pylist(), first):
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes):
                raise InputError(
                    f"{file}: row {row} has no bytes of an image in {column}; expected bytes, or struct {{bytes, path}}"
                )
            yield f"{file} row {row}", content


def _column(file: Path, table: Any, asked: str, usual: tuple[str, ...], setting: str) -> str:
    columns = table.schema_arrow.names
    for name in (asked,) if asked else usual:
        if name in columns:
            return name
    raise InputError(f"{file}: no column {asked or ' or '.join(usual)} among {', '.join(columns)}: set data.{setting}")


def class_names_of(file: Path, table: Any, asked: str) -> tuple[str, ...]:
    """Of the label's column, from the library's own metadata; none if they are not there."""
    content = (table.schema_arrow.metadata or {}).get(b"huggingface")
    column = _column(file, table, asked, LABEL_COLUMNS, "label_column")
    try:
        names = json.loads(content)["info"]["features"][column]["names"] if content else ()
    except (ValueError, KeyError, TypeError):  # it describes no classes
        return ()
    return tuple(map(str, names))


def damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} is not a whole parquet file ({str(error).partition(chr(10))[0]}): get it again")
