"""tune: a sweep over configurations, from the images that its trials need to the best of them as a configuration of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.session import require_answer
from cluster.tuning_population import check_pbt
from csm import storage, tables
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.metrics import METRICS
from csm.search.importance import Importance, importance
from csm.search.study import Study
from csm.sweep_plots import importance_bars, objective_history, pareto_plot, slices
from flows.artifacts import open_workspace
from flows.config import Config
from flows.model import finish, registry_name
from flows.progress import say
from flows.run import STAGES, terminable
from flows.stages import Context
from flows.sweep_inputs import input_choices, input_part, make_inputs
from flows.sweep_records import Estimate, SweepFolder, TrialRecord
from flows.sweep_results import front, front_metrics, importance_table, measure, ranking, sweep_table, trials_table
from flows.sweep_trials import Trials
from flows.sweeps import best_config, check_tune
from flows.tracking_address import OWN, Address


def tune(
    config: Config,
    workspace: Path,
    address: str = "local",
    command: str = "",
    forced: Sequence[str] = (),
    tracking: Address = OWN,
) -> tuple[dict[str, Any], list[Table]]:
    """Run or go on with the sweep of ``config`` in ``workspace``.

    Args:
        forced: names of stages, which make the images that trials need again, or "tune": drop the sweep that is there.

    Returns:
        What ``--json`` prints (trials, failed, best, best_yaml, sweep, model), and tables for the terminal.

    Raises:
        InputError: the space does not fit the rest, the workspace holds another sweep, or no trial came to its end.
    """
    tracking.check_workspace(workspace)
    require_answer(address)
    check_tune(config)
    if not config.tune.space:
        raise InputError("tune.space: empty; say what to try, for example --set 'tune.space.method.mixed.weight=[1, 2, 4]'")
    input_choices(config.tune.search_space)
    if config.tune.scheduler.kind == "pbt":
        check_pbt(config.tune.search_space.keys)
    with open_workspace(workspace) as opened, terminable():
        folder = SweepFolder(opened.root)
        if "tune" in forced:
            folder.drop()
        sweep = folder.open(config)
        stages = frozenset(forced) - {"tune"}
        with Context(config, opened, STAGES, address, command, stages, tracking, kind="sweep", key=sweep.key) as context:
            context.send_waiting()
            if address != "local":
                context.connect()
            context.tracker  # noqa: B018  opens the parent run, to which the stages of every workspace of images belong
            if name := registry_name(config):
                context.tracker.check_model_name(name)
            inputs = make_inputs(context, folder)
            settings = config.tune
            study = Study(settings.search_space, settings.search, settings.objectives, settings.seed)
            trials = Trials(context, folder, sweep, inputs, study)
            trials.resume()
            trials.run()
            result, shown = _conclude(trials)
        return result, shown


def _conclude(trials: Trials) -> tuple[dict[str, Any], list[Table]]:
    """Rank the trials, look at test images for the chosen ones, and write what came of it."""
    context, folder, config = trials.context, trials.folder, trials.context.config
    settings, space = config.tune, config.tune.search_space
    records = [record for _, record in sorted(trials.records.items())]
    ranked, best = ranking(records, settings), front(records, settings)
    if not ranked:
        error = next((f"trial {record.number}: {record.error}" for record in records if record.error), "all were stopped")
        raise InputError(
            f"tune: none of {len(records)} trials came to its end ({error}); change tune.space, or --force tune for the same again"
        )
    test: dict[int, dict[str, Estimate]] = {}
    for record in ranked:
        if record is ranked[0] or record.number in best:
            specs = trials.specs[record.number]
            n_classes = RealDataset.load_info(specs[0].data).n_classes
            test[record.number] = measure(specs, "test", settings, config.evaluate.bins, n_classes)
            values = {f"test_{name}": estimate[0] for name, estimate in test[record.number].items()}
            context.tracker.log_metrics(trials.key(record.number), values, record.epochs)
    frame, schema = sweep_table(records, space, settings, test, _run_ids(trials, records))
    tables.write(frame, folder.table, schema)
    storage.write_text(folder.best, best_config(config, ranked[0].last or ranked[0].values).to_yaml())
    objective = settings.objectives[0]
    mattered = importance(space, [(record.values, record.val[objective][0]) for record in ranked], settings.seed)
    storage.write_json(folder.importance, [item._asdict() for item in mattered])
    _draw(trials, ranked, best, mattered)
    failed = sum(record.status == "failed" for record in records)
    values = {f"val_{name}": estimate[0] for name, estimate in ranked[0].val.items()}
    values |= {f"test_{name}": estimate[0] for name, estimate in test[ranked[0].number].items()}
    totals = {"trials": float(len(records)), "failed": float(failed), "best_trial": float(ranked[0].number)}
    lost = context.losses.get("tune")
    if lost:
        say(f"tune: {lost}")
        totals |= {"workers_lost": float(lost.workers), "seconds_lost": round(lost.seconds, 3)}
    context.tracker.log_metrics(context.parent_key, {**totals, **values})
    for file in (folder.table, folder.best):
        context.tracker.log_file(context.parent_key, file)
    _finish(trials, ranked[0])
    say(f"tune: trial {ranked[0].number} is best; csm run --config {folder.best} repeats it, csm report shows the sweep")
    result = {
        "trials": len(records),
        "failed": failed,
        "best": {"trial": ranked[0].number, "values": ranked[0].values, **values},
        "best_yaml": str(folder.best),
        "sweep": str(folder.table),
        "model": str(folder.model),
        **({"workers_lost": lost.workers, "seconds_lost": round(lost.seconds, 3)} if lost else {}),
    }
    shown = [trials_table(records, settings, test), *([importance_table(mattered, objective)] if mattered else [])]
    return result, shown


def _finish(trials: Trials, best: TrialRecord) -> None:
    """Make the best trial a finished model, in the folder of the sweep and in the registry."""
    context, number = trials.context, best.number
    workspace = trials.inputs[storage.digest(input_part(best.values))]
    done = finish(
        replace(context, workspace=workspace),
        trials.specs[number],
        trials.folder.model,
        trials.key(number),
        registry_name(context.config),
    )
    if done.replaced:
        say(f"tune: model replaced, it was {done.replaced}")


def _run_ids(trials: Trials, records: Sequence[TrialRecord]) -> Mapping[int, str | None]:
    """MLflow's ids of trials, as far as the store has answered."""
    tracker = trials.context.tracker
    return {record.number: tracker.run_id(trials.key(record.number)) for record in records} if tracker.flush() else {}


def _draw(trials: Trials, ranked: Sequence[TrialRecord], best: set[int], mattered: Sequence[Importance]) -> None:
    """Draw the sweep, for its folder and the parent run."""
    context, folder, settings = trials.context, trials.folder, trials.context.config.tune
    done = sorted(ranked, key=lambda record: record.number)
    objective = settings.objectives[0]
    values, numbers = [record.val[objective][0] for record in done], [record.number for record in done]
    higher, label = METRICS[objective].higher_is_better, f"{objective} on validation"
    x, y = front_metrics(settings)[:2]
    across, up = ([record.val[name][0] for record in done] for name in (x, y))
    is_on = [record.number in best for record in done]
    figures = {
        "history": objective_history(numbers, values, label, higher),
        "pareto": pareto_plot(
            across, up, is_on, (f"{x} on validation", f"{y} on validation"), [str(number) for number in numbers]
        ),
    }
    tried = {key: [record.values.get(key) for record in done] for key in settings.search_space.keys}
    varied = {key: column for key, column in tried.items() if len({str(value) for value in column}) > 1}
    if varied:
        figures["slices"] = slices(varied, values, label, higher)
    if mattered:
        shares = {f"{item.key} ({item.beside})" if item.beside else item.key: item.share for item in mattered}
        figures["importance"] = importance_bars(shares, f"share of the variance of {label}")
    for name, figure in figures.items():
        with storage.replacing(folder.plots / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png")
        context.tracker.log_file(context.parent_key, folder.plots / f"{name}.png", "plots")


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
