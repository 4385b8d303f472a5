"""MLflow, and nothing else knows it: one parent run for each configuration, one child run for each stage and each classifier.

Run ids are kept in ``tracking.json`` beside the store, under a key that is equal when the work is, so work that goes on after an
interruption goes on in its run, and work that is not done again makes no run.
"""

import errno
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from sqlalchemy.exc import SQLAlchemyError

from csm import storage
from csm.errors import InputError

EXPERIMENT = "csm"
BATCH = 1000  # MLflow takes at most this many metrics a call
PARAM_CHARACTERS = 6000
MODEL_TAG = "csm.model"  # of registered models that csm made


@contextmanager
def _writing() -> Iterator[None]:
    """What SQLite says of a disk that takes no more becomes the system's own error, which the command line explains.

    Raises:
        OSError: the disk is full or broken.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        for words, code in (("database or disk is full", errno.ENOSPC), ("disk I/O error", errno.EIO)):
            if words in str(error):
                raise OSError(code, os.strerror(code), "mlflow.db") from error
        raise


class Tracker:
    """Writes to the store of one workspace, from the driver's process."""

    def __init__(self, workspace: Path) -> None:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        for name in ("mlflow.store.db.utils", "sqlalchemy.pool"):  # they log what they raise, with the traceback; Ctrl-C too
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._index_path = workspace / "tracking.json"
        self._index: dict[str, dict[str, Any]] = storage.read_json(self._index_path) if self._index_path.is_file() else {}
        try:
            with _writing():
                self._client = MlflowClient(store_uri(workspace))
                experiment = self._client.get_experiment_by_name(EXPERIMENT)
        except (MlflowException, SQLAlchemyError) as error:
            reason = " ".join(str(error).split())[:120]
            store = workspace / "mlflow.db"
            raise InputError(
                f"{store} is not a usable MLflow store ({reason}): move it away and run again, tracking starts anew"
            ) from None
        self._experiment = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(
                EXPERIMENT,
                artifact_location=(workspace / "mlartifacts").absolute().as_uri(),
                tags={"mlflow.experimentKind": "custom_model_development"},  # the UI then opens on runs, not on traces
            )
        )

    @_writing()
    def open_run(self, key: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any], parent: str | None = None) -> str:
        """Return the run kept under ``key``, or make it, as a child of run ``parent`` if given; its status becomes running."""
        known = self._index.get(key)
        if known and self._exists(known["run_id"]):
            self._client.update_run(known["run_id"], status=RunStatus.to_string(RunStatus.RUNNING))
            return str(known["run_id"])
        family = {MLFLOW_PARENT_RUN_ID: parent} if parent else {}
        run_id: str = self._client.create_run(self._experiment, run_name=name, tags={**tags, **family}).info.run_id
        self._index[key] = {"run_id": run_id, "step": -1}
        self._save()  # at once: a session that is killed from here on makes no second run
        flat = [Param(key_, str(value)[:PARAM_CHARACTERS]) for key_, value in flatten(params).items()]
        for start in range(0, len(flat), 100):  # MLflow takes at most 100 parameters a call
            self._client.log_batch(run_id, params=flat[start : start + 100])
        return run_id

    @_writing()
    def log_steps(self, key: str, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log metrics by step to the run under ``key``; steps that it has already are left out, so none stands there twice."""
        entry = self._index[key]
        now = int(time.time() * 1000)
        fresh = [(step, values) for step, values in rows if step > entry["step"]]
        metrics = [Metric(name, value, now, step) for step, values in fresh for name, value in values.items()]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(entry["run_id"], metrics=metrics[start : start + BATCH])
        if fresh:
            entry["step"] = max(step for step, _ in fresh)
            self._save()

    @_writing()
    def log_metrics(self, key: str, values: Mapping[str, float]) -> None:
        """Set final metrics of the run under ``key``; logging them again leaves the same last value."""
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._index[key]["run_id"], metrics=[Metric(name, value, now, 0) for name, value in values.items()]
        )

    @_writing()
    def log_file(self, key: str, path: Path, folder: str | None = None) -> None:
        """Copy a file to the artifacts of the run under ``key``."""
        self._client.log_artifact(self._index[key]["run_id"], str(path), folder)

    @_writing()
    def log_figure(self, key: str, figure: Any, name: str) -> None:
        """Keep a matplotlib figure with the run under ``key`` as ``name`` (a .png)."""
        self._client.log_figure(self._index[key]["run_id"], figure, name)

    def check_model_name(self, name: str) -> None:
        """``InputError`` if the registry has a model ``name`` that csm did not make."""
        found = self._client.search_registered_models(filter_string=f"name = '{name}'")
        if found and MODEL_TAG not in found[0].tags:
            raise InputError(
                f"register.name: {name!r} is taken in the registry by a model that csm did not make; "
                f"choose another, for example --set register.name={name}-2, or --set register.enabled=false"
            )

    @_writing()
    def register_model(self, key: str, folder: Path, name: str, description: str, tags: Mapping[str, str]) -> None:
        """Copy the MLflow model in ``folder`` to ``model/`` of the run under ``key``, and make a version of it, but not twice."""
        self.check_model_name(name)
        run_id = self.run_id(key)
        versions = self._client.search_model_versions(f"name = '{name}'")
        for known in versions:
            if known.run_id == run_id and dict(tags).items() <= known.tags.items():
                return
        self._client.log_artifacts(run_id, str(folder), "model")
        if not versions and not self._client.search_registered_models(filter_string=f"name = '{name}'"):
            self._client.create_registered_model(name, tags={MODEL_TAG: "true"}, description="Finished models of csm")
        self._client.create_model_version(
            name, f"runs:/{run_id}/model", run_id, tags=dict(tags), description=description, await_creation_for=None
        )

    @_writing()
    def close_run(self, key: str, status: str = "FINISHED") -> None:
        """End the run under ``key`` as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self._index[key]["run_id"], status=status)
        self._index[key]["status"] = status
        self._save()

    def is_finished(self, key: str) -> bool:
        """Whether the run under ``key`` was once ended as FINISHED: all that it should hold is there."""
        return self._index.get(key, {}).get("status") == "FINISHED"

    def run_id(self, key: str) -> str:
        """MLflow's id of the run under ``key``."""
        return str(self._index[key]["run_id"])

    def _exists(self, run_id: str) -> bool:
        try:
            self._client.get_run(run_id)
        except MlflowException:
            return False
        return True

    def _save(self) -> None:
        storage.write_json(self._index_path, self._index)


def store_uri(workspace: Path) -> str:
    """Tracking URI of the workspace's store."""
    return f"sqlite:///{(workspace / 'mlflow.db').absolute()}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
