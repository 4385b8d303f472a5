import io

import numpy as np
import pytest
from PIL import Image

from csm.plots import annotation_plot, image_grid, metric_bars, reliability_diagram


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_reliability_bars_gaps_and_ece_are_those_of_the_bins():
    # two bins of four are filled: (0.5, 0.75] with accuracy 1/2 and (0.75, 1] with accuracy 3/4
    confidence = np.array([0.6, 0.7, 0.9, 0.9, 1.0, 1.0])
    correct = np.array([True, False, True, True, True, False])
    axes, histogram = reliability_diagram(confidence, correct, n_bins=4, title="ce").axes
    bars, gaps = axes.containers
    assert [(bar.get_x(), bar.get_height()) for bar in bars] == [(0.5, 0.5), (0.75, 0.75)]
    assert [gap.get_height() for gap in gaps] == pytest.approx([0.15, 0.2])
    assert [bar.get_height() for bar in histogram.containers[0]] == pytest.approx([0, 0, 2 / 6, 4 / 6])
    assert axes.texts[0].get_text() == "ECE 18.3 %"  # 2/6 * 0.15 + 4/6 * 0.20
    assert axes.get_title() == "ce"


def test_reliability_overlays_what_temperature_changed():
    correct = np.array([True, False])
    axes, histogram = reliability_diagram([1.0, 1.0], correct, after=[0.5, 0.5]).axes
    assert axes.texts[0].get_text() == "ECE 50.0 %, 0.0 % after temperature"
    line = axes.lines[-1]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([0.5], [0.5])
    assert len(histogram.containers) == 2


@pytest.mark.parametrize("confidence", [[], [1.2], [float("nan")]])
def test_reliability_refuses_what_is_no_confidence(confidence):
    with pytest.raises(ValueError, match="confidence"):
        reliability_diagram(confidence, [True] * len(confidence))


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_shows_every_pixel_in_place(channels):
    images = np.arange(2 * 3 * 4 * 4 * channels, dtype=np.uint8).reshape(2, 3, 4, 4, channels)
    figure = image_grid(images, ["a", "b"], ["x", "y", "z"], [["1", "2", "3"], ["4", "5", "6"]], "sets")
    assert len(figure.axes) == 6
    for index, axes in enumerate(figure.axes):
        picture = axes.images[0]
        assert np.array_equal(np.squeeze(picture.get_array()), np.squeeze(images[index // 3, index % 3]))
        assert picture.get_interpolation() == "nearest"
        assert axes.get_xlabel() == str(index + 1)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["x", "y", "z"]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["a", "b"]
    assert png(figure).std() > 0


def test_image_grid_of_dark_pictures_is_not_stretched_in_contrast():
    assert figure_limits(np.full((1, 1, 2, 2, 1), 7, np.uint8)) == (0, 255)


def figure_limits(images):
    return image_grid(images).axes[0].images[0].get_clim()


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((2, 2, 4, 4), {}, "uint8"),
        ((2, 2, 4, 4, 2), {}, "1 or 3"),
        ((0, 2, 4, 4, 1), {}, "R, C"),
        ((2, 2, 4, 4, 1), {"row_labels": ["a"]}, "row_labels must have 2"),
        ((2, 2, 4, 4, 1), {"col_labels": ["a", "b", "c"]}, "col_labels must have 2"),
        ((2, 2, 4, 4, 1), {"captions": [["a", "b"]]}, "captions must have 2"),
        ((2, 2, 4, 4, 1), {"captions": [["a", "b"], ["c"]]}, "each row of captions must have 2"),
    ],
)
def test_image_grid_refuses_what_does_not_fit(shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        image_grid(np.zeros(shape, np.uint8), **kwargs)


def test_metric_bars_draw_means_spread_and_missing_seeds():
    figure = metric_bars(["ce", "csm"], {"NLL": [[1.0, 3.0], [1.0, np.nan]], "ECE, %": [[4.0, 4.0], [2.0, 2.0]]})
    nll, ece = figure.axes
    assert [bar.get_width() for bar in nll.patches] == [2.0, 1.0]
    assert [bar.get_width() for bar in ece.patches] == [4.0, 2.0]
    assert [label.get_text() for label in nll.get_yticklabels()] == ["ce", "csm"]
    assert nll.yaxis_inverted()  # the first method on top
    segments = nll.collections[0].get_segments()
    assert segments[0][:, 0] == pytest.approx([2 - 2**0.5, 2 + 2**0.5])
    assert segments[1][:, 0] == pytest.approx([1, 1])
    assert png(figure).std() > 0


def test_metric_bars_need_a_row_per_method():
    with pytest.raises(ValueError, match=r"'NLL'.*\(2, seeds\)"):
        metric_bars(["ce", "csm"], {"NLL": [[1.0, 2.0]]})
    with pytest.raises(ValueError, match="empty"):
        metric_bars([], {})


def mixed_truth(rows=400, seed=0):
    draw = np.random.default_rng(seed)
    truth = draw.dirichlet(np.full(4, 0.6), rows)
    class_a = draw.integers(0, 4, rows)
    return truth, class_a, (class_a + draw.integers(1, 4, rows)) % 4


def test_annotation_plot_puts_the_truth_on_the_diagonal_and_says_how_far_others_are():
    truth, a, b = mixed_truth()
    flat = np.full_like(truth, 0.25)
    figure = annotation_plot({"truth": truth, "flat": flat}, truth, a, b, "known")
    share, share_flat, top, top_flat = figure.axes
    assert [panel.get_title() for panel in (share, share_flat)] == [
        "truth\nTV 0.000",
        f"flat\nTV {np.abs(truth - 0.25).sum(axis=1).mean() / 2:.3f}",
    ]
    row = np.arange(len(truth))
    ratio, best = truth[row, a] / (truth[row, a] + truth[row, b]), truth.max(axis=1)
    for panel, true, said in (
        (share, ratio, ratio),
        (share_flat, ratio, 0.5 + 0 * ratio),
        (top, best, best),
        (top_flat, best, 0.25),
    ):
        _, low, high, mean = panel.lines
        said = np.broadcast_to(said, true.shape)
        for index, centre in enumerate(mean.get_xdata()):
            inside = said[(true >= centre - 0.025) & (true < centre + 0.025)]
            drawn = [line.get_ydata()[index] for line in (low, mean, high)]
            if len(inside) < 5:
                assert np.isnan(drawn).all()
            else:
                assert drawn == pytest.approx([np.quantile(inside, 0.1), inside.mean(), np.quantile(inside, 0.9)])
        assert np.isfinite(mean.get_ydata()).sum() >= 10
        assert panel.texts[0].get_text() == f"off by {np.abs(said - true).mean():.3f}"
    assert png(figure).std() > 0


def test_annotation_plot_leaves_out_images_without_a_ratio_and_wraps_after_five():
    truth, a, b = mixed_truth(8)
    outside = np.zeros_like(truth)
    outside[np.arange(8), [next(k for k in range(4) if k not in pair) for pair in zip(a, b, strict=True)]] = 1
    figure = annotation_plot({str(name): outside for name in range(7)}, truth, a, b)
    seen = [panel for panel in figure.axes if panel.get_visible()]
    assert len(figure.axes) == 20
    assert len(seen) == 14
    assert [len(panel.texts) for panel in seen[:10]] == [0] * 5 + [1] * 5  # no share to be off by
    assert png(figure).std() > 0


@pytest.mark.parametrize(
    ("labels", "message"), [({}, "must not be empty"), ({"x": np.full((4, 2), 0.5)}, r"'x'.*shape of truth, \(4, 4\)")]
)
def test_annotation_plot_needs_labels_of_the_shape_of_the_truth(labels, message):
    with pytest.raises(ValueError, match=message):
        annotation_plot(labels, *mixed_truth(4))
