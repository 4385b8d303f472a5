import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from csm.errors import InputError
from csm.generators.edm.checkpoints import read_checkpoint

WEIGHT = "model.enc.8x8_conv.weight"


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_settings_and_tensors_come_as_they_were(
    snapshot: Callable[[str], Any], cases: Any, tmp_path: Path, protocol: int
) -> None:
    original = snapshot("ncsnpp-ve")
    checkpoint = read_checkpoint(original.write(tmp_path / "net.pkl", protocol))
    assert checkpoint.preconditioning == "VEPrecond"
    assert checkpoint.unet == cases["ncsnpp-ve"].unet
    assert checkpoint.sigma_range == (0.01, 50)
    assert checkpoint.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        assert checkpoint.shape(name) == tensor.shape
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_the_network_alone_is_enough(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps(snapshot("adm-edm").network()))
    assert read_checkpoint(path).unet.model_type == "DhariwalUNet"


def test_what_else_is_in_the_file_is_left_alone(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    original = snapshot("ddpmpp-edm")
    original.extra = {"loss_fn": Call(nn.Linear, 1, 1), "dataset_kwargs": {"path": "x"}, "augment_pipe": np.zeros(3)}
    assert read_checkpoint(original.write(tmp_path / "net.pkl")).parameters == {"sigma_data": 0.5}


def test_numbers_of_numpy_are_numbers(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    original = snapshot("ddpmpp-edm")
    original.attributes |= {"sigma_data": np.float32(0.25), "sigma_min": np.int64(0), "sigma_max": np.float64("inf")}
    original.settings |= {"model_channels": np.int64(16), "channel_mult": [np.int32(2), 3]}
    checkpoint = read_checkpoint(original.write(tmp_path / "net.pkl"))
    assert checkpoint.parameters == {"sigma_data": 0.25}
    assert checkpoint.sigma_range == (0, float("inf"))
    assert checkpoint.unet.channel_mult == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(snapshot: Callable[[str], Any], tmp_path: Path, dtype: torch.dtype) -> None:
    original = snapshot("ddpmpp-edm")
    rounded = original.tensors[WEIGHT].to(dtype)
    original.tensors[WEIGHT] = rounded
    tensor = read_checkpoint(original.write(tmp_path / "net.pkl")).tensor(WEIGHT)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, rounded.float())


def test_a_view_into_a_larger_storage_is_read(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    original = snapshot("ddpmpp-edm")
    original.tensors[WEIGHT] = torch.randn(50, 3, 3, 3)[10:42].transpose(2, 3)
    assert torch.equal(read_checkpoint(original.write(tmp_path / "net.pkl")).tensor(WEIGHT), original.tensors[WEIGHT])


def tensor_of(storage: bytes, offset: Any, shape: Any, stride: Any) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, Call(torch.storage._load_from_bytes, storage), offset, shape, stride, False, {})


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize(
    ("storage", "offset", "shape", "stride"),
    [
        (saved(torch.zeros(4)._typed_storage()), 0, (5,), (1,)),
        (saved(torch.zeros(4)._typed_storage()), 3, (2,), (1,)),
        (saved(torch.zeros(4)._typed_storage()), -1, (2,), (1,)),
        (saved(torch.zeros(4)._typed_storage()), 0, (10**12,), (0,)),
        (saved(torch.zeros(4)._typed_storage()), 0, (-1,), (1,)),
        (saved(torch.zeros(4)._typed_storage()), 0, [2], (1,)),
        (saved(torch.zeros(4)._typed_storage()), 0, (2.0,), (1,)),
        (saved(torch.zeros(4, dtype=torch.int64)._typed_storage()), 0, (4,), (1,)),
        (saved(torch.zeros(4)._typed_storage())[:-8], 0, (4,), (1,)),
        (saved({"a": 1}), 0, (4,), (1,)),
        (b"", 0, (4,), (1,)),
    ],
)
def test_a_tensor_that_is_none_is_named(
    snapshot: Callable[[str], Any], tmp_path: Path, storage: bytes, offset: Any, shape: Any, stride: Any
) -> None:
    original = snapshot("ddpmpp-edm")
    network = original.network()
    network.state["_modules"]["model"].state["_buffers"]["bad"] = tensor_of(storage, offset, shape, stride)
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps(network))
    checkpoint = read_checkpoint(path)
    with pytest.raises(
        InputError, match=r"net.pkl: model.bad is damaged, or no plain tensor of floating-point numbers"
    ) as caught:
        checkpoint.tensor("model.bad")
    assert "\n" not in str(caught.value)


def test_a_call_hidden_in_a_storage_is_refused_and_named(
    snapshot: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = snapshot("ddpmpp-edm").network()
    network.state["_buffers"]["bad"] = tensor_of(saved(Call(os.system, "touch side-effect")), 0, (1,), (1,))
    Path("net.pkl").write_bytes(pickle.dumps(network))
    with pytest.raises(InputError, match=r"net.pkl holds posix.system in bad, which is .*: nothing was run") as caught:
        read_checkpoint(Path("net.pkl")).tensor("bad")
    assert "\n" not in str(caught.value)
    assert not Path("side-effect").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"ema": None}, r"holds no network as its averaged network \(ema\); expected VPPrecond or"),
        ({"state_dict": {}}, r"holds no network"),
        ([1, 2], r"holds no network"),
        (nn.Linear(2, 2), r"holds a Linear as its averaged network"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(value))
    refused(tmp_path / "net.pkl", message)


def test_other_networks_are_refused(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    original = snapshot("ddpmpp-edm")
    original.unet = "Generator"
    refused(
        original.write(tmp_path / "net.pkl"), r"the model of its EDMPrecond is 'Generator'; expected SongUNet or DhariwalUNet"
    )
    original.class_name = "OtherPrecond"
    refused(original.write(tmp_path / "net.pkl"), r"holds a OtherPrecond as its averaged network")


def test_a_model_without_classes_is_refused(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    original = snapshot("ddpmpp-edm")
    original.attributes["label_dim"] = original.settings["label_dim"] = 0
    refused(original.write(tmp_path / "net.pkl"), r"net.pkl: the model knows no classes \(label_dim 0\)")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("encoder_type", "other", r"encoder_type of its SongUNet: expected 'standard', 'skip' or 'residual', got 'other'"),
        ("num_blocks", 10**9, r"num_blocks of its SongUNet: expected a number less than or equal to 64"),
        ("model_channels", "many", r"model_channels of its SongUNet: expected a whole number"),
        ("new_setting", 1, r"new_setting of its SongUNet: "),
    ],
)
def test_settings_are_checked(snapshot: Callable[[str], Any], tmp_path: Path, key: str, value: Any, message: str) -> None:
    original = snapshot("ddpmpp-edm")
    original.settings[key] = value
    refused(original.write(tmp_path / "net.pkl"), message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sigma_data", "half", r"EDMPrecond.sigma_data: expected a number, got 'half'"),
        ("sigma_min", None, r"sigma_min None and sigma_max 50.0 are no range of noise levels"),
        ("sigma_max", 0.001, r"sigma_min 0.01 and sigma_max 0.001 are no range"),
        ("sigma_max", float("nan"), r"sigma_max nan are no range"),
    ],
)
def test_attributes_are_checked(snapshot: Callable[[str], Any], tmp_path: Path, key: str, value: Any, message: str) -> None:
    original = snapshot("ddpmpp-edm")
    original.attributes[key] = value
    refused(original.write(tmp_path / "net.pkl"), message)


def test_settings_by_position_are_refused(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    network = snapshot("ddpmpp-edm").network()
    network.state["_modules"]["model"].state["_init_args"] = (8, 3, 3)
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(network))
    refused(tmp_path / "net.pkl", r"does not say by name with which settings it was made")


def test_a_module_that_holds_itself_is_refused(snapshot: Callable[[str], Any], tmp_path: Path) -> None:
    network = snapshot("ddpmpp-edm").network()
    loop = nn.ModuleDict()
    loop.__dict__["_modules"] = {"again": loop}
    network.state["_modules"]["model"].state["_modules"]["loop"] = loop
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(network))
    refused(tmp_path / "net.pkl", r"model.loop(.again)+ lies deeper than any module of an EDM network")
