"""Names of a configuration become folders of the workspace, and only of the workspace."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from csm import storage
from csm.datasets import DatasetInfo
from csm.errors import InputError
from csm.pairs import all_pairs
from csm.planning import PlanConfig, write_plan
from flows.artifacts import Workspace
from flows.config import Config, load_config
from flows.run import STAGES
from flows.stages import Context
from flows.train import run_specs

NAMED = ("train.methods", "annotate.annotators", "annotate.encoders", "evaluate.shifts")
VALUES: dict[str, Any] = {
    "train.methods": {"loss": "cross-entropy"},
    "annotate.annotators": {"head": "lda", "encoder": "pixels"},
    "annotate.encoders": {"kind": "pixels"},
    "evaluate.shifts": {"kind": "corrupted"},
}
OUTSIDE = ("..", ".", "../../x", "/etc/x", "a/b", "a\\b", "", "~", "-x", ".hidden", "a\0b", "a b\n")


def configured(section: str, name: str) -> Config:
    base = load_config("demo")
    changes = {f"{section}": {name: VALUES[section]}}
    return base.with_values(changes)


@pytest.mark.parametrize("section", NAMED)
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_could_lead_out_is_refused(section: str, name: str) -> None:
    with pytest.raises(InputError, match="cannot name a folder") as caught:
        configured(section, name)
    assert str(caught.value).startswith(section)


@pytest.mark.parametrize("section", NAMED)
@pytest.mark.parametrize("name", ["a..b", "A_b-1.c", "0", "x."])
def test_odd_names_stay_inside(section: str, name: str) -> None:
    assert name in dataclasses.asdict(configured(section, name))[section.partition(".")[0]][section.partition(".")[2]]


def test_every_section_whose_keys_are_free_is_among_those() -> None:
    """A new mapping of a user's names must be looked at here."""
    known = {*NAMED, "data"}  # data is the settings of a source, checked against its arguments
    assert {key for key in _free_mappings(Config) if "parameters" not in key} - {"tune.space"} == known


def _free_mappings(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the settings that are mappings."""
    for field in dataclasses.fields(kind):
        value = field.type if not isinstance(field.type, str) else None
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _free_mappings(value, f"{key}.")
        elif getattr(value, "__origin__", None) in (dict, Mapping):
            yield key


def test_all_that_stages_write_is_inside(tmp_path: Path) -> None:
    root = tmp_path / "w"
    counts = {"train": 40, "val": 12, "test": 9}
    info = DatasetInfo("../../data", (8, 8, 1), ("../a", "/b"), (0.5,), (0.2,), counts, "d")
    storage.write_json(root / "dataset.json", dataclasses.asdict(info))
    write_plan(root / "plan.parquet", all_pairs(2), "d", "g", PlanConfig(sets_per_pair=4))
    config = load_config("demo", ["train.compare=[cross-entropy]", "name=../../other"])
    workspace = Workspace(root)
    written = [path for stage in STAGES.values() for path in stage.outputs(workspace, config)]
    written += [spec.directory for spec in run_specs(Context(config, workspace, STAGES))]
    assert len(written) > 10
    for path in written:
        assert path.resolve().is_relative_to(root.resolve()), path
