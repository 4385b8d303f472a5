"""How busy the driver's machine is: MLflow's own collectors, under the names that its page of system metrics shows."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING, MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

from csm.errors import InputError

SECONDS = 10.0  # between two samples, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise


class SystemMetrics:
    """Calls ``log`` with a sample of {system/NAME: value} now and then, in a thread of its own, until ``stop``."""

    def __init__(self, log: Callable[[Mapping[str, float]], None]) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor  # here: they need psutil, the rest of tracking does not
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._log = log
        self._seconds = float(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SECONDS)
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # whatever a machine without an NVIDIA driver says
            self._monitors.append(GPUMonitor())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        end = time.monotonic()
        while not self._stopped.wait(max(0.0, end + self._seconds - time.monotonic())):
            end = time.monotonic()
            with suppress(OSError, InputError):  # of the spool or the store: the driver meets it too, and says it
                self._log(self.sample())

    def sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": float(value) for name, value in values.items()}


def wanted() -> bool:
    """Whether samples are taken: unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING says no."""
    name = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.name
    return name not in os.environ or bool(MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get())
