import pytest
import torch

from csm.generators.edm.generator import EDMGenerator, EDMSpec
from csm.generators.edm.unets import SongUNetSettings
from csm.generators.unet import UNetGenerator, UNetSpec
from flows.bench import mix

UNET = {"img_resolution": 32, "in_channels": 3, "out_channels": 3, "label_dim": 10, "model_channels": 8}
SPEC = EDMSpec(
    tuple(range(10)), "EDMPrecond", {"sigma_data": 0.5}, 0.002, 80.0,
    SongUNetSettings(**UNET, channel_mult=(1, 1), num_blocks=1, attn_resolutions=()),
)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """The benchmark on networks and products that take milliseconds."""
    monkeypatch.setattr(mix, "_edm", lambda: EDMGenerator(SPEC).eval().requires_grad_(False))
    trained = UNetGenerator(UNetSpec((8, 8, 1), 10, 0.5, (8, 16), 1, 0.0)).eval().requires_grad_(False)
    monkeypatch.setattr(mix, "trained_generator", lambda workspace: trained)
    monkeypatch.setattr(mix, "MATMUL", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(mix, "BATCH", {"cpu": 16, "cuda": 16})
    monkeypatch.setattr(mix, "LEVELS", 16)


def test_the_numbers_belong_together(small, monkeypatch):
    drawn = []
    monkeypatch.setattr(mix.Image.Image, "save", lambda image, path: drawn.append((path.name, image.size)))
    result = mix.mixing_speed(seconds=0.01)
    assert result["ratio_equal_evaluations"] == pytest.approx(result["images_per_s"] / result["baseline_images_per_s"], rel=0.01)
    assert result["ratio_equal_fidelity"] > result["ratio_equal_evaluations"] * 1.5  # a third of the evaluations
    assert (result["evaluations"], result["evaluations_equal_fidelity"]) == (39, 13)
    share = result["images_per_s"] * 39 * result["flops"] / result["matmul_flops"]
    assert result["peak_share"] == pytest.approx(share, abs=1e-3)
    assert result["precision"] == "float32"  # the network is small
    assert 0 < result["mean_abs_levels"] < 20
    assert len(drawn) == 16  # once to warm up, once timed: a set each, every image written by itself
    assert len(set(drawn)) == 8
    assert drawn[0][1] == (32, 32)


def test_operations_are_those_of_the_layers():
    generator = EDMGenerator(SPEC).eval().requires_grad_(False)
    counted = []

    def count(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            counted.append(2 * output.numel() * module.weight[0].numel())
        else:
            counted.append(2 * output.shape[0] * module.weight.numel())

    for module in generator.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        generator.denoise(torch.zeros(1, 3, 32, 32), torch.ones(1), generator.embed(torch.tensor([0])))
    layers = sum(counted)
    attention = 2 * 2 * 256 * 256 * 8  # the lowest block always attends: 16 x 16 positions of 8 channels, two products
    assert mix._flops(generator) == layers + attention
