"""bench: speed as a ratio against a named baseline, both measured in one run on this machine, and what methods are worth (``proofs``).

One file for each benchmark.
"""

import json
from pathlib import Path

import click

from flows.bench.proofs import COMMANDS
from flows.options import OUTPUT_OPTIONS, print_table, show_result, with_options


@click.group(help="Speed, as a ratio against a named baseline measured in the same run; and what methods are worth.")
def bench() -> None: ...


for command in COMMANDS:
    bench.add_command(command)


@bench.command(
    "overhead",
    short_help="What Ray costs, and the driver's memory.",
    help="Mixing through Ray Data against a bare loop of the same work.",
)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Length of the bare loop.")
@click.option(
    "--shards", type=click.IntRange(min=1), default=200, show_default=True, help="Of the smaller plan, for the driver's memory."
)
@with_options(OUTPUT_OPTIONS)
def _overhead(seconds: float, shards: int, as_json: bool, debug: bool) -> None:
    from flows.bench.overhead import overhead as measure

    show_result(measure(seconds, shards), as_json)


@bench.command(
    "plan", short_help="A plan of 10 million images.", help="A plan of millions of rows on one core, and one shard of it."
)
@click.option("--rows", type=click.IntRange(min=1), default=10_000_000, show_default=True, help="Images in the plan, at least.")
@with_options(OUTPUT_OPTIONS)
def _plan(rows: int, as_json: bool, debug: bool) -> None:
    from flows.bench.plan import plan as measure

    show_result(measure(rows), as_json)


@bench.command(
    "solvers",
    short_help="Evaluations that each solver needs.",
    help="Network evaluations that each solver needs to come as close to the exact solution as the paper's Heun-20.",
)
@click.option("--workspace", type=click.Path(path_type=Path), help="Use its generator; else a small one is trained first.")
@click.option("--rows", type=click.IntRange(min=1), default=120, show_default=True, help="Images to mix with each setting.")
@with_options(OUTPUT_OPTIONS)
def _solvers(workspace: Path | None, rows: int, as_json: bool, debug: bool) -> None:
    from flows.bench.solvers import solvers as measure
    from flows.bench.solvers import summary, table

    result = measure(workspace, rows)
    print_table(table(result))
    for line in summary(result):
        click.echo(line)
    if as_json:
        click.echo(json.dumps(result))


@bench.command(
    "mix",
    short_help="Speed of mixing, and what bounds it.",
    help="Mixing with EDM's CIFAR-10 network against the original's way of working: images per second, and what bounds them.",
)
@click.option(
    "--workspace", type=click.Path(path_type=Path), help="Measure rounding on its generator; else a small one is trained."
)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Length of the baseline, about.")
@click.option("--compile", "compiled", is_flag=True, help="With torch.compile.")
@with_options(OUTPUT_OPTIONS)
def _mix(workspace: Path | None, seconds: float, compiled: bool, as_json: bool, debug: bool) -> None:
    from flows.bench.mix import mixing_speed

    show_result(mixing_speed(workspace, seconds, compiled), as_json)


@bench.command(
    "annotate",
    short_help="Speed of annotation.",
    help="Annotating mixed images by projection against the original's procedure, with the same encoder: images per second.",
)
@click.option("--images", type=click.IntRange(min=1), default=16_000, show_default=True, help="Mixed images, at least.")
@click.option(
    "--encoder", type=click.Choice(["clip-tiny", "small-cnn"]), default="clip-tiny", show_default=True, help="Random weights."
)
@with_options(OUTPUT_OPTIONS)
def _annotate(images: int, encoder: str, as_json: bool, debug: bool) -> None:
    from flows.bench.annotate import annotation_speed

    show_result(annotation_speed(images, encoder), as_json)


@bench.command(
    "train",
    short_help="Speed of training a classifier.",
    help="Training on real and mixed images against the original's way of working, with the same network: images per second.",
)
@click.option("--network", default="", help="Default: resnet18 on a CPU, resnet50 on a GPU.")
@click.option("--steps", type=click.IntRange(min=0), default=0, help="That are timed; default: 5 on a CPU, 100 on a GPU.")
@click.option("--variants", is_flag=True, help="Measure every precision and memory layout, and torch.compile, too.")
@with_options(OUTPUT_OPTIONS)
def _train(network: str, steps: int, variants: bool, as_json: bool, debug: bool) -> None:
    from flows.bench.train import training_speed

    show_result(training_speed(steps, network, variants), as_json)


@bench.command(
    "tune",
    short_help="What a sweep through Ray Tune costs.",
    help="Trials through Ray Tune against bare processes that train the same, two at once.",
)
@click.option("--trials", type=click.IntRange(min=1), default=40, show_default=True, help="Trainings on either side.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Length of one training, alone.")
@with_options(OUTPUT_OPTIONS)
def _tune(trials: int, seconds: float, as_json: bool, debug: bool) -> None:
    from flows.bench.tune import tuning_overhead

    show_result(tuning_overhead(trials, seconds), as_json)


def _numbers(ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    """Whole numbers, as in "1e6,1e7"."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [0.0]
    if any(value < 1 or value != int(value) for value in values):
        raise click.BadParameter(f"expected whole numbers above 0 and commas, got {text!r}")
    return tuple(map(int, values))


@bench.command(
    "scale",
    short_help="More actors, and plans of 100 million rows.",
    help="Images per second of 1, 2, 4 actors, and what plans of millions of rows cost to make, to list and to go on with.",
)
@click.option(
    "--rows",
    default="1e6,1e7",
    show_default=True,
    callback=_numbers,
    metavar="N,...",
    help='Of the plans. 1e8 takes about 10 minutes, 2 GiB of memory, and 1 GiB and 300,000 files of TMPDIR; "": none.',
)
@click.option(
    "--actors", default="1,2,4", show_default=True, callback=_numbers, metavar="N,...", help='Of a mixing pool; "": none.'
)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=20.0, show_default=True, help="Length of each mixing, about.")
@with_options(OUTPUT_OPTIONS)
def _scale(rows: tuple[int, ...], actors: tuple[int, ...], seconds: float, as_json: bool, debug: bool) -> None:
    from flows.bench.scale import plans_table, scale, speeds_table

    result = scale(rows, actors, seconds)
    for shown in (*([speeds_table(result["actors"])] if actors else []), *([plans_table(result["plans"])] if rows else [])):
        print_table(shown)
    if as_json:
        click.echo(json.dumps(result))


@bench.command(
    "classes",
    short_help="Cost and loss of labels of many classes.",
    help="Annotation of K Gaussian classes: time, bytes, and what is lost when only the most probable classes are stored.",
)
@click.option(
    "--classes", "numbers", default="10,100,1000", show_default=True, callback=_numbers, metavar="K,...", help="Of the data."
)
@click.option(
    "--top", "tops", default="8,32", show_default=True, callback=_numbers, metavar="M,...", help="Classes that are stored."
)
@click.option("--images", type=click.IntRange(min=8), default=16_384, show_default=True, help="Mixed images, at most.")
@with_options(OUTPUT_OPTIONS)
def _classes(numbers: tuple[int, ...], tops: tuple[int, ...], images: int, as_json: bool, debug: bool) -> None:
    from flows.bench.classes import classes, table

    rows = classes(numbers, tops, images)
    print_table(table(rows), width=130)
    if as_json:
        click.echo(json.dumps(rows))
