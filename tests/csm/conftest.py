import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums over several threads round differently; the tests compare bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def separable() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Images uint8 (K * per_class, 1, 6, 6) whose class is the bright pair of rows, in random order, and labels."""

    def make(per_class: int, seed: int = 0, n_classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        labels = torch.arange(n_classes).repeat(per_class)[torch.randperm(n_classes * per_class, generator=draw)]
        images = torch.randint(0, 120, (len(labels), 1, 6, 6), generator=draw)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, 2 * label : 2 * label + 2] += 110
        return images.to(torch.uint8), labels

    return make


@pytest.fixture
def edit() -> Callable[..., None]:
    """``edit(file, key=value, ...)`` changes keys of a JSON file; None as a value is null."""

    def change(file: Path, **changes: Any) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights in the files of the published ones; it spells its words, embeddings have 6 numbers."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "words").mkdir()
    (folder / "words" / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder / "words", model_max_length=24).save_pretrained(folder)
    layers: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 6,
        "initializer_range": 0.5,
    }
    text = {
        **layers,
        "vocab_size": len(words),
        "max_position_embeddings": 24,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    torch.manual_seed(4)
    vision = {**layers, "image_size": 16, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 16,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "size": 16,
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def held_out_posterior() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-posteriors (600, 3) that are three times too certain and lean to class 0, and labels."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(600, 3, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(truth.softmax(dim=1), 1, generator=draw).squeeze(1)
    return (3 * truth + torch.tensor([3.0, 0.0, 0.0])).log_softmax(dim=1).float(), labels


@pytest.fixture(scope="session")
def held_out_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Shares (300, 3) whose log-odds are 6 (share - 0.5), and labels."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (300,), generator=draw)
    share = 0.5 + 0.8 * torch.randn(300, 3, generator=draw)
    own = torch.rand(300, 3, generator=draw) < torch.sigmoid(6 * (share - 0.5))
    return torch.where(own, share, 1 - share), labels
