"""export: mixed images and their soft labels -> files that other programs read."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import polars as pl

from cluster.shards import part_path, plan_shards, read_plan
from csm import __version__, storage, tables
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.export import FORMATS, WORK, encode, rows
from csm.export_card import CARD, Card, write_readme
from csm.parameters import check_name
from csm.planning import SEMANTIC, shard_name
from csm.reannotation import soft_labels
from flows.artifacts import LEFT_OUT, Workspace, differences, is_url, open_workspace
from flows.config import Config, plain
from flows.export_model import MODEL_FORMATS
from flows.fit_annotators import annotators, calibration_of, resolve
from flows.progress import say, task
from flows.reuse import require
from flows.run import STAGES, terminable
from flows.stages import Context

NONE = "none"  # in place of an annotator: the ratios alone


def export(
    config: Config,
    root: Path,
    format_name: str,
    annotator: str | None,
    output: Path,
    shard_rows: int = 10_000,
    kind: str = SEMANTIC,
) -> dict[str, Any]:
    """Write the mixed set of the workspace at ``root`` to the folder ``output`` and return what ``--json`` prints.

    Args:
        config: as the images were made with.
        root: the workspace.
        format_name: of ``FORMATS``.
        annotator: whose soft labels, or "none"; None: those of ``annotate.annotator``.
        output: new or empty, or what an interrupted export of the same left there, which goes on.
        shard_rows: images of one tar or parquet file.
        kind: of the images, one of ``plan.kinds``.

    Raises:
        InputError: an unknown name, a stage that is not done, or an ``output`` that holds something else.
    """
    if format_name not in FORMATS:
        raise InputError(f"--format {format_name}: unknown; one of {', '.join((*FORMATS, *MODEL_FORMATS))}")
    annotator = annotator or config.annotate.annotator
    allowed = tuple(dict.fromkeys((*config.annotators, *annotators(Workspace(root), config), NONE)))
    if annotator not in allowed:
        raise InputError(f"--annotator {annotator}: unknown; one of {', '.join(allowed)}")
    check_name("--kind", kind, config.plan.kinds)
    if is_url(output):
        raise InputError(f"--output {output}: URLs are not supported yet; give a folder")
    needs = ("prepare", "generator", "plan", "mix") + (() if annotator == NONE else ("fit-annotators", "annotate"))
    with open_workspace(root, create=False) as workspace, terminable():
        context = Context(config, workspace, STAGES)
        require(context, "export", needs)
        annotator = resolve(workspace, annotator)
        digests = {name: record.digest for name in needs if (record := workspace.record(name))}
        card = _card(context.resolved, workspace, digests, format_name, annotator, shard_rows, kind)
        try:
            reused = not _open_output(output, card)
            if not reused:
                _write(workspace, output, card)
        except OSError as error:
            if error.errno is None or error.filename:
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(output)) from None  # a full disk does not say whose
        say(f"export: {'reused' if reused else 'done'}, {card.rows:,} images")
        return {
            "workspace": str(root),
            "output": str(output),
            "format": format_name,
            "kind": card.kind,
            "annotator": card.annotator,
            "rows": card.rows,
            "reused": reused,
        }


def _card(
    config: Config, workspace: Workspace, digests: dict[str, str], format_name: str, annotator: str, shard_rows: int, kind: str
) -> Card:
    info = RealDataset.load_info(workspace.root)
    return Card(
        csm=__version__,
        format=format_name,
        rows=sum(plan_shards(workspace.plan, kind).values()),
        shard_rows=shard_rows,
        config=config.name,
        dataset=info.name,
        shape=info.shape,
        class_names=info.class_names,
        generator=storage.read_json(workspace.generator / "generator.json")["kind"],
        plan=_planning(config),
        mix=_mixing(config),
        annotator=None if annotator == NONE else annotator,
        calibration=None if annotator == NONE else calibration_of(workspace, annotator),
        digests=digests,
        kind=kind,
    )


def _planning(config: Config) -> dict[str, Any]:
    """What was planned, with the setting of noises if it is not the first version's."""
    plan = asdict(config.plan)
    if plan["noise"] == LEFT_OUT["plan.noise"]:
        del plan["noise"]
    return plan


def _mixing(config: Config) -> dict[str, Any]:
    """How the images were made, with the scale of guidance if there was any."""
    mix = asdict(config.mix)
    del mix["guidance"]
    return mix if config.guidance == 1 else mix | {"guidance": config.guidance}


def _open_output(output: Path, card: Card) -> bool:
    """Make ``output`` ready for the files of ``card`` and return whether there is anything to write.

    Raises:
        InputError: it is a file, or it holds other things than an export of the same.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; choose a new or empty folder")
    work, wanted = output / WORK, plain(asdict(card))
    for path in (output / CARD, work / CARD):
        if path.is_file() and (found := storage.read_json(path)) != wanted:
            changed = "; ".join(differences(found, wanted)[:4]) if isinstance(found, dict) else "its card is damaged"
            raise InputError(f"--output {output}: holds another export ({changed}); choose a new or empty folder")
    if (output / CARD).is_file():
        shutil.rmtree(work, ignore_errors=True)  # the writer was killed just before it would have done so
        return False
    if (work / CARD).is_file():
        for path in [*output.glob(".*.tmp"), *output.glob("data/.*.tmp"), *work.glob(".*.tmp")]:
            path.unlink()  # left by a writer that was killed
        say("export: going on")
        return True
    if output.is_dir() and any(entry.name != WORK for entry in output.iterdir()):
        raise InputError(f"--output {output}: is not empty; choose a new or empty folder")
    storage.write_json(work / CARD, wanted)
    say("export: started")
    return True


def _write(workspace: Workspace, output: Path, card: Card) -> None:
    """Write the pieces that are not there yet, then what needs all of them; the card goes to its place last."""
    form = FORMATS[card.format]
    starts = range(0, card.rows, card.shard_rows)
    pieces = [form.piece(number, len(starts)) for number in range(len(starts))]
    sizes = plan_shards(workspace.plan, card.kind)
    read = lru_cache(maxsize=1)(partial(_read_shard, workspace, card))  # a shard may be the end of one piece and begin the next
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, task("export", card.rows) as progress:

        def frames(start: int, stop: int) -> Iterator[pl.DataFrame]:
            for part in _between(read, sizes, start, stop):
                for frame in encode(part, card.shape, pool):
                    yield frame
                    progress.advance(len(frame))

        for start, piece in zip(starts, pieces, strict=True):
            stop = min(start + card.shard_rows, card.rows)
            if (output / piece).is_file():
                progress.advance(stop - start)
            else:
                form.write(output, piece, frames(start, stop), card)
    form.finish(output, pieces)
    write_readme(output, card)
    storage.write_json(output / CARD, plain(asdict(card)))
    shutil.rmtree(output / WORK)


def _between(read: Callable[[int], pl.DataFrame], sizes: dict[int, int], start: int, stop: int) -> Iterator[pl.DataFrame]:
    """Rows start..stop-1 of the plan's rows of a kind, shard by shard; ``sizes`` is shard -> rows."""
    first = 0
    for shard, count in sizes.items():
        low, high = max(start - first, 0), min(stop - first, count)
        if low < high:
            yield read(shard).slice(low, high - low)
        first += count


def _read_shard(workspace: Workspace, card: Card, shard: int) -> pl.DataFrame:
    plan = read_plan(workspace.plan, shard)
    mixed = tables.read(part_path(workspace.mixed, shard), tables.MIXED)
    labels = None
    if card.annotator and card.calibration:
        n_classes = len(card.class_names)
        annotations = tables.read_annotations(part_path(workspace.annotations(card.annotator), shard), n_classes)
        labels = soft_labels(plan, annotations, n_classes, card.calibration)
    return rows(plan, mixed, labels, card.class_names, shard_name(shard))


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
