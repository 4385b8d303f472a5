"""How fast each stage is: as the user says, as this workspace's own work was, or as a short measurement finds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from cluster.ledger import part_name, read_receipts
from cluster.rates import in_threads, on_worker
from csm import storage
from csm.classifiers import ClassifierSpec
from csm.datasets import DatasetInfo, RealDataset
from csm.errors import InputError
from csm.methods import Method
from csm.mixing import evaluations_per_image
from csm.optimization import OptimizerConfig
from csm.planning import ratio_grid
from csm.rates import Source, encoding_rate, fitting_rate, mixing_rate, training_rate
from csm.sampling import SamplerConfig
from csm.tables import KINDS
from flows import generator
from flows.artifacts import Workspace
from flows.config import Config, plain
from flows.estimate_loads import Load, mixing_weights, training_images
from flows.fit_annotators import annotators
from flows.folders import absolute_folders
from flows.methods import TrainConfig, teacher_training
from flows.teacher_models import find_models, taken_models

SOURCES = ("given", "recorded", "measured", "unknown")
LENGTH_ONLY = ("steps", "seed", "learning_rate", "ema_halflife", "p_mean", "p_std", "flip", "checkpoint_steps")  # of a generator


class Rate(NamedTuple):
    """Images a second of one worker, None if that is not known; one of ``SOURCES``, and more of where it comes from, or why not."""

    images_per_s: float | None
    source: str
    note: str


def recorded(workspace: Workspace, config: Config, load: Load) -> Rate | None:
    """The rate of what was done in ``workspace`` before, by the same network on such workers; None if nothing was."""
    if not _same_workers(workspace, config, load):
        return None
    found = _RECORDED[load.stage](workspace, config)
    if found is None or found[1] <= 0:
        return None
    images, seconds, note = found
    return Rate(images / seconds, "recorded", f"{seconds:,.0f} s of work here{note}")


def measured(workspace: Workspace, config: Config, load: Load, on_cluster: bool, seconds: float) -> Rate:
    """The rate that a measurement of some times ``seconds`` gives, on a worker of the Ray session or in this process."""
    where = "on a worker" if on_cluster else "on this machine"
    if load.gpus and not on_cluster and not torch.cuda.is_available():
        return Rate(None, "unknown", f"no GPU on this machine: give --rate {load.stage}=N, or the --address of a cluster")
    try:
        works = list(_measurements(workspace, config, load, "cuda" if load.gpus else "cpu", seconds))
        rates = [on_worker(work, load.cpus, load.gpus) if on_cluster else in_threads(work, load.cpus) for work in works]
    except InputError as error:
        return Rate(None, "unknown", f"{error}; or give --rate {load.stage}=N")
    return Rate(1 / sum(1 / rate for rate in rates), "measured", where)


def _same_workers(workspace: Workspace, config: Config, load: Load) -> bool:
    """Whether the last command in ``workspace`` had such workers for the stage of ``load`` as ``config``."""
    if not workspace.config.is_file():
        return False
    section = _SECTION[load.stage]
    now = getattr(config.resources, section)
    try:
        before = yaml.safe_load(workspace.config.read_text()).get("resources", {}).get(section, {})
        return before.get("cpus", now.cpus) == now.cpus and bool(before.get("gpus", now.gpus)) == bool(now.gpus)
    except (yaml.YAMLError, ValueError, AttributeError):
        raise InputError(
            f"{workspace.config}: damaged, not a configuration: remove it; the next stage that is run writes it"
        ) from None


def _measurements(workspace: Workspace, config: Config, load: Load, device: str, seconds: float) -> Iterator[Callable[[], float]]:
    """What to measure for ``load``: rates of networks through which each image goes one after the other."""
    info = RealDataset.load_info(workspace.root)
    made = workspace.generator.absolute() if _same_generator(workspace, config) else None
    source = Source(info, workspace.root.absolute(), config.generator, made)
    teacher = teacher_training(config.train, config.annotate)
    if load.stage == "generator":
        yield partial(fitting_rate, source, device, seconds)
    elif load.stage == "mix":
        mix = config.mix
        yield partial(
            mixing_rate, source, mix.sampler, mix.batch_size, mix.operator, mix.precision, device, seconds, config.guidance
        )
    elif load.stage in ("train", "fit-teacher"):
        train = config.train if load.stage == "train" else teacher
        yield partial(training_rate, _spec(train, info), info, train.optimizer, device, seconds)
    else:
        for name in config.annotate.encoders_of(config.annotators):
            encoder, models = config.annotate.encoders[name], config.annotate.teacher.models
            settings, member, members = absolute_folders(encoder.parameters), _spec(teacher, info), config.annotate.members
            if models:
                folders = taken_models(workspace) or find_models(models)
                member, members = storage.read_record(folders[0] / "model.json", ClassifierSpec), len(folders)
            yield partial(encoding_rate, source, encoder.kind, settings, member, members, device, seconds)


def _spec(train: TrainConfig, info: DatasetInfo) -> ClassifierSpec:
    parameters = absolute_folders(train.parameters)
    return ClassifierSpec(train.network, parameters, info.shape[2], info.class_names, info.mean, info.std)


def _same_generator(workspace: Workspace, config: Config) -> bool:
    """Whether the generator of ``workspace`` is finished and the one of ``config``, trained as long or not."""
    record = workspace.record("generator")
    if record is None or not record.done:
        return False
    before, now = (_network_settings(settings) for settings in (record.settings, plain(generator.STAGE.settings(config))))
    return before == now


def _network_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in settings["generator"].items() if name not in LENGTH_ONLY}
    return {**settings, "generator": own}


Recorded = tuple[float, float, str] | None  # images, seconds of one worker, and what more is to say


def _generator_record(workspace: Workspace, config: Config) -> Recorded:
    record = workspace.record("generator")
    if record is None or not _same_generator(workspace, config):
        return None
    settings = record.settings["generator"]
    return settings["steps"] * settings["batch_size"], record.seconds * max(1, config.resources.fit.workers), ""


@dataclass(frozen=True)
class _Run:
    """What ``run.json`` says of a classifier."""

    settings: Method
    optimizer: OptimizerConfig
    seconds: float
    devices: int = 1


def _runs_record(folders: list[Path], train: TrainConfig, info: DatasetInfo) -> Recorded:
    """Of the finished classifiers in ``folders`` that have the network, and are trained by the precision, of ``train``."""
    images = seconds = 0.0
    for folder in folders:
        spec = storage.read_record(folder / "model.json", ClassifierSpec)
        run = storage.read_record(folder / "run.json", _Run)
        wanted = (train.network, train.parameters, train.optimizer.precision, train.optimizer.compile)
        if (spec.network, spec.parameters, run.optimizer.precision, run.optimizer.compile) == wanted:
            images += run.settings.members * training_images(run.settings, run.optimizer, info.counts)
            seconds += run.seconds * run.devices
    return (images, seconds, "") if images else None


def _train_record(workspace: Workspace, config: Config) -> Recorded:
    folders = sorted(file.parent for file in (workspace.root / "runs").glob("*/run.json"))
    return _runs_record(folders, config.train, RealDataset.load_info(workspace.root))


def _teacher_record(workspace: Workspace, config: Config) -> Recorded:
    folders = sorted(file.parent for file in (workspace.root / "annotators" / "members").glob("*/run.json"))
    return _runs_record(folders, teacher_training(config.train, config.annotate), RealDataset.load_info(workspace.root))


def _mix_record(workspace: Workspace, config: Config) -> Recorded:
    """Mixing with another solver or operator is scaled by the network evaluations, and images of another kind are weighted by theirs."""
    record, made = workspace.record("mix"), workspace.record("generator")
    if record is None or made is None or not _same_generator(workspace, config):
        return None
    if record.inputs["generator"] != made.digest:
        return None
    before, ratios = record.settings["mix"], ratio_grid(config.plan).tolist()
    sampler = SamplerConfig(**before["sampler"])
    weights = mixing_weights(KINDS, sampler, before["operator"], ratios)
    receipts = _receipts(workspace)
    images = seconds = 0.0
    for kind, weight in weights.items():
        if weight:
            rows, spent = receipts.get(part_name("mixed", kind), (0, 0.0))
            images, seconds = images + rows * weight, seconds + spent
    if not images:
        return None
    guidance = before.get("guidance", config.own_guidance)
    was = evaluations_per_image(sampler, before["operator"], ratios, guidance=guidance)
    now = evaluations_per_image(config.mix.sampler, config.mix.operator, ratios, guidance=config.guidance)
    return images, seconds * now / was, "" if now == was else f", scaled from {was:g} to {now:g} evaluations"


def _encoders_record(workspace: Workspace, config: Config) -> Recorded:
    return _one_after_the_other(workspace, [f"encoders/{name}" for name in config.annotate.encoders_of(config.annotators)])


def _annotate_record(workspace: Workspace, config: Config) -> Recorded:
    return _one_after_the_other(workspace, list(annotators(workspace, config)))


def _one_after_the_other(workspace: Workspace, parts: list[str]) -> Recorded:
    """Of images that go through all of ``parts``."""
    receipts = _receipts(workspace)
    if not parts or any(part not in receipts for part in parts):
        return None
    images = min(receipts[part][0] for part in parts)
    return images, sum(images * seconds / rows for rows, seconds in (receipts[part] for part in parts)), ""


def _receipts(workspace: Workspace) -> dict[str, tuple[int, float]]:
    """Part -> rows and seconds by the last receipt of each of its shards; those that say nothing of the time are left out."""
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for receipt in read_receipts(workspace.root).iter_rows(named=True):
        if receipt["seconds"] > 0:
            last[receipt["part"], receipt["shard"]] = receipt
    found: dict[str, tuple[int, float]] = {}
    for (part, _), receipt in last.items():
        rows, seconds = found.get(part, (0, 0.0))
        found[part] = rows + receipt["rows"], seconds + receipt["seconds"]
    return found


_RECORDED: dict[str, Callable[[Workspace, Config], Recorded]] = {
    "generator": _generator_record,
    "fit-teacher": _teacher_record,
    "fit-annotators": _encoders_record,
    "mix": _mix_record,
    "annotate": _annotate_record,
    "train": _train_record,
}
_SECTION = {
    "generator": "fit", "fit-teacher": "train", "fit-annotators": "annotate", "mix": "mix", "annotate": "annotate", "train": "train",
}  # fmt: skip
