"""A cluster of several raylets on this machine, of which a test loses some."""

from typing import Any

from ray.cluster_utils import Cluster

from tests.conftest import Processes

STORE = {"object_store_memory": 100 * 2**20}  # of each node
# The head hears of a dead node within seconds, and takes none for dead that is only slow: this machine may be busy.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 20_000,
    "health_check_failure_threshold": 3,
}


def start_head(cpus: int = 0) -> Cluster:
    """A cluster that is its head alone."""
    head = {"num_cpus": cpus, "include_dashboard": False, "_system_config": HEALTH, **STORE}
    return Cluster(initialize_head=True, head_node_args=head)


def lose_with_workers(cluster: Cluster, node: Any, processes: Processes) -> None:
    """Kill ``node`` and, first, its workers: they live on for a moment without their raylet, and would finish what they are at."""
    processes.kill(processes.descendants(node.all_processes["raylet"][0].process.pid))
    cluster.remove_node(node, allow_graceful=False)
