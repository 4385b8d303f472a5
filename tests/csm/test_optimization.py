import math

import pytest
import torch
from torch import nn

from csm.optimization import OptimizerConfig, build_optimizer, learning_rate

PER_EPOCH = 5


def rates(**settings: object) -> list[float]:
    config = OptimizerConfig(epochs=8, learning_rate=0.4, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, PER_EPOCH) for step in range(8 * PER_EPOCH)]


def test_constant_is_constant() -> None:
    assert rates(schedule="constant") == [0.4] * 40


def test_multi_step_falls_after_each_milestone() -> None:
    assert rates(schedule="multi-step", milestones=(3, 6)) == pytest.approx([0.4] * 15 + [0.04] * 15 + [0.004] * 10)


def test_cosine_ends_near_zero_as_torch_has_it() -> None:
    model = nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 40)
    expected = []
    for _ in range(40):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    assert rates(schedule="cosine") == pytest.approx(expected)


def test_a_warm_up_rises_linearly_before_any_schedule() -> None:
    for schedule, milestones in (("cosine", ()), ("constant", ()), ("multi-step", (4,))):
        found = rates(schedule=schedule, milestones=milestones, warmup=2)
        assert found[:10] == pytest.approx([0.4 * (step + 1) / 10 for step in range(10)])
        assert found[10] == pytest.approx(0.4)


def test_one_cycle_peaks_after_a_tenth() -> None:
    found = rates()
    assert max(found) == found[3] == pytest.approx(0.4)
    assert found[-1] == pytest.approx(0.2 * (1 + math.cos(math.pi * 35 / 36)))


def test_sgd_is_nesterovs_with_the_settings() -> None:
    (group,) = build_optimizer(nn.Linear(2, 2), OptimizerConfig(momentum=0.8, weight_decay=0.1)).param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.8, True, 0.1)
    assert not build_optimizer(nn.Linear(2, 2), OptimizerConfig(momentum=0.0)).param_groups[0]["nesterov"]


def test_adamw_spares_biases_and_normalisation_its_decay() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    decayed, spared = build_optimizer(network, OptimizerConfig(kind="adamw", weight_decay=0.1)).param_groups
    assert [tuple(weight.shape) for weight in decayed["params"]] == [(2, 1, 3, 3)]
    assert (len(spared["params"]), spared["weight_decay"], decayed["weight_decay"]) == (3, 0.0, 0.1)


def test_frozen_weights_are_left_alone() -> None:
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    assert len(build_optimizer(network, OptimizerConfig()).param_groups[0]["params"]) == 1
