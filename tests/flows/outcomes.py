"""What a command of the pipeline made and said."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

Run = Callable[..., subprocess.CompletedProcess[str]]
Copy = Callable[..., Path]
STAGES = [
    "prepare",
    "generator",
    "fit-teacher",
    "fit-annotators",
    "plan",
    "mix",
    "annotate",
    "train",
    "model",
    "evaluate",
    "report",
]


def mixed_rows(workspace: Path) -> pl.DataFrame:
    return pl.read_parquet(sorted((workspace / "mixed").glob("*.parquet"))).sort("mix_id")


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return dict(json.loads(done.stdout.splitlines()[-1]))
