"""Three small stages, one of each kind, and what runs them."""

from dataclasses import dataclass, field

import polars as pl

from csm.errors import InputError
from flows.artifacts import Workspace
from flows.config import load_config
from flows.reuse import run_stage
from flows.stages import Context, Made, Stage


class FakeTracker:
    """Remembers what a stage says of itself: key -> status."""

    def __init__(self):
        self.status, self.names, self.metrics = {}, {}, {}

    def open_run(self, key, name, tags, params, parent=None):
        self.status[key], self.names[key] = "RUNNING", name
        return key

    def run_id(self, key):
        return key

    def log_metrics(self, key, values):
        self.metrics[key] = values

    def close_run(self, key, status="FINISHED"):
        self.status[key] = status


@dataclass
class Pipeline:
    """source (costly) -> table -> end (incremental); ``ran`` counts, ``fail`` is raised by the named stage."""

    root: object
    ran: list = field(default_factory=list)
    fail: dict = field(default_factory=dict)
    tracker: FakeTracker = field(default_factory=FakeTracker)
    version: int = 1
    refuse: str = ""

    def context(self, *overrides, forced=()):
        stages = {
            "source": Stage(
                "source", 1, (), lambda config: {"seed": config.plan.seed}, lambda w, c: [w.root / "source.txt"],
                self.work("source"), self.check, costly=True,
            ),
            "table": Stage(
                "table", self.version, ("source",), lambda config: {"plan": {"ratios": config.plan.ratios}},
                lambda w, c: [w.root / "table.parquet"], self.work("table"),
            ),
            "end": Stage(
                "end", 1, ("table",), lambda config: {"bins": config.evaluate.bins},
                lambda w, c: [w.root / "end.txt"], self.work("end"), incremental=True,
            ),
        }  # fmt: skip
        config = load_config("digits", overrides)
        return Context(config, Workspace(self.root), stages, forced=frozenset(forced), _tracker=self.tracker)

    def check(self, config):
        if self.refuse:
            raise InputError(self.refuse)

    def work(self, name):
        def run(context, record):
            self.ran.append(name)
            path = context.stages[name].outputs(context.workspace, context.config)[0]
            self.found = path.exists()
            if path.suffix == ".parquet":
                pl.DataFrame({"ratios": [context.config.plan.ratios]}).write_parquet(path)
            else:
                path.write_text(str(record.settings))
            if name in self.fail:
                raise self.fail.pop(name)
            return Made(7, f"{name} of {record.settings} and {record.inputs}")

        return run

    def run(self, *overrides, forced=(), names=("source", "table", "end")):
        """Run the stages and return those that were really run, with what the command would report."""
        self.ran.clear()
        context = self.context(*overrides, forced=forced)
        for name in names:
            run_stage(context, name)
        assert [name for name in names if not context.outcomes[name]["reused"]] == self.ran
        return list(self.ran)


def state(root):
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
