import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from csm import storage
from csm.errors import InputError
from csm.generators import load_generator
from csm.generators.conditioning import OPERATORS, mix_embeddings, slerp_embeddings
from csm.generators.importing import ImportOptions
from csm.generators.stable_diffusion import StableDiffusionGenerator, encode_prompts, import_stable_diffusion

NAMES, PROMPT = ("cat", "dog", "fox"), "a {}"
PROMPTS = ["a cat", "a dog", "a fox"]
STEP = 250


@pytest.fixture
def source(stable_diffusion_pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stable_diffusion_pipeline, tmp_path / "source"))


@pytest.fixture(scope="module")
def generators(
    stable_diffusion_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[float, StableDiffusionGenerator]:
    """Without and with guidance; imported, and loaded when the source is gone."""
    folder, loaded = tmp_path_factory.mktemp("generator"), {}
    shutil.copytree(stable_diffusion_pipeline, folder / "source")
    for scale in (1.0, 7.5):
        import_stable_diffusion(folder / "source", folder / str(scale), ImportOptions(NAMES, guidance=scale, prompt=PROMPT))
    shutil.rmtree(folder / "source")
    for scale in (1.0, 7.5):
        generator = load_generator(folder / str(scale))
        assert isinstance(generator, StableDiffusionGenerator)
        loaded[scale] = generator
    return loaded


@pytest.fixture(scope="module")
def pipeline(stable_diffusion_pipeline: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(stable_diffusion_pipeline, safety_checker=None)


def batch() -> torch.Tensor:
    return torch.randn((3, 4, 4, 4), generator=torch.Generator().manual_seed(2))


def encoded(pipeline: Any, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the pipeline itself: the prompts (P, T, D), and as often the empty one."""
    with torch.no_grad():
        with_class, without = pipeline.encode_prompt(prompts, "cpu", 1, True)
    return with_class, without


def denoised(generator: StableDiffusionGenerator, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """D at ``STEP``, of x such that the network sees ``z``."""
    sigma = generator.schedule.log_sigmas[STEP].exp().float()
    return generator.denoise(z * (sigma**2 + 1).sqrt(), sigma.expand(len(z)), condition)


def expected(pipeline: Any, output: torch.Tensor, z: torch.Tensor, **settings: Any) -> torch.Tensor:
    """What diffusers makes of the network's output."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    scheduler.set_timesteps(999)
    return scheduler.step(output, STEP, z).pred_original_sample


def test_conditions_are_the_prompts_as_the_pipeline_encodes_them(
    generators: dict[float, StableDiffusionGenerator], pipeline: Any
) -> None:
    generator = generators[1.0]
    theirs, empty = encoded(pipeline, PROMPTS)
    assert theirs.shape == (3, 12, 8)
    assert torch.allclose(generator.embed(torch.tensor([0, 1, 2])), theirs, atol=1e-6)
    assert torch.allclose(generator.prompts[-1], empty[0], atol=1e-6)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-3


def test_it_denoises_as_the_original(generators: dict[float, StableDiffusionGenerator], pipeline: Any) -> None:
    generator, z = generators[1.0], batch()
    with torch.no_grad():
        output = pipeline.unet(z, STEP, encoded(pipeline, ["a fox", "a cat", "a dog"])[0]).sample
    ours = denoised(generator, z, generator.embed(torch.tensor([2, 0, 1])))
    assert torch.allclose(ours, expected(pipeline, output, z), atol=1e-4)


def test_guidance_is_that_of_the_pipeline(generators: dict[float, StableDiffusionGenerator], pipeline: Any) -> None:
    generator, z = generators[7.5], batch()
    condition, empty = encoded(pipeline, PROMPTS)
    with torch.no_grad():
        without, text = pipeline.unet(torch.cat([z, z]), STEP, torch.cat([empty, condition])).sample.chunk(2)
    output = without + 7.5 * (text - without)
    ours = denoised(generator, z, generator.embed(torch.tensor([0, 1, 2])))
    assert torch.allclose(ours, expected(pipeline, output, z), atol=1e-4)


def test_halfway_between_two_classes_the_network_sees_the_mean_text(
    generators: dict[float, StableDiffusionGenerator], pipeline: Any
) -> None:
    generator, z = generators[1.0], batch()
    theirs, _ = encoded(pipeline, PROMPTS)
    a, b = generator.embed(torch.tensor([0, 0, 0])), generator.embed(torch.tensor([1, 1, 1]))
    mixed = mix_embeddings(a, b, torch.full((3,), 0.5))
    with torch.no_grad():
        output = pipeline.unet(z, STEP, ((theirs[0] + theirs[1]) / 2).expand(3, -1, -1)).sample
    assert torch.allclose(denoised(generator, z, mixed), expected(pipeline, output, z), atol=1e-4)


def test_v_prediction(source: Path, tmp_path: Path, edit: Callable[..., None], pipeline: Any) -> None:
    edit(source / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")  # as Stable Diffusion 2's
    import_stable_diffusion(source, tmp_path / "imported", ImportOptions(NAMES, prompt=PROMPT))
    generator, z = load_generator(tmp_path / "imported"), batch()
    assert isinstance(generator, StableDiffusionGenerator)
    with torch.no_grad():
        output = pipeline.unet(z, STEP, encoded(pipeline, PROMPTS)[0]).sample
    ours = denoised(generator, z, generator.embed(torch.tensor([0, 1, 2])))
    assert torch.allclose(ours, expected(pipeline, output, z, prediction_type="v_prediction"), atol=1e-4)


def test_decoding_is_that_of_the_pipeline(generators: dict[float, StableDiffusionGenerator], pipeline: Any) -> None:
    with torch.no_grad():
        theirs = pipeline.vae.decode(batch() / pipeline.vae.config.scaling_factor).sample
    images = generators[1.0].decode(batch())
    assert images.shape == (3, 3, 8, 8)
    assert torch.allclose(images, theirs, atol=1e-6)


def test_what_solvers_need_to_know(generators: dict[float, StableDiffusionGenerator]) -> None:
    generator = generators[7.5]
    assert generator.n_classes == 3
    assert generator.noise_shape == (4, 4, 4)
    assert generator.sigma_range == pytest.approx((0.0292, 14.6146), abs=1e-3)
    assert generator.device == torch.device("cpu")
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())


def test_text_encoder_and_tokenizer_are_left_behind(source: Path, tmp_path: Path) -> None:
    import_stable_diffusion(source, tmp_path / "imported", ImportOptions(NAMES, guidance=2.0, prompt=PROMPT))
    files = {str(file.relative_to(tmp_path / "imported")) for file in (tmp_path / "imported").rglob("*") if file.is_file()}
    weights = {f"{name}/{file}" for name in ("unet", "vae") for file in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert files == weights | {"scheduler/scheduler_config.json", "prompts.safetensors", "generator.json"}
    value = json.loads((tmp_path / "imported" / "generator.json").read_text())
    assert value == {"kind": "stable-diffusion", "prompts": PROMPTS, "guidance": 2.0}


def test_names_of_weights_before_transformers_5(source: Path) -> None:
    before = encode_prompts(source, PROMPTS)
    file = source / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert torch.equal(encode_prompts(source, PROMPTS), before)


def test_a_tokenizer_of_vocabulary_and_merges(source: Path) -> None:
    before = encode_prompts(source, PROMPTS)
    (source / "tokenizer" / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / "words" / name, source / "tokenizer" / name)
    assert torch.equal(encode_prompts(source, PROMPTS), before)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "'StableDiffusionXLPipeline' cannot be used"),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            r"text_encoder is .*T5.*; expected CLIPTextModel",
        ),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'; expected null"),
        ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds is 1000; expected null"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256; expected null"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ("unet/config.json", {"sample_size": None}, "sample_size is null"),
        ("unet/config.json", {"in_channels": 9}, "4 output channels for 9 input channels"),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "'LCMScheduler' cannot be used"),
    ],
)
def test_other_models_are_refused_in_one_line(
    source: Path, tmp_path: Path, edit: Callable[..., None], file: str, changes: dict[str, Any], message: str
) -> None:
    edit(source / file, **changes)
    with pytest.raises(InputError, match=f"{file}: {message}") as caught:
        import_stable_diffusion(source, tmp_path / "imported", ImportOptions(NAMES, prompt=PROMPT))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ImportOptions(NAMES, classes=(0, 1, 2), prompt=PROMPT), r"generator.classes: Stable Diffusion has prompts, not numbers"),
        (
            ImportOptions(NAMES, prompt="a photo"),
            r"generator.prompt: expected a text with \{\} for the class name, got 'a photo'",
        ),
        (
            ImportOptions(NAMES, prompt="a long text of {}"),
            r"generator.prompt: 'a long text of cat' has 16 tokens; the model reads 12",
        ),
    ],
)
def test_options_that_cannot_be_used(source: Path, tmp_path: Path, options: ImportOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_stable_diffusion(source, tmp_path / "imported", options)


@pytest.mark.parametrize("missing", ["model_index.json", "unet/config.json", "text_encoder/model.safetensors", "vae/config.json"])
def test_a_missing_file_of_the_source_is_named(source: Path, tmp_path: Path, missing: str) -> None:
    (source / missing).unlink()
    with pytest.raises(InputError, match=f"{missing} does not exist"):
        import_stable_diffusion(source, tmp_path / "imported", ImportOptions(NAMES, prompt=PROMPT))


def test_a_damaged_text_encoder_is_named(source: Path, edit: Callable[..., None]) -> None:
    file = source / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    edit(source / "text_encoder" / "config.json", intermediate_size=32)
    with pytest.raises(
        InputError, match=r"text_encoder: encoder.layers.0.mlp.fc1.bias is \(16,\); by config.json it is \(32,\)"
    ) as caught:
        encode_prompts(source, PROMPTS)
    assert "\n" not in str(caught.value)
    edit(source / "text_encoder" / "config.json", intermediate_size=16)
    del tensors["embeddings.position_embedding.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"text_encoder: 1 of the weights of CLIPTextModel are missing, for example embeddings.pos"
    ):
        encode_prompts(source, PROMPTS)
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(InputError, match=r"pytorch_model.bin is damaged, or holds more than tensors"):
        encode_prompts(source, PROMPTS)


def test_a_tokenizer_without_its_words_is_named(source: Path) -> None:
    (source / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer cannot be loaded as CLIPTokenizer \(JSONDecodeError"):
        encode_prompts(source, PROMPTS)
    (source / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer has neither tokenizer.json nor vocab.json and merges.txt"):
        encode_prompts(source, PROMPTS)


def test_prompts_of_another_import_are_named(source: Path, tmp_path: Path) -> None:
    import_stable_diffusion(source, tmp_path / "imported", ImportOptions(NAMES, prompt=PROMPT))
    storage.write_tensors(tmp_path / "imported" / "prompts.safetensors", {"prompts": torch.zeros(3, 12, 8)})
    with pytest.raises(InputError, match=r"prompts.safetensors does not hold the 4 prompts: import the generator again"):
        load_generator(tmp_path / "imported")
    (tmp_path / "imported" / "prompts.safetensors").unlink()
    with pytest.raises(InputError, match=r"prompts.safetensors does not exist"):
        load_generator(tmp_path / "imported")


def test_every_operator_mixes_prompts_under_guidance(generators: dict[float, StableDiffusionGenerator]) -> None:
    generator, x, sigma = generators[7.5], batch(), torch.full((3,), 0.7)
    a, b, lam = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]), torch.tensor([0.0, 0.4, 1.0])
    prompts = generator.embed(a), generator.embed(b)
    mixed = {name: operator(generator, a, b, lam)(x, sigma) for name, operator in OPERATORS.items()}
    under_a, under_b = (generator.denoise(x, sigma, condition) for condition in prompts)
    assert torch.allclose(mixed["embedding"], generator.denoise(x, sigma, mix_embeddings(*prompts, lam)), atol=1e-5)
    assert torch.allclose(mixed["slerp"], generator.denoise(x, sigma, slerp_embeddings(*prompts, lam)), atol=1e-5)
    share = lam.view(-1, 1, 1, 1)
    assert torch.allclose(mixed["score"], share * under_a + (1 - share) * under_b, atol=1e-5)
    for name in OPERATORS:
        assert torch.allclose(mixed[name][[0, 2]], torch.stack([under_b[0], under_a[2]]), atol=1e-5)
