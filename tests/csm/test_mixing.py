from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
import pytest
import torch

from csm import tables
from csm.datasets.real import build
from csm.errors import InputError
from csm.generators.acceleration import accelerate
from csm.generators.conditioning import OPERATORS
from csm.generators.gaussians import fit_gaussians
from csm.generators.unet import UNetGenerator, UNetSpec
from csm.mixing import GENERATED, evaluations_per_image, fit_to, mix, sample, to_uint8
from csm.noise import initial_noise
from csm.planning import PlanConfig, make_plan
from csm.sampling import SamplerConfig
from csm.training_images import TrainingImages, pixel_mixtures, real_images

SHAPE = (4, 4, 1)
SAMPLER = SamplerConfig(steps=4, sigma_max=10.0)


@dataclass
class Flat:
    """Every image of a class is one grey level, which is also its condition; it remembers what it was first given."""

    levels: tuple[float, ...] = (-0.8, 0.0, 0.6)
    starts: list[torch.Tensor] = field(default_factory=list)
    spherical = True
    rows = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def n_classes(self) -> int:
        return len(self.levels)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        return (SHAPE[2], *SHAPE[:2])

    @property
    def sigma_range(self) -> tuple[float, float]:
        return (0.002, 80.0)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.levels)[labels][:, None]

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        if sigma[0] == SAMPLER.sigma_max:
            self.starts.append(x)
        return condition.view(-1, 1, 1, 1).expand_as(x)


class Broken(Flat):
    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return x * float("nan")


@pytest.fixture(scope="module")
def network() -> UNetGenerator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNetGenerator(UNetSpec(SHAPE, 3, 0.5, (8, 16), 1, 0.0)).eval().requires_grad_(False)


def plan(ratios: object = 3, sets: int = 2, noise: str = "image") -> pl.DataFrame:
    return make_plan(3, "data", "net", PlanConfig(ratios=ratios, sets_per_pair=sets, noise=noise))


def images_of(mixed: pl.DataFrame) -> torch.Tensor:
    return tables.to_images(mixed["image"], SHAPE)


def test_the_ratio_is_the_share_of_class_a() -> None:
    rows = plan(ratios=5)
    generator = Flat()
    images = images_of(mix(rows, generator, SHAPE, SAMPLER))
    for image, row in zip(images, rows.rows(named=True), strict=True):
        level = row["lam"] * generator.levels[row["class_a"]] + (1 - row["lam"]) * generator.levels[row["class_b"]]
        assert (image.double() - (level + 1) * 127.5).abs().max() <= 0.51


def test_score_mixing_of_grey_levels_is_their_mixture() -> None:
    rows, generator = plan(ratios=5), Flat()
    assert mix(rows, generator, SHAPE, SAMPLER, operator="score").equals(mix(rows, Flat(), SHAPE, SAMPLER))


def test_slerp_of_grey_levels_is_linear() -> None:
    # Vectors of one number are parallel or opposite.
    rows = plan(ratios=5)
    assert mix(rows, Flat(), SHAPE, SAMPLER, operator="slerp").equals(mix(rows, Flat(), SHAPE, SAMPLER))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("ratios", [2, 5, (0.0, 0.3), (0.2, 0.7, 0.8)])
def test_evaluations_are_those_that_mixing_makes(operator: str, ratios: object) -> None:
    rows, generator = plan(ratios=ratios), Flat()
    mix(rows, generator, SHAPE, SAMPLER, batch_size=7, operator=operator)
    each = evaluations_per_image(SAMPLER, operator, rows["lam"].to_list())
    assert generator.rows == pytest.approx(len(rows) * each)
    assert evaluations_per_image(SAMPLER, operator, rows["lam"].to_list(), guidance=3.0) == 2 * each


def test_operators_make_different_pictures_between_the_same_ends(network: UNetGenerator) -> None:
    rows = plan(ratios=3)
    images = {name: images_of(mix(rows, network, SHAPE, SAMPLER, operator=name)).int() for name in OPERATORS}
    middle = torch.from_numpy(rows["lam"].to_numpy() == 0.5)
    for name in ("slerp", "score"):
        assert (images[name] - images["embedding"])[~middle].abs().max() <= 1  # the batch of another size rounds differently
        assert (images[name] - images["embedding"])[middle].abs().max() > 1


def test_order_and_ids_are_those_of_the_plan() -> None:
    rows = plan().sample(fraction=1.0, shuffle=True, seed=1)
    mixed = mix(rows, Flat(), SHAPE, SAMPLER, batch_size=5)
    assert tables.check(mixed, tables.MIXED) is mixed
    assert mixed["mix_id"].to_list() == rows["mix_id"].to_list()
    straight = dict(mix(plan(), Flat(), SHAPE, SAMPLER, batch_size=7).iter_rows())
    assert dict(mixed.iter_rows()) == straight


def test_all_ratios_of_a_set_start_from_the_sets_own_noise() -> None:
    rows, generator = plan(noise="set"), Flat()
    mix(rows, generator, SHAPE, SAMPLER, batch_size=4)
    starts = torch.cat(generator.starts)
    assert torch.allclose(starts, initial_noise(rows["seed"].to_list(), (1, 4, 4)) * 10.0)
    sets = list(rows.select("class_a", "class_b", "group").iter_rows())
    for left in range(len(rows)):
        for right in range(left):
            assert torch.equal(starts[left], starts[right]) == (sets[left] == sets[right])


def test_neighbours_in_the_batch_do_not_matter(network: UNetGenerator) -> None:
    rows = plan()
    together = images_of(mix(rows, network, SHAPE, SAMPLER, batch_size=18)).float()
    alone = images_of(mix(rows, network, SHAPE, SAMPLER, batch_size=1)).float()
    assert (together - alone).abs().mean(dim=(1, 2, 3)).max() < 0.5
    assert together.std() > 10  # they are pictures, and not all one
    assert len({image.numpy().tobytes() for image in together}) == len(rows)


def test_the_same_rows_give_the_same_bits(network: UNetGenerator) -> None:
    assert mix(plan(), network, SHAPE, SAMPLER).equals(mix(plan(), network, SHAPE, SAMPLER))


def test_added_noise_belongs_to_the_row_too(network: UNetGenerator) -> None:
    rows, churned = plan(), replace(SAMPLER, solver="heun", churn=4.0)
    together = images_of(mix(rows, network, SHAPE, churned, batch_size=18)).float()
    other = images_of(mix(rows.reverse(), network, SHAPE, churned, batch_size=5)).flip(0).float()
    assert (together - other).abs().mean(dim=(1, 2, 3)).max() < 0.5
    assert mix(rows, network, SHAPE, churned).equals(mix(rows, network, SHAPE, churned))
    plain = images_of(mix(rows, network, SHAPE, replace(churned, churn=0.0), batch_size=18)).float()
    assert (together - plain).abs().mean(dim=(1, 2, 3)).min() > 5  # every image has moved


@pytest.mark.parametrize(("lam", "name"), [(1.0, "class_a"), (0.0, "class_b")])
def test_an_endpoint_is_the_unmixed_image_of_its_class(network: UNetGenerator, lam: float, name: str) -> None:
    rows = plan().filter(pl.col("lam") == lam)
    assert len(rows) == 6
    images = images_of(mix(rows, network, SHAPE, SAMPLER))
    assert torch.equal(images, sample(rows[name].to_list(), rows["seed"].to_list(), network, SHAPE, SAMPLER))
    other = "class_b" if name == "class_a" else "class_a"
    assert not torch.equal(images, sample(rows[other].to_list(), rows["seed"].to_list(), network, SHAPE, SAMPLER))


def test_colour_images_that_are_not_square_keep_their_shape() -> None:
    mixed = mix(plan(), Flat(), (2, 5, 3), SAMPLER)
    assert tables.to_images(mixed["image"], (2, 5, 3)).shape == (18, 3, 2, 5)


def test_levels_are_rounded_and_clipped() -> None:
    images = torch.tensor([-7.0, -1.0, -0.999, 0.0, 0.5, 0.9999, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 0, 128, 191, 255, 255, 255]
    levels = torch.arange(256)
    assert to_uint8(levels / 127.5 - 1).tolist() == levels.tolist()


def test_a_generator_that_gives_no_numbers_stops_the_mixing() -> None:
    with pytest.raises(InputError, match="not finite: fit it again or import another one"):
        mix(plan(), Broken(), SHAPE, SAMPLER)


class Latent(Flat):
    """Starts from noise of another shape and knows a narrower range of noise than the sampler asks for."""

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        return (2, 2, 2)

    @property
    def sigma_range(self) -> tuple[float, float]:
        return (0.05, 7.0)

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == self.noise_shape
        assert 0.05 * (1 - 1e-6) <= sigma.min() <= sigma.max() <= 7.0 * (1 + 1e-6)
        self.starts.append(sigma[:1])
        return condition.view(-1, 1, 1, 1).expand_as(x)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=1, keepdim=True).repeat(1, 3, 4, 4)  # colour, 8x8


def test_latents_are_decoded_and_fitted_to_the_data() -> None:
    rows = plan()
    generator = Latent()
    mixed = mix(rows, generator, SHAPE, SAMPLER)
    assert images_of(mixed).shape == (len(rows), 1, 4, 4)
    assert images_of(mixed).equal(images_of(mix(rows, Flat(), SHAPE, SAMPLER)))
    assert max(generator.starts).item() == pytest.approx(7.0)
    assert min(generator.starts).item() == pytest.approx(0.05)


def test_images_of_the_right_shape_are_left_alone() -> None:
    images = torch.rand(2, 3, 4, 5)
    assert fit_to(images, (4, 5, 3)) is images


def test_colour_becomes_luma_and_grey_becomes_three_equal_channels() -> None:
    primaries = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 2, 2)
    assert fit_to(primaries, (2, 2, 1))[:, 0, 0, 0].tolist() == pytest.approx([0.299, 0.587, 0.114])
    grey = torch.rand(2, 1, 2, 2)
    assert fit_to(grey, (2, 2, 3)).equal(torch.cat([grey] * 3, dim=1))


def test_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 4 channels cannot become images of 3"):
        fit_to(torch.zeros(1, 4, 2, 2), (2, 2, 3))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> TrainingImages:
    """Thirty training images, ten of each of three classes."""
    draw, labels = np.random.default_rng(0), np.arange(60) % 3
    splits = np.repeat(["train", "val", "test"], [30, 15, 15])
    data = build("toy", draw.integers(0, 256, (60, *SHAPE), dtype=np.uint8), labels, splits, ("a", "b", "c"))
    path = tmp_path_factory.mktemp("real") / "real.parquet"
    tables.write(data.frame, path, tables.REAL)
    return TrainingImages(path, SHAPE)


def plan_of(kind: str, real: TrainingImages, ratios: object = 5) -> pl.DataFrame:
    config = PlanConfig(ratios=ratios, sets_per_pair=4, kinds=(kind,))
    return make_plan(3, "data", "net", config, labels=real.labels)


def test_unmixed_images_are_samples_of_one_class(network: UNetGenerator, real: TrainingImages) -> None:
    rows = plan_of("unmixed", real)
    classes = [row["class_a"] if row["lam"] else row["class_b"] for row in rows.rows(named=True)]
    images = images_of(mix(rows, network, SHAPE, SAMPLER))
    assert torch.equal(images, sample(classes, rows["seed"].to_list(), network, SHAPE, SAMPLER))
    assert len({image.numpy().tobytes() for image in images}) == len(rows)


@pytest.mark.parametrize(("kind", "function"), [("pixel", pixel_mixtures), ("real", real_images)])
def test_what_is_made_of_real_images_needs_no_generator(kind: str, function, real: TrainingImages) -> None:
    rows = plan_of(kind, real)
    mixed = mix(rows, None, SHAPE, SAMPLER, real=real)
    assert mixed["mix_id"].equals(rows["mix_id"])
    assert torch.equal(images_of(mixed), function(rows, real))


@pytest.mark.parametrize("solver", ["heun", "euler", "abm-3"])
def test_little_noise_gives_nearly_the_real_image(solver: str, real: TrainingImages) -> None:
    rows = plan_of("noised", real)
    generator = fit_gaussians(real.take(np.arange(30)), torch.from_numpy(real.labels.astype(np.int64)), 3)
    sampler = SamplerConfig(solver=solver, steps=8, sigma_min=0.002)
    start = real.take(real.nearer(rows)).float()
    distances = []
    for strength in (0.004, 0.3, 20.0):
        images = images_of(mix(rows, generator, SHAPE, sampler, batch_size=7, real=real, strength=strength)).float()
        distances.append((images - start).abs().mean().item())
    assert distances[0] < 1  # level of 255
    assert distances[0] < distances[1] < distances[2]


def test_noised_images_start_from_the_nearer_image_with_the_noise_of_the_set(real: TrainingImages) -> None:
    rows, generator = plan_of("noised", real), Flat()
    mix(rows, generator, SHAPE, replace(SAMPLER, sigma_max=80.0), batch_size=4, real=real, strength=SAMPLER.sigma_max)
    image = real.take(real.nearer(rows)).double() / 127.5 - 1
    expected = image + SAMPLER.sigma_max * initial_noise(rows["seed"].to_list(), (1, 4, 4)).double()
    assert torch.allclose(torch.cat(generator.starts).double(), expected, atol=1e-5)


def test_a_noised_image_is_denoised_under_the_mixed_condition(real: TrainingImages) -> None:
    rows = plan_of("noised", real)
    images = images_of(mix(rows, Flat(), SHAPE, SAMPLER, real=real))
    assert torch.equal(images, images_of(mix(rows.with_columns(kind=pl.lit("semantic")), Flat(), SHAPE, SAMPLER)))


@pytest.mark.parametrize(
    ("generator", "strength", "message"),
    [
        (Flat(), 81.0, r"mix.strength: expected a noise level above 0.02 and up to 80, which .* got 81"),
        (Flat(), 0.02, "mix.strength: expected a noise level above 0.02 and up to 80"),
        (Latent(), 1.0, r"plan.kinds: noised needs a generator of the data's own pixels \(4 x 4 x 1\)"),
    ],
)
def test_noise_that_the_generator_does_not_know_is_refused(
    generator: Flat, strength: float, message: str, real: TrainingImages
) -> None:
    with pytest.raises(InputError, match=message):
        mix(plan_of("noised", real), generator, SHAPE, SAMPLER, real=real, strength=strength)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", tables.KINDS)
def test_evaluations_of_a_kind_are_those_that_it_makes(kind: str, operator: str, real: TrainingImages) -> None:
    rows, generator = plan_of(kind, real), Flat()
    mix(rows, generator, SHAPE, SAMPLER, operator=operator, real=real)
    ratios = plan_of("semantic", real)["lam"].to_list()
    assert generator.rows == pytest.approx(len(rows) * evaluations_per_image(SAMPLER, operator, ratios, kind))


def test_rows_of_two_kinds_and_missing_sources_are_refused(real: TrainingImages) -> None:
    both = pl.concat([plan_of("pixel", real), plan_of("semantic", real)])
    with pytest.raises(ValueError, match="plan: expected rows of one kind"):
        mix(both, Flat(), SHAPE, SAMPLER, real=real)
    with pytest.raises(ValueError, match="real: images of kind pixel need it, got None"):
        mix(plan_of("pixel", real), Flat(), SHAPE, SAMPLER)
    with pytest.raises(ValueError, match="generator: images of kind unmixed need it, got None"):
        mix(plan_of("unmixed", real), None, SHAPE, SAMPLER)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GENERATED)
def test_on_a_gpu_the_images_are_those_of_the_cpu_up_to_rounding(kind: str, network: UNetGenerator, real: TrainingImages) -> None:
    rows = plan_of(kind, real)
    expected = images_of(mix(rows, network, SHAPE, SAMPLER, batch_size=7, real=real)).int()
    found = images_of(mix(rows, accelerate(deepcopy(network), "cuda", "float32"), SHAPE, SAMPLER, batch_size=7, real=real)).int()
    assert (found - expected).abs().max() <= 2  # levels of 255
