import pytest
import torch
from torch import nn

from csm.encoders import vision
from csm.encoders.preprocessing import Preprocessing
from csm.encoders.vision import Vision
from csm.errors import InputError

CPU = torch.device("cpu")


class Flat(nn.Module):
    """The pixels times a matrix, plus and minus ``offset``, before which bfloat16 forgets them if it is large."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.randn(3 * 4 * 4, 5, generator=torch.Generator().manual_seed(0)), requires_grad=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.flatten(1).to(self.weight.dtype) @ self.weight + self.offset) - self.offset


def make(offset: float = 0.0, precision: str = "auto") -> Vision:
    return Vision("flat", Flat(offset), Preprocessing(size=4, crop_size=4), 3, 4, fixed=True, precision=precision)


def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def dtype(encoder: Vision) -> torch.dtype:
    return next(encoder.network.parameters()).dtype


def test_auto_takes_bfloat16_where_it_is_fast_and_does_not_move_features(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make()(images())
    monkeypatch.setattr(vision, "best_dtype", lambda network, device: torch.bfloat16)
    fast = make().to(CPU)
    assert dtype(fast) == torch.bfloat16
    assert fast(images()).dtype == torch.float32
    assert not torch.equal(fast(images()), expected)
    assert torch.nn.functional.cosine_similarity(fast(images()), expected).min() > 0.999
    assert dtype(fast.to(CPU)) == torch.bfloat16  # again
    faithful = make(1e4).to(CPU)
    assert dtype(faithful) == torch.float32
    assert torch.allclose(faithful(images()), expected, atol=1e-2)
    monkeypatch.setattr(vision, "best_dtype", lambda network, device: torch.float32)
    assert dtype(make().to(CPU)) == torch.float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_precision_is_kept(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"float32": torch.bfloat16, "bfloat16": torch.float32}[precision]
    monkeypatch.setattr(vision, "best_dtype", lambda network, device: other)
    assert dtype(make(precision=precision).to(CPU)) == getattr(torch, precision)


def test_another_precision_is_refused() -> None:
    with pytest.raises(InputError, match="precision: expected auto, float32, bfloat16, got 'half'"):
        make(precision="half")


@pytest.mark.gpu
def test_on_a_gpu_the_features_are_those_of_the_cpu_up_to_rounding() -> None:
    expected = make()(images())
    for precision in vision.PRECISIONS:
        found = make(precision=precision).to(torch.device("cuda"))(images().cuda()).cpu()
        assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999
