import pytest
import torch
from pydantic import ValidationError

from csm.generators.edm.unets import DhariwalUNetSettings, SongUNetSettings, make_mapping, make_unet

SMALL = {"img_resolution": 16, "in_channels": 1, "out_channels": 1, "label_dim": 3, "model_channels": 8, "num_blocks": 1}


@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
def test_every_tensor_of_a_song_unet_matters(encoder: str, decoder: str) -> None:
    settings = SongUNetSettings(**SMALL, channel_mult=(1, 2, 2), encoder_type=encoder, decoder_type=decoder)
    _every_tensor_matters(settings)


def test_every_tensor_of_a_dhariwal_unet_matters() -> None:
    _every_tensor_matters(DhariwalUNetSettings(**SMALL, channel_mult=(1, 8), attn_resolutions=(8,)))


def _every_tensor_matters(settings: SongUNetSettings | DhariwalUNetSettings) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, mapping = make_unet(settings), make_mapping(settings)
        x = torch.randn(2, 1, 16, 16)
    output = unet(x, mapping(torch.tensor([3.0, 40.0]), torch.eye(3)[:2]))
    assert output.shape == (2, 1, 16, 16)
    output.square().sum().backward()
    for name, parameter in [*unet.named_parameters(), *mapping.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_resolution_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match=r"img_resolution 16 cannot be halved 5 times"):
        make_unet(SongUNetSettings(**SMALL, channel_mult=(1,) * 6))


@pytest.mark.parametrize(
    "wrong", [{"num_blocks": 10**9}, {"model_channels": 0}, {"encoder_type": "other"}, {"channel_mult": ()}, {"unknown": 1}]
)
def test_other_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SongUNetSettings(**{**SMALL, **wrong})
