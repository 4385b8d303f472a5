"""The oracle: two processes that share every batch do what one process does, up to the order of sums."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F

from csm import storage
from csm.classifiers import Classifier, ClassifierSpec
from csm.errors import InputError
from csm.methods import Method, MixedTerm, PixelTerm
from csm.optimization import OptimizerConfig
from csm.schedules import MixedSet
from csm.training import Split, fit, predict
from csm.world import ALONE, World

pytestmark = pytest.mark.slow

PLAIN = OptimizerConfig(epochs=3, batch_size=8, learning_rate=0.05, shift=1, flip=True, cutout=2)
CE = Method()
MIXED = MixedTerm("teacher", loss="kl", weight=2.0, ramp="linear-up", warm_start=1)


@dataclass(frozen=True)
class Case:
    method: Method = CE
    optimizer: OptimizerConfig = PLAIN
    rows: int = 48
    streamed: bool = False
    dropout: float = 0.0


CASES = {
    "plain": Case(),
    "AdamW, average, early choice": Case(
        optimizer=replace(PLAIN, kind="adamw", learning_rate=0.01, ema=0.9, choose="val-nll", channels_last=True)
    ),
    "odd": Case(
        Method(mixed=replace(MIXED, warm_start=0)), replace(PLAIN, batch_size=64), rows=45
    ),  # one batch of 45, 90 companions
    "one companion": Case(Method(mixed=replace(MIXED, per_real=1, warm_start=0)), replace(PLAIN, batch_size=64), rows=45),
    "semantic mixing": Case(Method(mixed=MIXED)),
    "mixup in place": Case(Method(mixing=PixelTerm("mixup"))),
    "RegMixup": Case(Method(mixing=PixelTerm("regmixup"))),
    "RankMixup": Case(Method(mixing=PixelTerm("rankmixup"))),
    "MMCE": Case(Method(loss="mmce")),  # of pairs of images
    "MDCA": Case(Method(loss="mdca")),  # of means over images
    "AdaFocal": Case(Method(loss="adafocal")),  # with a state
    "stream": Case(optimizer=OptimizerConfig(epochs=3, batch_size=8, learning_rate=0.05), streamed=True),
    "bfloat16": Case(optimizer=replace(PLAIN, precision="bfloat16")),
    "dropout": Case(dropout=0.5),
    "resumed": Case(),
    "not finite": Case(optimizer=replace(PLAIN, learning_rate=1e30)),
    "uneven": Case(optimizer=replace(PLAIN, batch_size=9)),
}
EQUAL = [name for name in CASES if name not in ("bfloat16", "dropout", "resumed", "not finite", "uneven")]


class Pages:
    """A stream of the images in order; two processes take turns, so that together they have the batches of one."""

    def __init__(self, real: Split, world: World) -> None:
        self.real, self.world, self.rows = real, world, len(real[0])

    def batches(self, epoch: int, size: int) -> Iterator[Split]:
        start = self.world.rank * size
        for first in range(start, self.rows, size * self.world.size):
            yield tuple(part[first : first + size] for part in self.real)


def classifier(dropout: float) -> Classifier:
    """A small network without BatchNorm."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(72, 3)
    )  # fmt: skip
    return Classifier(network, ClassifierSpec("", {}, 1, ("a", "b", "c"), (0.4,), (0.25,)))


def blends(real: Split) -> MixedSet:
    """Pixel blends of images of each two classes, three ratios, two sets for each pair."""
    images, labels = real
    pairs = [(0, 1), (0, 2), (1, 2)] * 2
    pictures, soft = [], []
    for number, (a, b) in enumerate(pairs):
        first, second = (images[labels == label][number // 3].float() for label in (a, b))
        for lam in (0.0, 0.5, 1.0):
            pictures.append((lam * first + (1 - lam) * second).to(torch.uint8))
            soft.append(lam * F.one_hot(torch.tensor(a), 3) + (1 - lam) * F.one_hot(torch.tensor(b), 3))
    class_a, class_b = torch.tensor(pairs).unbind(dim=1)
    ratios = torch.tensor([0.0, 0.5, 1.0])
    return MixedSet(
        torch.stack(pictures), 0.9 * torch.stack(soft) + 1 / 30, torch.arange(18).view(6, 3), class_a, class_b, ratios
    )


def train(case: Case, real: Split, val: Split, world: World = ALONE, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a training leaves: weights, logits of the validation images, epochs, states, and what it raised."""
    epochs: list[dict[str, float]] = []
    states: list[dict[str, Any]] = []
    real = (real[0][: case.rows], real[1][: case.rows])
    model = classifier(case.dropout)
    error = ""
    try:
        fit(
            model,
            Pages(real, world) if case.streamed else real,
            val,
            case.method,
            case.optimizer,
            5,
            blends(real) if case.method.mixed else None,
            on_epoch=lambda epoch, values: epochs.append({"epoch": epoch, **values}),
            save_state=lambda state: states.append(deepcopy(state)),
            state=state,
            world=world,
        )
    except (FloatingPointError, InputError) as caught:
        error = str(caught)
    return {
        "weights": model.state_dict(),
        "logits": predict(model, val[0]),
        "epochs": epochs,
        "states": states,
        "error": error,
    }


def share(rank: int, folder: Path) -> None:
    """One of two processes: every case, into files."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = storage.read_state(folder / "data.pt")
    for name, case in CASES.items():
        state = data["state"] if name == "resumed" else None
        storage.write_state(folder / f"{name} {rank}.pt", train(case, data["real"], data["val"], World(rank, 2), state))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def data(separable: Callable[..., Split]) -> dict[str, Any]:
    return {"real": separable(16), "val": separable(8, seed=1)}


@pytest.fixture(scope="module")
def alone(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: train(case, data["real"], data["val"]) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def shared(data: dict[str, Any], alone: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes made of every case; "resumed" goes on from a state of the single process."""
    folder = tmp_path_factory.mktemp("shared")
    storage.write_state(folder / "data.pt", {**data, "state": alone["plain"]["states"][0]})
    multiprocessing.spawn(share, (folder,), nprocs=2)
    return {name: [storage.read_state(folder / f"{name} {rank}.pt") for rank in (0, 1)] for name in CASES}


def assert_near(left: dict[str, Any], right: dict[str, Any], since: int = 0) -> None:
    """The same up to rounding, after epoch ``since``."""
    assert len(left["epochs"]) == 3 - since
    for mine, other in zip(left["epochs"], right["epochs"][since:], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    assert torch.allclose(left["logits"], right["logits"], atol=1e-4)
    for name, weight in left["weights"].items():
        assert torch.allclose(weight, right["weights"][name], atol=1e-5), name


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_do_what_one_does(name: str, shared: Any, alone: Any) -> None:
    assert not torch.equal(alone[name]["weights"]["network.0.weight"], classifier(0.0).state_dict()["network.0.weight"])
    if (
        name == "stream"
    ):  # alone, it had batches of 8 in a row; two processes have batches of 4 in turns, which are the same images
        assert len(alone[name]["epochs"]) == 3
    assert_near(shared[name][0], alone[name])


def test_two_processes_do_what_one_does_in_bfloat16(shared: Any, alone: Any) -> None:
    two, one = shared["bfloat16"][0], alone["bfloat16"]
    assert [row["loss"] for row in two["epochs"]] == pytest.approx([row["loss"] for row in one["epochs"]], rel=2e-2)


@pytest.mark.parametrize("name", [*EQUAL, "bfloat16", "dropout", "resumed"])
def test_both_processes_end_with_the_same_weights(name: str, shared: Any) -> None:
    first, second = (result["weights"] for result in shared[name])
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_processes_do_not_share_dropout_masks(shared: Any, alone: Any) -> None:
    two, one = ([row["loss"] for row in result["epochs"]] for result in (shared["dropout"][0], alone["dropout"]))
    assert two == pytest.approx(one, rel=0.5)
    assert two != pytest.approx(one, rel=1e-4)


def test_only_the_first_process_reports_and_keeps_states(shared: Any) -> None:
    first, second = shared["plain"]
    assert [row["epoch"] for row in first["epochs"]] == [1, 2, 3]
    assert [state["epoch"] for state in first["states"]] == [1, 2]
    assert (second["epochs"], second["states"]) == ([], [])


def test_two_processes_go_on_from_the_state_of_one(shared: Any, alone: Any) -> None:
    assert_near(shared["resumed"][0], alone["plain"], since=1)


def test_one_process_goes_on_from_the_state_of_two(data: dict[str, Any], shared: Any, alone: Any) -> None:
    state = shared["plain"][0]["states"][1]
    assert_near(train(CASES["plain"], data["real"], data["val"], state=state), alone["plain"], since=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not finite", "lower train.optimizer.learning_rate"),
        ("uneven", "train.optimizer.batch_size: 9 images cannot be shared evenly by 2 workers"),
    ],
)
def test_what_stops_one_process_stops_both(name: str, message: str, shared: Any) -> None:
    first, second = (result["error"] for result in shared[name])
    assert first == second
    assert message in first
