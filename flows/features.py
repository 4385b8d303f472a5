"""Features: the real images, without the test split, through each encoder once, over Ray; annotators are fitted from them."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cluster.annotation import EncodeJob, EncoderSpec, encode_shards, read_slice, real_slices
from cluster.ledger import finished_parts, part_bytes, read_receipts
from csm import storage, tables
from csm.datasets import RealDataset
from csm.encoders import ENCODERS, Sources
from csm.errors import InputError
from flows.annotators import AUTO, encoder_files
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.fit_teacher import members
from flows.folders import absolute_folders
from flows.mix import process, remove_other_parts
from flows.stages import Context

NEEDS = {"members": "fit-teacher", "generator": "generator", "truth": "prepare"}  # field of Sources -> the stage that makes it


@dataclass(frozen=True)
class _Mark:
    fingerprint: str


def encoder_spec(workspace: Workspace, config: Config, name: str) -> EncoderSpec:
    """How workers, whose current folder may be another one, get the encoder ``name``."""
    encoder = config.annotate.encoders[name]
    folders = (workspace.encoder(name), workspace.generator, workspace.truth)
    fitted, generator, truth = (folder.absolute() for folder in folders)
    sources = Sources(fitted, members(workspace, config), generator, truth)
    return EncoderSpec(name, encoder.kind, sources, absolute_folders(encoder.parameters))


def device(config: Config) -> str:
    """Where annotation computes."""
    return "cuda" if config.resources.annotate.gpus else "cpu"


def recorded_fingerprint(file: Path) -> str:
    """The fingerprint that was written last of all to the JSON ``file``; "" if it is not there."""
    return storage.read_record(file, _Mark).fingerprint if file.is_file() else ""


def encode(context: Context, record: StageRecord, names: Collection[str], required: Collection[str]) -> dict[str, str]:
    """Bring the features of the encoders of ``names`` up to date and return which could not be, and why.

    Raises:
        InputError: one of the annotators ``required`` has such an encoder.
    """
    annotate = context.config.annotate
    encoders, needed = annotate.encoders_of(names), annotate.encoders_of(required)
    try:
        _encode_together(context, record, encoders)
        return {}
    except InputError:
        if set(encoders) == set(needed):
            raise
    failed = {}
    for name in encoders:  # one by one, to see which it is; what is there is not made again
        try:
            _encode_together(context, record, [name])
        except InputError as error:
            if name in needed:
                raise
            failed[name] = str(error)
    return failed


def _encode_together(context: Context, record: StageRecord, names: Sequence[str]) -> None:
    """Features of all real images but the test split, each image read once for all encoders ``names``, over Ray."""
    workspace, config = context.workspace, context.config
    real, slices = workspace.real.absolute(), real_slices(workspace.real)
    shape = RealDataset.load_info(workspace.root).shape
    receipts, jobs, done = read_receipts(workspace.root), list[EncodeJob](), 0
    for name in names:
        spec, key, directory = encoder_spec(workspace, config, name), encoder_key(context, record, name), workspace.encoder(name)
        _fit_encoder(spec, key, partial(_training_images, real, slices, shape))
        files = part_bytes(directory)
        remove_other_parts(directory, files, slices)
        finished = finished_parts(receipts, files, f"encoders/{name}", directory, key, slices)
        done += sum(slices[number] for number in finished)
        todo = frozenset(slices) - finished
        jobs.append(EncodeJob(spec, real, directory.absolute(), key, shape, todo, device(config)))
    todo_jobs = [job for job in jobs if job.shards]
    if todo_jobs:
        work = partial(encode_shards, todo_jobs, config.resources.annotate)
        keys = {f"encoders/{job.encoder.name}": job.key for job in todo_jobs}
        process(context, record, work, keys, set(keys), "features", sum(slices.values()) * len(jobs), done)


def _fit_encoder(spec: EncoderSpec, key: str, batches: Callable[[], Iterator[torch.Tensor]]) -> None:
    """Fit the encoder on the training images ``batches()`` if it is one that is fitted, and was not yet under ``key``."""
    fit, mark = ENCODERS[spec.kind].fit, spec.sources.fitted / "encoder.json"
    if fit is None or recorded_fingerprint(mark) == key:
        return
    fit(spec.sources, batches, **spec.parameters)
    storage.write_json(mark, {"kind": spec.kind, "fingerprint": key})


def _training_images(real: Path, slices: Collection[int], shape: tuple[int, int, int]) -> Iterator[torch.Tensor]:
    for number in slices:
        rows = read_slice(real, number, ["train"])
        if len(rows):
            yield tables.to_images(rows["image"], shape)


def encoder_key(context: Context, record: StageRecord, name: str) -> str:
    """Identifies everything that the features by encoder ``name`` depend on."""
    encoder = context.config.annotate.encoders[name]
    needs = {need: record.inputs[NEEDS[need]] for need in ENCODERS[encoder.kind].needs}
    settings = [encoder.kind, encoder.parameters, encoder_files(encoder)]
    return storage.digest("encoder", record.code_version, *settings, record.inputs["prepare"], needs)


def check_encoders(context: Context) -> None:
    """What can be seen to be wrong with the encoders that are needed in any case, before anything is loaded."""
    annotate, workspace = context.config.annotate, context.workspace
    for name in annotate.encoders_of(name for name in context.config.annotators if name != AUTO):
        encoder = annotate.encoders[name]
        kind = ENCODERS[encoder.kind]
        if "truth" in kind.needs and workspace.dataset.is_file() and not workspace.truth.is_dir():
            raise InputError(
                f"annotate.encoders.{name}: the law of these images is not known: set data.source=gaussians, or name another annotator"
            )
        if kind.check:
            try:
                kind.check(**encoder.parameters)
            except InputError as error:
                raise InputError(f"annotate.encoders.{name}: {error}") from None
