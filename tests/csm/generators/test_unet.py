import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from csm.errors import InputError
from csm.generators import load_generator
from csm.generators.guidance import set_guidance
from csm.generators.unet import NO_CLASS, UNetGenerator, UNetSpec, load_unet

SPEC = UNetSpec(shape=(8, 8, 1), n_classes=3, sigma_data=0.4, block_channels=(8, 16), layers_per_block=1, dropout=0.0)


class Stub(nn.Module):
    """Gives back a fixed picture and remembers what it was called with."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output, self.dtype = output, torch.float32

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        self.sample, self.timestep, self.condition = sample, timestep, class_labels
        return (self.output,)


def generator(spec: UNetSpec = SPEC, seed: int = 0) -> UNetGenerator:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNetGenerator(spec).eval().requires_grad_(False)


def batch(rows: int = 3, channels: int = 1) -> torch.Tensor:
    return torch.randn((rows, channels, 8, 8), generator=torch.Generator().manual_seed(2))


def test_preconditioning_is_that_of_edm_row_by_row() -> None:
    model, x = generator(), batch()
    output = batch(3) * 0.7 + 0.1
    stub = Stub(output)
    model.unet = stub
    sigmas = [0.002, 0.5, 80.0]
    condition = model.embed(torch.tensor([0, 2, 1]))
    denoised = model.denoise(x, torch.tensor(sigmas), condition)
    data = SPEC.sigma_data
    for row, sigma in enumerate(sigmas):  # Karras et al. 2022, table 1
        c_skip = data**2 / (sigma**2 + data**2)
        c_out = sigma * data / math.sqrt(sigma**2 + data**2)
        c_in = 1 / math.sqrt(sigma**2 + data**2)
        assert torch.allclose(stub.sample[row], c_in * x[row], rtol=1e-5, atol=1e-6)
        assert torch.allclose(denoised[row], c_skip * x[row] + c_out * output[row], rtol=1e-5, atol=1e-6)
        assert stub.timestep[row].item() == pytest.approx(250 * math.log(sigma) / 4, rel=1e-5)
    assert torch.equal(stub.condition, condition)


def test_without_noise_nothing_is_changed() -> None:
    model, x = generator(), batch()
    denoised = model.denoise(x, torch.full((3,), 1e-6), model.embed(torch.tensor([0, 1, 2])))
    assert torch.allclose(denoised, x, atol=1e-4)


def test_the_class_and_the_noise_level_matter() -> None:
    model, x = generator(), batch(1)
    zero, one = (model.denoise(x, torch.ones(1), model.embed(torch.tensor([label]))) for label in (0, 1))
    assert (zero - one).abs().max() > 1e-4
    high = model.denoise(x, torch.full((1,), 3.0), model.embed(torch.tensor([0])))
    assert (zero - high).abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(8, 8, 3), (4, 8, 1)], ids=["colour", "not-square"])
def test_shapes(shape: tuple[int, int, int]) -> None:
    height, width, channels = shape
    model = generator(UNetSpec(shape, 3, 0.4, (8, 16), 1, 0.0))
    x = torch.zeros(2, channels, height, width)
    assert model.denoise(x, torch.ones(2), model.embed(torch.tensor([0, 1]))).shape == x.shape
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize(("levels", "attended"), [(1, [False, False, True]), (2, [False, True, True]), (9, [True, True, True])])
def test_the_lowest_levels_have_attention(levels: int, attended: list[bool]) -> None:
    model = generator(UNetSpec((8, 8, 1), 3, 0.4, (8, 16, 16), 1, 0.0, attention_levels=levels))
    assert [hasattr(block, "attentions") for block in model.unet.down_blocks] == attended
    assert [hasattr(block, "attentions") for block in model.unet.up_blocks] == attended[::-1]
    x, labels = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    assert torch.equal(model(x, torch.ones(2), labels), model.denoise(x, torch.ones(2), model.embed(labels)))


def test_an_older_file_without_attention_levels_is_read(tmp_path: Path) -> None:
    generator().save(tmp_path)
    value = json.loads((tmp_path / "generator.json").read_text())
    del value["attention_levels"]
    (tmp_path / "generator.json").write_text(json.dumps(value))
    assert load_unet(tmp_path).spec == SPEC


def test_what_solvers_need_to_know() -> None:
    model = generator(UNetSpec((4, 8, 1), 3, 0.4, (8, 16), 1, 0.0))
    assert model.n_classes == 3
    assert model.noise_shape == (1, 4, 8)  # channels first, where the spec has them last
    assert model.sigma_range == (0.002, 80.0)


def test_decoding_leaves_pixels_as_they_are() -> None:
    x = 2 * batch()
    assert torch.equal(generator().decode(x), x)


def test_a_saved_generator_is_the_same(tmp_path: Path) -> None:
    model = generator()
    model.save(tmp_path)
    again = load_generator(tmp_path)
    assert isinstance(again, UNetGenerator)
    assert again.spec == SPEC
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    labels, sigma = torch.tensor([2, 0, 1]), torch.tensor([0.1, 1.0, 10.0])
    assert torch.equal(again.embed(labels), model.embed(labels))
    assert torch.equal(again.denoise(batch(), sigma, again.embed(labels)), model.denoise(batch(), sigma, model.embed(labels)))


def test_no_class_is_the_condition_0_and_guidance_leads_away_from_it() -> None:
    model, x, sigma = generator(replace(SPEC, label_dropout=0.1)), batch(), torch.tensor([0.1, 1.0, 10.0])
    condition = model.embed(torch.tensor([2, 0, 1]))
    with_class, without = (model.denoise(x, sigma, each) for each in (condition, torch.zeros_like(condition)))
    shown = model(x, sigma, torch.tensor([2, NO_CLASS, 1]))
    assert torch.allclose(shown, torch.stack([with_class[0], without[1], with_class[2]]), atol=1e-5)
    set_guidance(model, 2.5)
    assert torch.allclose(model.denoise(x, sigma, condition), without + 2.5 * (with_class - without), atol=1e-4)
    assert (with_class - without).abs().max() > 1e-3


def test_only_who_saw_images_without_a_class_can_be_guided(tmp_path: Path) -> None:
    generator(replace(SPEC, label_dropout=0.1)).save(tmp_path)
    set_guidance(load_unet(tmp_path), 3.0)
    with pytest.raises(
        InputError, match=r"^mix.guidance: this generator has no condition of no class, .* expected 1, got 3; train"
    ):
        set_guidance(generator(), 3.0)
    set_guidance(generator(), 1.0)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    generator().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model.safetensors is not a whole safetensors file"):
        load_unet(tmp_path)


@pytest.mark.parametrize(
    "foreign",
    [
        UNetSpec((8, 8, 1), 4, 0.4, (8, 16), 1, 0.0),
        UNetSpec((8, 8, 1), 3, 0.4, (8, 16), 2, 0.0),
        UNetSpec((8, 8, 3), 3, 0.4, (8, 16), 1, 0.0),
    ],
    ids=["classes", "layers", "channels"],
)
def test_foreign_weights_are_named(tmp_path: Path, foreign: UNetSpec) -> None:
    generator(foreign).save(tmp_path / "foreign")
    generator().save(tmp_path)
    (tmp_path / "foreign" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors holds the weights of another network"):
        load_unet(tmp_path)


@pytest.mark.parametrize("missing", ["model.safetensors", "generator.json"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    generator().save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=f"{missing} does not exist"):
        load_generator(tmp_path)


def test_an_unknown_kind_is_named_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "generator.json").write_text(json.dumps({"kind": "gan"}))
    with pytest.raises(InputError, match=r"generator.json: unknown kind 'gan'; one of .*unet"):
        load_generator(tmp_path)
