"""bench research: controlled experiments, each method against its reference, decided on validation and shown on test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm import storage
from csm.datasets import RealDataset
from csm.generators import load_truth
from csm.statistics import BOOTSTRAPPED, bootstrap, interval
from csm.truth import tv
from flows.artifacts import Workspace, open_workspace
from flows.bench.calibration import calibrate
from flows.bench.research_views import markdown
from flows.bench.studies import Arm, Study, arms, choose_studies, place_config, read_studies
from flows.bench.truth import true_posterior
from flows.config import Config
from flows.evaluate import split_logits
from flows.progress import say
from flows.run import STAGES
from flows.stages import Context
from flows.sweep_inputs import link_inputs
from flows.tracking_address import OWN, Address
from flows.train import run_specs

SPLITS = ("val", "test")


class Findings(NamedTuple):
    """What the studies found: rows of those that were asked for, and run -> error of trainings that failed."""

    rows: list[dict[str, Any]]
    failed: dict[str, str]


def research(
    root: Path,
    asked: Sequence[str] = (),
    seeds: int = 3,
    overrides: Sequence[str] = (),
    address: str = "local",
    command: str = "",
    tracking: Address = OWN,
    studies: Mapping[str, Study] | None = None,
    datasets: Sequence[str] = (),
) -> Findings:
    """Train the methods of the studies ``asked`` for (none: all) and compare each with its reference.

    Studies that need the same images and labels share a workspace below ``root``, others take over from it what is the same; what is
    finished there is not done again. ``root/research.json`` gets the rows, beside those of other studies and data sets, and
    ``root/STUDY.md`` a study.

    A row is a method of a study on the data of one configuration: study, dataset, method, reference, workspace, run, seeds; then for
    each of the splits val and test, by which nothing is to be decided: SPLIT_FIGURE, the mean over seeds of accuracy, ece, nll (nats) and
    brier as trained, and SPLIT_FIGURE_minus: [difference to the reference, low, high], the 95 % interval of a paired bootstrap over seeds
    and images, null for the reference; test_tv, to the true posterior, null where nobody knows it.

    Args:
        seeds: of each method.
        overrides: KEY=VALUE for every configuration, under what the studies change.
        studies: by name; None: the bundled ones.
        datasets: on which of their data sets; none: all of them.

    Raises:
        InputError: an unknown study or data set, a study that does not fit its configuration, or whatever the pipeline refuses.
    """
    known = read_studies() if studies is None else studies
    chosen = choose_studies(asked, known, datasets)
    needed = [arm for name, study in chosen.items() for arm in arms(name, study)]
    places = sorted({arm.place: arm for arm in needed}.values(), key=lambda arm: (arm.config, bool(arm.world)))  # the base first
    configs = {
        arm.place: place_config(arm.place, chosen, known, str((root / arm.data).absolute()), seeds, overrides) for arm in places
    }
    failed: dict[str, str] = {}
    for number, arm in enumerate(places):
        changed = ", ".join(f"{key} {value}" for key, value in arm.world.items())
        told = f"research: workspace {number + 1} of {len(places)}, {arm.place}{f' ({changed})' if changed else ''}"
        say(
            f"{told}: {len(configs[arm.place].train.compare)} methods x {seeds} seeds; {len(places) - number - 1} workspaces after it"
        )
        _take_over(
            configs[arm.place], root / arm.place, [root / other.place for other in places[:number] if other.config == arm.config]
        )
        outcome = calibrate(configs[arm.place], root / arm.place, address, command, tracking)
        failed |= {f"{arm.place}: {run}": error for run, error in outcome.failed.items()}
        done = {other.place for other in places[: number + 1]}
        for name in chosen:
            of = [one for one in needed if one.study == name]
            if arm.place in {one.place for one in of} and {one.place for one in of} <= done:
                _conclude(root, name, chosen[name], of, configs, failed)
    measured = {(arm.study, arm.data) for arm in needed}
    return Findings([row for row in _read(root) if (row["study"], row["dataset"]) in measured], failed)


def _take_over(config: Config, root: Path, sources: Sequence[Path]) -> None:
    """Link into the workspace at ``root`` the images and labels that others hold and that are the same."""
    if not sources:
        return
    with open_workspace(root) as opened, Context(config, opened, STAGES) as context:
        link_inputs(context, [Workspace(source) for source in sources])


def _conclude(
    root: Path, name: str, study: Study, of: Sequence[Arm], configs: Mapping[str, Config], failed: Mapping[str, str]
) -> None:
    """Measure a study whose methods are all trained, and write what came of it; those that failed are left out."""
    rows: list[dict[str, Any]] = []
    for config in study.configs:
        trained = [arm for arm in of if arm.config == config and not _failed(arm, configs[arm.place], failed)]
        if trained and trained[0].name == study.reference:
            rows += _rows(root, trained, configs)
        else:
            say(f"research: {name} on {config}: no rows, its reference {study.reference} failed")
    measured = {arm.data for arm in of}
    others = [row for row in _read(root) if row["study"] != name or row["dataset"] not in measured]
    storage.write_json(root / "research.json", [*others, *rows])
    storage.write_text(root / f"{name}.md", markdown(name, study, [*(row for row in others if row["study"] == name), *rows]))


def _failed(arm: Arm, config: Config, failed: Mapping[str, str]) -> bool:
    return any(f"{arm.place}: {arm.run}-seed{seed}" in failed for seed in range(config.train.seeds))


def _read(root: Path) -> list[dict[str, Any]]:
    path = root / "research.json"
    return storage.read_json(path) if path.is_file() else []


def _rows(root: Path, of: Sequence[Arm], configs: Mapping[str, Config]) -> list[dict[str, Any]]:
    """Rows of the methods ``of`` a study on one data set, the first of which is the reference."""
    config, reference = configs[of[0].place], of[0]
    found = [
        {
            "study": arm.study,
            "dataset": arm.data,
            "method": arm.name,
            "reference": reference.name,
            "workspace": arm.place,
            "run": arm.run,
            "seeds": config.train.seeds,
        }
        for arm in of
    ]
    scores = _scores(root, of, configs)
    for split in SPLITS:
        drawn = bootstrap(scores[split], n_bins=config.evaluate.bins, draws=config.evaluate.draws)
        for arm, row in zip(of, found, strict=True):
            row |= {f"{split}_{metric}": drawn[arm.name][metric].mean().item() for metric in BOOTSTRAPPED}
            for metric in BOOTSTRAPPED:
                difference = drawn[arm.name][metric] - drawn[reference.name][metric]
                ends = None if arm is reference else [difference.mean().item(), *interval(difference)]
                row[f"{split}_{metric}_minus"] = ends
    posterior = _posterior(root / reference.place)
    for arm, row in zip(of, found, strict=True):
        values = [] if posterior is None else [tv(log_probs.exp(), posterior) for log_probs, _ in scores["test"][arm.name]]
        row["test_tv"] = sum(values) / len(values) if values else None
    return found


def _scores(root: Path, of: Sequence[Arm], configs: Mapping[str, Config]) -> dict[str, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Split -> method -> for each seed log-probabilities (N, K) and labels (N,) as trained."""
    n_classes = RealDataset.load_info(root / of[0].place).n_classes
    specs = {place: run_specs(Context(configs[place], Workspace(root / place), STAGES)) for place in {arm.place for arm in of}}
    scores: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {split: {} for split in SPLITS}
    for split, found in scores.items():
        for arm in of:
            runs = [split_logits(spec, split, n_classes) for spec in specs[arm.place] if spec.method == arm.run]
            found[arm.name] = [(logits.double().log_softmax(dim=1), labels) for logits, labels in runs]
    return scores


def _posterior(workspace: Path) -> torch.Tensor | None:
    """True posterior (N, K) of the test images, where it is known."""
    model = load_truth(Workspace(workspace).truth)
    return None if model is None else true_posterior(model, RealDataset.load(workspace, ("test",)).split("test")[0])
