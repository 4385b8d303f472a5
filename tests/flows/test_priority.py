"""Two commands on one cluster, of which one goes first: a node of two CPUs, which the workers of either take both."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.sharing import LOST_SECONDS
from tests.conftest import Processes
from tests.flows.mixing_command import Mixing

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def two(ray_address: str, processes: Processes, tmp_path: Path) -> Iterator[tuple[Mixing, Mixing]]:
    """A command of no priority and one of priority 1, with all done that comes before mixing."""
    made = (
        Mixing(tmp_path / "low", 150, "--address", ray_address),  # enough to outlast the start of the other
        Mixing(tmp_path / "high", 12, "--address", ray_address, "--priority", "1"),
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
