"""What the tests of estimates share: a small data set, and a workspace that holds nothing else."""

from dataclasses import asdict
from pathlib import Path

from csm import storage
from csm.datasets import DatasetInfo
from flows.config import Config, load_config
from flows.estimate_loads import Load, loads

INFO = DatasetInfo("toy", (8, 8, 1), ("a", "b", "c"), (0.5,), (0.2,), {"train": 40, "val": 12, "test": 9}, "d")
RATES = {"generator": 10.0, "fit-teacher": 10.0, "fit-annotators": 10.0, "mix": 5.0, "annotate": 10.0, "train": 20.0}


def prepared(root: Path) -> Path:
    """Make ``root`` a workspace in which only `prepare` was run."""
    storage.write_json(root / "dataset.json", asdict(INFO))
    return root


def configuration(*overrides: str) -> Config:
    return load_config(
        "demo", ["annotate.annotator=teacher", "train.compare=[cross-entropy, csm]", "train.optimizer.epochs=3", *overrides]
    )


def by_stage(config: Config) -> dict[str, Load]:
    return {load.stage: load for load in loads(config, INFO)}
