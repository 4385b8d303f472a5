import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from csm.encoders import ENCODERS, Sources, encode
from csm.encoders.dinov2 import load_dinov2
from csm.errors import InputError


def config(**changes: int) -> Dinov2Config:
    layers = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "initializer_range": 0.5}
    return Dinov2Config(**{**layers, "image_size": 28, "patch_size": 7, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny DINOv2 with random weights in the published files: images are cropped to another size than its positions are for."""
    torch.manual_seed(5)
    Dinov2Model(config()).save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 21, "width": 21}).save_pretrained(tmp_path)
    return tmp_path


def images(rows: int = 5, channels: int = 3, side: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (rows, channels, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize(("channels", "side"), [(3, 24), (1, 24), (3, 8)])
def test_features_are_the_class_tokens_of_transformers(folder: Path, channels: int, side: int) -> None:
    batch = images(5, channels, side)
    arrays = batch.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array[..., 0] if channels == 1 else array) for array in arrays]
    pixels = torch.from_numpy(np.stack(BitImageProcessorPil.from_pretrained(folder)(pictures).pixel_values))
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folder).eval()(pixels).last_hidden_state[:, 0]
    found = encode(load_dinov2(Sources(folder), str(folder), "float32"), batch)
    assert found.shape == (5, 8)
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9999
    if side == 24:  # nothing to resize
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch(folder: Path) -> None:
    encoder, batch = load_dinov2(Sources(folder), str(folder), "float32"), images(20)
    assert torch.allclose(encoder(batch[7:9]), encoder(batch)[7:9], atol=1e-4)


def test_another_model_is_named(folder: Path, edit: Callable[..., None]) -> None:
    edit(folder / "config.json", model_type="clip")
    with pytest.raises(InputError, match=r"config.json: model_type is 'clip'; expected dinov2"):
        load_dinov2(Sources(folder), str(folder))


def test_a_classifier_is_not_taken_for_an_encoder(folder: Path) -> None:
    Dinov2ForImageClassification(config()).save_pretrained(folder)
    with pytest.raises(InputError, match=r"2 of the weights are not of Dinov2Model, for example classifier.bias"):
        load_dinov2(Sources(folder), str(folder))


def test_images_of_other_channels_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="dinov2: the images have 2 channels, the model takes 3"):
        load_dinov2(Sources(folder), str(folder))(images(channels=2))


def test_a_missing_file_is_named(folder: Path) -> None:
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] == "BitImageProcessor"
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config.json does not exist"):
        load_dinov2(Sources(folder), str(folder))


def test_it_is_registered() -> None:
    assert ENCODERS["dinov2"].load is load_dinov2
