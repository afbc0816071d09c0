"""The pictures of results: what they show, that nothing is cut or overlaps, and that no colour is needed."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from flip_hf.evaluation.papers import published
from flip_hf.evaluation.plots import (
    Sweep,
    plot_confusion_matrix,
    plot_interpolation,
    plot_probe_curves,
    plot_retrieval_grid,
    plot_zero_shot_bars,
)


@pytest.fixture
def picture(tmp_path):
    return tmp_path / "picture.png"


def texts_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def pixels(path) -> np.ndarray:
    """The picture (H, W, 3), of a size that fits a page."""
    with Image.open(path) as image:
        assert 300 <= min(image.size) and max(image.size) <= 2000
        return np.asarray(image.convert("RGB")).astype(int)


def is_grey(path) -> bool:
    return (np.ptp(pixels(path), axis=2) == 0).all()


def do_not_overlap(labels) -> bool:
    boxes = [label.get_window_extent() for label in labels]
    return not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False))


RESULTS = {"imagenet": 0.35, "cifar10": 0.7, "a $5 data $et": 1.0}


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """The figure of three results beside four papers, and its file."""
    path = tmp_path_factory.mktemp("bars") / "picture.png"
    papers = {m: published()[m] for m in ("FLIP L/14", "FLIP L/16", "OpenCLIP L/14")} | {"Other": {"mnist": 0.5}}
    chance = {"cifar10": 0.1, "mnist": 0.1}
    return plot_zero_shot_bars(RESULTS, papers, path, chance=chance, label="$mine$"), path


def markers_of(figure) -> dict:
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_bars_show_the_results(bars):
    (axes,) = bars[0].axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([35, 70, 100])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(RESULTS)
    assert texts_of(axes) == ["35.0", "70.0", "100.0"] and "(%)" in axes.get_xlabel()


def test_markers_show_the_papers_figures(bars):
    markers = markers_of(bars[0])
    assert list(markers) == ["FLIP L/14", "FLIP L/16", "OpenCLIP L/14"]  # one that has none of the data sets is not
    assert markers["FLIP L/14"].get_xdata() == pytest.approx([74.6, 97.2])
    assert markers["FLIP L/16"].get_xdata() == pytest.approx([74.3])


def test_each_marker_is_within_its_bar_on_a_lane_and_of_a_form_of_its_own(bars):
    markers = markers_of(bars[0])
    assert np.abs(markers["FLIP L/14"].get_ydata() - [0, 1]).max() < 0.39
    assert len({line.get_ydata()[0] for line in markers.values()}) == 3
    assert len({(line.get_marker(), line.get_markerfacecolor()) for line in markers.values()}) == 3


def test_chance_is_drawn_once_for_each_data_set_shown(bars):
    (chance,) = bars[0].axes[0].collections
    assert chance.get_segments()[0][:, 0].tolist() == pytest.approx([10, 10]) and len(chance.get_segments()) == 1


def test_the_legend_names_every_mark_in_plain_text(bars):
    figure, _ = bars
    legend = figure.legends[0].get_texts()
    expected = ["$mine$ (figures on the right)", *markers_of(figure), "chance"]
    assert [text.get_text() for text in legend] == expected
    assert not any(text.get_parse_math() for text in (*legend, *figure.axes[0].get_yticklabels()))


def test_bars_need_no_colour(bars):
    assert is_grey(bars[1])


def test_markers_of_many_papers_differ(picture):
    papers = {f"model {i}": {"imagenet": 0.5} for i in range(16)}
    (axes,) = plot_zero_shot_bars({"imagenet": 0.5}, papers, picture).axes
    assert len({(line.get_marker(), line.get_markerfacecolor()) for line in axes.lines}) == 16


def test_a_confusion_matrix_shows_shares_of_rows(picture):
    counts = np.array([[8, 2, 0], [1, 198, 1], [0, 0, 0]])
    figure = plot_confusion_matrix(counts, ["cat", "large dog", "$nobody$"], picture)
    axes, bar = figure.axes
    assert np.allclose(axes.images[0].get_array(), [[0.8, 0.2, 0], [0.005, 0.99, 0.005], [0, 0, 0]])
    assert texts_of(axes) == ["80", "20", "<1", "99", "<1"]
    assert [to_rgb(text.get_color())[0] for text in axes.texts] == [1, 0, 0, 1, 0]  # white on dark cells
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "large dog", "$nobody$"]
    assert axes.get_title() == "98.1 % of 210 samples right"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert "(%)" in bar.get_ylabel()
    assert is_grey(picture)


def test_many_classes_stay_readable_on_one_page(picture):
    counts = np.random.default_rng(0).integers(0, 3, (100, 100)) + 50 * np.eye(100, dtype=int)
    names = [f"class {i} " + "of a long name " * (i % 3) for i in range(100)]
    figure = plot_confusion_matrix(counts, names, picture)
    axes = figure.axes[0]
    assert axes.images[0].get_array().shape == (100, 100) and not axes.texts
    labels = axes.get_yticklabels()
    step = int(re.search(r"one in (\d+) is named", axes.get_ylabel()).group(1))
    assert [label.get_text().split()[1] for label in labels] == [str(i) for i in range(0, 100, step)]
    assert 25 <= len(labels) and max(len(label.get_text()) for label in labels) <= 24
    assert do_not_overlap(labels) and do_not_overlap(axes.get_xticklabels())
    # Nothing is cut: the rim of the picture is white.
    rim = pixels(picture)
    assert all((edge == 255).all() for edge in (rim[:5], rim[-5:], rim[:, :5], rim[:, -5:]))


def test_right_answers_have_a_thick_frame_and_a_tick(picture):
    images = [Image.new("RGB", (60, 40), (0, 0, shade)) for shade in (0, 120, 250)] + [np.zeros((30, 50, 3), np.uint8)]
    caption = "a cup for $5 or $6, " + "and more and more of it " * 20
    results = [[(images[0], False), (images[3], True), (images[2], False)], [("a", True), ("b", False)]]
    figure = plot_retrieval_grid([caption, images[1]], results, picture)
    grid = np.array(figure.axes).reshape(2, 4)
    assert [axes.get_title() for axes in grid[0]] == ["query", "1", "2", "3"]
    shown = " ".join(texts_of(grid[0, 0])[0].split())
    assert shown.startswith("a cup for $5 or $6, and more") and shown.endswith(" …")
    assert not grid[0, 0].texts[0].get_parse_math()
    frames = [[patch.get_linewidth() for patch in axes.patches] for axes in grid.ravel()]
    assert frames == [[], [0.8], [3.5], [0.8], [], [3.5], [0.8], []]
    assert ["✓" in texts_of(axes) for axes in grid.ravel()] == [False, False, True, False, False, True, False, False]
    assert [len(axes.images) for axes in grid.ravel()] == [0, 1, 1, 1, 1, 0, 0, 0]
    left, right, low, high = grid[0, 2].images[0].get_extent()
    assert (right - left) / (high - low) == pytest.approx(50 / 30)  # not stretched
    assert (pixels(picture)[:5] == 255).all()


@pytest.fixture(scope="module")
def probe_curves(tmp_path_factory):
    """The panels of a sweep and of few shots, and their file."""
    path = tmp_path_factory.mktemp("curves") / "picture.png"
    linear = Sweep({100.0: 0.5, 1e-6: 0.4, 0.1: 0.75}, "a fifth of train, held out, n = 20", 0.7, "test, n = 40")
    few_shot = {4: [0.5, 0.6, 0.55], 1: [0.2, 0.4], 16: [0.7]}
    sweep, shots = plot_probe_curves(linear, few_shot, 0.612, path, "test, n = 40").axes
    return sweep, shots, path


def test_a_sweep_shows_its_curve_its_best_and_the_test(probe_curves):
    sweep, _, _ = probe_curves
    curve, best, tested = sweep.lines
    assert curve.get_xdata() == pytest.approx([1e-6, 0.1, 100]) and curve.get_ydata() == pytest.approx([40, 75, 50])
    assert sweep.get_xscale() == "log"
    assert best.get_label() == "best on a fifth of train, held out, n = 20: 75.0 at λ = 0.1"
    assert tested.get_ydata() == pytest.approx([70, 70])
    assert tested.get_label() == "with that λ on test, n = 40: 70.0"


def test_few_shots_show_their_mean_their_spread_and_zero_shot(probe_curves):
    _, shots, _ = probe_curves
    mean, zero_shot = shots.lines
    assert mean.get_xdata().tolist() == [1, 4, 16] and mean.get_ydata() == pytest.approx([30, 55, 70])
    assert zero_shot.get_ydata() == pytest.approx([61.2, 61.2]) and zero_shot.get_label() == "zero-shot: 61.2"
    band = shots.collections[0].get_paths()[0].vertices
    assert {(round(x), round(y)) for x, y in band} >= {(1, 20), (1, 40), (4, 50), (4, 60), (16, 70)}
    assert [label.get_text() for label in shots.get_xticklabels()] == ["1", "4", "16"]


def test_probe_curves_name_their_data_outside_the_panels_without_colour(probe_curves):
    sweep, shots, path = probe_curves
    assert sweep.get_ylabel() == "accuracy (%), higher is better\ncurve: a fifth of train, held out, n = 20"
    assert shots.get_ylabel() == "accuracy (%), higher is better\ntest, n = 40"
    for panel in (sweep, shots):
        legend = panel.get_legend().get_window_extent()
        assert not legend.overlaps(panel.get_window_extent())
    assert is_grey(path)


def test_one_kind_of_probe_is_one_panel(picture):
    (sweep,) = plot_probe_curves(Sweep({1.0: 0.5}, "validation", 0.5, "test"), None, None, picture).axes
    assert sweep.get_xlabel() == "L2 penalty λ"
    (shots,) = plot_probe_curves(None, {1: [0.5]}, None, picture).axes
    assert len(shots.lines) == 1


def test_inputs_that_cannot_be_drawn_are_refused(picture):
    with pytest.raises(ValueError, match=r"shares in \[0, 1\]; imagenet has 74.3"):
        plot_zero_shot_bars({"imagenet": 74.3}, {}, picture)
    with pytest.raises(ValueError, match="at least one data set"):
        plot_zero_shot_bars({}, {}, picture)
    with pytest.raises(ValueError, match="counts .* of 2 classes"):
        plot_confusion_matrix(np.zeros((3, 3)), ["a", "b"], picture)
    with pytest.raises(ValueError, match="2 queries and 1 lists"):
        plot_retrieval_grid(["a", "b"], [[("c", True)]], picture)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_probe_curves(None, {}, 0.5, picture)
    with pytest.raises(ValueError, match="above 0"):
        plot_probe_curves(Sweep({0.0: 0.5}, "validation", 0.5, "test"), None, None, picture)
    assert not picture.exists()


def test_published_figures_are_the_papers():
    zero_shot = published()
    assert zero_shot["FLIP L/16"] == {"imagenet": pytest.approx(0.743)}
    assert zero_shot["CLIP L/16, reproduced"] == {"imagenet": pytest.approx(0.724)}
    assert zero_shot["FLIP L/14"]["imagenet_a"] == pytest.approx(0.512)
    for model in ("FLIP L/14", "CLIP L/14, reproduced", "OpenCLIP L/14"):  # tables 2, 4 and 6
        assert len(zero_shot[model]) == 1 + 25 + 5
    # Over the 25 data sets of table 4, FLIP is ahead of its CLIP on all but three.
    ahead = {d for d, v in zero_shot["FLIP L/14"].items() if v > zero_shot["CLIP L/14, reproduced"][d]}
    assert set(zero_shot["FLIP L/14"]) - ahead == {"oxford_pets", "gtsrb", "patch_camelyon"}
    found = published("text_retrieval")["FLIP L/14"]
    assert found == {"flickr30k": pytest.approx(0.891), "mscoco": pytest.approx(0.602)}
    assert all(0 < v < 1 for row in zero_shot.values() for v in row.values())
    with pytest.raises(ValueError, match="there are fine_tuning, image_retrieval"):
        published("zeroshot")


# -- interpolation -----------------------------------------------------------------------------------------------------


def test_an_interpolation_is_drawn_over_alpha_and_one_data_set_against_the_other(picture):
    curves = {"mine ($data)": {0.0: 0.2, 0.5: 0.7, 1.0: 0.8}, "other ($retain)": {0.0: 0.9, 0.5: 0.85, 1.0: 0.4}}
    figure = plot_interpolation(curves, picture)
    over_alpha, against = figure.axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in over_alpha.lines}
    assert drawn["mine ($data)"] == ([0, 0.5, 1], pytest.approx([20, 70, 80]))
    assert drawn["other ($retain)"] == ([0, 0.5, 1], pytest.approx([90, 85, 40]))
    (path,) = against.lines
    assert list(path.get_xdata()) == pytest.approx([90, 85, 40]) and list(path.get_ydata()) == pytest.approx(
        [20, 70, 80]
    )
    assert texts_of(against) == ["0", "0.5", "1"] and is_grey(picture)
    assert len(plot_interpolation({"mine": curves["mine ($data)"]}, picture).axes) == 1
