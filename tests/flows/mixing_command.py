"""`csm mix` as a process of its own, on a small plan whose shards take half a second."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from flows.artifacts import Workspace
from flows.config import load_config
from flows.reuse import run_stages
from flows.run import STAGES
from flows.stages import Context
from tests.conftest import CSM

# The steps make a shard take about half a second.
CONFIG = {
    "data": {"source": "digits"},
    "generator": {"kind": "gaussians"},
    "plan": {"pairs": [[0, 1], [2, 3]], "ratios": 3, "shard_rows": 6},
    "mix": {"sampler": {"steps": 1000}},
    "resources": {"mix": {"cpus": 1.0}},
}


class Mixing:
    """`csm mix` in ``folder``, started as often as it takes."""

    def __init__(self, folder: Path, shards: int, *options: str) -> None:
        """Do all that comes before mixing of ``shards`` shards, and keep ``options`` for then."""
        self.root, self.said, self.shards = folder / "workspace", folder / "said", shards
        self.root.mkdir(parents=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump({**CONFIG, "plan": {**CONFIG["plan"], "sets_per_pair": self.shards}}))
        with Context(load_config(str(config), []), Workspace(self.root), STAGES) as context:
            run_stages(context, ("prepare", "generator", "plan"))
        self.arguments = ["mix", "--config", str(config), "--workspace", str(self.root), *options]
        self.process: Any = None

    def start(self, *command: str) -> None:
        """Start it; ``command`` stands in place of `csm`."""
        with self.said.open("a") as said:
            words = [*(command or [str(CSM)]), *self.arguments]
            self.process = subprocess.Popen(words, stdout=said, stderr=said, start_new_session=True)

    def made(self) -> int:
        """Shards that its driver heard of as mixed."""
        path = self.root / "receipts.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def wait_until(self, happened: Callable[[], bool], seconds: float = 300.0) -> None:
        """While it runs."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.1)

    def finish(self) -> None:
        assert self.process.wait(300) == 0, self.said.read_text()
        plan = pl.read_parquet(self.root / "plan.parquet")
        parts = sorted((self.root / "mixed").glob("part-*"))
        assert len(parts) == plan["shard"].n_unique() == self.shards
        assert pl.concat([pl.read_parquet(part) for part in parts])["mix_id"].to_list() == plan["mix_id"].to_list()
