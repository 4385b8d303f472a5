"""The project's ``ray_cluster.yaml``, filled in for isolated hosts and brought up as a user would do it: from ``ctl``, with ``ray up``."""

import json
import shlex
import time
from pathlib import Path

import yaml

from tests.hosts.machines import CODE, CTL, Hosts

# Alive nodes: address -> id, as receipts have it.
NODES = """
import json, ray
ray.init("auto", log_to_driver=False, logging_level="ERROR")
print(json.dumps({node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}))
"""


class Launched:
    """A Ray cluster on ``hosts``: the first is the head, the others are workers.

    Attributes:
        file: the cluster's file as a user has it who filled in addresses and key; readable on ``ctl``.
        timings: seconds of what was done to bring it up.
    """

    def __init__(self, hosts: Hosts, name: str = "csm-test") -> None:
        self.hosts = hosts
        self.head, *self.workers = hosts.names
        self.file = fill_in(hosts, name)
        self.timings: dict[str, float] = {}

    @property
    def jobs(self) -> str:
        """Address of the Jobs API."""
        return f"http://{self.hosts.ip(self.head)}:8265"

    def repair(self) -> None:
        """Plug in and switch on what is not, free disks, and bring Ray up again if a node is missing."""
        for name in self.hosts.names:
            if not self.hosts.is_up(name):
                self.hosts.start(name)
            self.hosts.mend(name)
            self.hosts.free(name)
        nodes = self.nodes()
        if len(nodes) != len(self.hosts.names):
            # A head that is there stays as it is: it starts Ray on lost workers by itself.
            self.up("" if not self.timings else "--no-restart" if nodes else "--restart-only")

    def up(self, options: str = "", timeout: float = 300.0) -> None:
        """``ray up``, and wait for all workers. Also mends a cluster of which something was lost: without setting hosts up
        again with ``--restart-only``, and if the head is there, without starting Ray again on it with ``--no-restart``."""
        started = time.monotonic()
        self.hosts.run(CTL, "test -e ~/.ray/auth_token || ray get-auth-token --generate")
        self.hosts.run(CTL, f"cd {CODE} && ray up -y --no-config-cache {options} {self.file}", timeout)
        self.timings["ray up"] = time.monotonic() - started
        self.wait_for(len(self.hosts.names), timeout)
        self.timings["all workers joined"] = time.monotonic() - started

    def nodes(self) -> dict[str, str]:
        """Address -> id of the nodes that the head takes for alive."""
        done = self.hosts.run(self.head, f"python -c {shlex.quote(NODES)}", timeout=60, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray may say something of its own
        return json.loads(found[-1]) if found and done.returncode == 0 else {}

    def wait_for(self, count: int, timeout: float) -> None:
        """Wait until the head counts ``count`` nodes, itself among them."""
        end = time.monotonic() + timeout
        while len(found := self.nodes()) != count:
            if time.monotonic() > end:
                raise RuntimeError(f"{len(found)} nodes instead of {count} after {timeout:.0f} s: {sorted(found)}")
            time.sleep(1)


def fill_in(hosts: Hosts, name: str) -> Path:
    """The project's cluster file with these hosts' addresses and key in it, and nothing else changed."""
    cluster = yaml.safe_load((CODE / "ray_cluster.yaml").read_text(encoding="utf-8"))
    head, *workers = (hosts.ip(host) for host in hosts.names)
    cluster["cluster_name"] = name
    cluster["provider"].update(head_ip=head, worker_ips=workers)
    cluster["auth"].update(ssh_user="root", ssh_private_key="~/.ssh/id")
    path = hosts.shared / "ray_cluster.yaml"
    path.write_text(yaml.safe_dump(cluster), encoding="utf-8")
    return path
