from dataclasses import replace

import numpy as np
import pytest
import torch

from csm.datasets.digits import digits
from csm.fidelity import REFERENCE, TARGET, Fidelity, compare_solvers, distance, fewest, mixer
from csm.generators.conditioning import mix_embeddings
from csm.generators.gaussians import GaussianGenerator, GaussiansSpec, fit_gaussians
from csm.mixing import mix
from csm.noise import initial_noise
from csm.planning import PlanConfig, make_plan
from csm.sampling import SamplerConfig
from csm.tables import to_images

K, SHAPE = 3, (2, 2, 1)
PLAN = make_plan(K, "data", "net", PlanConfig(ratios=3, sets_per_pair=2))
EXPONENTIAL = SamplerConfig(solver="dpmpp-2m", spacing="exponential")
KARRAS = replace(EXPONENTIAL, spacing="karras")


@pytest.fixture(scope="module")
def generator() -> GaussianGenerator:
    draw = np.random.default_rng(0)
    factors = draw.normal(0, 0.3, (K, 4, 4))
    covariances = factors @ factors.transpose(0, 2, 1)
    values = (draw.uniform(-0.3, 0.3, (K, 4)), covariances, np.full(K, 1 / K))
    return GaussianGenerator(GaussiansSpec(SHAPE, K), *(torch.from_numpy(value) for value in values))


def test_the_distance_by_hand() -> None:
    first, second = torch.tensor([[0.0, 1.0], [0.5, -1.0]]), torch.tensor([[0.0, 0.0], [0.5, -0.8]])
    rms, mean_abs = distance(first, second)
    assert rms == pytest.approx(((127.5**2 + 25.5**2) / 4) ** 0.5)
    assert mean_abs == pytest.approx((127.5 + 25.5) / 4)


def test_the_reference_is_close_to_the_exact_flow(generator: GaussianGenerator) -> None:
    class_a, class_b = (generator.embed(torch.tensor(PLAN[name].to_list())) for name in ("class_a", "class_b"))
    condition = mix_embeddings(class_a, class_b, torch.tensor(PLAN["lam"].to_list()))
    noise = initial_noise(PLAN["seed"].to_list(), generator.noise_shape)
    exact = generator.flow(80.0 * noise, 80.0, 0.0, condition).clamp(-1, 1)
    mixed = mixer(PLAN, generator, batch_size=5)
    assert distance(mixed(REFERENCE), exact)[0] < 0.05
    assert distance(mixed(TARGET), exact)[0] > 0.3


def test_the_images_are_those_of_mixing(generator: GaussianGenerator) -> None:
    images = mixer(PLAN, generator)(TARGET)
    assert images.abs().max() <= 1
    rounded = to_images(mix(PLAN, generator, SHAPE, TARGET)["image"], SHAPE)
    assert ((images + 1) * 127.5 - rounded.float()).abs().max() <= 0.51


def test_a_series_ends_where_every_generator_is_as_close(generator: GaussianGenerator) -> None:
    mixers = {"all": mixer(PLAN, generator), "few": mixer(PLAN.head(4), generator)}
    through: list[SamplerConfig] = []
    results = compare_solvers(mixers, [EXPONENTIAL, KARRAS], (4, 10, 39, 60), through.append)
    assert through == [EXPONENTIAL, KARRAS]
    assert [(result.generator, result.sampler, result.excess) for result in results[:2]] == [
        ("all", TARGET, 1),
        ("few", TARGET, 1),
    ]
    for sampler in (EXPONENTIAL, KARRAS):
        series = [result for result in results if replace(result.sampler, steps=1) == replace(sampler, steps=1)]
        assert [result.generator for result in series] == ["all", "few"] * (len(series) // 2)
        pairs = [series[start : start + 2] for start in range(0, len(series), 2)]
        assert [max(result.excess for result in pair) <= 1 for pair in pairs] == [False] * (len(pairs) - 1) + [True]
    reference = mixers["few"](REFERENCE)
    target = distance(mixers["few"](TARGET), reference)
    for result in results:
        if result.generator == "few":
            found = distance(mixers["few"](result.sampler), reference)
            assert (result.rms, result.mean_abs) == pytest.approx(found)
            assert result.excess == pytest.approx(max(found[0] / target[0], found[1] / target[1]))


def test_the_default_is_as_close_as_the_paper_with_a_third_of_the_evaluations() -> None:
    data = digits()
    mixed = mixer(
        make_plan(10, "data", "net", PlanConfig(sets_per_pair=1)).sample(64, seed=1), fit_gaussians(*data.split("train"), 10)
    )
    results = compare_solvers({"digits": mixed}, [SamplerConfig()], (SamplerConfig().steps,))
    assert results[1].sampler == SamplerConfig()
    assert results[1].excess < 0.5
    assert results[1].evaluations <= results[0].evaluations / 3


def test_the_target_is_measured_once_and_counts_as_close(generator: GaussianGenerator) -> None:
    results = compare_solvers({"all": mixer(PLAN, generator), "few": mixer(PLAN.head(4), generator)}, [TARGET], (3, 39, 60))
    assert [result.sampler.steps for result in results] == [20, 20, 2, 2]
    assert fewest(results) == results[:2]


def test_heun_takes_no_more_than_it_may(generator: GaussianGenerator) -> None:
    results = compare_solvers({"all": mixer(PLAN, generator)}, [TARGET], (3, 4, 5))
    assert [result.evaluations for result in results] == [39, 3, 5]


def test_the_fewest_are_of_one_setting_for_all_generators() -> None:
    def measured(generator: str, steps: int, excess: float, rho: float = 7.0) -> Fidelity:
        return Fidelity(generator, SamplerConfig(solver="euler", steps=steps, rho=rho), steps, excess, excess, excess)

    easy = [measured("easy", 8, 0.9), measured("easy", 9, 0.8), measured("easy", 9, 0.99, rho=5.0), measured("easy", 10, 0.1)]
    hard = [measured("hard", 8, 1.1), measured("hard", 9, 0.9), measured("hard", 9, 0.2, rho=5.0), measured("hard", 10, 0.1)]
    assert fewest(easy) == easy[:1]
    assert fewest(easy + hard) == [easy[1], hard[1]]  # 0.9 at worst, where rho 5 has 0.99
    assert fewest([hard[0]]) == []
