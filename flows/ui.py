"""ui: MLflow's own pages on the workspace's store."""

import os
import sys
from pathlib import Path

from csm.errors import InputError
from flows.progress import say
from flows.tracking import store_uri


def serve(workspace: Path, host: str, port: int) -> None:
    """Replace this process by `mlflow server` on the workspace's store; ``InputError`` if there is none yet."""
    if not (workspace / "mlflow.db").is_file():
        raise InputError(f"--workspace {workspace}: has no mlflow.db yet; run `csm run --workspace {workspace}` first")
    say(f"MLflow on http://{host}:{port}  (Ctrl-C stops it)")
    artifacts = (workspace / "mlartifacts").absolute().as_uri()
    arguments = [
        "--backend-store-uri",
        store_uri(workspace),
        "--default-artifact-root",
        artifacts,
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
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *arguments])
