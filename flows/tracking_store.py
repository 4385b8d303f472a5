"""The MLflow side of tracking: one record of the spool after the other becomes calls that may be made twice without harm."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunStatus, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from csm import storage
from csm.errors import InputError
from csm.locations import is_remote
from flows.tracking_address import Address
from flows.tracking_answers import AwayError, RefusedError, answers, raise_disk, short
from flows.tracking_spool import Record, Spool, folder_digest

BATCH = 1000  # MLflow takes at most this many metrics a call
PARAMS = 100  # and this many parameters
MADE_BY = "csm.made_by"  # tag of the registered models that may be given further versions


class Store:
    """One experiment of a tracking store; run ids are kept in ``NAME.json`` of ``workspace``, which may be on a store, by key.

    An entry is {run_id, opened: in ms, steps: [[first, last], ...] of ``steps`` records, status: as last closed}.
    """

    def __init__(self, workspace: Path, address: Address) -> None:
        self.address = address
        self._workspace = workspace
        self._path = workspace / f"{address.name}.json"
        self.index: dict[str, dict[str, Any]] = storage.read_json(self._path) if self._path.is_file() else {}
        self._client: MlflowClient | None = None
        self._experiment = self._id = ""

    @property
    def is_remote(self) -> bool:
        """Whether ``save`` goes to a store of files, which takes a while."""
        return is_remote(self._path)

    def save(self) -> None:
        """Write the index, which a command that goes on finds its runs by."""
        storage.write_json(self._path, self.index)

    def connect(self) -> None:
        """Find or make the experiment; the tables, if the store is a new database.

        Raises:
            InputError: the file of the store is no database of MLflow's, or the experiment was deleted there.
            OSError: its disk takes no more.
            AwayError: it does not answer.
        """
        if self._client is not None:
            return
        uri = self.address.uri or store_uri(self._workspace)
        try:
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(self.address.experiment)
            if found is None:
                try:
                    self._experiment = client.create_experiment(
                        self.address.experiment,
                        artifact_location=self._artifacts(),
                        tags={"mlflow.experimentKind": "custom_model_development"},  # the UI then opens on runs, not on traces
                    )
                except MlflowException as error:
                    if not _says(error, RESOURCE_ALREADY_EXISTS):
                        raise
                    found = client.get_experiment_by_name(self.address.experiment)  # another command was faster
        except Exception as error:
            raise_disk(error)
            reason = short(error)
            if not self.address.is_local:
                raise AwayError(reason) from error
            file = uri.split("///", 1)[1]
            raise InputError(
                f"{file} is not a usable MLflow store ({reason}): move it away and run again, tracking starts anew"
            ) from None
        if found is not None:
            if found.lifecycle_stage != "active":
                reason = f"experiment {self.address.experiment} was deleted there; restore it, or give another --experiment"
                raise InputError(f"{self.address}: {reason}") if self.address.is_local else AwayError(reason)
            self._experiment = found.experiment_id
        self._client = client

    def send(self, record: Record, spool: Spool) -> None:
        """Do what ``record`` says; doing it again changes nothing.

        Raises:
            AwayError, RefusedError: it was not done, now or ever.
            OSError: the disk takes no more.
        """
        self.connect()
        action = self._actions().get(record.get("do", ""))
        if action is None:
            raise RefusedError("a damaged line")
        with answers(self.address):
            action(record, spool)

    def check_model(self, name: str) -> None:
        """``InputError`` if there is a registered model ``name`` that csm did not make."""
        self.connect()
        try:
            with answers(self.address):
                self._check_model(name)
        except RefusedError as error:
            raise InputError(f"{self.address}: {error}") from None

    def _actions(self) -> Mapping[str, Any]:
        return {
            "open": self._open,
            "tags": self._tags,
            "steps": self._steps,
            "metrics": self._metrics,
            "file": self._file,
            "inputs": self._inputs,
            "model": self._model,
            "close": self._close,
        }

    def _open(self, record: Record, spool: Spool) -> None:
        known = self.index.get(record["key"])
        if known and self._is_active(known["run_id"]):
            self._api.update_run(known["run_id"], status=RunStatus.to_string(RunStatus.RUNNING))
            return
        tags = {**record["tags"], "csm.key": _quoted(record["key"]), "csm.workspace": self._workspace_id()}
        if record["parent"]:
            tags[MLFLOW_PARENT_RUN_ID] = self._run(record["parent"])
        run_id = self._find(tags) or self._create(record, tags)
        flat = [Param(name, value) for name, value in record["params"].items()]
        for start in range(0, len(flat), PARAMS):
            self._api.log_batch(run_id, params=flat[start : start + PARAMS])
        self.index[record["key"]] = {"run_id": run_id, "opened": record["time"], "steps": []}

    def _create(self, record: Record, tags: Mapping[str, str]) -> str:
        run = self._api.create_run(self._experiment, start_time=record["time"], run_name=record["name"], tags=dict(tags))
        return str(run.info.run_id)

    def _find(self, tags: Mapping[str, str]) -> str | None:
        """The run that was made for this key before a kill, or whose index is lost."""
        wanted = " and ".join(f"tags.`{name}` = '{tags[name]}'" for name in ("csm.key", "csm.workspace"))
        found = self._api.search_runs([self._experiment], wanted, ViewType.ACTIVE_ONLY, max_results=1)
        return str(found[0].info.run_id) if found else None

    def _tags(self, record: Record, spool: Spool) -> None:
        tags = [RunTag(name, value) for name, value in record["tags"].items()]
        self._api.log_batch(self._run(record["key"]), tags=tags)

    def _steps(self, record: Record, spool: Spool) -> None:
        """Steps that the run has are left out: work that goes on tells some again, at another time."""
        run_id = self._run(record["key"])
        entry = self.index[record["key"]]
        taken = entry.get("steps") or [[0, entry.get("step", -1)]]  # one mark: as csm kept it before there was a spool
        rows = [(step, values) for step, values in record["rows"] if not any(first <= step <= last for first, last in taken)]
        self._log(run_id, [Metric(name, value, record["time"], step) for step, values in rows for name, value in values.items()])
        entry["steps"] = ranges([*taken, *([step, step] for step, _ in rows)])

    def _metrics(self, record: Record, spool: Spool) -> None:
        self._log(self._run(record["key"]), [Metric(*metric) for metric in record["metrics"]])

    def _log(self, run_id: str, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), BATCH):
            self._api.log_batch(run_id, metrics=metrics[start : start + BATCH])

    def _file(self, record: Record, spool: Spool) -> None:
        path = spool.file(record["file"])
        run_id = self._run(record["key"])
        if path.exists():  # else it was sent before a kill
            self._api.log_artifact(run_id, str(path), record["folder"])
            path.unlink()

    def _inputs(self, record: Record, spool: Spool) -> None:
        inputs = [
            DatasetInput(Dataset(**value["dataset"]), [InputTag(MLFLOW_DATASET_CONTEXT, value["context"])])
            for value in record["inputs"]
        ]
        self._api.log_inputs(self._run(record["key"]), inputs)

    def _model(self, record: Record, spool: Spool) -> None:
        """A version of a registered model, made once for each content; no version's files are ever replaced."""
        folder, name = spool.file(record["file"]), record["name"]
        run_id = self._run(record["key"])
        if not folder.is_dir():
            return
        is_new = self._check_model(name)
        digest = folder_digest(folder, without="MLmodel")  # which holds the time
        versions = [] if is_new else self._api.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        if any(version.tags.get("csm.digest") == digest for version in versions):
            return
        place = f"model-{digest}" if versions else "model"
        self._api.log_artifacts(run_id, str(folder), place)
        if is_new:
            try:
                self._api.create_registered_model(name, tags={MADE_BY: "csm"}, description=record["description"])
            except MlflowException as error:
                if not _says(error, RESOURCE_ALREADY_EXISTS):
                    raise
                self._check_model(name)  # another command was faster
        tags = {**record["tags"], "csm.digest": digest}
        source = f"{self._api.get_run(run_id).info.artifact_uri}/{place}"
        self._api.create_model_version(name, source, run_id, tags=tags, description=record["description"], await_creation_for=60)

    def _check_model(self, name: str) -> bool:
        """Whether there is no registered model ``name`` yet; ``RefusedError`` if there is one of somebody else's."""
        try:
            model = self._api.get_registered_model(name)
        except MlflowException as error:
            if _says(error, RESOURCE_DOES_NOT_EXIST):
                return True
            raise
        if MADE_BY not in model.tags:
            raise RefusedError(f"there is a registered model {name} that csm did not make; choose another name")
        return False

    def _close(self, record: Record, spool: Spool) -> None:
        self._api.set_terminated(self._run(record["key"]), record["status"], record["time"])
        self.index[record["key"]]["status"] = record["status"]

    def _run(self, key: str) -> str:
        if key not in self.index:
            raise RefusedError(f"it belongs to run {key}, which is not there")
        return str(self.index[key]["run_id"])

    def _is_active(self, run_id: str) -> bool:
        try:
            return bool(self._api.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if _says(error, RESOURCE_DOES_NOT_EXIST):
                return False
            raise

    @property
    def _api(self) -> MlflowClient:
        assert self._client is not None
        return self._client

    def _artifacts(self) -> str | None:
        """Where artifacts go; None: a server knows it. Beside a database file of all, else into the workspace."""
        if self.address.is_server:
            return None
        if self.address.is_sqlite:
            return (Path(self.address.uri.split("///", 1)[1]).absolute().parent / "mlartifacts").as_uri()
        return (self._workspace / "mlartifacts").absolute().as_uri()

    def _workspace_id(self) -> str:
        """Tells the runs of this workspace from those of others that track the same work in the same store."""
        path = self._workspace / "tracking.id"
        if not self._id and not path.is_file():
            storage.write_text(path, uuid.uuid4().hex + "\n")
        self._id = self._id or path.read_text().strip()
        return self._id


def store_uri(workspace: Path) -> str:
    """Tracking URI of the workspace's store."""
    return f"sqlite:///{(workspace / 'mlflow.db').absolute()}"


def ranges(pairs: Sequence[Sequence[int]]) -> list[list[int]]:
    """[first, last] ranges of whole numbers, sorted, those that touch made one."""
    merged: list[list[int]] = []
    for first, last in sorted(pairs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(last, merged[-1][1])
        elif first <= last:
            merged.append([first, last])
    return merged


def _says(error: MlflowException, code: int) -> bool:
    return bool(error.error_code == ErrorCode.Name(code))


def _quoted(key: str) -> str:
    """``key`` as it may stand between quotes in a search."""
    return key.replace("'", "").replace("`", "")
