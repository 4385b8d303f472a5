import math

import pytest
import torch

from csm.generators.edm.preconditioning import EDM, IDDPM, PRECONDITIONINGS, VE, VP, Coefficients

SIGMA = torch.tensor([0.01, 0.3, 1.0, 20.0, 80.0])


def test_vp_gives_the_time_at_which_the_process_has_that_noise() -> None:
    time = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    sigma = ((19.9 / 2 * time**2 + 0.1 * time).exp() - 1).sqrt()
    c: Coefficients = VP()(sigma.float())
    assert torch.allclose(c.noise.double(), 999 * time, rtol=1e-5)
    assert torch.equal(c.out, -sigma.float())


@pytest.mark.parametrize("kind", [VP, IDDPM])
def test_variance_preserving_inputs_have_the_variance_of_images_of_variance_1(kind: type[VP] | type[IDDPM]) -> None:
    c: Coefficients = kind()(SIGMA)
    assert torch.allclose(c.in_**2 * (1 + SIGMA**2), torch.ones(5))
    assert torch.equal(c.skip, torch.ones(5))


def test_ve_takes_x_as_it_is() -> None:
    c: Coefficients = VE()(SIGMA)
    assert torch.equal(c.in_, torch.ones(5))
    assert torch.equal(c.out, SIGMA)
    assert torch.allclose(c.noise, (SIGMA / 2).log())


def test_edm_inputs_and_targets_have_variance_1_and_the_error_is_amplified_least() -> None:
    data = 0.4
    c: Coefficients = EDM(data)(SIGMA)
    assert torch.allclose(c.in_**2 * (data**2 + SIGMA**2), torch.ones(5))
    target = (data**2 * (1 - c.skip) ** 2 + SIGMA**2 * c.skip**2) / c.out**2  # Karras et al. 2022, app. B.6
    assert torch.allclose(target, torch.ones(5), rtol=1e-4)
    assert torch.allclose(c.noise, SIGMA.log() / 4)


def test_iddpm_levels_are_those_of_the_cosine_schedule() -> None:
    levels = IDDPM().u
    assert levels.shape == (1001,)
    step = torch.arange(1, 1000, dtype=torch.float64)  # the first is limited, the last is no noise
    abar = (math.pi / 2 * (step / 1000 + 0.008) / 1.008).cos() ** 2  # Nichol & Dhariwal 2021, eq. 17
    assert abar[-1] < 1e-4
    expected = ((1 - abar) / abar).sqrt().flip(0)
    assert levels[-1] == 0
    assert torch.allclose(levels[1:-1].double()[300:-50], expected[300:-50], rtol=0.02)
    assert (levels[1:] < levels[:-1]).all()


def test_iddpm_rounds_to_the_nearest_step() -> None:
    model = IDDPM()
    sigma = torch.stack([model.u[0], model.u[400] * 0.9999, model.u[999], (model.u[10] + 2 * model.u[11]) / 3])
    assert model(sigma).noise.tolist() == [999, 599, 0, 988]


def test_iddpm_refuses_tables_without_end() -> None:
    for steps in (0, 10**12):
        with pytest.raises(ValueError, match=r"M must be from 1 to 100000"):
            IDDPM(M=steps)


def test_all_give_one_number_for_each_image() -> None:
    for kind in PRECONDITIONINGS.values():
        assert all(value.shape == (5,) and value.dtype == torch.float32 for value in kind()(SIGMA))
