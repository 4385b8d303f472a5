"""bench solvers: how many network evaluations each solver needs for images as close to the ODE's solution as the paper's Heun-20."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.table import Table

from csm.datasets.digits import digits
from csm.fidelity import REFERENCE, TARGET, Fidelity, affordable_steps, compare_solvers, fewest, mixer
from csm.generators import Generator
from csm.planning import PlanConfig, make_plan
from csm.sampling import SOLVERS, SamplerConfig, evaluations
from flows.bench.trained import trained_generator
from flows.progress import task

COUNTS = (8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 24, 28, 32, 39)
SHOWN = (8, 10, 12, 14, 16, 20, 28, 39)  # of these, columns of the table
SPACINGS: tuple[dict[str, Any], ...] = (
    {"spacing": "karras", "rho": 5.0},
    {"spacing": "karras", "rho": 7.0},
    {"spacing": "karras", "rho": 9.0},
    {"spacing": "exponential"},
    {"spacing": "exponential", "sigma_min": 0.02},
    {"spacing": "vp"},
)


def solvers(workspace: Path | None = None, rows: int = 120) -> dict[str, Any]:
    """Compare every solver with every spacing on a trained generator and on Gaussians fitted to scikit-learn's digits.

    Args:
        workspace: whose generator to use; none: a UNet of the demo's settings, trained here on ``digits-hard``.
        rows: of a plan over all pairs, mixed with each setting.

    Returns:
        rows, reference and target (settings), measured (a ``Fidelity`` each), fewest (generator -> solver -> the best, or null), and
        winner: the setting that is as close as the target on every generator, with the fewest evaluations; the target itself if no
        other is.
    """
    generators = {"trained": trained_generator(workspace), "gaussians": _gaussians()}
    mixers = {name: mixer(_plan(generator, rows), generator) for name, generator in generators.items()}
    samplers = list(_samplers())
    with task("compare", len(samplers)) as progress:
        measured = compare_solvers(mixers, samplers, COUNTS, lambda done: progress.advance(1, f"{done.solver}, {_spacing(done)}"))
    return {
        "rows": rows,
        "reference": asdict(REFERENCE),
        "target": asdict(TARGET),
        "measured": [asdict(result) for result in measured],
        "fewest": {name: {solver: _best(measured, name, solver) for solver in SOLVERS} for name in mixers},
        "winner": asdict(fewest(measured)[0].sampler),
    }


def table(result: dict[str, Any]) -> Table:
    """The result of ``solvers`` as a rich table: rms distances by number of evaluations, for every setting on every generator."""
    title = f"{result['rows']} images: rms in 8-bit levels by evaluations; * as close as Heun-20; a row ends where all are"
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, title=title, title_justify="left")
    for heading in ("solver ", "spacing ", "generator "):
        shown.add_column(heading, no_wrap=True)
    for count in SHOWN:
        shown.add_column(str(count), justify="right", no_wrap=True, min_width=6)
    cells = {
        (line["generator"], repr(line["sampler"])): f"{line['rms']:.2f}{'*' if line['excess'] <= 1 else ' '}"
        for line in result["measured"]
    }
    for sampler in _samplers():
        rows = [asdict(replace(sampler, steps=affordable_steps(sampler, count))) for count in SHOWN]
        for name in result["fewest"]:
            shown.add_row(sampler.solver, _spacing(sampler) + " ", name, *(cells.get((name, repr(row)), "") for row in rows))
    return shown


def summary(result: dict[str, Any]) -> Iterator[str]:
    """Lines that say what the table comes to."""
    for name, each in result["fewest"].items():
        for solver, best in each.items():
            if best is None:
                yield f"{name}: {solver} is never as close"
            else:
                yield f"{name}: {solver} needs {best['evaluations']} evaluations ({_spacing(SamplerConfig(**best['sampler']))})"
    winner = SamplerConfig(**result["winner"])
    yield f"fewest on all: {winner.solver}, {_spacing(winner)}, {winner.steps} steps, {evaluations(winner)} evaluations"


def _best(measured: list[Fidelity], generator: str, solver: str) -> dict[str, Any] | None:
    best = fewest([result for result in measured if result.generator == generator and result.sampler.solver == solver])
    return asdict(best[0]) if best else None


def _samplers() -> Iterator[SamplerConfig]:
    for solver in SOLVERS:
        for spacing in SPACINGS:
            yield replace(TARGET, solver=solver, **spacing)


def _spacing(sampler: SamplerConfig) -> str:
    rho = f", rho {sampler.rho:g}" if sampler.spacing == "karras" else ""
    return f"{sampler.spacing}{rho}, {sampler.sigma_max:g} to {sampler.sigma_min:g}"


def _plan(generator: Generator, rows: int) -> pl.DataFrame:
    """``rows`` rows, drawn from a plan over all pairs, so that all kinds of pairs and ratios are among them."""
    pairs = generator.n_classes * (generator.n_classes - 1) // 2
    config = PlanConfig(sets_per_pair=-(-rows // (pairs * PlanConfig().ratios)))
    return make_plan(generator.n_classes, "bench", "bench", config).sample(rows, seed=0)


def _gaussians() -> Generator:
    from csm.generators.gaussians import fit_gaussians

    data = digits()
    return fit_gaussians(*data.split("train"), data.info.n_classes)
