import math

import pytest
import torch
import torch.nn.functional as F

from csm.generators.edm.layers import Block, BlockStyle, Direction, DownAfterConv, Resample, ResamplingConv, resample

STYLE = BlockStyle(
    embedding=6, eps=1e-6, scale=math.sqrt(0.5), scale_and_shift=False, head_channels=0, resampled_skip=True, taps=(1, 1)
)
ADM = BlockStyle(embedding=6, eps=1e-5, scale=1.0, scale_and_shift=True, head_channels=4, resampled_skip=False, taps=(1, 1))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed + 1) * 0.3
    return module.requires_grad_(False)


def down_by_hand(x: torch.Tensor, taps: tuple[int, ...]) -> torch.Tensor:
    n, channels, height, width = x.shape
    pad, out = (len(taps) - 1) // 2, torch.zeros(n, channels, height // 2, width // 2)
    for i in range(height // 2):
        for j in range(width // 2):
            for a, first in enumerate(taps):
                for b, second in enumerate(taps):
                    row, column = 2 * i + a - pad, 2 * j + b - pad
                    if 0 <= row < height and 0 <= column < width:
                        out[:, :, i, j] += x[:, :, row, column] * first * second / sum(taps) ** 2
    return out


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_down_is_a_filter_at_every_other_pixel(taps: tuple[int, ...]) -> None:
    x = draw(2, 3, 4, 6)
    assert torch.allclose(Resample("down", taps)(x), down_by_hand(x, taps), atol=1e-6)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_up_is_four_times_the_transpose_of_down(taps: tuple[int, ...]) -> None:
    small, large = draw(1, 2, 2, 3), draw(1, 2, 4, 6, seed=1)
    up, down = Resample("up", taps)(small), Resample("down", taps)(large)
    assert up.shape == large.shape
    assert torch.allclose((up * large).sum(), 4 * (small * down).sum(), atol=1e-5)
    inside = Resample("up", taps)(torch.ones(1, 1, 4, 4))[:, :, 1:-1, 1:-1]
    assert torch.allclose(inside, torch.ones_like(inside))


def test_the_short_filter_is_computed_as_any_other() -> None:
    x, kernel = draw(2, 3, 4, 4), Resample("up", (1, 1)).resample_filter
    up = F.conv_transpose2d(x, 4 * kernel.expand(3, 1, -1, -1), stride=2, groups=3)
    down = F.conv2d(x, kernel.expand(3, 1, -1, -1), stride=2, groups=3)
    assert torch.allclose(resample(x, "up", (1, 1), kernel), up)
    assert torch.allclose(resample(x, "down", (1, 1), kernel), down, atol=1e-7)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_convolution_follows_the_resampling(direction: Direction) -> None:
    layer, x = seeded(ResamplingConv(3, 5, 3, direction, (1, 3, 3, 1))), draw(2, 3, 4, 4)
    filtered = Resample(direction, (1, 3, 3, 1))(x)
    assert torch.allclose(layer(x), F.conv2d(filtered, layer.weight, layer.bias, padding=1), atol=1e-6)


def test_down_after_a_convolution_is_one_strided_convolution() -> None:
    layer, x = seeded(DownAfterConv(3, 5, 3, (1, 3, 3, 1))), draw(2, 3, 8, 8)
    # The kernel of both in a row is their convolution, of 6 by 6.
    both = F.conv2d(F.pad(layer.weight, (3, 3, 3, 3)).view(15, 1, 9, 9), layer.resample_filter).view(5, 3, 6, 6)
    assert torch.allclose(layer(x), F.conv2d(x, both, layer.bias, stride=2, padding=2), atol=1e-5)


def test_attention_is_a_softmax_over_the_pixels_of_each_head() -> None:
    block, x, embedding = seeded(Block(ADM, 8, 8, attention=True)), draw(2, 8, 3, 2), draw(2, 6, seed=9)
    plain = seeded(Block(ADM, 8, 8))
    plain.load_state_dict({name: value for name, value in block.state_dict().items() if name in plain.state_dict()})
    before = plain(x, embedding)
    qkv = block.qkv(block.norm2(before)).flatten(2)  # (2, 24, 6)
    heads = []
    for head in range(2):
        query, key, value = (qkv[:, 12 * head + part : 12 * head + 12 : 3] for part in range(3))  # each (2, 4, 6)
        share = (query.transpose(1, 2) @ key / 2).softmax(dim=2)  # of 6 keys for each of 6 queries
        heads.append(value @ share.transpose(1, 2))
    expected = before + block.proj(torch.cat(heads, dim=1).view_as(before))
    assert torch.allclose(block(x, embedding), expected, atol=1e-5)


@pytest.mark.parametrize("style", [STYLE, ADM])
@pytest.mark.parametrize("direction", [None, "up", "down"])
def test_a_block_keeps_the_channels_last(style: BlockStyle, direction: Direction | None) -> None:
    block, x, embedding = seeded(Block(style, 8, 8, direction, attention=True)), draw(2, 8, 4, 4), draw(2, 6, seed=9)
    expected = block(x, embedding)
    last = block.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), embedding)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(last, expected, atol=1e-5)


def test_too_few_channels_for_a_head_have_no_attention() -> None:
    assert not hasattr(Block(BlockStyle(6, 1e-5, 1.0, True, 64, False, (1, 1)), 32, 32, attention=True), "qkv")
