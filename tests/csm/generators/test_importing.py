import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import csm
from csm.errors import InputError
from csm.generators import GENERATORS, load_generator
from csm.generators.importing import IMPORTERS, ImportOptions, class_numbers, detect, marking


def test_the_kind_of_each_model_that_can_be_imported(
    unet_pipeline: Path, dit_pipeline: Path, stable_diffusion_pipeline: Path, tmp_path: Path
) -> None:
    assert detect(unet_pipeline) == "diffusers-unet"
    assert detect(unet_pipeline / "unet") == "diffusers-unet"
    assert detect(dit_pipeline) == "dit"
    assert detect(stable_diffusion_pipeline) == "stable-diffusion"


def test_any_pipeline_with_such_a_unet_is_one(tmp_path: Path) -> None:
    index = {"_class_name": ["pipeline", "OwnPipeline"], "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert detect(tmp_path) == "diffusers-unet"


def test_a_file_is_edms_pickle_by_its_ending(tmp_path: Path) -> None:
    for name in ("net.pkl", "net.pt"):
        (tmp_path / name).write_bytes(b"no matter what is in here")
    assert detect(tmp_path / "net.pkl") == "edm"
    with pytest.raises(InputError, match=r"net.pt is a file that does not end in .pkl; expected .* or EDM's pickle") as caught:
        detect(tmp_path / "net.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("diffusers-unet", ImportOptions(("a", "b"), (1, 3))),
        ("dit", ImportOptions(("a", "b"), (1, 3), guidance=2.0)),
        ("stable-diffusion", ImportOptions(("a", "b"), prompt="{}")),
    ],
)
def test_what_each_kind_imports_is_loaded_by_its_name(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, options: ImportOptions
) -> None:
    fixture = {"diffusers-unet": "unet_pipeline", "dit": "dit_pipeline", "stable-diffusion": "stable_diffusion_pipeline"}[kind]
    source: Path = request.getfixturevalue(fixture)
    IMPORTERS[detect(source)](source, tmp_path, options)
    assert json.loads((tmp_path / "generator.json").read_text())["kind"] == kind
    assert kind in GENERATORS
    assert load_generator(tmp_path).n_classes == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, r"model_index.json is of a StableDiffusionXLPipeline"),
        ("model_index.json", {}, r"model_index.json is of a None"),
        ("config.json", {"_class_name": "UNet2DConditionModel"}, r"config.json is of a UNet2DConditionModel"),
        ("config.json", {"model_type": "gpt2"}, r"config.json is of a None"),
        ("other.json", {}, r"is no folder with model_index.json or config.json"),
    ],
)
def test_others_are_refused_in_one_line_that_says_what_was_expected(
    tmp_path: Path, name: str, content: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=rf"{message}; expected diffusers' .*DiTPipeline.*StableDiffusionPipeline.*UNet2DModel"
    ) as caught:
        detect(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("none.pkl", "none"):
        with pytest.raises(InputError, match=rf"{name} does not exist"):
            detect(tmp_path / name)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InputError, match=r"model_index.json is not valid JSON"):
        detect(tmp_path)


def test_the_mark_is_there_only_when_the_rest_is_whole(tmp_path: Path) -> None:
    mark = tmp_path / "generator.json"
    with marking(tmp_path, {"kind": "dit"}):
        assert not mark.exists()
    assert json.loads(mark.read_text()) == {"kind": "dit"}
    with pytest.raises(OSError, match="disk full"), marking(tmp_path, {"kind": "dit"}):
        raise OSError("disk full")
    assert not mark.exists()


def test_without_numbers_the_classes_are_the_same() -> None:
    assert class_numbers(ImportOptions(("a", "b")), 2) == (0, 1)
    assert class_numbers(ImportOptions(("a", "b"), (7, 3)), 10) == (7, 3)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((), r"the model has 10 classes and the data 2; .* a list of 2 numbers"),
        ((1,), r"expected 2 numbers, one for each class of the data, got 1"),
        ((1, 10), r"10 is no class of the model, which has 0..9"),
        ((1, -1), r"-1 is no class"),
        ((4, 4), r"two classes of the data have the same class"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(classes: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        class_numbers(ImportOptions(("a", "b"), classes), 10)


def test_importing_this_module_does_not_import_diffusers() -> None:
    code = "import sys, csm.generators.importing; print('diffusers' in sys.modules)"
    root = Path(csm.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("pipeline", ["unet_pipeline", "dit_pipeline", "stable_diffusion_pipeline"])
def test_all_of_a_generator_goes_to_its_device(request: pytest.FixtureRequest, tmp_path: Path, pipeline: str) -> None:
    source: Path = request.getfixturevalue(pipeline)
    kind = detect(source)
    classes = () if kind == "stable-diffusion" else (1, 3)
    options = ImportOptions(("a", "b"), classes, guidance=1.0 if kind == "diffusers-unet" else 2.0, prompt="{}")
    IMPORTERS[kind](source, tmp_path, options)
    generator = load_generator(tmp_path)
    assert isinstance(generator, torch.nn.Module)
    generator.to("meta")  # computes shapes only, and refuses tensors of the CPU, as a GPU does
    x = torch.zeros(2, *generator.noise_shape, device="meta")
    condition = generator.embed(torch.zeros(2, dtype=torch.int64, device="meta"))
    denoised = generator.denoise(x, torch.ones(2, device="meta"), condition)
    assert generator.device == denoised.device == torch.device("meta")
    assert denoised.shape == x.shape
    assert generator.decode(denoised).shape[:2] == (2, 3)
