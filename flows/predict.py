"""predict: images of all kinds of files -> a table of class, confidence, entropy and probabilities."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from csm import tables
from csm.calibrated import CalibratedClassifier
from csm.datasets.image_sources import Batch, decoded, images_of
from csm.errors import InputError
from csm.storage import replacing
from flows.models import open_model
from flows.progress import say, task

SHOWN = 20  # rows of the table on the terminal, and bad images that are named
Append = Callable[[pl.DataFrame], None]


def predict(
    images: Sequence[str],
    model: str,
    output: Path | None = None,
    batch_size: int = 256,
    device: str = "auto",
    tracking_uri: str | None = None,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Predict every image of ``images`` (files, folders; "-": names on stdin) with ``model``, a batch at a time.

    Returns:
        What ``--json`` prints, and the first rows (columns of ``tables.predicted``).

    Raises:
        InputError: the model or an input cannot be used, or not one image can be read; nothing is written then.
    """
    if output is not None and (output.suffix.lower() not in WRITERS or output.is_dir()):
        raise InputError(f"--output {output}: expected the name of a file that ends in {', '.join(WRITERS)}")
    place = find_device(device)
    classifier = open_model(model, tracking_uri)
    schema = tables.predicted(classifier.spec.class_names)
    sources = [images_of(path) for path in _names(images)]
    count = sum(source.count for source in sources)
    if not count:
        raise InputError("no images were given: name files or folders, or - for a list of names on stdin")
    items = (item for source in sources for item in source.read())
    first: list[pl.DataFrame] = []
    bad: list[str] = []
    failed = 0
    writer = _nowhere() if output is None else WRITERS[output.suffix.lower()](output, schema)
    with writer as append, task("predict", count) as progress:
        for batch in decoded(items, classifier.spec.shape, batch_size):
            frame = _rows(batch, classifier, batch_size, place, schema)
            append(frame)
            if sum(map(len, first)) < SHOWN:
                first.append(frame.head(SHOWN))
            errors = [str(error) for error in batch.errors if error is not None]
            bad += errors[: SHOWN - len(bad)]
            failed += len(errors)
            progress.advance(len(frame))
        if failed == count:
            raise InputError(f"not one of {count} images could be read; the first: {bad[0]}" if count > 1 else bad[0])
    for line in bad:
        say(f"  {escape(line)}")
    if failed:
        more = f" ({len(bad)} are named here)" if failed > len(bad) else ""
        say(f"predict: {failed:,} of {count:,} images could not be read{more}; the others are done")
    result = {"model": model, "images": count, "failed": failed, "output": None if output is None else str(output)}
    return result, pl.concat(first).head(SHOWN)


def table(first: pl.DataFrame, count: int) -> Table:
    """The first rows, for a terminal."""
    shown = Table(
        title=f"{count:,} image{'s' * (count != 1)}"
        if count <= len(first)
        else f"The first {len(first)} of {count:,} images (--output keeps all)"
    )
    for name, justify in (("file", "left"), ("class", "left"), ("confidence %", "right"), ("entropy", "right")):
        shown.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in first.iter_rows(named=True):
        if row["error"] is not None:
            shown.add_row(Text(row["file"]), Text("cannot be read", "red"), "", "")
        else:
            cells = f"{100 * row['confidence']:.1f}", f"{row['entropy']:.3f}"
            shown.add_row(Text(row["file"]), Text(row["class"]), *cells)
    return shown


def find_device(name: str) -> torch.device:
    """The device that ``--device`` names; "auto" is a GPU if torch finds one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _names(images: Sequence[str]) -> Iterator[str]:
    for name in images:
        if name == "-":
            yield from (line for raw in sys.stdin if (line := raw.rstrip("\r\n")))
        else:
            yield name


def _rows(
    batch: Batch, classifier: CalibratedClassifier, batch_size: int, device: torch.device, schema: tables.Schema
) -> pl.DataFrame:
    """Columns of ``schema`` for every item of ``batch``."""
    probs = classifier.predict(batch.images, batch_size, device)
    log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
    top = probs.max(dim=1)
    good = [row for row, error in enumerate(batch.errors) if error is None]
    names = [name for name in schema if name.startswith("p_")]
    columns = {
        "row": good,
        "class": [classifier.spec.class_names[k] for k in top.indices.tolist()],
        "label": top.indices.numpy(),
        "confidence": top.values.numpy(),
        "entropy": (-(probs * log_probs).sum(dim=1)).clamp(min=0).numpy(),
        **dict(zip(names, probs.T.numpy(), strict=True)),
    }
    predicted = pl.DataFrame(columns, schema_overrides={"row": pl.Int64(), "class": pl.String()})
    every = pl.DataFrame(
        {
            "row": range(len(batch.items)),
            "file": [item.name for item in batch.items],
            "error": pl.Series([None if error is None else str(error) for error in batch.errors], dtype=pl.String()),
        }
    )
    joined = every.join(predicted, on="row", how="left", maintain_order="left")
    return joined.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


@contextmanager
def _nowhere() -> Iterator[Append]:
    yield lambda frame: None


@contextmanager
def _text(path: Path, schema: tables.Schema, lines: Callable[[pl.DataFrame, bool], str]) -> Iterator[Append]:
    """Append frames to a text file; ``lines`` gives theirs, and gets whether they are the first ones."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:

        def append(frame: pl.DataFrame) -> None:
            file.write(lines(tables.check(frame, schema), file.tell() == 0))

        yield append


def _csv(frame: pl.DataFrame, first: bool) -> str:
    return frame.write_csv(include_header=first)


def _json_lines(frame: pl.DataFrame, first: bool) -> str:
    return frame.write_ndjson()


WRITERS: dict[str, Callable[[Path, tables.Schema], AbstractContextManager[Append]]] = {
    ".parquet": tables.in_pieces,
    ".csv": partial(_text, lines=_csv),
    ".jsonl": partial(_text, lines=_json_lines),
}


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
