"""Pickles as EDM's code writes them, of stand-in classes under the names of the original's, with weights by a formula."""

import pickle
import sys
import types
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from csm.generators.edm.generator import EDMGenerator, EDMSpec
from csm.generators.edm.unets import DhariwalUNetSettings, SongUNetSettings

SIGMAS = (0.005, 0.3, 2.0, 60.0)
IMAGE = {"img_resolution": 8, "in_channels": 3, "label_dim": 10}
SONG = {**IMAGE, "out_channels": 3, "model_channels": 16, "channel_mult": (2, 3), "num_blocks": 1, "attn_resolutions": (4,)}
NCSNPP = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual", "resample_filter": (1, 3, 3, 1)}
ADM = {**IMAGE, "model_channels": 64, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}


def _spec(preconditioning: Any, parameters: dict[str, Any], unet: Any) -> EDMSpec:
    return EDMSpec(tuple(range(10)), preconditioning, parameters, 0.01, 50.0, unet)


# What data/outputs.safetensors was measured for, by name.
CASES = {
    "ddpmpp-vp": _spec("VPPrecond", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}, SongUNetSettings(**SONG, augment_dim=9)),
    "ddpmpp-edm": _spec("EDMPrecond", {"sigma_data": 0.5}, SongUNetSettings(**SONG, augment_dim=9)),
    "ncsnpp-ve": _spec("VEPrecond", {}, SongUNetSettings(**SONG, **NCSNPP)),
    "skips-edm": _spec(
        "EDMPrecond", {"sigma_data": 0.25}, SongUNetSettings(**SONG, **{**NCSNPP, "encoder_type": "skip", "decoder_type": "skip"})
    ),
    "adm-iddpm": _spec(
        "iDDPMPrecond", {"C_1": 0.001, "C_2": 0.008, "M": 1000}, DhariwalUNetSettings(**ADM, out_channels=6, augment_dim=9)
    ),
    "adm-edm": _spec("EDMPrecond", {"sigma_data": 0.5}, DhariwalUNetSettings(**ADM, out_channels=3)),
}


def uniform(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 in [-1, 1): value i is a hash, in 32-bit integers, of i plus the CRC of the name."""
    h = np.arange(int(np.prod(shape)), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    h *= np.uint32(2654435761)
    h ^= h >> np.uint32(16)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    return torch.from_numpy(h / 2.0**31 - 1).float().reshape(shape)


def weights(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Values for the tensor of that name in a checkpoint; filters and tables stay as they are."""
    if name.endswith("resample_filter") or name == "u":
        return tensor
    values = uniform(name, tuple(tensor.shape))
    if name.endswith("freqs"):
        return 16 * values
    if tensor.ndim == 1:
        return 0.3 * values + (1 if "norm" in name and name.endswith("weight") else 0)
    return values * (3 / tensor[0].numel()) ** 0.5


def inputs(sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (2, 3, 8, 8), sigma (2,) and class weights (2, 10): of class 3, and of a mixture of classes 3 and 8."""
    x = uniform("clean", (2, 3, 8, 8)) + sigma * 3**0.5 * uniform("noise", (2, 3, 8, 8))
    classes = torch.zeros(2, 10)
    classes[0, 3], classes[1, 3], classes[1, 8] = 1, 0.3, 0.7
    return x, torch.tensor([sigma, sigma * 1.1]), classes


class Persistent:
    """Pickles as an object of a class that carries its own source text."""

    def __init__(self, class_name: str, **state: Any) -> None:
        empty: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}, "_init_args": (), "_init_kwargs": {}}
        self.class_name, self.state = class_name, {**empty, "training": False, **state}

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {"type": "class", "version": 6, "class_name": self.class_name, "state": self.state}
        source = "open('side-effect', 'w').close()"
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, ({**meta, "module_src": source},)


@dataclass
class Snapshot:
    """A checkpoint that can be changed before it is written."""

    class_name: str
    attributes: dict[str, Any]
    unet: str
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any] = field(default_factory=dict)

    def network(self) -> Persistent:
        top = Persistent(self.class_name, **self.attributes)
        model = Persistent(self.unet, _init_kwargs=self.settings)
        top.state["_modules"]["model"] = model
        for name, tensor in self.tensors.items():
            state, path = top.state, name.split(".")
            for part in path[:-1]:
                if part not in state["_modules"]:
                    state["_modules"][part] = (
                        nn.ModuleDict() if part in ("enc", "dec") else Persistent("UNetBlock", skip_scale=np.sqrt(0.5))
                    )
                inner = state["_modules"][part]
                state = inner.state if isinstance(inner, Persistent) else inner.__dict__
            if path[-1] in ("freqs", "resample_filter", "u"):
                state["_buffers"][path[-1]] = tensor
            else:
                state["_parameters"][path[-1]] = (
                    nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor
                )
        return top

    def write(self, path: Path, protocol: int = 4) -> Path:
        path.write_bytes(pickle.dumps({"ema": self.network(), **self.extra}, protocol=protocol))
        return path


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Snapshot]:
    """``snapshot(case)``: the checkpoint of one of ``CASES``."""

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
        raise AssertionError("the pickle was run")

    module = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = _reconstruct_persistent_obj.__name__
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def make(case: str) -> Snapshot:
        spec = CASES[case]
        settings = {key: value for key, value in asdict(spec.unet).items() if key != "model_type"}
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        limits = {"sigma_min": spec.sigma_min, "sigma_max": spec.sigma_max, "label_dim": 10, "use_fp16": False}
        tensors = {checkpoint_name(name): tensor for name, tensor in EDMGenerator(spec).state_dict().items()}
        tensors = {name: weights(name, tensor) for name, tensor in tensors.items()}
        more = {"dropout": 0.13, "label_dropout": 0}
        return Snapshot(spec.preconditioning, {**limits, **spec.parameters}, spec.unet.model_type, {**settings, **more}, tensors)

    return make


def checkpoint_name(name: str) -> str:
    group, rest = name.split(".", 1)
    return rest if group == "preconditioning" else f"model.{rest}"


@pytest.fixture
def cases() -> dict[str, EDMSpec]:
    return CASES


@pytest.fixture
def reference() -> Any:
    """Inputs and noise levels of ``data/outputs.safetensors``."""
    return types.SimpleNamespace(inputs=inputs, sigmas=SIGMAS, file=Path(__file__).parent / "data" / "outputs.safetensors")
