"""The pictures of the committed points: words that nothing strikes through, and legends that cover nothing."""

import json

import pytest
from matplotlib.transforms import Bbox

from flip_hf.reproduction.figures import draw_findings, draw_over_time
from flip_hf.reproduction.running import Points
from flip_hf.reproduction.speedup import steady
from tests.helpers.programs import ROOT


@pytest.fixture(params=["reproduce", "reproduce_coarse"])
def points(request):
    folder = ROOT / "scripts" / "results" / request.param
    return steady(Points(folder, json.loads((folder / "plan.json").read_text())["recipe"]).read())


def covered(axes, box: Bbox) -> bool:
    """Returns whether a curve of the panel, or one of its points, is in a box of the picture."""
    curves = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    return any(curve.intersects_bbox(box, filled=False) for curve in curves if len(curve.vertices))


def test_the_words_about_the_arrow_are_struck_through_by_no_curve(points, tmp_path):
    figure = draw_over_time(points, tmp_path / "a.png")
    left = figure.axes[0]
    words = [text for text in left.texts if text.get_text()]
    assert all("times sooner" in text.get_text() for text in words)
    for text in words:
        box = Bbox.from_bounds(*text.get_bbox_patch().get_window_extent().bounds) if text.get_bbox_patch() else None
        assert not covered(left, box or text.get_window_extent())
    assert "higher is better" in left.get_ylabel()


def test_the_legend_of_the_findings_covers_none(points, tmp_path):
    figure = draw_findings(points, tmp_path / "a.png")
    (axes,) = figure.axes
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert axes.get_legend() is None and "more accurate" in axes.get_xlabel()
