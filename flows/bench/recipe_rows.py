"""What a finished data set of `csm bench recipe` says of its methods: a row for each, and a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from csm import tables, truth
from csm.assessment import chance_ece
from csm.datasets import RealDataset
from csm.generators import load_truth
from csm.posthoc import apply_posthoc, fit_posthoc
from csm.statistics import BOOTSTRAPPED, bootstrap, interval
from flows.artifacts import Workspace
from flows.bench.recipe_plan import RecipePlan
from flows.bench.recipe_search import Trial
from flows.bench.truth import true_posterior
from flows.config import Config
from flows.evaluate import split_logits, training_cost
from flows.run import STAGES
from flows.stages import Context
from flows.summary import NONE, TEMPERATURE
from flows.train import run_specs

FIGURES = ("accuracy", "ece", "nll", "brier", "tv", "ece_t", "nll_t", "brier_t", "tv_t")
FIRST = ("accuracy", "ece", "nll", "brier", "tv", "nll_t", "brier_t")  # in a row, before what explains them
SUFFIX = {NONE: "", TEMPERATURE: "_t"}
MAKING = ("generator", "plan", "mix")  # stages of which generation is made, and annotation
LABELLING = ("fit-teacher", "fit-annotators", "annotate")

Scores = dict[str, list[tuple[Tensor, Tensor]]]  # method -> for each seed log-probabilities (N, K) and labels (N,)


def rows(config: Config, workspace: Workspace, dataset: str, plan: RecipePlan, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row for each method of ``config``, whose classifiers are trained and measured in ``workspace``.

    * dataset, method, seeds: a number.
    * accuracy, ece, nll (nats), brier, tv: on the test split as trained, means over seeds; fractions. tv is the mean total variation to
      the true posterior, null where nobody knows it. nll_t, brier_t: at the temperature fitted on validation.
    * device_seconds: of training one classifier, or all members of an ensemble; mean over seeds.
    * kind: what the method is to the recipe. ece_t, tv_t, temperature; FIGURE_sd: standard deviation over seeds, null with one.
    * ece_chance: ECE that as many images would show on average if these confidences were right: below it is luck.
    * settings: what the search chose, the others are those of the configuration; search_trials, search_seconds: its trials, and their
      training.
    * generation_seconds, annotation_seconds: by the clock, of all images and labels in the workspace; 0 for methods that use none.
    * recipe_minus: figure -> [difference, low, high] of the recipe's mean less the method's, with the 95 % interval of a paired bootstrap
      over seeds and images; null for the recipe itself.
    * bayes_accuracy: of the true posterior on the test split.
    """
    scores, temperatures = _scores(config, workspace)
    figures = _figures(workspace, config, scores)
    minus = _minus(config, scores, plan.recipe)
    cost = training_cost(workspace, config)
    posterior, names = _truth(workspace)
    bayes = None if posterior is None else float((posterior.argmax(dim=1) == names).double().mean())
    found = []
    for name, method in config.train.chosen.items():
        tried = [trial for trial in trials if trial.method == (plan.methods[name].like or name)]
        of, images = figures[name], method.mixed is not None
        means = {figure: of[figure].mean().item() if figure in of else None for figure in FIGURES}
        spreads = {f"{figure}_sd": of[figure].std().item() if len(of[figure]) > 1 else None for figure in of}
        found.append(
            {
                "dataset": dataset,
                "method": name,
                "seeds": config.train.seeds,
                **{figure: means[figure] for figure in FIRST},
                "device_seconds": round(cost[name], 3),
                "kind": plan.methods[name].kind,
                "ece_t": means["ece_t"],
                "tv_t": means["tv_t"],
                "ece_chance": _by_chance(scores[NONE][name], config.evaluate.bins),
                "temperature": sum(temperatures[name]) / len(temperatures[name]),
                **spreads,
                "settings": {**next((trial.values for trial in tried if trial.chosen), {}), **plan.methods[name].change},
                "search_trials": len(tried),
                "search_seconds": round(sum(trial.seconds for trial in tried), 3),
                "generation_seconds": _seconds(workspace, MAKING) if images else 0.0,
                "annotation_seconds": _seconds(workspace, LABELLING) if images else 0.0,
                "recipe_minus": minus.get(name),
                "bayes_accuracy": bayes,
            }
        )
    return found


def table(found: Sequence[dict[str, Any]]) -> Table:
    """The rows of one data set for a terminal, least NLL first within each kind."""
    row = found[0]
    bayes = "" if row["bayes_accuracy"] is None else f", Bayes accuracy {100 * row['bayes_accuracy']:.1f} %"
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    shown.title = f"{row['dataset']}, test split, {row['seeds']} seeds{bayes}: as trained | at the fitted temperature"
    known = any(row["tv"] is not None for row in found)
    columns = [
        name
        for name in ("accuracy", "ece", "nll", "brier", "tv", "ece_t", "nll_t", "brier_t", "tv_t")
        if known or "tv" not in name
    ]
    shown.add_column("method", no_wrap=True)
    shown.add_column("kind", no_wrap=True)
    for name in columns:
        label = {"accuracy": "acc. %", "ece": "ECE %", "nll": "NLL x100", "brier": "Brier x100", "tv": "TV %"}[
            name.removesuffix("_t")
        ]
        shown.add_column(("| " if name == "ece_t" else "") + label, justify="right", no_wrap=True)
    shown.add_column("device s", justify="right", no_wrap=True)
    kinds = list(dict.fromkeys(row["kind"] for row in found))
    for row in sorted(found, key=lambda row: (kinds.index(row["kind"]), row["nll"])):
        shown.add_row(row["method"], row["kind"], *(_cell(row, name) for name in columns), f"{row['device_seconds']:.3g}")
    return shown


def _cell(row: Mapping[str, Any], name: str) -> str:
    spread = row.get(f"{name}_sd")
    return f"{100 * row[name]:.1f}" + (f" ±{100 * spread:.1f}" if spread is not None else "")


def _scores(config: Config, workspace: Workspace) -> tuple[dict[str, Scores], dict[str, list[float]]]:
    """What the classifiers of each method say of the test images, as trained and at their temperatures; and these."""
    n_classes = RealDataset.load_info(workspace.root).n_classes
    scores: dict[str, Scores] = {NONE: {}, TEMPERATURE: {}}
    temperatures: dict[str, list[float]] = {}
    for spec in run_specs(Context(config, workspace, STAGES)):
        fitted = fit_posthoc(TEMPERATURE, *split_logits(spec, "val", n_classes), where=spec.run)
        logits, labels = split_logits(spec, "test", n_classes)
        scores[NONE].setdefault(spec.method, []).append((logits.double().log_softmax(dim=1), labels))
        scores[TEMPERATURE].setdefault(spec.method, []).append((apply_posthoc(logits, fitted), labels))
        temperatures.setdefault(spec.method, []).append(fitted.values["temperature"])
    return scores, temperatures


def _figures(workspace: Workspace, config: Config, scores: Mapping[str, Scores]) -> dict[str, dict[str, Tensor]]:
    """Method -> figure -> one value for each seed."""
    metrics = tables.read(workspace.metrics, tables.METRICS).filter(pl.col("split") == "test").sort("seed")
    posterior, _ = _truth(workspace)
    found: dict[str, dict[str, Tensor]] = {}
    for name in config.train.chosen:
        found[name] = {}
        for posthoc, suffix in SUFFIX.items():
            of = metrics.filter(method=name, posthoc=posthoc)
            for metric in BOOTSTRAPPED:
                found[name][metric + suffix] = torch.tensor(of.filter(metric=metric)["value"].to_list(), dtype=torch.float64)
            if posterior is not None:
                values = [truth.tv(log_probs.double().exp(), posterior) for log_probs, _ in scores[posthoc][name]]
                found[name][f"tv{suffix}"] = torch.tensor(values, dtype=torch.float64)
        del found[name]["accuracy_t"]  # a temperature changes no accuracy
    return found


def _by_chance(scores: Sequence[tuple[Tensor, Tensor]], n_bins: int) -> float:
    """ECE of perfectly calibrated classifiers with these confidences, mean over classifiers and draws of their images' labels."""
    return sum(chance_ece(log_probs.exp().max(dim=1).values, n_bins).mean().item() for log_probs, _ in scores) / len(scores)


def _minus(config: Config, scores: Mapping[str, Scores], recipe: str) -> dict[str, dict[str, list[float]]]:
    """Method -> figure -> difference of the recipe to it, and the ends of its interval."""
    if recipe not in config.train.chosen:
        return {}
    found: dict[str, dict[str, list[float]]] = {}
    for posthoc, suffix in SUFFIX.items():
        drawn = bootstrap(scores[posthoc], n_bins=config.evaluate.bins, draws=config.evaluate.draws)
        for name in drawn:
            for metric in BOOTSTRAPPED if name != recipe else ():
                difference = drawn[recipe][metric] - drawn[name][metric]
                found.setdefault(name, {})[metric + suffix] = [difference.mean().item(), *interval(difference)]
    return found


def _truth(workspace: Workspace) -> tuple[Tensor | None, Tensor]:
    """True posterior (N, K) of the test images, if it is known, and their labels."""
    images, labels = RealDataset.load(workspace.root, ("test",)).split("test")
    model = load_truth(workspace.truth)
    return (None if model is None else true_posterior(model, images)), labels


def _seconds(workspace: Workspace, stages: Sequence[str]) -> float:
    """That the stages took in the workspace, by the clock."""
    records = [workspace.record(stage) for stage in stages]
    return round(sum(record.seconds for record in records if record), 3)
