import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from csm.errors import InputError
from csm.model_folders import find_folder, read_config, read_model, write_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("unet")
    unet.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_model(UNet2DModel, folder)
    assert "\n" not in str(caught.value)


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_is_read_for_evaluation(folder: Path) -> None:
    model = read_model(UNet2DModel, folder)
    assert same(model, UNet2DModel.from_pretrained(folder))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_half_precision_becomes_single(folder: Path, tmp_path: Path) -> None:
    half = UNet2DModel.from_pretrained(folder).half()
    half.save_pretrained(tmp_path / "half")
    model = read_model(UNet2DModel, tmp_path / "half")
    assert model.dtype == torch.float32
    assert same(model, half.float())


def test_shards_are_read_and_replaced_when_written_again(folder: Path, tmp_path: Path) -> None:
    original = UNet2DModel.from_pretrained(folder)
    original.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model = read_model(UNet2DModel, tmp_path / "shards")
    assert same(model, original)
    write_model(model, tmp_path / "shards")
    assert sorted(file.name for file in (tmp_path / "shards").iterdir()) == ["config.json", WEIGHTS]
    assert same(read_model(UNet2DModel, tmp_path / "shards"), original)


PICKLE = "diffusion_pytorch_model.bin"


def test_a_pickle_of_tensors_is_read_as_tensors(folder: Path) -> None:
    original = read_model(UNet2DModel, folder)
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()
    assert same(read_model(UNet2DModel, folder), original)
    assert not (folder / WEIGHTS).exists()  # the user's folder stays as it was


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("content", ["evil", "damaged", "nested"])
def test_other_pickles_are_refused_and_nothing_is_run(folder: Path, tmp_path: Path, content: str) -> None:
    (folder / WEIGHTS).unlink()
    if content == "damaged":
        (folder / PICKLE).write_bytes(b"no matter what is in here")
    else:
        values: dict[str, Any] = {"conv_in.weight": Evil(tmp_path / "trace") if content == "evil" else {"a": torch.zeros(1)}}
        torch.save(values, folder / PICKLE)
    refused(folder, f"{PICKLE} is (damaged, or holds more than tensors: nothing of it was run|no table of tensors)")
    assert not (tmp_path / "trace").exists()


def test_weights_of_a_larger_model_are_not_left_out(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "mid_block.more.weight": torch.zeros(2)}, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, r"1 of the weights are not of UNet2DModel, for example mid_block.more.weight")


def test_pickles_in_the_list_of_shards_are_refused(folder: Path) -> None:
    (folder / "evil.bin").write_bytes(b"no matter what is in here")
    for name in ("evil.bin", "../model.safetensors", ""):
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": name}}))
        refused(folder, r"index.json names no safetensors files of its own folder")


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    refused(folder, f"{missing} does not exist")


def test_a_variant_must_be_chosen(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    refused(folder, rf"{WEIGHTS} does not exist, only diffusion_pytorch_model.fp16.safetensors: rename the one to use")


def test_a_variant_in_shards_is_chosen_by_its_list(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16-00001-of-00001.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").touch()
    refused(
        folder,
        rf"{WEIGHTS}.index.json does not exist, only diffusion_pytorch_model.safetensors.index.fp16.json: rename the one to use",
    )


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "part-2.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refused(folder, r"part-2.safetensors does not exist")


def test_a_truncated_file_is_named(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    refused(folder, rf"{WEIGHTS} is not a whole safetensors file")


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, r"1 of the weights of UNet2DModel are missing, for example conv_in.weight")


def test_weights_of_another_configuration_are_refused(folder: Path, edit: Callable[..., None]) -> None:
    edit(folder / "config.json", in_channels=1)
    refused(folder, r"model cannot be loaded as UNet2DModel \(.*conv_in.weight")


def test_a_configuration_that_makes_no_model_is_refused(folder: Path, edit: Callable[..., None]) -> None:
    edit(folder / "config.json", down_block_types=["NoSuchBlock", "DownBlock2D"])
    refused(folder, r"model cannot be loaded as UNet2DModel \(.*NoSuchBlock")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        ('{"_class_name": "B"}', "'B' cannot be used; expected A or C"),
    ],
)
def test_damaged_configurations_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json.*{message}"):
        read_config(tmp_path / "config.json", ["A", "C"])


def test_a_folder_in_place_of_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_config(tmp_path)


class Hub:
    """In place of ``snapshot_download``: there is no network where the tests run."""

    def __init__(self, folder: Path, files: list[str] | None = None) -> None:
        self.folder, self.files, self.calls = folder, files, list[tuple[str, list[str]]]()

    def __call__(self, name: str, allow_patterns: list[str]) -> str:
        self.calls.append((name, allow_patterns))
        if self.files is None:
            raise LocalEntryNotFoundError("no connection\nin many lines")
        self.folder.mkdir(exist_ok=True)
        for file in self.files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (self.folder / file).touch()
        return str(self.folder)


def fetched(hub: Hub, path: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert find_folder(path) == hub.folder
    return sorted(file.name for file in hub.folder.iterdir())


PUBLISHED = [
    "README.md",
    "config.json",
    "flax_model.msgpack",
    "merges.txt",
    "preprocessor_config.json",
    "tokenizer.json",
    "vocab.json",
]


def test_from_the_hub_come_configuration_words_and_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    hub = Hub(tmp_path / "cache", [*PUBLISHED, *shards, "pytorch_model.bin", "evil.py", "training_args.bin"])
    wanted = ["config.json", "merges.txt", *shards, "preprocessor_config.json", "tokenizer.json", "vocab.json"]
    assert fetched(hub, "openai/clip-vit-base-patch32", monkeypatch) == sorted(wanted)
    assert [name for name, _ in hub.calls] == ["openai/clip-vit-base-patch32"]


def test_weights_as_a_pickle_come_only_if_there_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path / "cache", [*PUBLISHED, "pytorch_model.bin", "training_args.bin"])
    wanted = ["config.json", "merges.txt", "preprocessor_config.json", "pytorch_model.bin", "tokenizer.json", "vocab.json"]
    assert fetched(hub, "owner/name", monkeypatch) == wanted  # `read_model` takes only tensors from it
    assert len(hub.calls) == 2


def test_a_local_folder_is_taken_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder("owner/name") == Path("owner/name")
    assert find_folder(str(tmp_path)) == tmp_path
    assert hub.calls == []


def test_without_a_connection_the_user_is_told_to_give_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path))
    with pytest.raises(
        InputError, match=r"no folder a/b, and the .* hub does not give .* \(LocalEntryNotFoundError\).* folder$"
    ) as caught:
        find_folder("a/b")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/absent/folder", "./a/b", "../b", "a/b/c", "name", "a /b"])
def test_what_is_no_name_on_the_hub_is_a_folder_that_is_missing(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"path: folder .*does not exist"):
        find_folder(path)
