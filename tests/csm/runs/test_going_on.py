"""Trainings that are finished already, that were interrupted, or whose state is damaged."""

from dataclasses import replace
from pathlib import Path

import pytest

from csm import runs, storage
from csm.errors import InputError
from csm.methods import Method
from csm.runs import fit_run, is_finished
from tests.csm.runs.conftest import contents, spec_of


def test_a_finished_run_is_not_trained_again(workspace: Path) -> None:
    spec = spec_of(workspace)
    fit_run(spec)
    before = {path.name: path.stat().st_mtime_ns for path in spec.directory.iterdir()}
    epochs: list[int] = []
    fit_run(spec, lambda epoch, values: epochs.append(epoch))
    assert epochs == []
    assert {path.name: path.stat().st_mtime_ns for path in spec.directory.iterdir()} == before


def test_a_finished_run_of_another_fingerprint_is_trained_again(workspace: Path) -> None:
    first = spec_of(workspace)
    fit_run(first)
    old = contents(first)
    second = replace(first, seed=1, run="ce-seed1", fingerprint="f1")
    assert not is_finished(second)
    finished: list[bool] = []
    fit_run(second, lambda epoch, values: finished.append(is_finished(first) or is_finished(second)))
    assert finished == [False] * 4  # an interruption must not leave the new files under the old record
    assert is_finished(second)
    assert not is_finished(first)
    assert contents(second)["weights"] != old["weights"]


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    workspace: Path, settings: Method, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = replace(spec_of(workspace, settings=settings), directory=workspace / "undisturbed")
    fit_run(undisturbed)
    monkeypatch.setattr(runs, "STATE_SECONDS", 0.0)
    spec = spec_of(workspace, settings=settings)

    def interrupt(number: int, values: dict[str, float]) -> None:
        if number == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_run(spec, interrupt)
    assert not is_finished(spec)
    assert (spec.directory / "state.pt").exists() == (epoch > 1)  # the state of an epoch is saved after it
    epochs: list[int] = []
    fit_run(spec, lambda number, values: epochs.append(number))
    assert epochs == list(range(max(epoch, 1), 5))
    assert contents(spec) == contents(undisturbed)
    assert not (spec.directory / "state.pt").exists()


def test_a_state_of_other_settings_is_not_gone_on_from(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "STATE_SECONDS", 0.0)

    def interrupt(number: int, values: dict[str, float]) -> None:
        if number == 3:
            raise KeyboardInterrupt

    old = spec_of(workspace)
    with pytest.raises(KeyboardInterrupt):
        fit_run(old, interrupt)
    new = replace(old, seed=4, fingerprint="f4")
    fit_run(new)
    fresh = replace(new, directory=workspace / "fresh")
    fit_run(fresh)
    assert contents(new) == contents(fresh)


@pytest.mark.parametrize("content", [b"", b"no state", b"PK\x03\x04 cut"])
def test_a_damaged_state_is_never_a_start_from_zero(workspace: Path, content: bytes) -> None:
    spec = spec_of(workspace)
    spec.directory.mkdir(parents=True)
    (spec.directory / "state.pt").write_bytes(content)
    epochs: list[int] = []
    with pytest.raises(InputError, match=r"state.pt is a damaged training state .*: remove it to start from zero"):
        fit_run(spec, lambda epoch, values: epochs.append(epoch))
    assert epochs == []
    assert (spec.directory / "state.pt").read_bytes() == content


def test_states_are_not_saved_more_often_than_the_interval(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Path] = []
    monkeypatch.setattr(storage, "write_state", lambda path, state: saved.append(path))
    monkeypatch.setattr(runs, "STATE_SECONDS", 3600.0)
    fit_run(spec_of(workspace))
    assert saved == []
    monkeypatch.setattr(runs, "STATE_SECONDS", 0.0)
    fit_run(spec_of(workspace, "again"))
    assert len(saved) == 3


def test_a_damaged_record_is_named(workspace: Path) -> None:
    spec = spec_of(workspace)
    spec.directory.mkdir(parents=True)
    (spec.directory / "run.json").write_text('{"run": "ce')
    with pytest.raises(InputError, match=r"run.json is not valid JSON"):
        fit_run(spec)
