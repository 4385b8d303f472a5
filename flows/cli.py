"""The command line: `csm VERB`."""

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from flows.bench import bench
from flows.model_commands import calibrate, check, export, predict, serve
from flows.options import (
    ESTIMATE_OPTIONS,
    OUTPUT_OPTIONS,
    SHARED_OPTIONS,
    TRACKING_OPTIONS,
    WORKSPACE_OPTION,
    print_table,
    with_options,
)

# Two processes that share cores wait asleep, not spinning: a spinning thread holds the core that the others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class _Commands(click.Group):
    """Turns our errors into one line and an exit code, for every verb."""

    def invoke(self, ctx: click.Context) -> Any:
        debug = "--debug" in sys.argv
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "csm"
            click.echo(f"{path}: {' '.join(error.format_message().split())} ({path} --help lists what there is)", err=True)
            raise SystemExit(error.exit_code) from None
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except KeyboardInterrupt:
            forced = any(argument.partition("=")[0] == "--force" for argument in sys.argv)
            click.echo(f"csm: interrupted; run the same command again{', without --force,' if forced else ''} to go on", err=True)
            raise SystemExit(130) from None
        except Exception as error:
            if debug:
                from flows.masking import masked

                click.echo(masked(traceback.format_exc()), err=True, nl=False)
            raise SystemExit(_explain(error)) from None


def _explain(error: Exception) -> int:
    """Print ``error`` as one line and return the exit code: 2 for what the user gave, 1 for a failure."""
    from csm.errors import InputError
    from flows.masking import masked

    line = masked(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, InputError) or getattr(
        error, "is_input", False
    ):  # of many trainings, see cluster.training.TrainingError
        click.echo(f"csm: {line}", err=True)
        return 2
    if isinstance(error, OSError) and error.errno is not None:
        where = f" {error.filename}:" if error.filename else ""
        click.echo(
            f"csm:{where} {error.strerror}; free space or change permissions, then run the same command again to go on", err=True
        )
        return 2
    click.echo(f"csm: failed: {type(error).__name__}: {line[:1000]} (--debug shows where; the same command goes on)", err=True)
    return 1


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="csm")
def cli() -> None:
    """Calibration-aware semantic mixing: make data that says "this could be either", and train classifiers on it."""


cli.add_command(bench)
for command in (predict, check, calibrate, export, serve):
    cli.add_command(command)


def _add_verb(verb: str, text: str) -> None:
    @cli.command(verb, help=text)
    @with_options(SHARED_OPTIONS)
    def command(**options: Any) -> None:
        _run_verb(verb, **options)


def _run_verb(verb: str, workspace: Path, as_json: bool, debug: bool, **options: Any) -> None:
    started = time.monotonic()
    resolved, arguments = _resolve(**options)
    from flows.run import results_tables, run_verb

    result = run_verb(verb, resolved, workspace, **arguments)
    result["seconds"] = round(time.monotonic() - started, 3)
    if verb in ("run", "evaluate", "report") and result["metrics"]:
        for table in results_tables(resolved, workspace):
            print_table(table)
    if verb in ("run", "report") and result["report"]:
        click.echo(f"report: {result['report']}")
    if as_json:
        click.echo(json.dumps(result))


def _resolve(
    config: str,
    overrides: tuple[str, ...],
    address: str,
    forced: tuple[str, ...],
    tracking_uri: str,
    experiment: str,
    more: tuple[str, ...] = (),
) -> tuple[Any, dict[str, Any]]:
    """The checked configuration, and what a verb is called with beside it; ``more``: what --force takes beside stages."""
    from csm.errors import InputError
    from flows.config import load_config
    from flows.masking import command_line
    from flows.tracking_address import Address

    resolved = load_config(config, overrides)  # before the rest is imported: a wrong name is told sooner
    tracking = Address(tracking_uri, experiment)
    from flows.run import STAGES

    for stage in forced:
        if stage not in (*more, *STAGES):
            raise InputError(f"--force {stage}: unknown stage; one of {', '.join((*more, *STAGES))}")
    return resolved, {"address": address, "command": command_line(address), "forced": forced, "tracking": tracking}


_add_verb("prepare", "Read the data set into the workspace: splits, statistics, one table.")
_add_verb("shift", "Make the corruption sets and sets out of distribution of evaluate.shifts.")
_add_verb("fit-generator", "Train the class-conditional diffusion model on the train split.")


@cli.command("import-generator")
@click.argument("path", required=False)
@with_options(SHARED_OPTIONS)
def import_generator(path: str | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Take over a diffusion model from PATH (instead of generator.path): an EDM .pkl or a folder of diffusers."""
    if path is not None:
        overrides = (*overrides, f"generator.path={json.dumps(os.path.abspath(path))}")
    _run_verb("import-generator", overrides=overrides, **options)


@cli.command(help="Write down every image to mix: pair of classes, ratio, noise. --estimate: what all stages will cost.")
@with_options((*SHARED_OPTIONS, *ESTIMATE_OPTIONS))
def plan(
    estimate: bool, rates: tuple[str, ...], prices: tuple[str, ...], devices: int | None, measure: float | None, **options: Any
) -> None:
    if estimate:
        from flows.estimate_command import run_estimate

        run_estimate(rates, prices, devices, 5.0 if measure is None else measure, **options)
        return
    if rates or prices or devices is not None or measure is not None:
        raise click.UsageError("--rate, --price, --devices and --measure belong to --estimate")
    _run_verb("plan", **options)


_add_verb("mix", "Make the mixed images of the plan, over Ray.")
_add_verb("annotate", "Fit the annotators and give every mixed image its confidence, over Ray.")
_add_verb("train", "Train a classifier for every method and seed, over Ray.")
_add_verb("evaluate", "Measure accuracy and calibration, before and after temperature scaling.")
_add_verb("report", "Write report.html: table, reliability, mixed images.")
_add_verb("run", "All of it: from the data to the report. What is already done is reused.")


@cli.command(help="Try configurations of tune.space, several at a time, and write the best one as best.yaml.")
@with_options(SHARED_OPTIONS)
def tune(workspace: Path, as_json: bool, debug: bool, **options: Any) -> None:
    started = time.monotonic()
    resolved, arguments = _resolve(more=("tune",), **options)
    from flows.tune import tune as sweep

    result, shown = sweep(resolved, workspace, **arguments)
    result["seconds"] = round(time.monotonic() - started, 3)
    for table in shown:
        print_table(table)
    click.echo(f"best: {result['best_yaml']}")
    if as_json:
        click.echo(json.dumps(result))


@cli.command(help="Open the MLflow UI on the workspace's runs.")
@with_options((WORKSPACE_OPTION,))
@with_options(TRACKING_OPTIONS)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def ui(workspace: Path, tracking_uri: str, experiment: str, host: str, port: int, debug: bool) -> None:
    from flows.ui import serve

    serve(workspace, host, port, tracking_uri, experiment)


@cli.command(help="Show what differs between trained classifiers: NAMEs are methods, runs or trials, the first is the baseline.")
@click.argument("names", nargs=-1, metavar="NAME NAME ...")
@with_options((WORKSPACE_OPTION,))
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page too, with reliability diagrams.")
@with_options(OUTPUT_OPTIONS)
def compare(names: tuple[str, ...], workspace: Path, html: Path | None, as_json: bool, debug: bool) -> None:
    started = time.monotonic()
    from flows.compare import as_json as values
    from flows.compare import compare as measure
    from flows.compare_views import terminal_tables, write_page

    compared = measure(names, workspace)
    for table in terminal_tables(compared):
        print_table(table)
    if html:
        write_page(compared, html)
        click.echo(f"page: {html}")
    if as_json:
        page = str(html) if html else None
        click.echo(json.dumps({**values(compared), "html": page, "seconds": round(time.monotonic() - started, 3)}))


@cli.command(
    help="Check this machine, the installation and, with --address, every node of a Ray cluster; a problem makes the exit code 1."
)
@with_options((WORKSPACE_OPTION,))
@click.option("--address", default="local", show_default=True, help="Ray: local, auto, HOST:PORT or ray://HOST:PORT.")
@with_options(TRACKING_OPTIONS[:1])
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def doctor(workspace: Path, address: str, tracking_uri: str, as_json: bool, debug: bool) -> None:
    from flows.doctor import diagnose, show
    from flows.tracking_address import Address

    findings = diagnose(workspace, address, Address(tracking_uri))
    show(findings)
    if as_json:
        click.echo(json.dumps(findings))
    if findings["problems"]:
        raise SystemExit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    cli.main(args=list(arguments) if arguments is not None else None, prog_name="csm")


def script(file: str) -> None:
    """Entry point of a verb's own file: `python flows/VERB.py ...`, or `ray submit CLUSTER.yaml flows/VERB.py -- ...`."""
    sys.argv = ["csm", Path(file).stem.replace("_", "-"), *sys.argv[1:]]
    main()


if __name__ == "__main__":
    main()
