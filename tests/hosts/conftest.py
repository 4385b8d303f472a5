"""Isolated hosts with a Ray cluster on them, one for all tests, and the table of faults that they fill."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.hosts.launching import Launched
from tests.hosts.machines import CODE, Hosts
from tests.hosts.small_run import SmallRun

FAULTS = CODE / "build" / "faults.json"
_told = pytest.StashKey[list["Fault"]]()


@dataclass(frozen=True)
class Fault:
    """A row of the table of faults: what was done, what happened, and the seconds that it cost, with how these were measured."""

    fault: str
    happened: str
    seconds_lost: float
    measured: str


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A head, h1, and two workers, h2 and h3, of as many CPUs each as this machine has."""
    made = Hosts(tmp_path_factory.mktemp("hosts") / "hosts", 3)
    yield made
    made.down()


@pytest.fixture(scope="session")
def launched(hosts: Hosts) -> Launched:
    """``ray_cluster.yaml`` brought up on them."""
    cluster = Launched(hosts)
    cluster.repair()
    return cluster


@pytest.fixture
def cluster(launched: Launched) -> Launched:
    """The same, whole again whatever the test before did to it."""
    launched.repair()
    return launched


@pytest.fixture
def workspace(hosts: Hosts, request: pytest.FixtureRequest) -> Path:
    """A folder of the test's own on storage that all hosts see, at the same path here; not made yet."""
    return hosts.shared / request.node.name


@pytest.fixture(scope="session")
def whole(launched: Launched) -> SmallRun:
    """The small pipeline, run to its end while nothing fails."""
    run = SmallRun(launched, launched.hosts.shared / "whole")
    run.finish("run")
    run.check()
    return run


@pytest.fixture
def run(whole: SmallRun, cluster: Launched, workspace: Path) -> SmallRun:
    """The same, before anything is mixed."""
    return whole.copy_unmixed(workspace)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``tell(fault, happened, seconds_lost, measured)`` writes a row of the table of faults, ``build/faults.json``."""
    rows = request.config.stash.setdefault(_told, [])

    def write(fault: str, happened: str, seconds_lost: float, measured: str) -> None:
        rows.append(Fault(fault, happened, round(seconds_lost, 1), measured))
        FAULTS.parent.mkdir(exist_ok=True)
        FAULTS.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")

    return write


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for row in config.stash.get(_told, []):
        terminalreporter.write_line(f"{row.seconds_lost:6.1f} s lost  {row.fault}: {row.happened} ({row.measured})")
