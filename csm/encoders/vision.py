"""Pretrained vision models as encoders: preprocessing, network and precision."""

import copy
import logging

import torch
import torch.nn.functional as F
from torch import nn

from csm.encoders.preprocessing import Preprocessing, preprocess
from csm.errors import InputError
from csm.precision import best_dtype

BATCH = 128  # images in the network together
FAITHFUL = 0.999  # cosine between a feature and the same in bfloat16
PRECISIONS = ("auto", "float32", "bfloat16")

logger = logging.getLogger(__name__)


class Vision(nn.Module):
    """Features float32 (N, F) of images uint8 (N, C, H, W), C that of the network, or 1 (grey) where the preprocessing makes RGB of it."""

    def __init__(
        self, name: str, network: nn.Module, preprocessing: Preprocessing, channels: int, side: int, fixed: bool, precision: str
    ) -> None:
        """
        Args:
            name: for messages.
            network: pixels float32 (N, channels, h, w) -> features (N, F); float32, in evaluation mode, without gradients.
            preprocessing: that it was trained with.
            channels: that it takes.
            side: height and width of the images that its positions are for.
            fixed: it takes no other size.
            precision: of its weights: "float32", "bfloat16", or "auto": bfloat16 if the device that ``to`` moves it to gains by it and
                no feature of a few test images turns by more than ``FAITHFUL``.

        Raises:
            InputError: there is no such precision.
        """
        super().__init__()
        if precision not in PRECISIONS:
            raise InputError(f"precision: expected {', '.join(PRECISIONS)}, got {precision!r}")
        self.name, self.network, self.preprocessing = name, network, preprocessing
        self.channels, self.side, self.fixed, self.precision = channels, side, fixed, precision
        if precision == "bfloat16":
            self.network.to(torch.bfloat16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.preprocessing.channels(images.shape[1]) != self.channels:
            raise InputError(f"{self.name}: the images have {images.shape[1]} channels, the model takes {self.channels}")
        return torch.cat([self._encode(self.network, batch) for batch in images.split(BATCH)])

    def to(self, device: torch.device) -> "Vision":  # type: ignore[override]  # an encoder is moved, nothing else
        super().to(device)
        if self.precision == "auto" and best_dtype(self.network, device) == torch.bfloat16:
            lower = copy.deepcopy(self.network).to(torch.bfloat16)
            cosine = self._turn(lower, device)
            if cosine > FAITHFUL:
                self.network, self.precision = lower, "bfloat16"
            logger.info("%s: cosine of features in bfloat16 and float32 is at least %.5f", self.name, cosine)
        return self

    def _encode(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        pixels = preprocess(images, self.preprocessing)
        if self.fixed and pixels.shape[2:] != (self.side, self.side):
            made, wanted = " x ".join(map(str, pixels.shape[2:])), f"{self.side} x {self.side}"
            raise InputError(f"{self.name}: preprocessor_config.json makes images of {made}, the model takes {wanted}")
        features: torch.Tensor = network(pixels)
        return features.float()

    @torch.no_grad()
    def _turn(self, lower: nn.Module, device: torch.device) -> float:
        """Least cosine between features of this network and of ``lower``, of blocks of random colours."""
        blocks = torch.randint(0, 256, (8, self.channels, 8, 8), generator=torch.Generator().manual_seed(0))
        images = F.interpolate(blocks.float(), size=(self.side, self.side)).to(device, torch.uint8)
        return float(F.cosine_similarity(self._encode(self.network, images), self._encode(lower, images)).min())
