"""What a run was made from: its data sets, the code of the user, the command."""

import getpass
import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from csm.datasets import DatasetInfo
from csm.locations import is_remote
from csm.planning import SEMANTIC
from flows.masking import masked

TRAINING = "training"


def real_input(info: DatasetInfo, folder: Path) -> dict[str, Any]:
    """The real images in workspace ``folder`` as an input of a run."""
    profile = {"images": info.counts, "shape": info.shape, "classes": info.n_classes}
    schema = {"image": {"dtype": "uint8", "shape": info.shape}, "label": {"dtype": "uint16", "classes": info.class_names}}
    return _input(info.name, info.digest, folder / "real", profile, schema)


def mixed_input(info: DatasetInfo, kind: str, annotator: str, digest: str, images: int, folder: Path) -> dict[str, Any]:
    """The images of ``kind`` in ``folder`` with the soft labels of ``annotator``, which ``digest`` identifies, as an input of a run."""
    profile = {"images": images, "kind": kind, "shape": info.shape, "classes": info.n_classes, "annotator": annotator}
    schema = {"image": {"dtype": "uint8", "shape": info.shape}, "label": {"dtype": "float32", "shape": [info.n_classes]}}
    name = "mixed" if kind == SEMANTIC else kind
    return _input(f"{info.name} {name}, {annotator}", digest, folder, profile, schema)


def _input(name: str, digest: str, folder: Path, profile: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """As ``Store`` logs it; source_type "local" is a path that ``mlflow.data`` resolves, and so is the scheme of a store."""
    uri = str(folder.absolute())
    dataset = {
        "name": name[:500],
        "digest": digest[:36],
        "source_type": uri.partition("://")[0] if is_remote(folder) else "local",
        "source": json.dumps({"uri": uri}),
        "schema": json.dumps({"csm": schema}),
        "profile": json.dumps(profile),
    }
    return {"dataset": dataset, "context": TRAINING}


def origin_tags(command: str) -> dict[str, str]:
    """Tags of every run: who, by which command, with which commit of the git tree that the user works in, if it is one."""
    tags = {"mlflow.source.type": "LOCAL"}
    if command:
        tags["mlflow.source.name"] = masked(command)[:5000]
    with suppress(OSError, KeyError):  # a user without a name, as in some containers
        tags["mlflow.user"] = getpass.getuser()
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git
        return tags
    if git.returncode == 0:
        tags["mlflow.source.git.commit"] = git.stdout.strip()
    return tags
