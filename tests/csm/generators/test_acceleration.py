from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from csm.errors import InputError
from csm.generators import Generator, acceleration
from csm.generators.acceleration import accelerate
from csm.generators.diffusers_unet import import_diffusers_unet, load_diffusers_unet
from csm.generators.dit import import_dit, load_dit
from csm.generators.importing import ImportOptions
from csm.generators.stable_diffusion import import_stable_diffusion, load_stable_diffusion
from csm.generators.unet import UNetGenerator, UNetSpec
from csm.precision import best_dtype


@pytest.fixture(params=["unet", "diffusers-unet", "dit", "stable-diffusion"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Generator]:
    """``make()`` gives a new generator of the kind, with the same weights each time."""
    kinds = {
        "diffusers-unet": ("unet_pipeline", import_diffusers_unet, load_diffusers_unet, 1.0),
        "dit": ("dit_pipeline", import_dit, load_dit, 1.5),
        "stable-diffusion": ("stable_diffusion_pipeline", import_stable_diffusion, load_stable_diffusion, 1.5),
    }

    def unet() -> Generator:
        torch.manual_seed(0)
        return UNetGenerator(UNetSpec((8, 8, 1), 2, 0.5, (16, 32), 1, 0.0)).eval().requires_grad_(False)

    if request.param == "unet":
        return unet
    fixture, take_over, load, guidance = kinds[request.param]
    classes = () if request.param == "stable-diffusion" else (1, 3)
    take_over(request.getfixturevalue(fixture), tmp_path / "generator", ImportOptions(("a", "b"), classes, guidance, "{}"))
    return lambda: load(tmp_path / "generator")


def denoised(generator: Generator) -> torch.Tensor:
    x = torch.randn(2, *generator.noise_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return generator.denoise(x, torch.tensor([0.3, 2.0]), generator.embed(torch.tensor([0, 1])))


def test_float32_on_the_cpu_changes_no_bit(make: Callable[[], Generator]) -> None:
    assert torch.equal(denoised(accelerate(make(), precision="float32")), denoised(make()))


def test_bfloat16_rounds_the_network_alone(make: Callable[[], Generator]) -> None:
    exact, generator = denoised(make()), accelerate(make(), precision="bfloat16")
    rounded = denoised(generator)
    assert {weight.dtype for weight in generator.network.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()  # bfloat16 has 8 bits: 0.4 % for each operation
    assert {generator.embed(torch.tensor([0])).dtype, generator.decode(torch.zeros(1, *generator.noise_shape)).dtype} == {
        torch.float32
    }


def test_convolutions_lie_channels_last_in_bfloat16(make: Callable[[], Generator]) -> None:
    network = accelerate(make(), precision="bfloat16").network
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]  # type: ignore[union-attr]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_auto_takes_bfloat16_for_large_networks_on_processors_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, small = torch.device("cpu"), nn.Linear(10, 10)
    with torch.device("meta"):
        large = nn.Linear(10_000, 1_000)
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        assert best_dtype(large, cpu) == expected
        assert best_dtype(small, cpu) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert best_dtype(small, torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert best_dtype(small, torch.device("cuda")) == torch.float32


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_images_up_to_rounding() -> None:
    torch.manual_seed(0)
    generator = UNetGenerator(UNetSpec((8, 8, 1), 2, 0.5, (16,), 1, 0.0)).eval().requires_grad_(False)
    expected = denoised(generator)
    assert torch.allclose(denoised(accelerate(generator, compiled=True)), expected, atol=1e-4)


def test_without_a_gpu_one_is_refused(make: Callable[[], Generator], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"resources\.mix\.gpus: torch finds no CUDA device"):
        accelerate(make(), "cuda")


@pytest.mark.gpu
def test_on_a_gpu_the_images_are_those_of_the_cpu_up_to_rounding(make: Callable[[], Generator]) -> None:
    def on_gpu(generator: Generator) -> torch.Tensor:
        x = torch.randn(2, *generator.noise_shape, generator=torch.Generator().manual_seed(1)).cuda()
        with torch.no_grad():
            condition = generator.embed(torch.tensor([0, 1], device="cuda"))
            return generator.denoise(x, torch.tensor([0.3, 2.0], device="cuda"), condition).cpu()

    expected = denoised(make())
    assert torch.allclose(on_gpu(accelerate(make(), "cuda", "float32")), expected, atol=1e-2)
    assert torch.allclose(on_gpu(accelerate(make(), "cuda", "bfloat16")), expected, atol=0.05 * expected.abs().max().item())
