import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from csm import storage, tables
from csm.encoders import FeatureTable, Sources
from csm.encoders.clip import load_clip
from csm.errors import InputError
from csm.reannotation import HEADS, FitInputs
from csm.reannotation.zero_shot import ZeroShot, fit_zero_shot, load_zero_shot

NAMES = ("cat", "dog", "7")


def inputs(folder: Path, clip: Path | str, size: int = 6) -> FitInputs:
    """Of one image whose feature is zero: only its length matters."""
    schema = tables.features(size)
    row = {"image_id": [0], "split": ["train"], "label": [0], "feature": np.zeros((1, size), np.float32)}
    tables.write(pl.DataFrame(row, schema=dict(schema)), folder / "features" / "part-0.parquet", schema)
    return FitInputs(FeatureTable(folder / "features"), len(NAMES), NAMES, {"path": str(clip)})


def fitted(folder: Path, clip: Path, prompt: str) -> ZeroShot:
    fit_zero_shot(folder, inputs(folder, clip), prompt)
    return load_zero_shot(folder)


def test_the_posterior_is_that_of_transformers(clip_folder: Path, tmp_path: Path) -> None:
    batch = torch.randint(0, 256, (7, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pictures = [Image.fromarray(array) for array in batch.permute(0, 2, 3, 1).numpy()]
    pixels = torch.from_numpy(np.stack(CLIPImageProcessorPil.from_pretrained(clip_folder)(pictures).pixel_values))
    words = CLIPTokenizer.from_pretrained(clip_folder)([f"a {name}." for name in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip_folder).eval()(pixel_values=pixels, **words).logits_per_image.softmax(dim=1)
    features = load_clip(Sources(tmp_path), str(clip_folder), "float32")(batch)
    found = fitted(tmp_path, clip_folder, "a {}.")(features).exp()
    assert torch.allclose(found, expected, atol=1e-4)
    assert expected.std(dim=0).max() > 0.01


def test_several_prompts_are_averaged_after_they_have_length_one(clip_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    head = fitted(tmp_path, clip_folder, "a {}. | the {}!|{} {}")
    for name, text in zip(NAMES, head.texts, strict=True):
        total = np.zeros(6)
        for sentence in (f"a {name}.", f"the {name}!", f"{name} {name}"):
            with torch.no_grad():
                own = model.get_text_features(**tokenizer(sentence, return_tensors="pt")).pooler_output[0].double().numpy()
            total += own / np.linalg.norm(own)
        assert np.allclose(text.numpy(), total / np.linalg.norm(total), atol=1e-5)


def test_lengths_of_features_do_not_matter(clip_folder: Path, tmp_path: Path) -> None:
    head, features = fitted(tmp_path, clip_folder, "{}"), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(head(features), head(features * 30), atol=1e-4)
    assert torch.allclose(head(features).exp().sum(dim=1), torch.ones(4), atol=1e-5)


def test_it_needs_the_folder_of_clip_only_once(clip_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    HEADS["zero-shot"].fit(tmp_path, inputs(tmp_path, copy))
    shutil.rmtree(copy)
    assert HEADS["zero-shot"].load(tmp_path)(torch.ones(2, 6)).shape == (2, 3)
    assert not HEADS["zero-shot"].pair
    assert set(storage.read_tensors(tmp_path / "texts.safetensors")) == {"texts", "scale"}


def test_features_of_another_encoder_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"texts of .* have 6 numbers, the features of the images 8: take the encoder clip"):
        fit_zero_shot(tmp_path, inputs(tmp_path, clip_folder, size=8))
    head = fitted(tmp_path / "good", clip_folder, "{}")
    with pytest.raises(InputError, match="zero-shot: it was fitted on 6 numbers for each image, the encoder gives 8"):
        head(torch.ones(2, 8))


@pytest.mark.parametrize("prompt", ["a photo", "a {}.|", "", "{}|photo"])
def test_a_prompt_without_the_name_is_refused(clip_folder: Path, tmp_path: Path, prompt: str) -> None:
    with pytest.raises(InputError, match=r"prompt: expected a text with {} for the class name, got"):
        fit_zero_shot(tmp_path, inputs(tmp_path, clip_folder), prompt)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path: folder .*absent' does not exist"):
        fit_zero_shot(tmp_path, inputs(tmp_path, tmp_path / "absent"))
