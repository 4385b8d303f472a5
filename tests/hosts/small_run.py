"""A small pipeline in a workspace that all hosts see, started on the head, and what must be true of it when it has ended."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from cluster.shards import part_path, plan_shards, read_plan
from csm import tables
from csm.datasets import RealDataset
from csm.generators import load_generator
from csm.mixing import mix
from csm.sampling import SamplerConfig
from tests.hosts.launching import Launched
from tests.hosts.machines import Running

# Forty shards; one mixing worker on each host, so that both are at work. The steps are what makes a shard take a second.
STEPS = 1500
CONFIG: dict[str, Any] = {
    "name": "faults",
    "data": {"source": "digits"},
    "generator": {"kind": "gaussians"},
    "plan": {"pairs": [[0, 1], [2, 3]], "ratios": 3, "sets_per_pair": 40, "shard_rows": 6},
    "mix": {"sampler": {"steps": STEPS}},
    "annotate": {"annotator": "lda-pixels"},
    "train": {
        "seeds": 1,
        "compare": ["cross-entropy", "csm"],
        "methods": {"csm": {"mixed": {"annotator": "lda-pixels"}}},
        "optimizer": {"epochs": 2},
    },
    "resources": {"mix": {"cpus": 1.5}, "annotate": {"cpus": 0.4, "max_actors": 1}, "train": {"workers": 1}},
}


class SmallRun:
    """`csm` with one workspace, on the head of ``cluster``."""

    def __init__(self, cluster: Launched, workspace: Path) -> None:
        self.cluster, self.hosts, self.workspace = cluster, cluster.hosts, workspace
        self.config = cluster.hosts.shared / "faults.yaml"
        self.config.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")

    def options(self, *more: str) -> str:
        """Options of every verb."""
        return " ".join(["--config", str(self.config), "--workspace", str(self.workspace), "--address auto --json", *more])

    def begin(self, verb: str, *more: str) -> Running:
        """Start `csm VERB` on the head."""
        return self.hosts.begin(self.cluster.head, f"csm {verb} {self.options(*more)}")

    def finish(self, verb: str, *more: str, timeout: float = 600.0) -> dict[str, Any]:
        """Run `csm VERB` on the head to its end, which must be a good one; what ``--json`` prints."""
        done = self.hosts.run(self.cluster.head, f"csm {verb} {self.options(*more)}", timeout)
        return result(done.stdout)

    def mixed(self) -> list[dict[str, Any]]:
        """Receipts of mixed shards that the driver wrote down so far."""
        return [receipt for receipt in read_receipts(self.workspace) if receipt["part"] == "mixed"]

    def wait_for_mixed(self, count: int, running: Running, timeout: float = 600.0) -> float:
        """Wait until the driver has written ``count`` receipts of mixed shards, and return the seconds that it took."""
        started = time.monotonic()
        wait_for(lambda: len(self.mixed()) >= count, running, timeout)
        return time.monotonic() - started

    def parts(self) -> dict[str, int]:
        """Finished part files of mixed images, with the time when each was written."""
        return {path.name: path.stat().st_mtime_ns for path in (self.workspace / "mixed").glob("part-*")}

    def check(self, oracle: Path | None = None, steps: int = STEPS) -> None:
        """Every image of the plan is there, once, as are its annotations; they are those of ``oracle``, or of mixing without Ray."""
        plan = tables.read(self.workspace / "plan.parquet", tables.PLAN)
        shards = plan_shards(self.workspace / "plan.parquet")
        info = RealDataset.load_info(self.workspace)
        for folder, schema in (("mixed", tables.MIXED), ("annotations/lda-pixels", tables.annotations(info.n_classes))):
            made = pl.concat([tables.read(path, schema) for path in sorted((self.workspace / folder).glob("part-*"))])
            assert made["mix_id"].to_list() == plan.sort("shard", maintain_order=True)["mix_id"].to_list()
            assert made["mix_id"].n_unique() == len(plan)
            for shard in shards if oracle else ():
                parts = [part_path(root / folder, shard) for root in (self.workspace, oracle)]
                ours, theirs = (tables.read(path, schema) for path in parts)
                assert ours.equals(theirs)
        if oracle is None:
            generator = load_generator(self.workspace / "generator")
            rows = read_plan(self.workspace / "plan.parquet", 0)
            direct = mix(rows, generator, info.shape, SamplerConfig(steps=steps), 128)
            assert tables.read(part_path(self.workspace / "mixed", 0), tables.MIXED).equals(direct)

    def copy_unmixed(self, workspace: Path) -> "SmallRun":
        """A workspace of its own in which all is done that comes before mixing."""
        shutil.copytree(
            self.workspace,
            workspace,
            ignore=shutil.ignore_patterns(
                "mixed", "annotations", "receipts*", "runs", "model", "*metrics*", "mlflow*", "tracking*"
            ),
        )
        for stage in ("mix", "annotate", "train", "model", "evaluate", "report"):
            (workspace / "stages" / f"{stage}.json").unlink(missing_ok=True)
        return SmallRun(self.cluster, workspace)


def wait_for(happened: Callable[[], bool], running: Running, timeout: float = 600.0) -> None:
    """Wait until ``happened()``; ``running`` must not end before."""
    end = time.monotonic() + timeout
    while not happened():
        assert running.returncode is None, running.out.read_text()[-2000:] + running.err.read_text()[-4000:]
        assert time.monotonic() < end, f"not within {timeout:.0f} s: " + running.err.read_text()[-4000:]
        time.sleep(0.1)


def usual_seconds(whole: SmallRun) -> float:
    """What mixing takes while nothing fails."""
    return float(json.loads((whole.workspace / "stages" / "mix.json").read_text(encoding="utf-8"))["seconds"])


def read_receipts(workspace: Path) -> list[dict[str, Any]]:
    """Receipts that a driver wrote down so far."""
    path = workspace / "receipts.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def result(stdout: str) -> dict[str, Any]:
    """What ``--json`` printed, among what else a launcher prints."""
    return next(json.loads(line) for line in reversed(stdout.splitlines()) if line.startswith('{"'))


def hosts_of(cluster: Launched, receipts: list[dict[str, Any]]) -> Counter[str]:
    """How many of ``receipts`` each host made."""
    names = {cluster.hosts.ip(name): name for name in cluster.hosts.names}
    nodes = {node: names[address] for address, node in cluster.nodes().items()}
    return Counter(nodes.get(receipt["node"], "lost") for receipt in receipts)
