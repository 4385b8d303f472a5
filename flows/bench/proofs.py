"""The benchmarks of what methods are worth on the command line: bench truth, calibration, recipe and research."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from flows.masking import command_line
from flows.options import ADDRESS_OPTION, OUTPUT_OPTIONS, OVERRIDE_OPTION, TRACKING_OPTIONS, Folder, print_table, with_options
from flows.tracking_address import Address

WIDTH = 180  # of tables, where there is no terminal


def _names(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...]:
    """Names with commas between; none without the option."""
    names = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    if text is not None and not names:  # of a shell variable that is not set, it would be everything
        raise click.BadParameter("it is empty; name some, or leave the option out", ctx, param)
    return names


def _proof_options(workspace: str) -> tuple[Callable[..., Any], ...]:
    """Those that all of the commands have; ``workspace`` is the default."""
    return (
        OVERRIDE_OPTION,
        click.option(
            "--workspace",
            type=Folder(),
            default=Path(workspace),
            show_default=True,
            help="Everything goes there; of several data sets each has a workspace below it.",
        ),
        ADDRESS_OPTION,
        *TRACKING_OPTIONS,
        *OUTPUT_OPTIONS,
    )


@click.command(
    "truth",
    short_help="How right the annotators are, where the truth is known.",
    help="Every annotator's labels, and the classifiers that learn them, against the true posterior of data drawn from known Gaussians.",
)
@click.option("--config", default="gaussians", show_default=True, help="Name of a configuration with data of source gaussians.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Data sets: data.seed 0, 1, ...")
@click.option(
    "--generator", "generators", multiple=True, help="fitted (to the training images) or oracle (the truth); default: both."
)
@with_options(_proof_options("truth"))
def _truth(
    config: str,
    overrides: tuple[str, ...],
    workspace: Path,
    seeds: int,
    generators: tuple[str, ...],
    address: str,
    tracking_uri: str,
    experiment: str,
    as_json: bool,
    debug: bool,
) -> None:
    from flows.bench.truth import GENERATORS, measure, table

    tracking, line = Address(tracking_uri, experiment), command_line(address)
    rows = measure(workspace, config, overrides, seeds, generators or tuple(GENERATORS), address, line, tracking)
    for generator in generators or GENERATORS:
        print_table(table(rows, generator), width=130)
    click.echo(f"plots, runs and rows: {workspace}")
    if as_json:
        click.echo(json.dumps(rows))


@click.command(
    "calibration",
    short_help="Calibration methods, trained and measured alike.",
    help="Train methods with several seeds on one data set, in parallel over Ray, and compare them with cross-entropy.",
)
@click.option("--config", default="digits-hard", show_default=True, help="Name of a bundled configuration, or a .yaml file.")
@click.option(
    "--methods",
    metavar="all|losses|mixing|NAME,...",
    help="all of train.methods, those without mixing, those with (beside cross-entropy), or names.  [default: train.compare]",
)
@click.option("--seeds", type=click.IntRange(min=1), help="Of each method.  [default: train.seeds]")
@with_options(_proof_options("calibration"))
def _calibration(
    config: str,
    methods: str | None,
    seeds: int | None,
    overrides: tuple[str, ...],
    workspace: Path,
    address: str,
    tracking_uri: str,
    experiment: str,
    as_json: bool,
    debug: bool,
) -> None:
    from flows.bench.calibration import calibrate, configure
    from flows.run import results_tables

    tracking, line = Address(tracking_uri, experiment), command_line(address)
    outcome = calibrate(configure(config, overrides, methods, seeds), workspace, address, line, tracking)
    if outcome.config is not None:
        for table in results_tables(outcome.config, workspace):
            print_table(table)
        click.echo(f"report: {workspace / 'report.html'}")
    if as_json:
        click.echo(json.dumps(outcome.rows))
    _tell(outcome.failed)


@click.command(
    "recipe",
    short_help="The recipe against every baseline and ablation, each at its best.",
    help="Search settings for every method with the same budget, by NLL on validation, train each with several seeds, and say which "
    "targets the recipe reaches on which data set.",
)
@click.option("--datasets", callback=_names, metavar="NAME,...", help="Configurations, or .yaml files.  [default: the plan's]")
@click.option("--methods", callback=_names, metavar="NAME,...", help="Of the plan, and those that they need.  [default: all]")
@click.option("--seeds", type=click.IntRange(min=1), help="Of each method, with what was chosen for it.  [default: 5]")
@click.option("--trials", type=click.IntRange(min=1), help="Settings tried for each method; 1: as they stand.  [default: 6]")
@click.option("--doublings", type=click.IntRange(min=0), help="Of the best trial's epochs, while it gets better.  [default: 2]")
@click.option("--quick", is_flag=True, help="One data set, two seeds, few methods and trials: minutes; below WORKSPACE/quick.")
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="A plan of your own, as flows/configs/bench/recipe.yaml."
)
@with_options(_proof_options("recipe"))
def _recipe(
    datasets: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: int | None,
    trials: int | None,
    doublings: int | None,
    quick: bool,
    plan_file: Path | None,
    overrides: tuple[str, ...],
    workspace: Path,
    address: str,
    tracking_uri: str,
    experiment: str,
    as_json: bool,
    debug: bool,
) -> None:
    from flows.bench.recipe import recipe as prove
    from flows.bench.recipe_plan import read_plan
    from flows.bench.recipe_reach import reach, reach_table
    from flows.bench.recipe_rows import table

    tracking, line = Address(tracking_uri, experiment), command_line(address)
    plan, options = read_plan(plan_file), (overrides, address, line, tracking)
    proof = prove(workspace, plan, datasets, methods, seeds, trials, doublings, quick, *options)
    for dataset in dict.fromkeys(row["dataset"] for row in proof.rows):
        print_table(table([row for row in proof.rows if row["dataset"] == dataset]), WIDTH)
    if found := reach(proof.rows):
        print_table(reach_table(found), WIDTH)
    if as_json:
        click.echo(json.dumps(proof.rows))
    _tell(proof.failed)


@click.command(
    "research",
    short_help="Controlled experiments on mixing, labels and training.",
    help="Train the methods of each STUDY (none: all of flows/configs/research) and compare them with its reference: on validation, "
    "by which to decide, and on test.",
)
@click.argument("studies", nargs=-1, metavar="[STUDY ...]")
@click.option("--datasets", callback=_names, metavar="NAME,...", help="Of the studies.  [default: all that they ask about]")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Of each method.")
@with_options(_proof_options("research"))
def _research(
    studies: tuple[str, ...],
    datasets: tuple[str, ...],
    seeds: int,
    overrides: tuple[str, ...],
    workspace: Path,
    address: str,
    tracking_uri: str,
    experiment: str,
    as_json: bool,
    debug: bool,
) -> None:
    from flows.bench.research import research as study
    from flows.bench.research_views import tables
    from flows.bench.studies import read_studies

    tracking, line = Address(tracking_uri, experiment), command_line(address)
    findings = study(workspace, studies, seeds, overrides, address, line, tracking, datasets=datasets)
    known = read_studies()
    for name in dict.fromkeys(row["study"] for row in findings.rows):
        for table in tables(name, known[name], [row for row in findings.rows if row["study"] == name]):
            print_table(table, WIDTH)
        click.echo(f"as Markdown: {workspace / f'{name}.md'}")
    if as_json:
        click.echo(json.dumps(findings.rows))
    _tell(findings.failed)


def _tell(failed: Mapping[str, str]) -> None:
    for run, error in failed.items():
        click.echo(f"csm: failed: {run}: {error}", err=True)
    if failed:
        click.echo("csm: the same command trains what failed again, and nothing else", err=True)
        raise SystemExit(1)


COMMANDS = (_truth, _calibration, _recipe, _research)
