"""Ensembles, whose members are trained one after the other."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from csm import storage
from csm.classifiers import load_classifier
from csm.datasets import RealDataset
from csm.methods import Method
from csm.runs import RunSpec, fit_run, is_finished
from tests.csm.runs.conftest import predictions_of, spec_of


def ensemble_of(workspace: Path, members: int = 3) -> RunSpec:
    single = spec_of(workspace, "deep")
    parts = tuple(
        replace(single, run=f"m{j}", seed=10 * j, directory=single.directory / f"member-{j}", fingerprint=f"m{j}")
        for j in range(members)
    )
    return replace(single, settings=Method(members=members), members=parts, fingerprint="whole")


def test_an_ensemble_is_the_mean_of_its_members_probabilities(workspace: Path) -> None:
    spec = ensemble_of(workspace)
    fit_run(spec)
    assert all(is_finished(one) for one in (spec, *spec.members))
    frames = [predictions_of(member) for member in spec.members]
    whole = predictions_of(spec)
    assert whole.select("split", "image_id", "label").equals(frames[0].select("split", "image_id", "label"))
    assert whole["run"].unique().to_list() == ["deep-seed0"]
    for row in range(len(whole)):
        total = np.zeros(3)
        for frame in frames:
            logits = np.array(frame["logits"][row], dtype=np.float64)
            weights = np.exp(logits - logits.max())
            total += weights / weights.sum()
        np.testing.assert_allclose(np.exp(np.array(whole["logits"][row], dtype=np.float64)), total / 3, atol=1e-6)
    record = storage.read_json(spec.directory / "run.json")
    assert [member["seed"] for member in record["members"]] == [0, 10, 20]
    assert record["seconds"] == pytest.approx(sum(member["seconds"] for member in record["members"]), abs=2e-3)
    assert record["settings"]["members"] == 3
    weights = [storage.file_digest(member.directory / "model.safetensors") for member in spec.members]
    assert len(set(weights)) == 3
    images, _ = RealDataset.load(workspace).split("test")
    ids = whole.filter(pl.col("split") == "test")
    with torch.no_grad():
        said = load_classifier(spec.directory)(images).softmax(dim=1)
    np.testing.assert_allclose(said.numpy(), np.exp(ids["logits"].to_numpy()), atol=1e-6)


def test_an_ensemble_goes_on_between_two_members(workspace: Path) -> None:
    undisturbed = ensemble_of(Path(shutil.copytree(workspace, workspace.parent / "undisturbed")))
    fit_run(undisturbed)
    spec, epochs = ensemble_of(workspace), list[int]()

    def interrupt(number: int, values: dict[str, float]) -> None:
        epochs.append(number)
        if len(epochs) == 6:  # the second epoch of the second member
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_run(spec, interrupt)
    assert [is_finished(one) for one in (*spec.members, spec)] == [True, False, False, False]
    before = (spec.members[0].directory / "model.safetensors").stat().st_mtime_ns
    epochs.clear()
    fit_run(spec, lambda number, values: epochs.append(number))
    assert (spec.members[0].directory / "model.safetensors").stat().st_mtime_ns == before
    assert epochs == [1, 2, 3, 4] * 2
    assert predictions_of(spec).equals(predictions_of(undisturbed))
    files = [storage.file_digest(one.directory / "model.safetensors") for one in (spec, undisturbed)]
    assert files[0] == files[1]
