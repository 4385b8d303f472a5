"""Finished models by what a user calls them: a folder or workspace, which may be on a store, or a name in MLflow's registry."""

import logging
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from csm.calibrated import CalibratedClassifier, load_calibrated
from csm.errors import InputError
from csm.locations import is_remote, location, reach
from flows.masking import masked

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

FILES = ("model.json", "model.safetensors")
PLACES = ("model", "artifacts")  # where `model.json` lies below a workspace, an MLflow model


def open_model(text: str, tracking_uri: str | None = None) -> CalibratedClassifier:
    """The finished model that ``--model`` names, in evaluation mode. No code that comes with it is run.

    Args:
        text: a folder with ``model.json``, a workspace, the folder of an MLflow model, each of them on this machine or on a store, or a URI
            of MLflow: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``runs:/RUN_ID/model``.
        tracking_uri: the MLflow store of such a URI; None: MLFLOW_TRACKING_URI.

    Raises:
        InputError: there is no such model, or it is damaged or no finished one.
    """
    if text.startswith(("models:/", "runs:/")):
        return _fetch(text, tracking_uri)
    root = _place(text)
    for folder in (root, *(root / place for place in PLACES)):
        if (folder / "model.json").is_file():
            return load_calibrated(folder)
    reason = "does not exist" if not root.exists() else "holds no model.json" if root.is_dir() else "is a file, not a folder"
    raise InputError(
        f"--model {text}: {reason}; give a workspace in which `csm train` ended, or its folder model, or models:/NAME/VERSION"
    )


def _place(text: str) -> Path:
    """The folder, or the place on a store that answers, which ``text`` names."""
    try:
        root = location(text)
        if is_remote(root):
            reach(root, write=False)
    except InputError as error:
        more = "give a folder, s3://BUCKET/FOLDER, or models:/NAME/VERSION or runs:/RUN_ID/model with --tracking-uri"
        raise InputError(f"--model {error}; {more}") from None
    return root


def _fetch(uri: str, tracking_uri: str | None) -> CalibratedClassifier:
    store = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not store:
        raise InputError(f"--model {uri}: in which store? give --tracking-uri, such as sqlite:////FOLDER/workspace/mlflow.db")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault(
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"
    )  # its own 7 wait for minutes before they say that nobody answers
    from mlflow.artifacts import download_artifacts  # seconds to import
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with TemporaryDirectory() as folder:
        try:
            source = _source(MlflowClient(store), uri) if uri.startswith("models:/") else uri.rstrip("/")
            for name in FILES:
                download_artifacts(f"{source}/artifacts/{name}", dst_path=folder, tracking_uri=store)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            reason = masked(" ".join(str(error).split()))[:200]
            raise InputError(f"--model {uri}: {masked(store)} does not give it ({reason})") from None
        found = next(path.parent for path in Path(folder).rglob(FILES[0]))
        return load_calibrated(found)


def _source(client: "MlflowClient", uri: str) -> str:
    """Where the files of a registered model lie. MLflow's own way would ask the store of the whole process, and make one if it lacks it."""
    matched = re.fullmatch(r"models:/+([^/@]+)(?:/(\d+|latest)|@([^/]+))", uri)
    if matched is None:
        raise InputError(f"--model {uri}: expected models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS")
    name, version, alias = matched.groups()
    if alias:
        version = client.get_model_version_by_alias(name, alias).version
    elif version == "latest":
        versions = client.search_model_versions(f"name = '{name}'")
        if not versions:
            raise InputError(f"--model {uri}: the registry has no version of {name!r}")
        version = max(int(known.version) for known in versions)
    return str(client.get_model_version_download_uri(name, str(version)))
