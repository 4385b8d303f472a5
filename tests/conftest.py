"""What the tests of `cluster` and `flows` share: a tiny configuration, a finished workspace, one small Ray cluster."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.groups import Groups

# Small enough that starting processes is most of the time; two pairs, so that every pair has several shards.
TINY: dict[str, Any] = {
    "data": {"source": "digits"},
    "generator": {"block_channels": [8, 16], "steps": 3, "batch_size": 16},
    "plan": {"pairs": [[0, 1], [2, 3]], "ratios": 3, "sets_per_pair": 4, "shard_rows": 6},
    "mix": {"sampler": {"steps": 2}, "batch_size": 4},  # a batch ends inside a shard
    "annotate": {"members": 1, "annotator": "projection"},
    "train": {
        "seeds": 1,
        "compare": ["cross-entropy", "csm"],
        "methods": {"csm": {"mixed": {"annotator": "teacher"}}},
        "optimizer": {"epochs": 2},
    },
    "resources": {"mix": {"max_actors": 1}, "train": {"workers": 1}},
}
ROOT = Path(__file__).parents[1]
CSM = Path(sys.executable).with_name("csm")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups:
    """How ``pytest -n`` shares the tests out."""
    return Groups(config, log)


class Finished(NamedTuple):
    """A workspace in which `csm run` came to its end; tests only read it."""

    root: Path
    config: Path
    command: list[str]
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The last line of stdout."""
        return dict(json.loads(self.stdout.splitlines()[-1]))


class Processes:
    """Processes that a test started, by their ids."""

    @staticmethod
    def descendants(pid: int) -> list[int]:
        """Children of ``pid``, their children, ..."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    children.setdefault(parent, []).append(int(entry.name))
        found, ahead = [], [pid]
        while ahead:
            below = children.get(ahead.pop(), [])
            found += below
            ahead += below
        return found

    @staticmethod
    def name(pid: int) -> str:
        """Its command line or the title that it gave itself; "" for one that is gone."""
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""

    @staticmethod
    def runs(pid: int) -> bool:
        """Whether it is there and no zombie."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def kill(self, pids: list[int]) -> None:
        """SIGKILL to each."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def left(self, pids: list[int], seconds: float) -> list[str]:
        """Names of those that still run after at most ``seconds``."""
        end = time.monotonic() + seconds
        while (running := [pid for pid in pids if self.runs(pid)]) and time.monotonic() < end:
            time.sleep(0.2)
        return [self.name(pid) for pid in running]


@pytest.fixture(scope="session")
def processes() -> Processes:
    return Processes()


@pytest.fixture(scope="session")
def write_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``write_config(**sections)`` writes the tiny configuration, its sections updated one level deep, and gives the path."""

    def write(**sections: Any) -> Path:
        values = {key: {**TINY.get(key, {}), **sections.get(key, {})} for key in {**TINY, **sections}}
        path = tmp_path_factory.mktemp("config") / "tiny.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture(scope="session")
def tiny(write_config: Callable[..., Path]) -> Path:
    """The tiny configuration."""
    return write_config()


@pytest.fixture(scope="session")
def csm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``csm(*arguments)`` runs the installed console script in a folder of its own."""
    folder = tmp_path_factory.mktemp("cwd")

    def run(*arguments: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        command = [str(CSM), *map(str, arguments)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def finished(
    tiny: Path, csm: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """`csm run` on the tiny configuration, once for all tests that only read what it leaves."""
    root = tmp_path_factory.mktemp("finished") / "workspace"
    command = ["run", "--config", str(tiny), "--workspace", str(root), "--json"]
    done = csm(*command)
    assert done.returncode == 0, done.stderr
    return Finished(root, tiny, command, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def ray_head() -> Iterator[Any]:
    """One small real Ray cluster on this machine: the node of its head, which all tests share."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    yield cluster.head_node
    cluster.shutdown()


@pytest.fixture(scope="session")
def ray_address(ray_head: Any) -> str:
    """Its address for ``--address``."""
    return str(ray_head.gcs_address)


@pytest.fixture(scope="module")
def ray_session(ray_address: str) -> Iterator[None]:
    """This process joined to it, for the tests of a module."""
    from cluster.session import session

    with session(ray_address):
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Workers of one CPU use one thread; sums over several threads round differently."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, tuple[int, int]]]:
    """``snapshot(folder)`` gives size and time of every file: equal snapshots, nothing was written (but the lock)."""

    def take(folder: Path) -> dict[str, tuple[int, int]]:
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    return take


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 of the tests' own, which this process and those that it starts use."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield address
    server.stop()


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new, empty bucket; copies of what lies there go below ``tmp_path``."""
    from csm.locations import location, store

    monkeypatch.setenv("CSM_CACHE", str(tmp_path / "cache"))
    root = location(f"s3://{uuid.uuid4().hex}/w")
    store(root).mkdir(str(root.parent))
    return root
