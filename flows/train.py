"""train: every method with every seed, in one Ray Train worker group."""

from dataclasses import asdict, replace
from typing import Any

from csm import storage
from csm.datasets import RealDataset
from csm.runs import MixedSource, RunSpec
from flows.annotate import annotated
from flows.artifacts import StageRecord
from flows.config import Config
from flows.fit_annotators import resolve
from flows.folders import absolute_folders
from flows.networks import check_train, network_settings
from flows.stages import Context, Made, Stage
from flows.training import fit_runs


def run_specs(context: Context) -> list[RunSpec]:
    """All runs of the comparison, seed by seed. A run depends on the annotations and the calibration of its own annotator alone."""
    workspace, config = context.workspace, context.config
    train = config.train
    info = RealDataset.load_info(workspace.root)
    specs = []
    for seed in range(train.seeds):
        for name, method in train.chosen.items():
            source, labels = None, ""
            if method.mixed:
                annotator = resolve(workspace, config.annotator_of(method))
                method = replace(method, mixed=replace(method.mixed, annotator=annotator))
                labels = annotated(workspace, config, annotator)
                source = MixedSource(
                    plan=workspace.plan.absolute(),
                    mixed=workspace.mixed.absolute(),
                    annotations=workspace.annotations(annotator).absolute(),
                    calibration=(workspace.annotator(annotator) / "calibration.json").absolute(),
                )
            settings = {**asdict(method), "description": ""}
            common = [train.network, network_settings(train), asdict(train.optimizer), train.workers, seed]
            spec = RunSpec(
                run=f"{name}-seed{seed}",
                method=name,
                seed=seed,
                directory=workspace.run(f"{name}-seed{seed}").absolute(),
                data=workspace.root.absolute(),
                network=train.network,
                parameters=absolute_folders(train.parameters),
                settings=method,
                optimizer=train.optimizer,
                mixed=source,
                fingerprint=storage.digest("run", settings, info.digest, labels, *common),
            )
            specs.append(spec)
    return specs


def _run(context: Context, record: StageRecord) -> Made:
    specs = run_specs(context)
    fit_runs(context, specs, "train", "classifier")
    return Made(len(specs), storage.digest(*(spec.fingerprint for spec in specs)))


def _settings(config: Config) -> dict[str, Any]:
    chosen = {name: asdict(replace(method, description="")) for name, method in config.train.chosen.items()}
    for name, method in config.train.chosen.items():
        if method.mixed:
            chosen[name]["mixed"]["annotator"] = config.annotator_of(method)
    parameters = network_settings(config.train)
    return {"train": {**asdict(config.train), "parameters": parameters, "methods": chosen, "compare": list(chosen)}}


STAGE = Stage(
    name="train",
    unit="classifiers",
    code_version=2,
    inputs=("prepare",),
    more_inputs=lambda config: ("annotate",) if config.mixes else (),
    settings=_settings,
    outputs=lambda workspace, config: [
        workspace.run(f"{name}-seed{seed}") / "run.json" for seed in range(config.train.seeds) for name in config.train.chosen
    ],
    check=check_train,
    run=_run,
    incremental=True,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
