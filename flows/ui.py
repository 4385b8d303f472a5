"""ui: MLflow's own pages, opened on views of csm's runs that are useful at once."""

import logging
import os
import re
import sys
from pathlib import Path

import mlflow.store.db.utils as store_utils
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from csm.errors import InputError
from flows.artifacts import Workspace
from flows.masking import masked
from flows.progress import say
from flows.tracking import store_uri
from flows.tracking_address import Address
from flows.ui_views import View, write_views


def serve(workspace: Path, host: str, port: int, tracking_uri: str, experiment: str) -> None:
    """Write the views into the store and print their addresses; a store that is no server is then served, by this very process.

    Args:
        workspace: whose store it is if ``tracking_uri`` is "".
        host, port: where to listen.
        tracking_uri: of a server (``http://...``), whose address is printed, or of a database.
        experiment: name of the MLflow experiment.

    Raises:
        InputError: there is no store yet, no such experiment, or the server does not answer.
    """
    asked = Address(tracking_uri, experiment)
    asked.check_workspace(workspace)
    if not tracking_uri and not (workspace / "mlflow.db").is_file():
        raise InputError(f"--workspace {workspace}: has no mlflow.db yet; run `csm run --workspace {workspace}` first")
    store = asked.uri or store_uri(workspace)
    number, views = prepare(store, experiment)
    address = re.sub("//[^/@]*@", "//", store).rstrip("/") if asked.is_server else f"http://{host}:{port}"
    say(f"MLflow on {address}" + ("" if asked.is_server else "  (Ctrl-C stops it)"))
    for view in views:
        say(f"  {view.name}: {view_address(address, number, view)}")
    if not asked.is_server:
        _replace_by_server(store, workspace, host, port)


def prepare(store: str, experiment: str) -> tuple[str, list[View]]:
    """Write the views of ``experiment`` into ``store``; return the experiment's number and the views."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # or a server that is down is asked for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    store_utils.MAX_RETRY_COUNT = 1  # the same for a database
    try:
        client = MlflowClient(store)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise InputError(
                f"--experiment {experiment}: there is no such experiment yet; run `csm run --experiment {experiment}` first"
            )
        return str(found.experiment_id), write_views(client, found)
    except (MlflowException, SQLAlchemyError, ModuleNotFoundError) as error:
        text = masked(" ".join(str(error).split()))
        reason = "it cannot be reached" if "Max retries" in text or "Connection refused" in text else text[:160]
        raise InputError(
            f"--tracking-uri: no MLflow store answers there ({reason}); start the server or correct the address"
        ) from None


def view_address(server: str, experiment: str, view: View) -> str:
    """Where a browser finds the view. Without the workflow MLflow opens its pages for language models."""
    return f"{server}/#/experiments/{experiment}/runs?{'&'.join([WORKFLOW, f'viewStateShareKey={view.key}', CHARTS])}"


WORKFLOW = "workflowType=machine_learning"
CHARTS = "compareRunsMode=CHART"


def _replace_by_server(store: str, workspace: Path, host: str, port: int) -> None:
    arguments = [
        "--backend-store-uri",
        store,
        "--default-artifact-root",
        (Workspace(workspace).own / "mlartifacts").absolute().as_uri(),
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",  # one person looks at one workspace
        "--uvicorn-opts",
        "--log-level warning",
    ]
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # its job workers serve none of what csm keeps
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # the server is told its store by name
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *arguments])


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
