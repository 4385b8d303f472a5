"""`csm doctor --address` against a cluster of several nodes, with tokens, as the shipped files make it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# In a process of its own: whether tokens are asked for is settled once in each. A line on stdin adds that many nodes.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
store = {"object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
print(cluster.address, flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        cluster.add_node(num_cpus=2, **store)
    cluster.wait_for_nodes()
    print("joined", flush=True)
cluster.shutdown()
"""


@pytest.fixture
def cluster(monkeypatch):
    """(address, ``add(count)``): a head that computes nothing, and how workers join it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root)
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=dict(os.environ)
    ) as process:

        def add(count):
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "joined\n"

        yield process.stdout.readline().strip(), add
        process.stdin.close()


def test_a_sound_cluster_has_no_problem(cluster, csm, tmp_path):
    address, add = cluster
    command = ("doctor", "--address", address, "--workspace", tmp_path / "w", "--json")
    early = csm(*command)
    assert early.returncode == 1, early.stderr
    (problem,) = json.loads(early.stdout.splitlines()[-1])["problems"]
    assert problem.startswith("no node has a CPU to work with: the workers have not joined")
    add(2)
    done = csm(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    findings = json.loads(done.stdout.splitlines()[-1])
    assert findings["problems"] == []
    assert (findings["ray"]["nodes"], findings["ray"]["cpus"], findings["ray"]["gpus"]) == (3, 4, 0)
    assert sorted(node["cpus"] for node in findings["ray"]["each"]) == [0, 2, 2]
    for node in findings["ray"]["each"]:
        assert [node["error"], node["storage"], node["tracking"], node["cuda"], node["auth"]] == ["", "", "", "", "token"]
        assert node["versions"]["torch"] == findings["packages"]["torch"]
        assert node["seconds"] < 60
    assert list(tmp_path.iterdir()) == []
