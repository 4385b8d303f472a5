"""train: every method with every seed, in one Ray Train worker group."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from csm import storage
from csm.datasets import RealDataset
from csm.methods import identity
from csm.runs import MixedSource, RunSpec
from flows.annotate import annotated
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.fit_annotators import resolve
from flows.folders import absolute_folders
from flows.networks import check_train, network_settings
from flows.stages import Context, Made, Stage
from flows.training import fit_runs

MEMBER_SEEDS = 10_000  # between the seeds of two members of an ensemble: above all of methods and of the teacher


def run_specs(context: Context, seeds: Iterable[int] | None = None) -> list[RunSpec]:
    """All runs of the comparison, seed by seed. A run depends on the annotations and the calibration of its own annotator alone.

    Args:
        seeds: None: those that the configuration reports, 0..train.seeds-1.
    """
    workspace, config = context.workspace, context.config
    train = config.train
    info = RealDataset.load_info(workspace.root)
    labelled = cache(partial(annotated, workspace, config))
    specs = []
    for seed in range(train.seeds) if seeds is None else seeds:
        for name, method in train.chosen.items():
            source, labels = None, ""
            if method.mixed:
                annotator = resolve(workspace, config.annotator_of(method))
                method = replace(method, mixed=replace(method.mixed, annotator=annotator))
                labels = "".join(labelled(annotator, kind) for kind in method.mixed.kinds)
                source = MixedSource(
                    plan=workspace.plan.absolute(),
                    mixed=workspace.mixed.absolute(),
                    annotations=workspace.annotations(annotator).absolute(),
                    calibration=(workspace.annotator(annotator) / "calibration.json").absolute(),
                    kinds=method.mixed.kinds,
                    labels=labels,
                )
            optimizer = train.optimizer_of(method)
            settings = identity(replace(method, members=1, optimizer={}))  # of one classifier; `optimizer` has its own
            common = [settings, info.digest, labels, train.network, network_settings(train), asdict(optimizer), train.workers]
            spec = RunSpec(
                run=f"{name}-seed{seed}",
                method=name,
                seed=seed,
                directory=workspace.run(f"{name}-seed{seed}").absolute(),
                data=workspace.root.absolute(),
                network=train.network,
                parameters=absolute_folders(train.parameters),
                settings=method,
                optimizer=optimizer,
                mixed=source,
                fingerprint=storage.digest("run", *common, seed),
            )
            specs.append(spec if method.members == 1 else _ensemble(spec, common))
    return specs


def _ensemble(spec: RunSpec, common: list[Any]) -> RunSpec:
    """``spec`` as a deep ensemble; ``common``: what the fingerprints of its members have in common. The first is the classifier alone."""
    seeds = [number * MEMBER_SEEDS + spec.seed for number in range(spec.settings.members)]
    members = tuple(
        replace(
            spec,
            run=f"{spec.run}-member-{number}",
            seed=seed,
            directory=_member(spec.directory, number),
            settings=replace(spec.settings, members=1),
            fingerprint=storage.digest("run", *common, seed),
        )
        for number, seed in enumerate(seeds)
    )
    fingerprint = storage.digest("ensemble", [member.fingerprint for member in members])
    return replace(spec, members=members, fingerprint=fingerprint)


def _member(run: Path, number: int) -> Path:
    """Folder of a member of the ensemble in the folder ``run``."""
    return run / f"member-{number}"


def _run(context: Context, record: StageRecord) -> Made:
    specs = run_specs(context)
    fit_runs(context, specs, "train", "classifier")
    return Made(sum(len(spec.singles) for spec in specs), storage.digest(*(spec.fingerprint for spec in specs)))


def _settings(config: Config) -> dict[str, Any]:
    chosen = {name: identity(method) for name, method in config.train.chosen.items()}
    for name, method in config.train.chosen.items():
        if method.mixed:
            chosen[name]["mixed"]["annotator"] = config.annotator_of(method)
    parameters = network_settings(config.train)
    return {"train": {**asdict(config.train), "parameters": parameters, "methods": chosen, "compare": list(chosen)}}


def _outputs(workspace: Workspace, config: Config) -> list[Path]:
    records = []
    for seed in range(config.train.seeds):
        for name, method in config.train.chosen.items():
            run = workspace.run(f"{name}-seed{seed}")
            members = [_member(run, number) for number in range(method.members)] if method.members > 1 else []
            records += [folder / "run.json" for folder in (run, *members)]
    return records


STAGE = Stage(
    name="train",
    unit="classifiers",
    code_version=2,
    inputs=("prepare",),
    more_inputs=lambda config: ("annotate",) if config.mixes else (),
    settings=_settings,
    outputs=_outputs,
    check=check_train,
    run=_run,
    incremental=True,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
