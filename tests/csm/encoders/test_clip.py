import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from csm.encoders import ENCODERS, Sources, encode
from csm.encoders.clip import encode_texts, load_clip
from csm.encoders.vision import Vision
from csm.errors import InputError

TEXTS = ["a photo of a cat.", "3", "an image of the number 7!"]


@pytest.fixture
def folder(clip_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip_folder, tmp_path / "clip"))


def load(folder: Path, precision: str = "float32") -> Vision:
    return load_clip(Sources(folder / "own"), str(folder), precision)


def images(rows: int = 5, channels: int = 3, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (rows, channels, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def expected(folder: Path, batch: torch.Tensor) -> torch.Tensor:
    """Image embeddings of transformers itself, pixels by PIL."""
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    arrays = batch.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array) for array in arrays]
    pixels = torch.from_numpy(np.stack(processor(pictures).pixel_values))
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder).eval().get_image_features(pixel_values=pixels).pooler_output


@pytest.mark.parametrize(("channels", "side"), [(3, 16), (1, 16), (3, 8), (1, 40)])
def test_features_are_the_image_embeddings_of_transformers(clip_folder: Path, channels: int, side: int) -> None:
    batch = images(5, channels, side)
    found = encode(load(clip_folder), batch)
    assert found.shape == (5, 6)
    assert found.dtype == torch.float32
    reference = expected(clip_folder, batch)
    assert torch.nn.functional.cosine_similarity(found, reference).min() > 0.9999  # PIL rounds a few pixels otherwise
    assert torch.allclose(found.norm(dim=1), reference.norm(dim=1), rtol=0.01)
    assert (reference.norm(dim=1) - 1).abs().min() > 0.1  # not normalised
    if side == 16:  # nothing to resize
        assert torch.allclose(found, reference, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch(clip_folder: Path) -> None:
    encoder, batch = load(clip_folder), images(131)  # more than go through the network together
    whole = encoder(batch)
    for rows in (slice(0, 1), slice(100, 131), slice(3, 70)):
        assert torch.allclose(encoder(batch[rows]), whole[rows], atol=1e-4)


def test_the_image_half_alone_is_enough(clip_folder: Path, tmp_path: Path) -> None:
    CLIPVisionModelWithProjection.from_pretrained(clip_folder).save_pretrained(tmp_path / "vision")
    shutil.copy(clip_folder / "preprocessor_config.json", tmp_path / "vision")
    assert torch.equal(load(tmp_path / "vision")(images()), load(clip_folder)(images()))
    with pytest.raises(InputError, match=r"model_type is 'clip_vision_model'; expected clip$"):
        encode_texts(str(_with_words(clip_folder, tmp_path / "vision")), TEXTS)


def _with_words(source: Path, folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    return folder


def test_old_files_hold_numbers_of_positions_too(folder: Path) -> None:
    before = load(folder)(images())
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{half}_model.embeddings.position_ids": torch.arange(5)[None] for half in ("text", "vision")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(folder)(images()), before)


def test_texts_are_embedded_as_by_transformers(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csm.encoders.clip.TEXTS", 2)  # in two batches, padded to other lengths
    found, scale = encode_texts(str(clip_folder), TEXTS)
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    with torch.no_grad():
        reference = model.get_text_features(**tokenizer(TEXTS, padding=True, return_tensors="pt")).pooler_output
    assert torch.allclose(found, reference, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.1
    assert scale == pytest.approx(np.exp(2.6592), rel=1e-4)


def test_a_text_that_is_too_long_is_named(clip_folder: Path) -> None:
    with pytest.raises(InputError, match=r"prompt: 'a photo of something that is long' has \d+ tokens; the model reads 24"):
        encode_texts(str(clip_folder), ["a photo of something that is long", "3"])


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(InputError, match=f"{missing} does not exist"):
        load(folder)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"clip has neither tokenizer.json nor vocab.json and merges.txt"):
        encode_texts(str(folder), TEXTS)


def changed(folder: Path, edit: Callable[..., None], **values: Any) -> str:
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vision_config={**config["vision_config"], **values})
    with pytest.raises(InputError) as caught:
        load(folder)(images())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_of_another_shape_are_named(folder: Path, edit: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    message = changed(folder, edit, intermediate_size=8)
    assert "vision_model.encoder.layers.0.mlp.fc1.bias is (32,); by config.json it is (8,)" in message
    assert capfd.readouterr().err == ""  # transformers prints a table


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 of the weights of CLIPModel are missing, for example visual_projection.weight"):
        load(folder)


def test_another_model_is_named(folder: Path, edit: Callable[..., None]) -> None:
    edit(folder / "config.json", model_type="siglip")
    with pytest.raises(InputError, match=r"config.json: model_type is 'siglip'; expected clip or clip_vision_model"):
        load(folder)


def test_images_of_other_channels_are_refused(clip_folder: Path) -> None:
    with pytest.raises(InputError, match="clip: the images have 4 channels, the model takes 3"):
        load(clip_folder)(images(channels=4))


def test_grey_that_stays_grey_is_refused(folder: Path, edit: Callable[..., None]) -> None:
    edit(folder / "preprocessor_config.json", do_convert_rgb=False)
    with pytest.raises(InputError, match="clip: the images have 1 channels, the model takes 3"):
        load(folder)(images(channels=1))


def test_a_preprocessing_of_another_size_is_refused(folder: Path, edit: Callable[..., None]) -> None:
    edit(folder / "preprocessor_config.json", crop_size=12)
    with pytest.raises(InputError, match=r"preprocessor_config.json makes images of 12 x 12, the model takes 16 x 16"):
        load(folder)(images())


def test_no_gradients_and_no_training_mode(clip_folder: Path) -> None:
    encoder = load(clip_folder)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.network.modules() if module is not encoder.network)


def test_it_is_registered() -> None:
    assert ENCODERS["clip"].load is load_clip
