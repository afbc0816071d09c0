"""The curves of a run, as a person reads them."""

import math
from itertools import pairwise

import pytest

from flip_hf.training.progress import plot_curves


@pytest.mark.parametrize("step", [7, 4_000, 20_000, 50_000_000])
def test_labels_do_not_collide_and_legends_cover_nothing(step, tmp_path):
    records = [
        {"samples": i * step, "loss": 4 * math.exp(-i / 20), "accuracy": 1 - math.exp(-i / 20), "logit_scale": 10 + i}
        for i in range(1, 60)
    ]
    records += [{"samples": i * 15 * step, "zero_shot_top1": 0.2 * i} for i in range(1, 4)]
    figure = plot_curves(records, {"unmasked": 40 * step}, tmp_path / "curves.png")
    figure.canvas.draw()
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss (lower is better)",
        "accuracy (higher is better)",
        "logit scale (1 / temperature)",
    ]
    for axes in figure.axes:
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
        assert len(boxes) >= 3
        assert all(first.x1 + 4 < second.x0 for first, second in pairwise(boxes))
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


def test_stages_are_marked_with_their_numbers_and_one_line_in_the_legend(tmp_path):
    records = [{"samples": 100 * i, "loss": 1 / i, "accuracy": i / 60} for i in range(1, 60)]
    figure = plot_curves(records, {"stage 2": 2000, "stage 3": 3000, "stage 4": 5500}, tmp_path / "curves.png")
    figure.canvas.draw()
    for axes in figure.axes:
        marked = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert marked == [2000, 3000, 5500]
        assert [(text.get_position()[0], text.get_text()) for text in axes.texts] == [
            *((2000, "2"), (3000, "3"), (5500, "4")),
        ]
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels.count("a stage begins, its number above") == 1 and len(labels) == 2
        inside = axes.get_window_extent()
        assert all(text.get_window_extent().y0 >= inside.y1 for text in axes.texts)
