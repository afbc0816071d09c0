"""The papers' figures are about data sets that the registry knows."""

from flip_hf.evaluation.papers import published
from flip_hf.evaluation.registry import all_data_sets, data_set_names


def test_published_figures_name_known_data_sets():
    rows = published("zero_shot")
    assert rows and all(set(row) <= set(all_data_sets()) for row in rows.values())
    assert set(data_set_names(["flip25"])) <= set(rows["FLIP L/14"])
