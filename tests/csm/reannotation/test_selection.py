from collections.abc import Callable

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from csm.errors import InputError
from csm.reannotation.heads import FitInputs
from csm.reannotation.posterior import Posterior
from csm.reannotation.selection import held_out_nll

Inputs = Callable[..., FitInputs]


def test_it_is_the_least_nll_of_all_temperatures(fit_inputs: Inputs) -> None:
    draw = torch.Generator().manual_seed(0)
    scores, labels = 5 * torch.randn(200, 3, generator=draw), torch.randint(0, 3, (200,), generator=draw)
    scores[torch.arange(200), labels] += 4
    inputs = fit_inputs((torch.full((3, 3), float("nan")), torch.arange(3)), (scores, labels))  # the train split is not looked at

    def nll(log_temperature: float) -> float:
        return float(-log_softmax(scores.double().numpy() / 10**log_temperature, axis=1)[torch.arange(200), labels].mean())

    expected = minimize_scalar(nll, bounds=(-2, 2), method="bounded", options={"xatol": 1e-8})
    assert abs(expected.x) > 0.2
    assert held_out_nll(Posterior(), inputs.features, "here") == pytest.approx(expected.fun, rel=1e-6)


def test_images_that_are_all_read_right_leave_nothing_and_no_warning(
    fit_inputs: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = fit_inputs((torch.zeros(3, 3), torch.arange(3)), (torch.eye(3), torch.arange(3)))
    assert held_out_nll(Posterior(), inputs.features, "here") == pytest.approx(0, abs=1e-9)
    assert not caplog.records


def test_a_feature_that_is_not_finite_is_refused(fit_inputs: Inputs) -> None:
    inputs = fit_inputs((torch.zeros(3, 3), torch.arange(3)), (torch.full((3, 3), float("inf")), torch.arange(3)))
    with pytest.raises(InputError, match="here: a feature of a real image is not finite"):
        held_out_nll(Posterior(), inputs.features, "here")
