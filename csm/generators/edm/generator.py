"""EDM's networks (Karras et al. 2022) as generators: read from NVIDIA's pickles, kept as safetensors."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from csm import storage
from csm.classifiers.classifier import load_weights
from csm.errors import InputError
from csm.generators.edm.checkpoints import Checkpoint, read_checkpoint
from csm.generators.edm.layers import Resample
from csm.generators.edm.preconditioning import PRECONDITIONINGS, Coefficients, Preconditioning
from csm.generators.edm.unets import DhariwalUNetSettings, SongUNetSettings, make_mapping, make_unet
from csm.generators.importing import ImportOptions, class_numbers, marking

SAMPLED = (0.002, 80.0)  # the noise levels that EDM samples through (Karras et al. 2022, table 1)


@dataclass(frozen=True)
class EDMSpec:
    """Everything but the weights (``generator.json``).

    Attributes:
        classes: the model's class for each class of the data set.
        preconditioning, parameters: key of ``PRECONDITIONINGS`` and its settings.
        sigma_min, sigma_max: noise levels that the model is sampled through.
        unet: settings of the network.
    """

    classes: tuple[int, ...]
    preconditioning: Preconditioning
    parameters: dict[str, int | float]
    sigma_min: float
    sigma_max: float
    unet: SongUNetSettings | DhariwalUNetSettings


# NVIDIA's edm-cifar10-32x32-cond-vp.pkl: 55.7 million parameters.
CIFAR10_COND_VP = EDMSpec(
    classes=tuple(range(10)),
    preconditioning="EDMPrecond",
    parameters={"sigma_data": 0.5},
    sigma_min=SAMPLED[0],
    sigma_max=SAMPLED[1],
    unet=SongUNetSettings(
        img_resolution=32,
        in_channels=3,
        out_channels=3,
        label_dim=10,
        augment_dim=9,
        model_channels=128,
        channel_mult=(2, 2, 2),
    ),
)


class EDMGenerator(nn.Module):
    """``denoise(x, sigma, condition)`` of images in [-1, 1].

    ``network``, the U-Net, does nearly all the work; it computes in the dtype and memory format of its weights, and may be cast, compiled
    or replaced. ``mapping``, of noise level and class to the network's embedding, and ``preconditioning`` stay in float32. The condition
    is the weight of each of the model's classes, float32 (N, K_model): one-hot for a class. The mapping begins with a linear layer, so a
    mixture of conditions is a mixture of class embeddings.
    """

    spherical = False
    guides, guidance = False, 1.0
    classes: torch.Tensor

    def __init__(self, spec: EDMSpec) -> None:
        """With random weights."""
        super().__init__()
        self.spec = spec
        self.network: nn.Module = make_unet(spec.unet)
        self.mapping = make_mapping(spec.unet)
        self.preconditioning = PRECONDITIONINGS[spec.preconditioning](**spec.parameters)
        self.register_buffer("classes", torch.tensor(spec.classes), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.classes.device

    @property
    def n_classes(self) -> int:
        return len(self.spec.classes)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        size = self.spec.unet.img_resolution
        return self.spec.unet.in_channels, size, size

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.spec.sigma_min, self.spec.sigma_max

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """One-hot conditions float32 (N, K_model) of labels int64 (N,)."""
        return F.one_hot(self.classes[labels], self.spec.unet.label_dim).float()

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Estimate of the clean images float32 (N, C, H, W), from x = clean + sigma * noise.

        Args:
            x: float (N, C, H, W); what is not float32 is rounded to it, here and below.
            sigma: float (N,), > 0.
            condition: float (N, K_model).
        """
        x = x.float()
        c: Coefficients = self.preconditioning(sigma.float())
        skip, out, in_ = (factor.view(-1, 1, 1, 1) for factor in (c.skip, c.out, c.in_))
        dtype = next(self.network.parameters()).dtype
        embedding = self.mapping(c.noise, condition.float())
        output = self.network((in_ * x).to(dtype), embedding.to(dtype)).float()
        denoised: torch.Tensor = skip * x + out * output[:, : x.shape[1]]  # a learned variance would be the second half
        return denoised

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself: the model works on pixels."""
        return x


def import_edm(path: Path, directory: Path, options: ImportOptions) -> None:
    """Write the network in the pickle at ``path`` to ``directory``: ``model.safetensors``, float32, and ``generator.json`` last.

    Args:
        path: NVIDIA's pickle, or a snapshot of a training with EDM's code.
        directory: what ``load_edm`` reads.
        options: ``guidance`` must be 1: these models have no class for none.

    Raises:
        InputError: the file is missing or damaged, would run something, or holds another network; one line says which tensor or setting.
    """
    if options.guidance != 1:
        raise InputError(f"generator.guidance: an EDM network has no class for 'none': expected 1, got {options.guidance}")
    checkpoint = read_checkpoint(path)
    low, high = checkpoint.sigma_range
    spec = EDMSpec(
        class_numbers(options, checkpoint.unet.label_dim),
        checkpoint.preconditioning,
        checkpoint.parameters,
        max(low, SAMPLED[0]),
        min(high, SAMPLED[1]),
        checkpoint.unet,
    )
    tensors = _matched(checkpoint, spec)
    value: dict[str, Any] = {"kind": "edm", **asdict(spec)}
    with marking(directory, value):
        storage.write_tensors(directory / "model.safetensors", tensors)


def load_edm(directory: Path) -> EDMGenerator:
    """Return the generator that ``import_edm`` wrote to ``directory``, in evaluation mode, without gradients."""
    generator = EDMGenerator(storage.read_record(directory / "generator.json", EDMSpec))
    load_weights(generator, directory / "model.safetensors")
    return generator.eval().requires_grad_(False)


def _matched(checkpoint: Checkpoint, spec: EDMSpec) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under our names; ``InputError`` unless they are exactly those of the network of ``spec``."""
    path, tensors = checkpoint.path, checkpoint.tensors
    try:
        with torch.device("meta"):  # names and shapes only
            ours = EDMGenerator(spec).state_dict()
    except (ArithmeticError, ValueError) as error:
        raise InputError(f"{path}: its settings make no network ({' '.join(str(error).split())})") from None
    whose = f"{spec.preconditioning} with a {spec.unet.model_type} of its settings"
    names = {_original_name(name): name for name in ours}
    missing, unexpected = sorted(names.keys() - tensors), sorted(tensors.keys() - names)
    if missing:
        raise InputError(f"{path}: {len(missing)} tensors of {whose} are missing, for example {missing[0]}")
    if unexpected:
        raise InputError(f"{path}: {len(unexpected)} tensors are not of {whose}, for example {unexpected[0]}")
    for original, name in names.items():
        if (shape := checkpoint.shape(original)) != ours[name].shape:
            raise InputError(f"{path}: {original} is of shape {shape}; {whose} has {tuple(ours[name].shape)}")
    loaded = {name: checkpoint.tensor(original) for original, name in names.items()}
    filters = Resample("up", getattr(spec.unet, "resample_filter", (1, 1))).resample_filter
    for original, name in names.items():
        if name.endswith(".resample_filter") and not torch.equal(loaded[name], filters):
            raise InputError(f"{path}: {original} is not the filter of its settings")
    return loaded


def _original_name(name: str) -> str:
    """The checkpoint's name of one of our tensors: ours are grouped by what may be cast and what may not."""
    group, rest = name.split(".", 1)
    return rest if group == "preconditioning" else f"model.{rest}"
