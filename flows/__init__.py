"""What a user runs: the command line, configurations, workspaces, tracking and the report."""

import os

# MLflow would tell its makers of every call, from a thread that changes the environment while others read it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
