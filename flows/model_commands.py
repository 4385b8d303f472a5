"""The verbs that use a finished model, or logits alone: `csm predict`, `csm check`, `csm calibrate`."""

import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from flows.options import OUTPUT_OPTIONS, print_table, with_options

MODEL_OPTIONS = (
    click.option(
        "--model",
        default="workspace",
        show_default=True,
        metavar="MODEL",
        help="A workspace, a folder with model.json, or models:/NAME/VERSION.",
    ),
    click.option("--tracking-uri", metavar="URI", help="MLflow server or store where models:/NAME/VERSION is registered."),
    click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Images at a time."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
)
REPORT_OPTIONS = (
    click.option("--bins", type=click.IntRange(min=1), default=15, show_default=True, help="Of ECE and diagrams, equal width."),
    click.option(
        "--draws", type=click.IntRange(min=100), default=1000, show_default=True, help="Resamples behind the intervals."
    ),
    click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the HTML report and tables."),
)


@click.command(
    help="Class, confidence, entropy and probabilities of images: files, folders, *.npz, *.parquet, or - (names on stdin)."
)
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@with_options(MODEL_OPTIONS)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A .parquet, .csv or .jsonl file; without, a table is shown.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 if an image cannot be read.")
@with_options(OUTPUT_OPTIONS)
def predict(images: tuple[str, ...], output: Path | None, strict: bool, as_json: bool, debug: bool, **options: Any) -> None:
    started = time.monotonic()
    from flows.predict import predict as run
    from flows.predict import table

    result, first = run(images, output=output, **options)
    if output is None:
        print_table(table(first, result["images"]))
    else:
        click.echo(f"predict: {output}")
    _finish(result, started, as_json)
    if strict and result["failed"]:
        raise SystemExit(1)


@click.command(help="Is a model calibrated on these labelled images? Exit code 1 if its ECE is shown to be above the threshold.")
@with_options(MODEL_OPTIONS)
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="A folder with a subfolder for each class, *.npz (images, labels), parquet of `datasets`, or a workspace.",
)
@click.option("--split", default="test", show_default=True, help="Where the data have splits: train, val or test.")
@click.option("--threshold", type=float, default=0.05, show_default=True, help="Highest ECE that passes, a fraction.")
@with_options((*REPORT_OPTIONS, *OUTPUT_OPTIONS))
def check(as_json: bool, debug: bool, **options: Any) -> None:
    started = time.monotonic()
    from flows.check import check as run
    from flows.check import table

    result, checked = run(command=_line(), **options)
    print_table(table(checked), width=120)
    for sentence in checked.sentences:
        click.echo(sentence)
    if result["output"]:
        click.echo(f"report: {result['output']}/report.html")
    _finish(result, started, as_json)
    if not result["passed"]:
        raise SystemExit(1)


@click.command(help="Fit post-hoc calibration to logits and labels alone: no generator, no images, no model.")
@click.option(
    "--logits",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="*.npz or *.parquet with logits (N, K), or probabilities, and labels (N,).",
)
@click.option("--test", type=click.Path(path_type=Path), metavar="FILE", help="Other rows to measure on; without, cross-fitted.")
@click.option(
    "--posthoc", default="all", show_default=True, metavar="NAMES", help="Methods, with commas, for example temperature,vector."
)
@with_options((*REPORT_OPTIONS, *OUTPUT_OPTIONS))
def calibrate(as_json: bool, debug: bool, **options: Any) -> None:
    started = time.monotonic()
    from flows.calibrate import calibrate as run
    from flows.calibrate import sentences, table

    result, methods = run(command=_line(), **options)
    print_table(table(methods, result["chosen"]), width=120)
    for sentence in sentences(result, methods):
        click.echo(sentence)
    if result["output"]:
        click.echo(f"report: {result['output']}/report.html")
    _finish(result, started, as_json)


def _line() -> str:
    """The command as it was typed, for the page."""
    return shlex.join(["csm", *sys.argv[1:]])


def _finish(result: Mapping[str, Any], started: float, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**result, "seconds": round(time.monotonic() - started, 3)}))
