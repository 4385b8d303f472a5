import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from csm import storage
from csm.errors import InputError
from csm.generators import load_generator
from csm.generators.conditioning import mix_embeddings
from csm.generators.diffusers_unet import DiffusersUNetGenerator, import_diffusers_unet
from csm.generators.importing import ImportOptions

OPTIONS = ImportOptions(class_names=("a", "b", "c"), classes=(3, 0, 2))
LABELS, NUMBERS = torch.tensor([2, 0, 1]), torch.tensor([2, 3, 0])
STEP = 17


@pytest.fixture
def source(unet_pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unet_pipeline, tmp_path / "source"))


@pytest.fixture(scope="module")
def generator(unet_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> DiffusersUNetGenerator:
    """Imported, and loaded when the source is gone."""
    folder = tmp_path_factory.mktemp("generator")
    shutil.copytree(unet_pipeline, folder / "source")
    import_diffusers_unet(folder / "source", folder / "imported", OPTIONS)
    shutil.rmtree(folder / "source")
    loaded = load_generator(folder / "imported")
    assert isinstance(loaded, DiffusersUNetGenerator)
    return loaded


def batch() -> torch.Tensor:
    return torch.randn((3, 3, 8, 4), generator=torch.Generator().manual_seed(2))


def denoised(generator: DiffusersUNetGenerator, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """D at ``STEP``, of x such that the network sees ``z``."""
    sigma = generator.schedule.log_sigmas[STEP].exp().float()
    return generator.denoise(z * (sigma**2 + 1).sqrt(), sigma.expand(len(z)), condition)


def expected(unet_pipeline: Path, output: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """What diffusers makes of the network's output."""
    settings = {"clip_sample": False}
    scheduler = DDIMScheduler.from_pretrained(unet_pipeline / "scheduler", **settings)
    scheduler.set_timesteps(1000)
    return scheduler.step(output, STEP, z).pred_original_sample


def test_it_denoises_as_the_original_with_integer_classes(generator: DiffusersUNetGenerator, unet_pipeline: Path) -> None:
    unet, z = UNet2DModel.from_pretrained(unet_pipeline / "unet").eval(), batch()
    with torch.no_grad():
        output = unet(z, STEP, class_labels=NUMBERS).sample[:, :3]
    ours = denoised(generator, z, generator.embed(LABELS))
    assert torch.allclose(ours, expected(unet_pipeline, output, z), atol=1e-4)


def test_halfway_between_two_classes_is_the_mean_of_their_embeddings(
    generator: DiffusersUNetGenerator, unet_pipeline: Path
) -> None:
    unet, z = UNet2DModel.from_pretrained(unet_pipeline / "unet").eval(), batch()
    with torch.no_grad():
        unet.class_embedding.weight[1] = (unet.class_embedding.weight[3] + unet.class_embedding.weight[2]) / 2
        output = unet(z, STEP, class_labels=torch.tensor([1, 1, 1])).sample[:, :3]
    a, b = generator.embed(torch.tensor([0, 0, 0])), generator.embed(torch.tensor([2, 2, 2]))
    ours = denoised(generator, z, mix_embeddings(a, b, torch.full((3,), 0.5)))
    assert torch.allclose(ours, expected(unet_pipeline, output, z), atol=1e-4)
    assert not torch.allclose(ours, denoised(generator, z, a), atol=1e-4)


def test_what_solvers_need_to_know(generator: DiffusersUNetGenerator) -> None:
    assert generator.n_classes == 3
    assert generator.noise_shape == (3, 8, 4)
    assert generator.sigma_range == pytest.approx((0.0064, 20291), rel=0.02)  # of the cosine schedule
    assert generator.device == torch.device("cpu")
    assert torch.equal(generator.decode(batch()), batch())
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())


def test_only_safetensors_and_json_are_written_and_the_mark_last(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "generator.json").write_text("of an earlier import")
    write, order = storage.write_json, []

    def record(path: Path, value: Any) -> None:
        assert not (tmp_path / "imported" / "generator.json").exists()
        order.append(path.name)
        write(path, value)

    monkeypatch.setattr(storage, "write_json", record)
    import_diffusers_unet(source, tmp_path / "imported", OPTIONS)
    assert order == ["scheduler_config.json", "generator.json"]
    assert {file.suffix for file in (tmp_path / "imported").rglob("*") if file.is_file()} == {".json", ".safetensors"}
    assert json.loads((tmp_path / "imported" / "generator.json").read_text()) == {"kind": "diffusers-unet", "classes": [3, 0, 2]}


@pytest.mark.parametrize("place", ["inside", "beside", "pipeline"])
def test_a_bare_unet_with_its_scheduler(source: Path, tmp_path: Path, place: str) -> None:
    if place != "pipeline":
        target = source / "unet" if place == "inside" else source
        (source / "scheduler" / "scheduler_config.json").rename(target / "scheduler_config.json")
    import_diffusers_unet(source / "unet", tmp_path / "imported", OPTIONS)
    assert load_generator(tmp_path / "imported").n_classes == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_class_embeds": None}, "the model knows no classes"),
        ({"class_embed_type": "timestep"}, "the model knows no classes"),
        ({"class_embed_type": "identity"}, "the model knows no classes"),
        ({"sample_size": None}, "sample_size is null"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'; expected 'positional'"),
        ({"out_channels": 4}, "4 output channels for 3 input channels"),
        ({"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel' cannot be used; expected UNet2DModel"),
    ],
)
def test_other_models_are_refused_in_one_line(
    source: Path, tmp_path: Path, edit: Callable[..., None], changes: dict[str, Any], message: str
) -> None:
    edit(source / "unet" / "config.json", **changes)
    with pytest.raises(InputError, match=f"config.json.*{message}") as caught:
        import_diffusers_unet(source, tmp_path / "imported", OPTIONS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "imported").exists()


def test_latent_models_are_refused(source: Path, tmp_path: Path, edit: Callable[..., None]) -> None:
    edit(source / "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(InputError, match=r"in the latent space of a vqvae cannot be used"):
        import_diffusers_unet(source, tmp_path / "imported", OPTIONS)


def test_guidance_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"generator.guidance: .* expected 1, got 2.0"):
        import_diffusers_unet(source, tmp_path / "imported", ImportOptions(("a",), (0,), guidance=2.0))


def test_classes_must_fit(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the model has 4 classes and the data 2"):
        import_diffusers_unet(source, tmp_path / "imported", ImportOptions(("a", "b")))


def test_a_missing_scheduler_is_named(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "scheduler")
    with pytest.raises(InputError, match=r"no scheduler_config.json; expected it in .*scheduler$"):
        import_diffusers_unet(source, tmp_path / "imported", OPTIONS)


@pytest.mark.parametrize(
    "missing", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
)
def test_what_an_import_lost_is_named(source: Path, tmp_path: Path, missing: str) -> None:
    import_diffusers_unet(source, tmp_path / "imported", OPTIONS)
    (tmp_path / "imported" / missing).unlink()
    with pytest.raises(InputError, match=f"{missing} does not exist"):
        load_generator(tmp_path / "imported")
