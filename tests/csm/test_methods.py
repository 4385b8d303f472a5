import math

import pytest
from pydantic import ValidationError

from csm.methods import Method, MixedTerm, identity

EPOCHS = 8


def weights(**settings: object) -> list[float]:
    term = MixedTerm(weight=2.0, **settings)  # type: ignore[arg-type]
    return [term.weight_at(epoch, EPOCHS) for epoch in range(EPOCHS)]


def test_a_constant_weight_is_the_weight() -> None:
    assert weights() == [2.0] * EPOCHS


def test_linear_ramps_go_up_and_down_in_a_straight_line() -> None:
    assert weights(ramp="linear-up") == pytest.approx([2 * epoch / 8 for epoch in range(8)])
    assert weights(ramp="linear-down") == pytest.approx([2 - 2 * epoch / 8 for epoch in range(8)])


def test_cosine_ramps_are_half_a_cosine() -> None:
    up = weights(ramp="cosine-up")
    assert up == pytest.approx([1 - math.cos(math.pi * epoch / 8) for epoch in range(8)])
    assert weights(ramp="cosine-down") == pytest.approx([2 - value for value in up])


def test_after_a_short_ramp_its_last_value_stays() -> None:
    assert weights(ramp="linear-up", ramp_epochs=4)[4:] == [2.0] * 4
    assert weights(ramp="cosine-down", ramp_epochs=4)[4:] == pytest.approx([0.0] * 4)


def test_a_cycle_starts_at_nothing_and_comes_again() -> None:
    found = weights(ramp="cyclic", ramp_epochs=4)
    assert found[:4] == pytest.approx([0.0, 1.0, 2.0, 1.0])
    assert found[4:] == pytest.approx(found[:4])


def test_a_ramp_moves_within_an_epoch() -> None:
    assert MixedTerm(weight=1.0, ramp="linear-up").weight_at(0.5, 4) == 0.125


def test_off_after_an_epoch() -> None:
    assert weights(off_after=3) == [2.0] * 3 + [0.0] * 5
    assert weights(off_after=0) == [0.0] * 8
    assert MixedTerm(off_after=3).weight_at(2.99, 8) == 1.0


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"ramp": "up"}, {"ramp_epochs": 0}, {"off_after": -1}, {"warm_start": -1}]
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MixedTerm(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({}, True),
        ({"schedule": "uniform"}, True),
        ({"schedule": "endpoints"}, False),
        ({"images": "unmixed", "schedule": "uniform"}, False),
        ({"images": "pixel", "schedule": "interior"}, False),
        ({"images": ("unmixed", "semantic"), "schedule": "uniform"}, True),
        ({"images": ("unmixed", "noised"), "schedule": "uniform"}, False),
    ],
)
def test_semantic_mixing_is_of_images_between_classes_from_a_generator(settings: dict[str, str], ours: bool) -> None:
    assert MixedTerm(**settings).is_semantic is ours


def test_a_list_of_one_kind_of_images_is_that_kind() -> None:
    for kind, schedule in (("semantic", "interior"), ("noised", "interior"), ("unmixed", "uniform")):
        one, several = (Method(mixed=MixedTerm(images=images, schedule=schedule)) for images in (kind, (kind,)))
        assert identity(one) == identity(several)
    assert identity(Method(mixed=MixedTerm(images=("semantic", "noised")))) != identity(Method(mixed=MixedTerm(images="noised")))
