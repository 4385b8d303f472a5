"""A command whose cluster loses the only node with room for its workers: it says what it waits for, and can be ended or ends."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Processes
from tests.flows.mixing_command import Mixing
from tests.nodes import STORE, lose_with_workers, start_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]

IMPATIENT = "from cluster import standing; standing.PATIENCE_SECONDS = 10.0; from flows.cli import main; main()"


class Nodes:
    """A head that computes nothing, and at most one node of one CPU."""

    def __init__(self, processes: Processes) -> None:
        self.cluster = start_head()
        self._processes = processes

    def add(self) -> None:
        self._node = self.cluster.add_node(num_cpus=1, **STORE)
        self.cluster.wait_for_nodes()

    def lose(self) -> None:
        lose_with_workers(self.cluster, self._node, self._processes)


@pytest.fixture
def nodes(processes: Processes) -> Iterator[Nodes]:
    made = Nodes(processes)
    yield made
    made.cluster.shutdown()


@pytest.fixture
def mixing(nodes: Nodes, processes: Processes, tmp_path: Path) -> Iterator[Mixing]:
    made = Mixing(tmp_path / "mixing", 40, "--address", nodes.cluster.address)
    yield made
    if made.process is not None and made.process.poll() is None:
        processes.kill([made.process.pid])


def lose_in_the_middle(nodes: Nodes, mixing: Mixing, *command: str) -> Callable[[], str]:
    """Start ``mixing``, lose the node when it has made something new, and return what gives all that it has said since then."""
    said, made = len(mixing.said.read_text()) if mixing.said.is_file() else 0, mixing.made()
    nodes.add()
    mixing.start(*command)
    mixing.wait_until(lambda: mixing.made() >= made + 3)
    nodes.lose()
    return lambda: mixing.said.read_text()[said:]


@pytest.mark.timeout(900)
def test_it_waits_until_it_is_interrupted_or_has_waited_long_enough_and_goes_on(nodes: Nodes, mixing: Mixing) -> None:
    said = lose_in_the_middle(nodes, mixing)
    mixing.wait_until(lambda: "waiting: " in said())
    assert "have no room for mix (1 CPU, 0 GPU)" in said()
    mixing.process.send_signal(signal.SIGINT)
    assert mixing.process.wait(60) == 130, said()

    said = lose_in_the_middle(nodes, mixing, sys.executable, "-c", IMPATIENT)
    assert mixing.process.wait(120) == 1, said()
    last = said().splitlines()[-1]
    assert last.startswith("csm: failed: RuntimeError: nodes were lost, ")
    assert "add nodes, then run the same command again to go on" in last

    nodes.add()
    kept = mixing.made()
    mixing.start()
    mixing.finish()
    assert mixing.made() > kept  # a receipt may be lost with a command that was interrupted, never a part
