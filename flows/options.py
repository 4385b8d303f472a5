"""Options that verbs of the command line share, and how they show their results."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from csm.locations import location
from flows.tracking_address import EXPERIMENT


class Folder(click.ParamType[Path]):
    """A folder of this machine."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == "":  # of a shell variable that is not set, it would be the folder where one stands
            self.fail("it is empty; give a folder, . for this one", param, ctx)
        return self.place(value)

    def place(self, text: str | Path) -> Path:
        return Path(text)


class Place(Folder):
    """A folder, or SCHEME://... of a store."""

    def place(self, text: str | Path) -> Path:
        return location(text)


WORKSPACE_OPTION = click.option(
    "--workspace",
    type=Place(),
    default=Path("workspace"),
    show_default=True,
    metavar="DIR",
    help="Where all goes: a folder that every node sees, or s3://BUCKET/FOLDER.",
)
OVERRIDE_OPTION = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting, e.g. train.seeds=5; repeatable."
)
ADDRESS_OPTION = click.option(
    "--address", default="local", show_default=True, help="Ray: local starts one here; auto, HOST:PORT or ray://HOST:PORT."
)
CONFIG_OPTIONS = (
    click.option("--config", default="demo", show_default=True, help="Name of a bundled configuration, or a .yaml file."),
    OVERRIDE_OPTION,
    WORKSPACE_OPTION,
)
TRACKING_OPTIONS = (
    click.option(
        "--tracking-uri",
        envvar="MLFLOW_TRACKING_URI",
        default="",
        metavar="URI",
        help="MLflow store of the runs: http://HOST:PORT, postgresql+psycopg2://..., sqlite:///FILE.  "
        "[default: $MLFLOW_TRACKING_URI, else the workspace's]",
    ),
    click.option("--experiment", default=EXPERIMENT, show_default=True, help="Experiment of the runs in MLflow."),
)
OUTPUT_OPTIONS = (
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def submittable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for a command with SUBMIT_OPTIONS: ``--priority`` becomes a setting, and with ``--submit`` a cluster does the work."""

    @functools.wraps(function)
    def command(*, submit: str | None, priority: int | None, **options: Any) -> Any:
        if priority is not None:
            options["overrides"] = (*options["overrides"], f"resources.priority={priority}")
        if submit is None:
            return function(**options)
        from flows.submit import run_job

        raise SystemExit(run_job(submit, click.get_current_context(), options))

    return command


SUBMIT_OPTIONS = (
    click.option(
        "--submit",
        metavar="URL",
        help="Do it on the cluster with the dashboard http://HEAD:8265: the log is followed, Ctrl-C leaves it running.",
    ),
    click.option("--priority", type=int, metavar="N", help="Of this run on a shared cluster: lower ones wait.  [default: 0]"),
    submittable,
)
SHARED_OPTIONS = (
    *CONFIG_OPTIONS,
    ADDRESS_OPTION,
    click.option(
        "--force", "forced", multiple=True, metavar="STAGE", help="Do a stage again though nothing changed; repeatable."
    ),
    *TRACKING_OPTIONS,
    *OUTPUT_OPTIONS,
    *SUBMIT_OPTIONS,
)

ESTIMATE_OPTIONS = (
    click.option("--estimate", is_flag=True, help="Do not plan: say what the whole configuration will cost, in device-hours and money."),
    click.option(
        "--rate", "rates", multiple=True, metavar="STAGE=N",
        help="With --estimate: images/s of one worker of STAGE (mix, annotate, train, ...); repeatable.",
    ),
    click.option(
        "--price", "prices", multiple=True, metavar="KIND=AMOUNT",
        help="With --estimate: price of an hour of a device; KIND is gpu or core; repeatable.",
    ),
    click.option(
        "--devices", type=click.IntRange(min=1),
        help="With --estimate: devices of each kind that work at once; tells the hours of the clock.",
    ),
    click.option(
        "--measure", type=click.FloatRange(min=0), metavar="SECONDS",
        help="With --estimate: length of the measurement of a speed that is not known; 0: none.  [default: 5]",
    ),
)  # fmt: skip


def with_options(options: Sequence[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command ``options``, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def show_result(result: Mapping[str, Any], as_json: bool) -> None:
    """A line for each value, and with ``--json`` all of them as one object."""
    for key, value in result.items():
        click.echo(f"{key:<28}{value}")
    if as_json:
        click.echo(json.dumps(result))


def print_table(table: Any, width: int = 110) -> None:
    """A rich table, on a terminal in its width, else in ``width`` columns."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=width)
    console.print(table)
