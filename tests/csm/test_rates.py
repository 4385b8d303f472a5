"""Rates: what a clock would say, and that each kind of network can be measured without anything having been fitted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from csm import rates, tables
from csm.classifiers import ClassifierSpec
from csm.datasets.real import build
from csm.encoders import ENCODERS
from csm.generators.config import GeneratorConfig
from csm.optimization import OptimizerConfig
from csm.rates import Source, encoding_rate, fitting_rate, images_per_second, mixing_rate, steps_per_second, training_rate
from csm.sampling import SamplerConfig

SHORT = 0.02


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], Callable[[int], None]]:
    """``clock(fixed, each)`` gives work that takes so many seconds a call and an image, on a clock of its own."""
    now = [0.0]
    monkeypatch.setattr(rates.time, "monotonic", lambda: now[0])

    def make(fixed: float, each: float) -> Callable[[int], None]:
        def work(amount: int) -> None:
            now[0] += fixed + each * amount

        return work

    return make


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 1)).astype(np.uint8)
    data = build("noise", images, np.arange(90) % 3, np.repeat(tables.SPLITS, 30), ["a", "b", "c"])
    data.save(root)
    return Source(data.info, root, GeneratorConfig(block_channels=(8, 16), batch_size=8))


@pytest.mark.parametrize("each", [1e-4, 0.3, 7.0])
def test_images_a_second_are_those_of_the_clock(clock: Callable[..., Callable[[int], None]], each: float) -> None:
    assert images_per_second(clock(0.0, each), most=64, seconds=2.0) == pytest.approx(1 / each)


def test_what_every_call_costs_is_spread_over_full_batches(clock: Callable[..., Callable[[int], None]]) -> None:
    assert images_per_second(clock(0.1, 0.001), most=64, seconds=10.0) == pytest.approx(64 / 0.164)


@pytest.mark.parametrize("fixed", [0.0, 5.0])
def test_steps_a_second_are_without_what_a_training_costs_beside_them(
    clock: Callable[..., Callable[[int], None]], fixed: float
) -> None:
    assert steps_per_second(clock(fixed, 0.01), seconds=2.0) == pytest.approx(100)


@pytest.mark.parametrize("kind", ["auto", "gaussians"])
def test_mixing_and_training_are_measured_before_there_is_a_generator(source: Source, kind: str, tmp_path: Path) -> None:
    other = Source(source.info, source.data, GeneratorConfig(kind=kind, block_channels=(8, 16), batch_size=8))  # type: ignore[arg-type]
    before = {path for path in source.data.rglob("*")}
    assert mixing_rate(other, SamplerConfig(steps=2), 8, "embedding", "float32", "cpu", SHORT) > 0
    assert {path for path in source.data.rglob("*")} == before, "nothing is left in the workspace"


def test_training_of_generator_and_classifier_is_measured(source: Source) -> None:
    spec = ClassifierSpec("small-cnn", {"width": 4}, 1, source.info.class_names, source.info.mean, source.info.std)
    optimizer = OptimizerConfig(batch_size=8, schedule="multi-step", milestones=(3,), choose="val-nll", hold="stream")
    assert training_rate(spec, source.info, optimizer, "cpu", SHORT) > 0
    assert fitting_rate(source, "cpu", SHORT) > 0


@pytest.mark.parametrize("kind", ["pixels", "pca", "classifier", "teacher", "generator"])
def test_every_encoder_that_needs_no_files_of_the_user_is_measured(source: Source, kind: str) -> None:
    spec = ClassifierSpec("small-cnn", {"width": 4}, 1, source.info.class_names, source.info.mean, source.info.std)
    assert kind in ENCODERS
    parameters = {"levels": 1, "draws": 2} if kind == "generator" else {}
    assert encoding_rate(source, kind, parameters, spec, 2, "cpu", SHORT) > 0
