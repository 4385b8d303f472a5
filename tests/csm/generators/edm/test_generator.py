import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from csm import tables
from csm.errors import InputError
from csm.generators import load_generator
from csm.generators.conditioning import mix_embeddings
from csm.generators.edm.generator import CIFAR10_COND_VP, EDMGenerator, import_edm, load_edm
from csm.generators.importing import IMPORTERS, ImportOptions, detect
from csm.mixing import mix
from csm.planning import PlanConfig, make_plan
from csm.sampling import SamplerConfig

NAMES = tuple("abcdefghij")
CASE_NAMES = ["ddpmpp-vp", "ddpmpp-edm", "ncsnpp-ve", "skips-edm", "adm-iddpm", "adm-edm"]


@pytest.fixture
def imported(snapshot: Callable[[str], Any], tmp_path: Path) -> Callable[..., EDMGenerator]:
    """``imported(case, options)``: the generator of a case, out of its pickle, by way of a folder."""

    def make(case: str, options: ImportOptions | None = None) -> EDMGenerator:
        source = snapshot(case).write(tmp_path / f"{case}.pkl")
        IMPORTERS[detect(source)](source, tmp_path / case, options or ImportOptions(NAMES))
        source.unlink()
        generator = load_generator(tmp_path / case)
        assert isinstance(generator, EDMGenerator)
        return generator

    return make


def refused(snapshot: Any, path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        import_edm(snapshot.write(path / "net.pkl"), path / "generator", ImportOptions(NAMES))
    assert "\n" not in str(caught.value)
    assert not (path / "generator").exists()


@pytest.mark.parametrize("case", CASE_NAMES)
def test_outputs_are_those_of_the_original_code(imported: Callable[..., EDMGenerator], reference: Any, case: str) -> None:
    generator, expected = imported(case), load_file(reference.file)[case]
    for sigma, theirs in zip(reference.sigmas, expected, strict=True):
        x, level, classes = reference.inputs(sigma)
        ours = generator.denoise(x, level, classes)
        # Images are computed to 1e-5; where the network's output is scaled with sigma, it is the output that is.
        assert (ours - theirs).abs().max() <= 1e-5 * max(1, sigma), sigma


def test_every_case_was_measured(cases: Any, reference: Any) -> None:
    assert sorted(cases) == sorted(CASE_NAMES) == sorted(load_file(reference.file))


def test_the_data_sets_classes_become_the_models(imported: Callable[..., EDMGenerator], reference: Any) -> None:
    generator, every = imported("ddpmpp-edm", ImportOptions(("a", "b"), (8, 3))), imported("ddpmpp-edm")
    assert (generator.n_classes, every.n_classes) == (2, 10)
    condition = generator.embed(torch.tensor([1, 0]))
    assert condition.dtype == torch.float32
    assert torch.equal(condition, torch.eye(10)[[3, 8]])
    x, sigma, _ = reference.inputs(0.3)
    assert torch.equal(generator.denoise(x, sigma, condition), every.denoise(x, sigma, every.embed(torch.tensor([3, 8]))))


@pytest.mark.parametrize("case", ["ddpmpp-edm", "adm-edm"])
def test_a_mixture_of_conditions_is_a_mixture_of_class_embeddings(
    imported: Callable[..., EDMGenerator], reference: Any, case: str
) -> None:
    generator = imported(case)
    x, sigma, _ = reference.inputs(0.3)
    a, b = (generator.embed(torch.tensor([label, label])) for label in (2, 5))
    mixed = generator.denoise(x, sigma, mix_embeddings(a, b, torch.tensor([0.25, 0.6])))
    table = generator.mapping.map_label.weight  # (E, 10); now class 7 embeds as the mixture
    for row, share in enumerate((0.25, 0.6)):
        table[:, 7] = share * table[:, 2] + (1 - share) * table[:, 5]
        alone = generator.denoise(x, sigma, generator.embed(torch.tensor([7, 7])))
        assert torch.allclose(mixed[row], alone[row], atol=1e-5)


def test_half_precision_and_channels_last_change_little(imported: Callable[..., EDMGenerator], reference: Any) -> None:
    generator = imported("ncsnpp-ve")
    x, sigma, classes = reference.inputs(0.3)
    full = generator.denoise(x, sigma, classes)
    generator.network.to(torch.bfloat16, memory_format=torch.channels_last)
    seen = []
    generator.network.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    half = generator.denoise(x, sigma, classes)
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert half.dtype == torch.float32
    assert {value.dtype for value in generator.mapping.state_dict().values()} == {torch.float32}
    difference = (half - full).abs()
    assert 0 < difference.mean() < 0.01
    assert difference.max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("case", ["skips-edm", "adm-edm"])
def test_the_network_compiles_as_one_graph(imported: Callable[..., EDMGenerator], reference: Any, case: str) -> None:
    generator, inputs = imported(case), reference.inputs(0.3)
    expected = generator.denoise(*inputs)
    generator.network = torch.compile(generator.network, fullgraph=True, backend="eager")  # eager: traced, not compiled to code
    assert torch.equal(generator.denoise(*inputs), expected)


def test_inputs_of_double_precision_are_rounded(imported: Callable[..., EDMGenerator], reference: Any) -> None:
    generator = imported("ddpmpp-vp")
    x, sigma, classes = reference.inputs(0.3)
    double = generator.denoise(x.double(), sigma.double(), classes.double())
    assert double.dtype == torch.float32
    assert torch.equal(double, generator.denoise(x, sigma, classes))


def test_what_solvers_need_to_know(imported: Callable[..., EDMGenerator]) -> None:
    generator = imported("adm-iddpm")
    assert generator.noise_shape == (3, 8, 8)
    assert generator.sigma_range == (0.01, 50)
    assert generator.device == torch.device("cpu")
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    x = torch.ones(1, 3, 8, 8)
    assert generator.decode(x) is x


def test_noise_levels_stay_inside_those_that_edm_samples(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    original = snapshot("ddpmpp-edm")
    original.attributes |= {"sigma_min": 0, "sigma_max": float("inf")}
    import_edm(original.write(tmp_path / "net.pkl"), tmp_path, ImportOptions(NAMES))
    assert load_edm(tmp_path).sigma_range == (0.002, 80)


def test_all_of_it_goes_to_its_device(imported: Callable[..., EDMGenerator]) -> None:
    for case in ("ncsnpp-ve", "adm-iddpm"):
        generator = imported(case).to("meta")
        condition = generator.embed(torch.zeros(2, dtype=torch.int64, device="meta"))
        x = torch.zeros(2, 3, 8, 8, device="meta")
        assert generator.denoise(x, torch.ones(2, device="meta"), condition).device == generator.device == torch.device("meta")


def test_what_is_written(imported: Callable[..., EDMGenerator], cases: Any, tmp_path: Path) -> None:
    generator = imported("ncsnpp-ve", ImportOptions(("a", "b"), (8, 3)))
    assert sorted(file.name for file in (tmp_path / "ncsnpp-ve").iterdir()) == ["generator.json", "model.safetensors"]
    value = json.loads((tmp_path / "ncsnpp-ve" / "generator.json").read_text())
    assert value["kind"] == "edm"
    assert value["unet"]["encoder_type"] == "residual"
    assert generator.spec == replace(cases["ncsnpp-ve"], classes=(8, 3))
    assert {tensor.dtype for tensor in load_file(tmp_path / "ncsnpp-ve" / "model.safetensors").values()} == {torch.float32}


def test_mixing(imported: Callable[..., EDMGenerator]) -> None:
    generator = imported("ddpmpp-edm", ImportOptions(("a", "b", "c"), (8, 3, 1)))
    rows = make_plan(3, "data", "net", PlanConfig(ratios=3, sets_per_pair=1))
    mixed = mix(rows, generator, (8, 8, 3), SamplerConfig(steps=2))
    images = tables.to_images(mixed["image"], (8, 8, 3))
    assert images.shape == (9, 3, 8, 8)
    assert len(images.unique(dim=0)) == 9


def test_a_missing_tensor_is_named(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    original = snapshot("ddpmpp-edm")
    del original.tensors["model.dec.8x8_block1.conv1.bias"]
    refused(
        original,
        tmp_path,
        r"net.pkl: 1 tensors of EDMPrecond with a SongUNet .* missing, for example model.dec.8x8_block1.conv1.bias",
    )


def test_an_unexpected_tensor_is_named(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    original = snapshot("ddpmpp-edm")
    original.tensors["model.enc.more.weight"] = torch.zeros(2)
    refused(original, tmp_path, r"net.pkl: 1 tensors are not of EDMPrecond with a SongUNet .*, for example model.enc.more.weight")


def test_a_tensor_of_another_shape_is_named(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    original = snapshot("ddpmpp-edm")
    original.tensors["model.map_layer0.bias"] = torch.zeros(63)
    refused(original, tmp_path, r"model.map_layer0.bias is of shape \(63,\); EDMPrecond .* has \(64,\)")


def test_another_filter_is_refused(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    original = snapshot("ddpmpp-edm")
    original.tensors["model.dec.8x8_up.skip.resample_filter"] = torch.ones(1, 1, 2, 2)
    refused(original, tmp_path, r"model.dec.8x8_up.skip.resample_filter is not the filter of its settings")


@pytest.mark.parametrize(("key", "value"), [("model_channels", 3), ("model_channels", 131), ("img_resolution", 9)])
def test_settings_that_make_no_network_are_refused(snapshot: Callable[[str], Any], tmp_path: Path, key: str, value: int) -> None:
    original = snapshot("ddpmpp-edm")
    original.settings[key] = value
    refused(original, tmp_path, r"net.pkl: its settings make no network")


def test_guidance_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"generator.guidance: an EDM network has no class for 'none': expected 1, got 2"):
        import_edm(tmp_path / "net.pkl", tmp_path, ImportOptions(NAMES, guidance=2))


def test_weights_of_another_network_are_named(imported: Callable[..., EDMGenerator], tmp_path: Path) -> None:
    imported("ddpmpp-edm")
    imported("ncsnpp-ve")
    (tmp_path / "ncsnpp-ve" / "model.safetensors").replace(tmp_path / "ddpmpp-edm" / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors holds the weights of another network"):
        load_edm(tmp_path / "ddpmpp-edm")


def test_the_network_for_cifar_10_has_as_many_parameters_as_the_original() -> None:
    with torch.device("meta"):
        generator = EDMGenerator(CIFAR10_COND_VP)
    assert sum(parameter.numel() for parameter in generator.parameters()) == 55_735_299  # counted in the original's
    assert generator.noise_shape == (3, 32, 32)
