import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from csm.errors import InputError
from csm.generators import load_generator
from csm.generators.conditioning import OPERATORS, mix_embeddings
from csm.generators.dit import DiTGenerator, import_dit
from csm.generators.importing import ImportOptions

NAMES, CLASSES = ("a", "b", "c"), (4, 0, 2)
LABELS, NUMBERS = torch.tensor([2, 0, 1]), torch.tensor([2, 4, 0])
NONE = 5  # the class of none of the tiny model
STEP = 400


@pytest.fixture
def source(dit_pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dit_pipeline, tmp_path / "source"))


@pytest.fixture(scope="module")
def generators(dit_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, DiTGenerator]:
    """Without and with guidance; imported, and loaded when the source is gone."""
    folder, loaded = tmp_path_factory.mktemp("generator"), {}
    shutil.copytree(dit_pipeline, folder / "source")
    for scale in (1.0, 3.5):
        import_dit(folder / "source", folder / str(scale), ImportOptions(NAMES, CLASSES, guidance=scale))
    shutil.rmtree(folder / "source")
    for scale in (1.0, 3.5):
        generator = load_generator(folder / str(scale))
        assert isinstance(generator, DiTGenerator)
        loaded[scale] = generator
    return loaded


@pytest.fixture(scope="module")
def original(dit_pipeline: Path) -> DiTTransformer2DModel:
    return DiTTransformer2DModel.from_pretrained(dit_pipeline / "transformer").eval().requires_grad_(False)


def batch() -> torch.Tensor:
    return torch.randn((3, 4, 4, 4), generator=torch.Generator().manual_seed(2))


def denoised(generator: DiTGenerator, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """D at ``STEP``, of x such that the network sees ``z``."""
    sigma = generator.schedule.log_sigmas[STEP].exp().float()
    return generator.denoise(z * (sigma**2 + 1).sqrt(), sigma.expand(len(z)), condition)


def expected(output: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """What diffusers makes of the network's output."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(1000)
    return scheduler.step(output, STEP, z).pred_original_sample


def steps(rows: int = 3) -> torch.Tensor:
    return torch.full((rows,), STEP)


def test_one_hot_conditions_are_the_integer_labels_of_the_original(
    generators: dict[float, DiTGenerator], original: DiTTransformer2DModel
) -> None:
    generator, z = generators[1.0], batch()
    theirs = original(z, steps(), NUMBERS).sample
    assert theirs.shape[1] == 8
    ours = generator.transformer(z, steps(), generator.embed(LABELS)).sample
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(denoised(generator, z, generator.embed(LABELS)), expected(theirs[:, :4], z), atol=1e-4)


def test_guidance_is_that_of_the_pipeline(generators: dict[float, DiTGenerator], original: DiTTransformer2DModel) -> None:
    generator, z = generators[3.5], batch()
    both = original(torch.cat([z, z]), steps(6), torch.cat([NUMBERS, torch.full((3,), NONE)])).sample[:, :4]
    with_class, without = both.split(3)
    output = without + 3.5 * (with_class - without)
    assert torch.allclose(denoised(generator, z, generator.embed(LABELS)), expected(output, z), atol=1e-4)


def test_halfway_between_two_classes_every_table_gives_the_mean(
    generators: dict[float, DiTGenerator], dit_pipeline: Path
) -> None:
    generator, z = generators[1.0], batch()
    a, b = generator.embed(torch.tensor([0, 0, 0])), generator.embed(torch.tensor([1, 1, 1]))
    mixed = mix_embeddings(a, b, torch.full((3,), 0.5))
    assert mixed[0].tolist() == [0.5, 0, 0, 0, 0.5, 0]
    original = DiTTransformer2DModel.from_pretrained(dit_pipeline / "transformer").eval().requires_grad_(False)
    for block in original.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight
        table[1] = (table[4] + table[0]) / 2
    theirs = original(z, steps(), torch.tensor([1, 1, 1])).sample
    assert torch.allclose(generator.transformer(z, steps(), mixed).sample, theirs, atol=1e-6)
    assert not torch.allclose(generator.transformer(z, steps(), a).sample, theirs, atol=1e-4)


def test_decoding_is_that_of_the_autoencoder(generators: dict[float, DiTGenerator], dit_pipeline: Path) -> None:
    vae = AutoencoderKL.from_pretrained(dit_pipeline / "vae").eval()
    with torch.no_grad():
        theirs = vae.decode(batch() / 0.2).sample
    images = generators[1.0].decode(batch())
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.float32
    assert torch.allclose(images, theirs, atol=1e-6)


def test_what_solvers_need_to_know(generators: dict[float, DiTGenerator]) -> None:
    generator = generators[3.5]
    assert generator.n_classes == 3
    assert generator.noise_shape == (4, 4, 4)
    assert generator.sigma_range == pytest.approx((0.01, 157.4), rel=0.01)  # of DDPM's linear schedule
    assert generator.device == torch.device("cpu")
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())


def test_what_is_written(source: Path, tmp_path: Path) -> None:
    import_dit(source, tmp_path / "imported", ImportOptions(NAMES, CLASSES, guidance=2.0))
    files = {str(file.relative_to(tmp_path / "imported")) for file in (tmp_path / "imported").rglob("*") if file.is_file()}
    weights = {
        f"{name}/{file}" for name in ("transformer", "vae") for file in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    assert files == weights | {"scheduler/scheduler_config.json", "generator.json"}
    value = json.loads((tmp_path / "imported" / "generator.json").read_text())
    assert value == {"kind": "dit", "classes": [4, 0, 2], "guidance": 2.0}


def test_the_class_name_before_diffusers_0_28(source: Path, tmp_path: Path, edit: Callable[..., None]) -> None:
    old = {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "double_self_attention": False}
    edit(source / "transformer" / "config.json", **old)
    import_dit(source, tmp_path / "imported", ImportOptions(NAMES, CLASSES))
    assert load_generator(tmp_path / "imported").n_classes == 3


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"_class_name": "PixArtTransformer2DModel"}, "'PixArtTransformer2DModel' cannot be used"),
        ("transformer/config.json", {"norm_type": "layer_norm"}, "norm_type is 'layer_norm'; expected 'ada_norm_zero'"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "'AutoencoderTiny' cannot be used; expected AutoencoderKL"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "'EDMEulerScheduler' cannot be used"),
    ],
)
def test_other_models_are_refused_in_one_line(
    source: Path, tmp_path: Path, edit: Callable[..., None], file: str, changes: dict[str, Any], message: str
) -> None:
    edit(source / file, **changes)
    with pytest.raises(InputError, match=f"{file}: {message}") as caught:
        import_dit(source, tmp_path / "imported", ImportOptions(NAMES, CLASSES))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "imported").exists()


def test_other_numbers_of_channels_are_refused(source: Path, tmp_path: Path) -> None:
    settings = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "norm_num_groups": 4, "sample_size": 4}
    DiTTransformer2DModel(**settings, out_channels=5).save_pretrained(source / "transformer")
    with pytest.raises(InputError, match=r"5 output channels for 4 input channels"):
        import_dit(source, tmp_path / "imported", ImportOptions(NAMES, CLASSES))
    DiTTransformer2DModel(**settings, in_channels=2).save_pretrained(source / "transformer")
    with pytest.raises(InputError, match=r"vae/config.json: latent codes of 4 channels for a network of 2"):
        import_dit(source, tmp_path / "imported", ImportOptions(NAMES, CLASSES))


def test_classes_must_fit(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"5 is no class of the model, which has 0..4"):  # 5 is none
        import_dit(source, tmp_path / "imported", ImportOptions(("a",), (5,)))


@pytest.mark.parametrize("missing", ["transformer/config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_missing_file_is_named(source: Path, tmp_path: Path, missing: str) -> None:
    import_dit(source, tmp_path / "imported", ImportOptions(NAMES, CLASSES))
    (tmp_path / "imported" / missing).unlink()
    with pytest.raises(InputError, match=f"{missing} does not exist"):
        load_generator(tmp_path / "imported")
    (source / missing).unlink()
    with pytest.raises(InputError, match=f"{missing} does not exist"):
        import_dit(source, tmp_path / "imported", ImportOptions(NAMES, CLASSES))


def test_score_mixes_the_guided_denoisers_and_slerp_is_refused(generators: dict[float, DiTGenerator]) -> None:
    generator, x, sigma = generators[3.5], batch(), torch.full((3,), 0.7)
    a, b, lam = LABELS, LABELS.roll(1), torch.tensor([0.0, 0.3, 1.0])
    under_a, under_b = (generator.denoise(x, sigma, generator.embed(labels)) for labels in (a, b))
    share = lam.view(-1, 1, 1, 1)
    mixed = OPERATORS["score"](generator, a, b, lam)(x, sigma)
    assert torch.allclose(mixed, share * under_a + (1 - share) * under_b, atol=1e-5)
    linear = OPERATORS["embedding"](generator, a, b, lam)(x, sigma)
    assert not torch.allclose(mixed[1], linear[1], atol=1e-4)
    assert torch.allclose(mixed[[0, 2]], linear[[0, 2]], atol=1e-5)
    with pytest.raises(InputError, match=r"mix.operator: slerp needs a generator whose condition is an embedding"):
        OPERATORS["slerp"](generator, a, b, lam)
