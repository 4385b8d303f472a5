"""bench truth: how right each annotator's labels are, and what a classifier learns from them, where the true posterior is known."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from cluster.shards import part_path, plan_shards, read_plan
from csm import storage, tables, truth
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.generators import ExactGenerator, load_truth
from csm.metrics import evaluate
from csm.plots import annotation_plot
from csm.reannotation import Calibration, soft_labels
from flows.annotators import AUTO
from flows.artifacts import Workspace
from flows.config import Config, load_config
from flows.fit_annotators import resolve
from flows.progress import say
from flows.run import run_verb
from flows.tracking import Tracker
from flows.tracking_address import OWN, Address

GENERATORS = {"fitted": "gaussians", "oracle": "truth"}  # fitted first: the honest one
NONE = "none"  # annotator of methods without mixed images
LABELS = ("tv", "kl", "pair_error", "outside_mass", "ece_labels")
CLASSIFIER = ("accuracy", "ece", "nll", "tv_classifier")
MEASURES = (*LABELS, *CLASSIFIER)


def measure(
    root: Path,
    config: str = "gaussians",
    overrides: Sequence[str] = (),
    seeds: int = 3,
    generators: Sequence[str] = tuple(GENERATORS),
    address: str = "local",
    command: str = "",
    tracking: Address = OWN,
) -> list[dict[str, Any]]:
    """Run the pipeline on data sets whose posterior is known; compare every annotator's labels, and its classifiers, with the truth.

    Each generator and data-set seed is a workspace below ``root``, so an interrupted benchmark goes on where it was. ``root`` also gets
    ``truth.json`` (what is returned), ``labels-GENERATOR.png`` (labels against the truth, first seed), and an MLflow store with a run for
    each generator (with this picture of every seed) and below it one for each row.

    Args:
        root: folder for all of it.
        config, overrides: as for ``load_config``; the data must be of source ``gaussians``.
        seeds: data sets, with ``data.seed`` 0, 1, ...
        generators: of ``GENERATORS``.
        address: of Ray.
        command: that was typed, for the reports.
        tracking: where the runs go; by default into a store below ``root`` and those of the workspaces.

    Returns:
        A row for each generator, seed and method, and one for ``auto``, whose method is that of the annotator it chose:

        * annotator ("none" for methods without mixed images), generator, seed, method.
        * tv, kl (nats), pair_error, outside_mass, ece_labels: of the labels, see ``csm.truth.compare``; null where there are no labels,
          and kl null where it is infinite (labels of two classes).
        * accuracy, ece, nll (nats), tv_classifier: of the method's classifiers on the test split at temperature 1, mean over their seeds.
        * bayes_accuracy: of the true posterior on the test split.

    Raises:
        InputError: an unknown generator, data without known posterior, or whatever the pipeline refuses.
    """
    for name in generators:
        if name not in GENERATORS:
            raise InputError(f"--generator {name}: unknown; one of {', '.join(GENERATORS)}")
    rows: list[dict[str, Any]] = []
    for generator in generators:
        figures, measured = {}, []
        for seed in range(seeds):
            resolved = load_config(config, [*overrides, f"data.seed={seed}", f"generator.kind={GENERATORS[generator]}"])
            if resolved.data["source"] != "gaussians":
                raise InputError(
                    f"--config {config}: nobody knows the true posterior of {resolved.data['source']}; use gaussians"
                )
            workspace = Workspace(root / f"{generator}-seed{seed}")
            say(f"{generator} generator, data-set seed {seed}: {workspace.root}")
            run_verb("run", resolved, workspace.root, address, command, tracking=tracking)
            of_seed = [
                {"annotator": name, "generator": generator, "seed": seed, **row} for name, row in _rows(resolved, workspace)
            ]
            figures[seed] = _figure(workspace, generator, of_seed)
            measured += of_seed
        figures[0].savefig(root / f"labels-{generator}.png")
        tracker = Tracker(root, tracking, command)
        try:
            _track(tracker, root, generator, measured, figures)
        finally:
            tracker.close()
        rows += measured
    storage.write_json(root / "truth.json", rows)
    return rows


def table(rows: Sequence[dict[str, Any]], generator: str) -> Table:
    """The rows of ``generator`` as a rich table, labels of least TV first: mean and standard deviation over data-set seeds."""
    chosen = [row for row in rows if row["generator"] == generator]
    seeds, bayes = len({row["seed"] for row in chosen}), sum(row["bayes_accuracy"] for row in chosen) / len(chosen)
    title = f"{generator} generator, {seeds} data sets, Bayes accuracy {100 * bayes:.1f} %: labels of mixed images | classifier on test"
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    shown.add_column("annotator")
    for heading in ("TV %", "KL", "pair %", "outside %", "ECE %", "| acc. %", "ECE %", "NLL x100", "TV %"):
        shown.add_column(heading, justify="right", no_wrap=True)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in chosen:
        groups.setdefault(_title(row), []).append(row)

    def worst(item: tuple[str, list[dict[str, Any]]]) -> float:
        return max(math.inf if row["tv"] is None else row["tv"] for row in item[1])

    for title, group in sorted(groups.items(), key=worst):
        cells = [_cell([row[name] for row in group], 1 if name == "kl" else 100, 2 if name == "kl" else 1) for name in MEASURES]
        shown.add_row(title, *cells)
    return shown


def _title(row: dict[str, Any]) -> str:
    """The annotator, and the method if that is another use of it; ``auto`` may have chosen another annotator on each data set."""
    if row["annotator"] == AUTO:
        return AUTO
    if row["annotator"] == NONE:
        return str(row["method"])
    return row["annotator"] if row["method"].endswith(f"-{row['annotator']}") else f"{row['annotator']} ({row['method']})"


def _cell(values: Sequence[float | None], unit: float, digits: int) -> str:
    found = torch.tensor([unit * value for value in values if value is not None], dtype=torch.float64)
    if len(found) < len(values):
        return ""
    spread = f" ±{found.std():.{digits}f}" if len(found) > 1 else ""
    return f"{found.mean():.{digits}f}{spread}"


def _rows(config: Config, workspace: Workspace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(annotator, values) of each method of the comparison, and of ``auto`` if it was asked."""
    model = load_truth(workspace.truth)
    assert model is not None  # the data is of source gaussians
    images, names = RealDataset.load(workspace.root).split("test")
    posterior = _posterior(model, images)
    bayes = float((posterior.argmax(dim=1) == names).double().mean())
    labels: dict[str, dict[str, float | None]] = {}
    picked = resolve(workspace, AUTO) if workspace.choice.is_file() else None
    for method, settings in config.train.chosen.items():
        asked = config.annotator_of(settings) if settings.mixed else NONE
        annotator = picked if asked == AUTO else asked
        if annotator != NONE and annotator not in labels:
            labels[annotator] = _compare(workspace, annotator, model)
        said = labels.get(annotator, dict.fromkeys(LABELS))
        row = {"method": method, **said, **_classifier(config, workspace, method, posterior), "bayes_accuracy": bayes}
        yield annotator, row
        if annotator == picked and asked != AUTO:
            yield AUTO, row


def _classifier(config: Config, workspace: Workspace, method: str, posterior: torch.Tensor) -> dict[str, float]:
    """Mean over training seeds of what the classifiers of ``method`` reach on the test split."""
    values = []
    for seed in range(config.train.seeds):
        path = workspace.run(f"{method}-seed{seed}") / "predictions.parquet"
        frame = tables.read(path, tables.predictions(posterior.shape[1])).filter(pl.col("split") == "test").sort("image_id")
        logits, names = torch.from_numpy(frame["logits"].to_numpy().copy()), torch.tensor(frame["label"].to_list())
        scores = evaluate(logits, names, n_bins=config.evaluate.bins, metrics=["accuracy", "ece", "nll"])
        values.append({**scores, "tv_classifier": truth.tv(logits.double().softmax(dim=1), posterior)})
    return {name: sum(value[name] for value in values) / len(values) for name in CLASSIFIER}


def _compare(workspace: Workspace, annotator: str, model: ExactGenerator) -> dict[str, float | None]:
    """The labels of ``annotator`` against the truth, over all mixed images."""
    labels, posterior, class_a, class_b = (torch.cat(parts) for parts in zip(*_labels(workspace, annotator, model), strict=True))
    found = truth.compare(labels, posterior, class_a, class_b)
    found["ece_labels"] = found.pop("ece")
    return {name: found[name] if math.isfinite(found[name]) else None for name in LABELS}  # JSON knows no infinity


def _labels(
    workspace: Workspace, annotator: str, model: ExactGenerator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Soft labels, true posterior, class a and class b of the mixed images, shard by shard."""
    calibration = storage.read_record(workspace.annotator(annotator) / "calibration.json", Calibration)
    info = RealDataset.load_info(workspace.root)
    for shard in plan_shards(workspace.plan):
        plan = read_plan(workspace.plan, shard)
        annotated = tables.read_annotations(part_path(workspace.annotations(annotator), shard), info.n_classes)
        said = soft_labels(plan, annotated, info.n_classes, calibration)
        mixed = tables.read(part_path(workspace.mixed, shard), tables.MIXED)
        rows = plan.join(said, on="mix_id", maintain_order="left").join(mixed, on="mix_id", maintain_order="left")
        posterior = _posterior(model, tables.to_images(rows["image"], info.shape))
        pair = (torch.tensor(rows[name].to_list(), dtype=torch.int64) for name in ("class_a", "class_b"))
        yield torch.from_numpy(rows["soft_label"].to_numpy().copy()), posterior, *pair


def _posterior(model: ExactGenerator, images: torch.Tensor) -> torch.Tensor:
    """True p(y | x) float64 (N, K) of uint8 images."""
    return torch.cat([model.log_posterior(part.double() / 127.5 - 1) for part in images.split(4096)]).softmax(dim=1)


def _figure(workspace: Workspace, generator: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """The labels of every annotator against the truth, best first."""
    names = {row["annotator"]: row["tv"] for row in rows if row["tv"] is not None and row["annotator"] != AUTO}
    labels = {}
    model = load_truth(workspace.truth)
    assert model is not None
    for name in sorted(names, key=names.__getitem__):
        labels[name], posterior, class_a, class_b = (
            torch.cat(parts) for parts in zip(*_labels(workspace, name, model), strict=True)
        )
    return annotation_plot(
        labels, posterior, class_a, class_b, f"Labels of mixed images against the true posterior, {generator} generator"
    )


def _track(tracker: Tracker, root: Path, generator: str, rows: Sequence[dict[str, Any]], figures: Mapping[int, Figure]) -> None:
    """A run for the generator with the figures and below it one for each row; found again when the benchmark is run again."""
    parent = f"truth {generator} {root.absolute()}"
    run = tracker.open_run(parent, f"bench truth, {generator}", {"csm.kind": "truth"}, {"generator": generator})
    for seed, figure in figures.items():
        tracker.log_figure(parent, figure, f"labels-seed{seed}.png")
    for row in rows:
        params = {name: row[name] for name in ("annotator", "generator", "seed", "method")}
        key = f"{parent} {storage.digest(params)}"
        tags = {"csm.kind": "truth", "csm.annotator": row["annotator"], "csm.method": row["method"]}
        tracker.open_run(key, f"{row['annotator']} seed {row['seed']}", tags, params, run)
        tracker.log_metrics(key, {name: row[name] for name in (*MEASURES, "bayes_accuracy") if row[name] is not None})
        tracker.close_run(key)
    tracker.close_run(parent)
