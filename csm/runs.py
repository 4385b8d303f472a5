"""One training run as files: what to train, from where, into which folder; resumable and done once."""

import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl
import torch

from csm import storage, tables
from csm.classifiers import Classifier, ClassifierSpec, build_classifier, build_ensemble, load_classifier, mean_log_probs
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.locations import Location, listing, local
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.planning import SEMANTIC
from csm.reannotation import Calibration, soft_labels, sparse_labels
from csm.schedules import MixedSet
from csm.training import OnEpoch, Split, Stream, fit, predict
from csm.world import ALONE, CPU, World, from_first, together

STATE_SECONDS = 10.0  # between two saves of an unfinished training


@dataclass(frozen=True)
class MixedSource:
    """Where the mixed images and their annotations lie, of which kinds they should be, and what identifies their labels."""

    plan: Location
    mixed: Location
    annotations: Location
    calibration: Location
    kinds: tuple[str, ...] = (SEMANTIC,)
    labels: str = ""


@dataclass(frozen=True)
class RunSpec:
    """One classifier to train.

    Attributes:
        run: its name; ``method`` and ``seed`` say what it is.
        directory: where its files go.
        data: the folder that holds ``dataset.json`` and ``real/``.
        network, parameters: see ``csm.classifiers.NETWORKS``.
        settings, optimizer: how to train.
        mixed: for methods with a mixed term.
        fingerprint: of everything that the result depends on; a finished run with the same one is not trained again.
        members: of a deep ensemble, its classifiers: runs of their own, from which it is made.
    """

    run: str
    method: str
    seed: int
    directory: Location
    data: Location
    network: str
    parameters: dict[str, Any]
    settings: Method
    optimizer: OptimizerConfig
    mixed: MixedSource | None
    fingerprint: str
    members: tuple["RunSpec", ...] = ()

    @property
    def singles(self) -> tuple["RunSpec", ...]:
        """What is trained for it: its members, or itself."""
        return self.members or (self,)


def is_finished(spec: RunSpec) -> bool:
    """Whether ``spec.directory`` holds the finished run with this fingerprint (``run.json`` is written last)."""
    record = spec.directory / "run.json"
    value = storage.read_json(record) if record.is_file() else {}
    return isinstance(value, dict) and value.get("fingerprint") == spec.fingerprint


def fit_run(
    spec: RunSpec,
    on_epoch: OnEpoch | None = None,
    device: torch.device = CPU,
    world: World = ALONE,
    stream: Callable[[Path, int, World], Stream] | None = None,
    on_state: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Train the classifier of ``spec`` and write ``model.*``, ``predictions.parquet``, ``history.json`` and ``run.json``.

    An unfinished run goes on from ``state.pt``; a finished one returns at once. On a CPU the result depends on the spec, the files it
    names and torch's number of threads only. Rank 0 alone reads the state and writes files. Of an ensemble first the members are trained,
    one after the other; it has no history of its own.

    Args:
        spec: what to train.
        on_epoch: called on rank 0 after each epoch.
        device, world: see ``csm.training.fit``.
        stream: called with ``spec.data``, the seed and ``world`` for the images of a training that holds them on disk.
        on_state: called on rank 0 after each epoch but the last, after ``on_epoch``, with what ``state.pt`` holds when it is saved.

    Raises:
        InputError: on every rank alike: a file is missing or damaged, or the stream is.
        FloatingPointError: the loss is not finite; on every rank alike.
    """
    if spec.members:
        for member in spec.members:
            fit_run(member, on_epoch, device, world, stream, on_state)
        if world.rank == 0 and not is_finished(spec):
            _pool(spec)
        return
    # Asked of rank 0 alone: a network file system may show another node an older state of the folder.
    if from_first(together(lambda: world.rank == 0 and is_finished(spec), world), world):
        return
    if spec.optimizer.hold == "stream" and stream is None:
        raise InputError("train.optimizer.hold: 'stream' needs someone who reads the images from disk, as csm train does")
    state_path = spec.directory / "state.pt"

    def read() -> dict[str, Any] | None:
        if world.rank > 0:
            return None
        (spec.directory / "run.json").unlink(missing_ok=True)
        state = storage.read_state(state_path) if state_path.is_file() else None
        return state if state is not None and state.get("fingerprint") == spec.fingerprint else None  # else: of other settings

    resumed = from_first(together(read, world), world)
    history: list[dict[str, float]] = resumed["history"] if resumed else []
    spent = resumed["seconds"] if resumed else 0.0
    started = saved = time.monotonic()

    def record_epoch(epoch: int, values: dict[str, float]) -> None:
        history.append({"epoch": epoch, **values})
        if on_epoch:
            on_epoch(epoch, values)

    def save_state(training: dict[str, Any]) -> None:
        nonlocal saved
        now = time.monotonic()
        state = {"fingerprint": spec.fingerprint, "history": history, "seconds": spent + now - started, "training": training}
        if now - saved >= STATE_SECONDS:
            storage.write_state(state_path, state)
            saved = now
        if on_state:
            on_state(state)

    def images() -> tuple[RealDataset, Split | Stream, MixedSet | None]:
        stamp = _stamp(spec.data / "dataset.json", spec.data / "real")
        streamed = stream if spec.optimizer.hold == "stream" else None
        data = _dataset(spec.data, ("val", "test") if streamed else tables.SPLITS, stamp)
        real = streamed(spec.data, spec.seed, world) if streamed else data.split("train")
        source, info = spec.mixed, data.info
        if source is None:
            return data, real, None
        read_from = _stamp(source.plan, source.mixed, source.annotations, source.calibration)
        return data, real, _mixed_set(source, info.shape, info.n_classes, read_from)

    data, real, mixed = together(images, world)
    classifier = new_classifier(spec, data)
    fit(
        classifier,
        real,
        data.split("val"),
        spec.settings,
        spec.optimizer,
        spec.seed,
        mixed=mixed,
        on_epoch=record_epoch,
        save_state=save_state,
        state=resumed["training"] if resumed else None,
        device=device,
        world=world,
    )
    if world.rank > 0:
        return
    classifier.save(spec.directory)
    tables.write(
        predictions(spec.run, classifier, data), spec.directory / "predictions.parquet", tables.predictions(data.info.n_classes)
    )
    storage.write_json(spec.directory / "history.json", history)
    _write_record(spec, spent + time.monotonic() - started, world.size)
    state_path.unlink(missing_ok=True)


def _pool(spec: RunSpec) -> None:
    """Write the files of an ensemble whose members are finished: their networks as one model, the log of their mean probabilities."""
    (spec.directory / "run.json").unlink(missing_ok=True)
    schema = tables.predictions(RealDataset.load_info(spec.data).n_classes)
    frames = [tables.read(member.directory / "predictions.parquet", schema) for member in spec.members]
    pooled = mean_log_probs(torch.stack([torch.from_numpy(frame["logits"].to_numpy().copy()).double() for frame in frames]))
    logits = pl.Series("logits", pooled.float().numpy(), dtype=schema["logits"])
    build_ensemble([load_classifier(member.directory) for member in spec.members]).save(spec.directory)
    tables.write(frames[0].with_columns(pl.lit(spec.run).alias("run"), logits), spec.directory / "predictions.parquet", schema)
    records = [storage.read_json(member.directory / "run.json") for member in spec.members]
    members = [{name: record[name] for name in ("run", "seed", "fingerprint", "seconds")} for record in records]
    _write_record(spec, sum(record["seconds"] for record in records), records[0]["devices"], members=members)


def _write_record(spec: RunSpec, seconds: float, devices: int, **more: Any) -> None:
    """Write ``run.json``, which says that all other files are there."""
    record = {
        "run": spec.run,
        "method": spec.method,
        "seed": spec.seed,
        "fingerprint": spec.fingerprint,
        "seconds": round(seconds, 3),
        "devices": devices,
        "settings": asdict(spec.settings),
        "optimizer": asdict(spec.optimizer),
        "labels": spec.mixed.labels if spec.mixed else "",
        **more,
    }
    storage.write_json(spec.directory / "run.json", record)


def new_classifier(spec: RunSpec, data: RealDataset) -> Classifier:
    """The classifier of ``spec`` before training: its weights are drawn from ``spec.seed``."""
    info = data.info
    torch.manual_seed(spec.seed)
    return build_classifier(ClassifierSpec(spec.network, spec.parameters, info.shape[2], info.class_names, info.mean, info.std))


def predictions(run: str, classifier: Classifier, data: RealDataset) -> pl.DataFrame:
    """The `predictions` table of a classifier on the validation and test split."""
    parts = []
    schema = tables.predictions(data.info.n_classes)
    for split in ("val", "test"):
        rows = data.frame.filter(pl.col("split") == split).sort("image_id")
        images, _ = data.split(split)
        logits = pl.Series("logits", predict(classifier, images).numpy(), dtype=schema["logits"])
        parts.append(rows.select(pl.lit(run).alias("run"), "split", "image_id", "label").with_columns(logits))
    return pl.concat(parts)


Stamp = tuple[tuple[str, str, str], ...]


def _stamp(*paths: Path) -> Stamp:
    """Identifies the files at and below ``paths``, as a cache key."""
    return tuple((str(path), name, version) for path in paths for name, (_, version) in sorted(listing(path).items()))


@lru_cache(maxsize=1)
def _dataset(directory: Path, splits: tuple[str, ...], stamp: Stamp) -> RealDataset:
    return RealDataset.load(directory, splits)


@lru_cache(maxsize=2)
def _mixed_set(source: MixedSource, shape: tuple[int, int, int], n_classes: int, stamp: Stamp) -> MixedSet:
    """Read once for all runs of a process that share a source; of its folders only the part files of its kinds."""
    return MixedSet.concat([read_mixed(source, kind, shape, n_classes) for kind in source.kinds])


def read_mixed(source: MixedSource, kind: str, shape: tuple[int, int, int], n_classes: int) -> MixedSet:
    """The images of ``kind`` that ``source`` names, of ``shape`` (H, W, C), with their labels; ``InputError`` if some lack."""
    plan = tables.read_plan(source.plan, kind)
    if plan.is_empty():
        raise InputError(f"{source.plan} plans no {kind} images: run csm plan again")
    shards = frozenset(plan["shard"].to_list())
    mixed = _read_parts(source.mixed, lambda part: tables.read(part, tables.MIXED), shards)
    annotations = _read_parts(source.annotations, lambda part: tables.read_annotations(part, n_classes), shards)
    calibration = storage.read_record(source.calibration, Calibration)
    read = sparse_labels if "classes" in annotations.columns else soft_labels
    return MixedSet.join(plan, mixed, read(plan, annotations, n_classes, calibration), shape, n_classes)


def _read_parts(directory: Path, read: Callable[[Path], pl.DataFrame], shards: Collection[int]) -> pl.DataFrame:
    """Those part files of ``shards`` that are there, in their order."""
    parts = sorted(local(directory).glob("part-*.parquet")) if directory.is_dir() else []
    parts = [part for part in parts if int(part.stem.removeprefix("part-")) in shards]
    if not parts:
        raise InputError(f"{directory} holds no part file: run csm mix and csm annotate first")
    return pl.concat([read(part) for part in parts])
