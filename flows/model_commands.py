"""The verbs that use a finished model, mixed images or logits: `csm predict`, `check`, `calibrate`, `export`, `serve`."""

import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from flows.options import CONFIG_OPTIONS, OUTPUT_OPTIONS, print_table, with_options

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


@click.command(help="Write the mixed images with their soft labels, or the finished model, for other programs.")
@with_options(CONFIG_OPTIONS)
@click.option(
    "--format",
    required=True,
    help="Of the images: image-folder, webdataset or huggingface (parquet). Of the model: onnx, safetensors or mlflow.",
)
@click.option("--model", metavar="M", help="The model: a folder, models:/NAME/VERSION or runs:/ID/model.  [default: --workspace]")
@click.option("--tracking-uri", metavar="URI", help="The MLflow store of --model.  [default: MLFLOW_TRACKING_URI]")
@click.option("--annotator", help="Whose soft labels; none: the ratios alone.  [default: annotate.annotator]")
@click.option("--kind", default="semantic", show_default=True, help="Of the images, one of plan.kinds.")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="A new or empty folder.")
@click.option(
    "--shard-rows", type=click.IntRange(min=1), default=10000, show_default=True, help="Images of one tar or parquet file."
)
@with_options(OUTPUT_OPTIONS)
def export(
    config: str,
    overrides: tuple[str, ...],
    workspace: Path,
    format: str,
    model: str | None,
    tracking_uri: str | None,
    annotator: str | None,
    kind: str,
    output: Path,
    shard_rows: int,
    as_json: bool,
    debug: bool,
) -> None:
    started = time.monotonic()
    from flows.config import load_config

    resolved = load_config(config, overrides)
    from flows.export import export as write
    from flows.export_model import MODEL_FORMATS, export_model

    if format in MODEL_FORMATS:
        result = export_model(workspace, model, format, output, tracking_uri)
    else:
        result = write(resolved, workspace, format, annotator, output, shard_rows, kind)
    result["seconds"] = round(time.monotonic() - started, 3)
    click.echo(f"export: {result['output']}")
    if as_json:
        click.echo(json.dumps(result))


@click.command(help="Answer requests over HTTP with the finished model: POST /invocations, GET /health.")
@click.option(
    "--model", metavar="M", default="workspace", show_default=True, help="A folder, models:/NAME/VERSION or runs:/ID/model."
)
@click.option("--tracking-uri", metavar="URI", help="The MLflow store of --model.  [default: MLFLOW_TRACKING_URI]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=5001, show_default=True)
@click.option("--max-batch", type=click.IntRange(min=1), default=256, show_default=True, help="Images of one request.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="Size of one request.  [default: what --max-batch images take]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def serve(model: str, tracking_uri: str | None, host: str, port: int, max_batch: int, max_bytes: int | None, debug: bool) -> None:
    from flows.serve import serve as answer

    answer(model, host, port, max_batch, max_bytes, tracking_uri)


def _line() -> str:
    """The command as it was typed, for the page."""
    return shlex.join(["csm", *sys.argv[1:]])


def _finish(result: Mapping[str, Any], started: float, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**result, "seconds": round(time.monotonic() - started, 3)}))
