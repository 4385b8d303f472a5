"""What identifies the soft labels that classifiers are trained on: those that were asked for, and those that lie in a workspace."""

from collections.abc import Iterable
from dataclasses import asdict

from cluster.shards import KEY, part_path
from csm import storage, tables
from csm.planning import first_shard
from csm.reannotation import Calibration
from flows.artifacts import Workspace


def label_digest(key: str, calibration: Calibration) -> str:
    """Of the labels of images of one kind that were annotated under ``key`` and are calibrated so."""
    return storage.digest(key, asdict(calibration))


def present_labels(workspace: Workspace, annotator: str, kinds: Iterable[str]) -> str | None:
    """``MixedSource.labels`` of what ``annotator`` says of images of ``kinds`` in ``workspace`` now; None if it does not lie there."""
    calibration, folder = workspace.annotator(annotator) / "calibration.json", workspace.annotations(annotator)
    if not calibration.is_file():
        return None
    footers = [tables.metadata(part_path(folder, first_shard(kind))) for kind in kinds]
    read = storage.read_record(calibration, Calibration)
    digests = [label_digest(footer[KEY], read) for footer in footers if footer is not None and KEY in footer]
    return "".join(digests) if len(digests) == len(footers) else None
