"""Twins: classifiers that were trained before, under another name or as a member of an ensemble, known by their fingerprint."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import polars as pl

from csm import storage, tables
from csm.locations import local
from csm.runs import RunSpec


def adopt(runs: Path, specs: Sequence[RunSpec]) -> list[RunSpec]:
    """Copy to the folder of each run of ``specs``, which are not finished, the finished one of equal fingerprint below ``runs``.

    Equal fingerprints are equal classifiers: the first member of an ensemble is the classifier that its method trains alone.

    Returns:
        Those of ``specs`` of which there is none.
    """
    if not specs:
        return []
    records = sorted([*runs.glob("*/run.json"), *runs.glob("*/member-*/run.json")])
    known = {storage.read_json(record).get("fingerprint"): record.parent for record in records}
    for spec in specs:
        if spec.fingerprint in known:
            _copy(known[spec.fingerprint], spec)
    return [spec for spec in specs if spec.fingerprint not in known]


def _copy(source: Path, spec: RunSpec) -> None:
    """The files of the run in ``source`` as those of ``spec``; ``run.json``, which says that they are there, comes last."""
    (spec.directory / "run.json").unlink(missing_ok=True)
    for name in ("model.safetensors", "model.json", "history.json"):
        with storage.replacing(spec.directory / name) as temporary:
            shutil.copyfile(local(source / name), temporary)
    schema = tables.predictions(len(storage.read_json(source / "model.json")["class_names"]))
    predictions = tables.read(source / "predictions.parquet", schema).with_columns(pl.lit(spec.run).alias("run"))
    tables.write(predictions, spec.directory / "predictions.parquet", schema)
    own = {"run": spec.run, "method": spec.method, "settings": asdict(spec.settings)}
    storage.write_json(spec.directory / "run.json", {**storage.read_json(source / "run.json"), **own})
