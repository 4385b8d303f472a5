"""From the file of a model to mixed images, by the verbs that a user types, for every kind and every operator."""

import json

import numpy as np
import polars as pl
import pytest
import yaml
from PIL import Image

from csm import tables
from csm.generators import load_generator
from csm.mixing import mix
from csm.sampling import SamplerConfig

SHAPE = (8, 8, 3)
KINDS = {"diffusers-unet": [1, 3], "dit": [1, 3], "stable-diffusion": [], "edm": [2, 9]}  # the model's classes of cat and dog
CASES = [
    ("diffusers-unet", "embedding"),
    pytest.param("edm", "score", marks=pytest.mark.slow),
    pytest.param("stable-diffusion", "slerp", marks=pytest.mark.slow),
    pytest.param("dit", "embedding", marks=pytest.mark.slow),
    pytest.param("stable-diffusion", "embedding", marks=pytest.mark.slow),
    pytest.param("edm", "embedding", marks=pytest.mark.slow),
    pytest.param("diffusers-unet", "slerp", marks=pytest.mark.slow),
    pytest.param("diffusers-unet", "score", marks=pytest.mark.slow),
    pytest.param("dit", "score", marks=pytest.mark.slow),
    pytest.param("stable-diffusion", "score", marks=pytest.mark.slow),
]


@pytest.fixture
def model(request, unet_pipeline, dit_pipeline, stable_diffusion_pipeline, edm_snapshot, tmp_path):
    """``model(kind)`` gives the path of a model."""
    folders = {"diffusers-unet": unet_pipeline, "dit": dit_pipeline, "stable-diffusion": stable_diffusion_pipeline}
    return lambda kind: edm_snapshot("ddpmpp-edm").write(tmp_path / "edm.pkl") if kind == "edm" else folders[kind]


@pytest.fixture
def config(tmp_path):
    """``config(kind, operator, ...)`` writes a configuration for cats and dogs."""
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(draw.integers(0, 256, SHAPE, np.uint8)).save(tmp_path / "images" / name / f"{number}.png")

    def write(kind, operator="embedding", **mixing):
        path = tmp_path / "mine.yaml"
        sampler = {"solver": "heun", "steps": 2}
        values = {
            "data": {"source": "image-folder", "path": str(tmp_path / "images"), "size": 8},
            "generator": {"classes": KINDS[kind], "prompt": "{}"},
            "plan": {"sets_per_pair": 2, "ratios": 3, "shard_rows": 3},
            "mix": {"sampler": sampler, "operator": operator, **mixing},
        }
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.mark.ray
@pytest.mark.parametrize(("kind", "operator"), CASES)
def test_a_model_is_imported_and_mixes(call, model, config, ray_address, one_thread, tmp_path, kind, operator):
    options = ("--config", config(kind, operator), "--workspace", "w")
    code, _, said = call("import-generator", model(kind), *options)
    assert code == 0, said
    resolved = ("--config", "w/config.yaml", "--workspace", "w")  # as the command says
    assert f"go on with {' '.join(resolved)}" in said
    for verb in ("plan", "mix"):
        code, _, said = call(verb, *resolved, "--address", ray_address)
        assert code == 0, said
    assert "mix: done, 6 images" in said
    mixed = pl.read_parquet(sorted((tmp_path / "w" / "mixed").glob("*.parquet")))
    generator = load_generator(tmp_path / "w" / "generator")
    plan = pl.read_parquet(tmp_path / "w" / "plan.parquet")
    parts = [
        mix(shard, generator, SHAPE, SamplerConfig(solver="heun", steps=2), operator=operator) for shard in plan.iter_slices(3)
    ]
    assert mixed.equals(pl.concat(parts))
    assert (
        len(tables.to_images(mixed["image"], SHAPE).flatten(1).unique(dim=0)) > 3
    )  # noises depend on the path; random weights saturate
    assert json.loads((tmp_path / "w" / "generator" / "generator.json").read_text())["kind"] == kind


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_goes_from_an_imported_model_to_its_report(call, model, config, tmp_path):
    options = ("--config", config("edm"), "--workspace", "w")
    assert call("import-generator", model("edm"), *options)[0] == 0
    small = ("--set", "train.seeds=1", "--set", "train.compare=[cross-entropy, csm]", "--set", "train.optimizer.epochs=2")
    small = (*small, "--set", "train.optimizer.batch_size=4", "--set", "annotate.members=1")
    code, _, said = call("run", "--config", "w/config.yaml", "--workspace", "w", *small)
    assert code == 0, said
    assert "generator: reused" in said
    page = (tmp_path / "w" / "report.html").read_text()
    assert "cat" in page


def test_a_model_that_is_gone_or_damaged_is_named(call, model, config, tmp_path):
    options = ("--config", config("edm"), "--workspace", "w")
    assert call("import-generator", model("edm"), *options)[0] == 0
    (tmp_path / "edm.pkl").rename(tmp_path / "moved.pkl")
    for verb in ("mix", "run"):
        code, _, said = call(verb, "--config", "w/config.yaml", "--workspace", "w")
        assert code == 2
        assert said.splitlines()[-1].startswith("csm: ")
        assert f"{tmp_path / 'edm.pkl'} does not exist" in said.splitlines()[-1]


def test_guidance_of_a_model_without_images_of_no_class_is_refused(call, model, config, tmp_path):
    code, _, said = call("import-generator", model("edm"), "--config", config("edm", guidance=3), "--workspace", "w")
    assert code == 2
    assert said.splitlines()[-1] == "csm: mix.guidance: expected 1, got 3: a model of kind edm has no condition of no class"
    assert not (tmp_path / "w" / "generator" / "generator.json").exists()


def test_weights_that_are_not_finite_are_not_taken(call, config, edm_snapshot, tmp_path):
    checkpoint = edm_snapshot("ddpmpp-edm")
    next(iter(checkpoint.tensors.values())).view(-1)[0] = float("nan")
    checkpoint.write(tmp_path / "nan.pkl")
    code, _, said = call("import-generator", "nan.pkl", "--config", config("edm"), "--workspace", "w")
    assert code == 2
    assert "nan.pkl has weights that are not finite" in said.splitlines()[-1]
    assert not (tmp_path / "w" / "generator" / "generator.json").exists()


@pytest.mark.ray
def test_what_cannot_lie_on_a_sphere_is_refused(call, model, config, ray_address, tmp_path):
    options = ("--config", config("edm", "slerp"), "--workspace", "w")
    call("import-generator", model("edm"), *options)
    resolved = ("--config", "w/config.yaml", "--workspace", "w", "--address", ray_address)
    call("plan", *resolved)
    (tmp_path / "w" / "mixed").mkdir()
    (tmp_path / "w" / "mixed" / "part-00000000.parquet").touch()
    code, _, said = call("mix", *resolved, "--force", "mix")
    assert code == 2
    assert said.splitlines()[-1].startswith("csm: mix.operator: slerp needs ")
    assert (tmp_path / "w" / "mixed" / "part-00000000.parquet").exists()  # refused before anything is removed


@pytest.mark.slow
@pytest.mark.ray
def test_bfloat16_and_the_gaussians_of_the_data(call, model, config, ray_address, tmp_path):
    options = ("--config", config("dit", precision="bfloat16"), "--workspace", "w")
    call("import-generator", model("dit"), *options)
    for verb in ("plan", "mix"):
        code, _, said = call(verb, "--config", "w/config.yaml", "--workspace", "w", "--address", ray_address)
        assert code == 0, said
    settings = ("--set", "generator.kind=gaussians", "--set", "generator.classes=[]", "--workspace", "g")
    for verb in ("prepare", "fit-generator", "plan", "mix"):
        code, _, said = call(verb, "--config", "mine.yaml", *settings, "--address", ray_address)
        assert code == 0, said
    assert json.loads((tmp_path / "g" / "generator" / "generator.json").read_text())["kind"] == "gaussians"


def test_a_pickle_that_would_run_something_does_not(call, config, tmp_path):
    (tmp_path / "evil.pkl").write_bytes(b"cposix\nsystem\n(Vtouch ran\ntR.")
    code, _, said = call("import-generator", "evil.pkl", "--config", config("edm"), "--workspace", "w")
    assert code == 2
    assert said.splitlines()[-1].startswith("csm: ")
    assert "posix.system" in said.splitlines()[-1]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "w" / "generator" / "generator.json").exists()


def test_another_model_in_its_place_is_not_taken_silently(call, model, config, tmp_path):
    options = ("--config", config("edm"), "--workspace", "w")
    assert call("import-generator", model("edm"), *options)[0] == 0
    (tmp_path / "edm.pkl").write_bytes(b"another")
    code, _, said = call("import-generator", tmp_path / "edm.pkl", *options)
    assert code == 2
    assert "generator was made by another configuration there (files " in said
