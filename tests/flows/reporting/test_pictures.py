"""Pictures on the page: how they are stored, how many are shown, and what stands under them."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flows import reporting
from flows.reporting import Annotation, Cell, Dataset, MixedSet, data_uri, render
from tests.flows.reported import Page, report


def test_gallery_runs_from_class_b_to_class_a(page):
    assert "dog → cat" in page.text("h3")
    words = [element["attrs"]["aria-label"] for element in page.all("div", role="img", tabindex="0")]
    assert [text.partition(";")[0] for text in words] == [
        f"Mix of dog and cat, ratio of cat {lam}" for lam in ("0.00", "0.50", "1.00")
    ]
    assert words[1].partition("; ")[2] == (
        "projection: raw 0.40, calibrated 0.50; posterior: calibrated 0.25, 25 % outside the pair, most likely <script>alert(1)</script>"
    )
    tips = page.text("div", **{"class": "tip"})
    assert tips[1].startswith("ratio of cat in: 0.50 projection: raw 0.40, calibrated 0.50")
    cells = page.text("td", role="cell")
    assert cells[3:6] == ["0.00", "0.50", "1.00"]  # ratio that went in
    assert cells[9:12] == [f"{share} 25 % <script>alert(1)</script>" for share in ("0.00", "0.25", "1.00")]
    assert 'style="width:18.8%"' in render(report())  # 0.25 of the 0.75 within the pair


def test_shares_of_the_bars_under_an_image_sum_to_one(html):
    bars = re.findall(r'<div class="share".*?</div>', html)
    assert len(bars) == 6
    for bar in bars:
        assert sum(map(float, re.findall(r"width:([\d.]+)%", bar))) == pytest.approx(100, abs=0.2)


def test_small_pictures_keep_their_pixels_and_large_ones_are_photographs():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    decoded = Image.open(io.BytesIO(base64.b64decode(data_uri(image).split(",")[1])))
    assert np.array_equal(np.asarray(decoded), image)
    large = data_uri(np.zeros((400, 200, 1), np.uint8))
    assert Image.open(io.BytesIO(base64.b64decode(large.split(",")[1]))).size == (48, 96)
    assert 'class="px' not in render(replace(report(), dataset=replace(report().dataset, image_shape=(64, 64, 3))))
    assert " px" in render(report())


@pytest.mark.parametrize("image", [np.zeros((4, 4, 1)), np.zeros((4, 4, 2), np.uint8), np.zeros((4,), np.uint8)])
def test_pictures_of_other_kinds_are_refused(image):
    with pytest.raises(ValueError, match="uint8"):
        data_uri(image)


def test_a_large_run_stays_under_two_megabytes_and_says_what_it_leaves_out():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    pictures = [np.asarray(Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)) for small in coarse]
    names = [f"class {index}" for index in range(200)]
    cells = [Cell(step / 7, pictures[step], {"posterior": Annotation(0.5, 0.1, "cat")}) for step in range(8)]
    samples = [(name, [picture] * 20) for name, picture in zip(names, pictures, strict=True)]
    big = replace(
        report(),
        dataset=Dataset("tiny-imagenet", names, {"test": 10_000}, (64, 64, 3)),
        gallery=[MixedSet("cat", "dog", cells)] * 50,
        data_samples=samples,
        generator_samples=samples,
    )
    text = render(big)
    assert len(text) < 2e6
    page = Page(text)
    assert page.text("h3").count("dog → cat") == reporting.MAX_SETS
    rows = [element for element in page.all("div") if element["attrs"].get("class") == "row"]
    assert len(rows) == 2 * reporting.MAX_CLASSES
    assert all(r["attrs"]["aria-label"].startswith(f"{reporting.MAX_SAMPLES} ") for r in rows)
    assert f"Shown are the first {reporting.MAX_SETS} of 50 sets." in text
    assert f"Shown are {reporting.MAX_CLASSES} of 200 classes." in text
    assert "and 180 more" in text
