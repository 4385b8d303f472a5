"""Two commands on one cluster, of which one goes first: a node of two CPUs, which the workers of either take both."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from cluster.sharing import LOST_SECONDS
from flows.artifacts import Workspace
from flows.config import load_config
from flows.run import STAGES
from flows.stages import Context, run_stages
from tests.conftest import CSM, Processes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# The steps make a shard take about half a second. The first command has enough of them to outlast the start of the other.
CONFIG = {
    "data": {"source": "digits"},
    "generator": {"kind": "gaussians"},
    "plan": {"pairs": [[0, 1], [2, 3]], "ratios": 3, "shard_rows": 6},
    "mix": {"sampler": {"steps": 1000}},
    "resources": {"mix": {"cpus": 1.0}},
}
SHARDS = {"low": 150, "high": 12}


class Mixing:
    """`csm mix` in ``folder``, started as often as it takes."""

    def __init__(self, folder: Path, *options: str) -> None:
        """Do all that comes before mixing, and keep ``options`` for then."""
        self.root, self.said, self.shards = folder / "workspace", folder / "said", SHARDS[folder.name]
        self.root.mkdir(parents=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump({**CONFIG, "plan": {**CONFIG["plan"], "sets_per_pair": self.shards}}))
        with Context(load_config(str(config), []), Workspace(self.root), STAGES) as context:
            run_stages(context, ("prepare", "generator", "plan"))
        self.command = [str(CSM), "mix", "--config", str(config), "--workspace", str(self.root), *options]
        self.process: Any = None

    def start(self) -> None:
        with self.said.open("a") as said:
            self.process = subprocess.Popen(self.command, stdout=said, stderr=said, start_new_session=True)

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


@pytest.fixture
def two(ray_address: str, processes: Processes, tmp_path: Path) -> Iterator[tuple[Mixing, Mixing]]:
    """A command of no priority and one of priority 1, with all done that comes before mixing."""
    made = (
        Mixing(tmp_path / "low", "--address", ray_address),
        Mixing(tmp_path / "high", "--address", ray_address, "--priority", "1"),
    )
    yield made
    for mixing in made:
        if mixing.process is not None and mixing.process.poll() is None:
            processes.kill([mixing.process.pid])


@pytest.mark.timeout(900)
def test_a_run_gives_way_goes_on_when_the_other_is_killed_and_gives_way_again(two: tuple[Mixing, Mixing]) -> None:
    low, high = two
    low.start()
    low.wait_until(lambda: low.made() >= 2)
    high.start()
    high.wait_until(lambda: high.made() >= 2)  # on CPUs that the other gave up
    high.process.kill()
    killed, before, kept = time.monotonic(), low.made(), high.made()
    assert before < low.shards
    assert kept < high.shards
    low.wait_until(lambda: "waiting: a run of priority 1 goes first" in low.said.read_text())
    low.wait_until(lambda: low.made() > before)
    waited = time.monotonic() - killed
    print(f"went on {waited:.1f} s after the other was killed")
    assert LOST_SECONDS / 2 < waited < LOST_SECONDS + 60.0  # the rest is its workers' start

    high.start()
    high.wait_until(lambda: high.made() > kept)
    before = low.made()
    high.finish()
    assert low.made() == before < low.shards
    low.finish()
    assert low.made() == low.shards  # of the other one, receipts of what was under way were lost with its driver
    assert low.said.read_text().count("mix: started") == 1
