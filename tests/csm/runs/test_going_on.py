import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from csm import runs, storage, tables
from csm.classifiers import load_classifier
from csm.datasets import RealDataset
from csm.datasets.real import build
from csm.errors import InputError
from csm.methods import Method, MixedTerm
from csm.optimization import OptimizerConfig
from csm.planning import PlanConfig, make_plan
from csm.reannotation import Calibration
from csm.reannotation.truncation import truncate
from csm.runs import MixedSource, RunSpec, fit_run, is_finished

OPTIMIZER = OptimizerConfig(epochs=4, batch_size=8, learning_rate=0.05)
CE = Method()
CSM = Method(mixed=MixedTerm("teacher"))


def write_real(root: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    splits = np.array((["train"] * 5 + ["val"] * 2 + ["test"]) * 6)
    build("tiny", images.permute(0, 2, 3, 1).numpy(), labels.numpy(), splits, ("a", "b", "c")).save(root)


def write_mixed(root: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Blends and annotations in two part files, as the stages leave them."""
    plan = make_plan(3, "data", "net", PlanConfig(ratios=3, sets_per_pair=2, shard_rows=9))
    tables.write(plan, root / "plan.parquet", tables.PLAN)
    for (shard,), rows in plan.group_by("shard"):
        pictures, posterior = [], []
        for row in rows.rows(named=True):
            a, b = (images[labels == row[name]][row["group"]].float() for name in ("class_a", "class_b"))
            pictures.append((row["lam"] * a + (1 - row["lam"]) * b).to(torch.uint8))
            probs = [0.02] * 3
            probs[row["class_a"]] += 0.94 * row["lam"]
            probs[row["class_b"]] += 0.94 * (1 - row["lam"])
            posterior.append(np.log(probs))
        mixed = rows.select("mix_id").with_columns(tables.from_images(torch.stack(pictures)))
        tables.write(mixed, root / "mixed" / f"part-{shard:08d}.parquet", tables.MIXED)
        annotations = rows.select(
            "mix_id",
            pl.col("lam").alias("lam_raw"),
            pl.Series("log_posterior", np.array(posterior, dtype=np.float32), dtype=pl.Array(pl.Float32, 3)),
        )
        tables.write(annotations, root / "annotations" / f"part-{shard:08d}.parquet", tables.annotations(3))
    storage.write_json(root / "calibration.json", asdict(Calibration("temperature", temperature=1.5)))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, separable: Callable[..., Any]) -> Path:
    root = tmp_path_factory.mktemp("workspace")
    write_real(root, *separable(16))
    write_mixed(root, *separable(4, seed=1))
    return root


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "workspace"))


def spec_of(workspace: Path, name: str = "ce", settings: Method = CE, seed: int = 0, fingerprint: str = "f0") -> RunSpec:
    source = None
    if settings.mixed:
        parts = (workspace / part for part in ("plan.parquet", "mixed", "annotations", "calibration.json"))
        source = MixedSource(*parts)
    return RunSpec(
        run=f"{name}-seed{seed}", method=name, seed=seed, directory=workspace / "runs" / name, data=workspace, mixed=source,
        network="small-cnn", parameters={"width": 4}, settings=settings, optimizer=OPTIMIZER, fingerprint=fingerprint,
    )  # fmt: skip


def predictions_of(spec: RunSpec) -> pl.DataFrame:
    return tables.read(spec.directory / "predictions.parquet", tables.predictions(3))


def contents(spec: RunSpec) -> dict[str, Any]:
    """What must not depend on interruptions."""
    record = storage.read_json(spec.directory / "run.json")
    del record["seconds"]
    return {
        "weights": storage.file_digest(spec.directory / "model.safetensors"),
        "predictions": predictions_of(spec).rows(),
        "history": storage.read_json(spec.directory / "history.json"),
        "record": record,
    }


@pytest.fixture(params=["ce", "csm"])
def settings(request: pytest.FixtureRequest) -> Method:
    return CSM if request.param == "csm" else CE


def test_a_run_leaves_its_files_and_nothing_else(workspace: Path, settings: Method) -> None:
    spec = spec_of(workspace, settings=settings)
    assert not is_finished(spec)
    fit_run(spec)
    assert is_finished(spec)
    names = sorted(path.name for path in spec.directory.iterdir())
    assert names == ["history.json", "model.json", "model.safetensors", "predictions.parquet", "run.json"]
    record = storage.read_json(spec.directory / "run.json")
    assert (record["run"], record["method"], record["seed"], record["fingerprint"]) == ("ce-seed0", "ce", 0, "f0")
    assert record["seconds"] > 0
    assert record["optimizer"] == json.loads(json.dumps(asdict(OPTIMIZER)))
    assert [row["epoch"] for row in storage.read_json(spec.directory / "history.json")] == [1, 2, 3, 4]


def test_predictions_are_those_of_the_saved_model_on_every_held_out_image(workspace: Path, settings: Method) -> None:
    spec = spec_of(workspace, settings=settings)
    fit_run(spec)
    frame = predictions_of(spec)
    data = RealDataset.load(workspace)
    model = load_classifier(spec.directory)
    held_out = data.frame.filter(pl.col("split") != "train")
    assert len(held_out) == 18
    assert (
        frame.select("split", "image_id", "label")
        .sort("image_id")
        .equals(held_out.select("split", "image_id", "label").sort("image_id"))
    )
    assert frame["run"].unique().to_list() == ["ce-seed0"]
    logits = {row["image_id"]: row["logits"] for row in frame.rows(named=True)}
    for name in ("val", "test"):
        images, _ = data.split(name)
        ids = sorted(data.frame.filter(pl.col("split") == name)["image_id"])
        with torch.no_grad():
            assert torch.equal(torch.tensor([logits[number] for number in ids]), model(images))


def test_held_out_images_are_normalised_by_the_train_split(workspace: Path) -> None:
    spec = spec_of(workspace)
    fit_run(spec)
    data = RealDataset.load(workspace)
    pixels = data.split("train")[0].double() / 255
    saved = load_classifier(spec.directory).spec
    assert saved.mean == pytest.approx([pixels.mean().item()], abs=1e-9)
    assert saved.std == pytest.approx([pixels.std(correction=0).item()], abs=1e-9)


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


def test_a_run_is_a_function_of_its_spec(workspace: Path, settings: Method) -> None:
    first, second = (replace(spec_of(workspace, settings=settings), directory=workspace / name) for name in ("one", "two"))
    fit_run(first)
    torch.manual_seed(77)
    fit_run(second)
    assert contents(first) == contents(second)


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


def test_mixed_images_are_joined_by_id_over_all_part_files(workspace: Path) -> None:
    straight = replace(spec_of(workspace, settings=CSM), directory=workspace / "straight")
    fit_run(straight)
    moved = Path(shutil.copytree(workspace, workspace.parent / "moved"))
    # All images but one in one file, shuffled; annotations in the other order.
    first, second = sorted((moved / "mixed").iterdir())
    images = pl.concat([tables.read(path, tables.MIXED) for path in (first, second)]).sample(fraction=1.0, shuffle=True, seed=1)
    tables.write(images.head(1), first, tables.MIXED)
    tables.write(images.slice(1), second, tables.MIXED)
    for path in (moved / "annotations").iterdir():
        tables.write(tables.read(path, tables.annotations(3)).reverse(), path, tables.annotations(3))
    shuffled = spec_of(moved, settings=CSM)
    fit_run(shuffled)
    assert contents(shuffled) == contents(straight)


@pytest.mark.parametrize("folder", ["mixed", "annotations"])
def test_missing_part_files_are_named(workspace: Path, folder: str) -> None:
    spec = spec_of(workspace, settings=CSM)
    (workspace / folder / "part-00000001.parquet").unlink()
    with pytest.raises(InputError, match="9 of 18 planned images are not mixed and annotated"):
        fit_run(spec)
    (workspace / folder / "part-00000000.parquet").unlink()
    with pytest.raises(InputError, match=f"{folder} holds no part file"):
        fit_run(spec)
    assert not is_finished(spec)


def test_a_damaged_record_is_named(workspace: Path) -> None:
    spec = spec_of(workspace)
    spec.directory.mkdir(parents=True)
    (spec.directory / "run.json").write_text('{"run": "ce')
    with pytest.raises(InputError, match=r"run.json is not valid JSON"):
        fit_run(spec)


def test_files_that_changed_are_read_again(workspace: Path, separable: Callable[..., Any]) -> None:
    # A process may train, make the data anew in the same folder, and train again.
    before = replace(spec_of(workspace, settings=CSM), directory=workspace / "before")
    fit_run(before)
    other = Path(shutil.copytree(workspace, workspace.parent / "other"))
    for root in (workspace, other):
        write_real(root, *separable(16, seed=8))
    again, fresh = spec_of(workspace, settings=CSM, fingerprint="f1"), spec_of(other, settings=CSM, fingerprint="f1")
    fit_run(again)
    fit_run(fresh)
    assert contents(again) == contents(fresh)
    assert contents(again)["predictions"] != contents(before)["predictions"]
    for root in (workspace, other):
        write_mixed(root, *separable(4, seed=9))
    again, fresh = (replace(spec, directory=spec.directory / "later") for spec in (again, fresh))
    fit_run(again)
    fit_run(fresh)
    assert contents(again) == contents(fresh)
    assert contents(again)["weights"] != storage.file_digest(
        spec_of(workspace).directory / "model.safetensors"
    )  # of the first mixture


def test_the_record_can_be_read_by_other_tools(workspace: Path) -> None:
    fit_run(spec_of(workspace, settings=CSM))
    record = json.loads((workspace / "runs" / "ce" / "run.json").read_text())
    assert record["settings"]["mixed"]["annotator"] == "teacher"


def test_a_run_on_truncated_annotations_is_that_on_what_they_stand_for(workspace: Path, tmp_path: Path) -> None:
    weights = {}
    for top in (None, 2):  # of three classes: the third has all that is left, so nothing is lost
        for part in (workspace / "annotations").glob("part-*"):
            frame = tables.read_annotations(part, 3)
            if top is not None:
                said = truncate(torch.from_numpy(frame["log_posterior"].to_numpy().copy()), top)
                columns = {name: pl.Series(value.numpy()) for name, value in said._asdict().items()}
                schema = tables.annotations(3, top)
                frame = frame.with_columns(**columns).select(pl.col(name).cast(dtype) for name, dtype in schema.items())
                tables.write(frame, part, schema)
        spec = spec_of(workspace, f"csm-{top}", CSM)
        fit_run(spec)
        weights[top] = load_classifier(spec.directory).state_dict()
    for name, tensor in weights[2].items():
        assert torch.allclose(tensor, weights[None][name], atol=1e-4), name


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


def test_a_training_reads_the_part_files_of_its_kind_alone(workspace: Path) -> None:
    """The folders of two kinds: the mixtures of the fixture, and the same pictures under the ids of pixel mixtures."""
    semantic, config = (
        tables.read_plan(workspace / "plan.parquet"),
        PlanConfig(kinds=("semantic", "pixel"), ratios=3, sets_per_pair=2, shard_rows=9),
    )
    both = make_plan(3, "data", "net", config)
    tables.write(both, workspace / "plan.parquet", tables.PLAN)
    first = 20_000_000  # the shards of pixel mixtures
    ids = dict(zip(semantic["mix_id"], both.filter(kind="pixel")["mix_id"], strict=True))
    for folder, schema in (("mixed", tables.MIXED), ("annotations", tables.annotations(3))):
        for shard in (0, 1):
            part = tables.read(workspace / folder / f"part-{shard:08d}.parquet", schema)
            other = part.with_columns(pl.col("mix_id").replace_strict(ids))
            tables.write(other, workspace / folder / f"part-{first + shard:08d}.parquet", schema)
            (workspace / folder / f"part-{shard:08d}.parquet").write_bytes(b"damaged")
    spec = spec_of(workspace, "csm", CSM)
    assert spec.mixed is not None
    fit_run(replace(spec, mixed=replace(spec.mixed, kind="pixel")))
    with pytest.raises(InputError, match=r"part-00000000.parquet is not a whole parquet file"):
        fit_run(replace(spec, fingerprint="f1"))
    with pytest.raises(InputError, match=r"plan.parquet plans no real images: run csm plan again"):
        fit_run(replace(spec, fingerprint="f2", mixed=replace(spec.mixed, kind="real")))
