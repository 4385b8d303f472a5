"""Population-based training: who takes over whose state, and that the result is what a training by hand gives."""

import random

import pytest

from cluster.tuning_population import check_pbt, perturb
from csm.errors import InputError


def test_numbers_are_perturbed_and_nothing_else():
    draw = random.Random(0)
    values = {"a": 1.0, "b": 10, "c": "text", "d": True}
    seen = [perturb(values, draw) for _ in range(50)]
    assert {row["a"] for row in seen} == {0.8, 1.2}
    assert {row["b"] for row in seen} == {8, 12}
    assert all(type(row["b"]) is int and row["c"] == "text" and row["d"] is True for row in seen)


def test_only_what_a_running_training_can_change_may_be_searched():
    check_pbt(["train.optimizer.learning_rate", "method.parameters.gamma", "method.mixed.weight"])
    for key in (
        "method",
        "train.optimizer.batch_size",
        "train.optimizer.kind",
        "annotate.teacher.network",
        "method.mixed.schedule",
    ):
        with pytest.raises(InputError, match=rf"tune\.space\.{key}: pbt changes trainings that run"):
            check_pbt(["method.mixed.weight", key])
