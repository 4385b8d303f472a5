"""Tracking in MLflow: one parent run for each configuration, one child run for each stage and each classifier.

Everything is written to a spool (``flows/tracking_spool.py``) in the workspace, or on this machine if that is on a store of files, from
which a thread of the driver (``flows/tracking_sender.py``) sends it to MLflow's store (``flows/tracking_store.py``): one that is down or
slow neither stops nor delays the work, and what a command could not send, the next one sends. Runs are named by a key that is equal when
the work is, so work that goes on after an interruption goes on in its run, and work that is not done again makes no run.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric_name, _validate_model_name, _validate_param_name, _validate_tag_name

from csm.errors import InputError
from flows.artifacts import Workspace
from flows.masking import masked
from flows.tracking_address import OWN, Address
from flows.tracking_answers import short
from flows.tracking_inputs import origin_tags
from flows.tracking_sender import PATIENCE, Sender
from flows.tracking_spool import Spool
from flows.tracking_store import Store, store_uri
from flows.tracking_system import SystemMetrics, wanted

PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000
__all__ = ["PARAM_CHARACTERS", "Tracker", "flatten", "store_uri"]


class Tracker:
    """Writes the runs of one workspace to a store, from the driver's process.

    Raises:
        InputError: the store is a file that is no MLflow database; said by the call after the one that met it, too.
        OSError: the disk of the workspace takes no more.
    """

    def __init__(self, workspace: Path, address: Address = OWN, command: str = "") -> None:
        _prepare(address)
        self._origin = origin_tags(command)
        self._store = Store(workspace, address)
        if address.is_local:
            self._store.connect()
        spool = Spool(Workspace(workspace).own, address.name)
        self._status: dict[str, str] = {}  # status of runs by key, which the store may not know yet
        self._opened: dict[str, int] = {}  # when runs were opened, in ms
        for record in spool.records():
            if record.get("do") == "open":
                self._opened.setdefault(record["key"], record["time"])
            if record.get("do") == "close":
                self._status[record["key"]] = record["status"]
        self._time = 0
        self._system: tuple[str, SystemMetrics] | None = None  # of the run under that key
        self._sender = Sender(spool, self._store, address)

    def open_run(self, key: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any], parent: str | None = None) -> str:
        """Open the run under ``key``, made if there is none, as a child of the run under key ``parent``; its status becomes running.

        Returns ``key``.
        """
        if parent is not None:
            self._require(parent)
        flat = {name_: masked(str(value))[:PARAM_CHARACTERS] for name_, value in flatten(params).items()}
        for param in flat:
            _validate_param_name(param)
        record = {"do": "open", "key": key, "name": name, "tags": {**self._origin, **_tags(tags)}, "params": flat}
        now = self._now()
        self._sender.append({**record, "parent": parent, "time": now})
        self._opened.setdefault(key, now)
        return key

    def set_tags(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of the run under ``key``."""
        self._require(key)
        self._sender.append({"do": "tags", "key": key, "tags": _tags(tags)})

    def log_steps(self, key: str, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log metrics by step to the run under ``key``; steps that it has already are left out, so none stands there twice."""
        self._require(key)
        for name in {name for _, values in rows for name in values}:
            _validate_metric_name(name)
        if rows:
            plain = [[int(step), {name: float(value) for name, value in values.items()}] for step, values in rows]
            self._sender.append({"do": "steps", "key": key, "rows": plain, "time": self._now()})

    def log_metrics(self, key: str, values: Mapping[str, float], step: int = 0) -> None:
        """Set final metrics of the run under ``key``; logging them again leaves the last value."""
        self._require(key)
        now = self._now()
        for name in values:
            _validate_metric_name(name)
        metrics = [[name, float(value), now, step] for name, value in values.items()]
        self._sender.append({"do": "metrics", "key": key, "metrics": metrics})

    def log_file(self, key: str, path: Path, folder: str | None = None) -> None:
        """Copy a file, as it is now, to the artifacts of the run under ``key``."""
        self._require(key)
        self._sender.append({"do": "file", "key": key, "folder": folder}, path)

    def log_figure(self, key: str, figure: Any, name: str) -> None:
        """Keep a matplotlib figure with the run under ``key`` as ``name`` (a .png)."""
        self._require(key)
        with self._sender.change:
            path = self._sender.spool.room(name)
            figure.savefig(path)
            self._sender.append({"do": "file", "key": key, "folder": None, "file": f"{path.parent.name}/{name}"})

    def log_inputs(self, key: str, inputs: Sequence[Mapping[str, Any]]) -> None:
        """Name the data sets that the run under ``key`` was made from: see ``flows/tracking_inputs.py``."""
        self._require(key)
        self._sender.append({"do": "inputs", "key": key, "inputs": list(inputs)})

    def check_model_name(self, name: str) -> None:
        """``InputError`` if a model cannot be registered as ``name``; a store that does not answer now is asked when it is sent."""
        try:
            _validate_model_name(name)
        except MlflowException as error:
            raise InputError(f"registered model {name!r}: {error.message}; choose another name") from None
        if "'" in name:
            raise InputError(f"registered model {name!r}: no quotes; choose another name")
        found: list[InputError] = []

        def ask() -> None:
            try:
                self._store.check_model(name)
            except InputError as error:
                found.append(error)
            except Exception as error:
                logging.getLogger(__name__).debug("registered model %s could not be looked up: %s", name, short(error))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if found:
            raise found[0]

    def register_model(self, key: str, folder: Path, name: str, description: str, tags: Mapping[str, str]) -> None:
        """Copy an MLflow model to the artifacts of the run under ``key`` and make it a version of the registered model ``name``.

        The same content makes no second version. A registered model that csm did not make is left alone, and that is said.
        """
        self._require(key)
        self.check_model_name(name)
        self._sender.append({"do": "model", "key": key, "name": name, "description": description, "tags": _tags(tags)}, folder)

    def watch(self, key: str) -> None:
        """Log how busy this machine is to the run under ``key``, until it is closed; steps are seconds since it was first opened."""
        if not wanted() or self._system is not None:
            return
        began = self._store.index.get(key, {}).get("opened", self._opened[key])

        def log(values: Mapping[str, float]) -> None:
            if self._sender.error is None:
                self.log_metrics(key, values, round((self._now() - began) / 1000))

        self._system = (key, SystemMetrics(log))

    def close_run(self, key: str, status: str = "FINISHED") -> None:
        """End the run under ``key`` as FINISHED, FAILED or KILLED."""
        self._require(key)
        if self._system is not None and self._system[0] == key:
            self._system[1].stop()
            self._system = None
        self._sender.append({"do": "close", "key": key, "status": status, "time": self._now()})
        self._status[key] = status

    def is_finished(self, key: str) -> bool:
        """Whether the run under ``key`` was once ended as FINISHED: all that it should hold is there, or waits to be sent."""
        return self._status.get(key, self._store.index.get(key, {}).get("status")) == "FINISHED"

    def run_id(self, key: str) -> str | None:
        """MLflow's id of the run under ``key``, once all is sent; None if the store does not answer."""
        self._require(key)
        self.flush()
        found = self._store.index.get(key)
        return str(found["run_id"]) if found else None

    def flush(self) -> bool:
        """Wait until all is sent, at most a few seconds if the store is not this machine's; whether it is.

        Raises:
            InputError, OSError: the store is damaged, or the disk takes no more.
        """
        return self._sender.flush()

    def close(self) -> None:
        """Stop watching, send what can be sent, and say what waits."""
        if self._system is not None:
            self._system[1].stop()
        self._sender.close()

    def _now(self) -> int:
        """Milliseconds since 1970, never the same twice: of two values at one time MLflow takes the greater for the last."""
        with self._sender.change:
            self._time = max(int(time.time() * 1000), self._time + 1)
            return self._time

    def _require(self, key: str) -> None:
        if key not in self._opened and key not in self._store.index:
            raise KeyError(key)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    for name in tags:
        _validate_tag_name(name)
    return {name: masked(str(value))[:TAG_CHARACTERS] for name, value in tags.items()}


def _prepare(address: Address) -> None:
    """Keep MLflow quiet, and let it give up soon: whoever waits and tries again is the sender."""
    for name, level in (("mlflow", logging.ERROR), ("alembic", logging.ERROR), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    for name in ("mlflow.store.db.utils", "sqlalchemy.pool"):  # they log what they raise, with the traceback; Ctrl-C too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if address.is_server:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
