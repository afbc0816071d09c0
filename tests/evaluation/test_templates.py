"""Prompts and labels, and the errors of those that cannot be used."""

import pytest

from flip_hf.evaluation.loading import read_class_names
from flip_hf.evaluation.templates import check_labels, fault_of, resolve_templates


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a {adj} photo of {}", "has {adj}, which nothing fills"),
        ("{} and {}", "has {} 2 times; write it once"),
        ("a photo", "has no {} for the label."),
        ("{", "has a single brace"),
        ("} {}", "has a single brace"),
        ("{0} {}", "has {0}, which nothing fills"),
        ("{} {x.__class__}", "has {x.__class__}, which nothing fills"),
        ("{:>9}", "has {:>9}, which nothing fills"),
        ("{!r}", "has {!r}, which nothing fills"),
        ("{} {", "has a single brace"),
        ("{} {0.a}", "has {0.a}, which nothing fills"),
        ("{} {:>9999999}", "has {:>9999999}, which nothing fills"),  # refused before memory is asked for
    ],
)
def test_a_template_without_a_label_is_refused_naming_the_brace(template, said):
    assert said in str(fault_of(template))
    with pytest.raises(ValueError) as caught:
        resolve_templates([template])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_with_one_place_takes_a_label():
    for template in ("{}", "a photo of a {}.", "{{{}}}", "{{x}} {}"):
        assert fault_of(template) is None and "cat" in template.format("cat")


def test_labels_name_each_thing_once():
    check_labels(["a", "b"])
    for labels, said in (
        (["a", " "], "Label 2 of 2 is empty"),
        ([], "no labels"),
        (["a", "b", "a"], "'a' is given tw"),
    ):
        with pytest.raises(ValueError, match=said):
            check_labels(labels)


def test_an_empty_line_among_class_names_is_refused_and_at_the_end_it_is_none(tmp_path):
    """Dropped, it would shift the names that follow by one label each."""
    path = tmp_path / "names.txt"
    path.write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match="names.txt has no name in line 2"):
        read_class_names(path)
    path.write_text(" cat \r\ndog\n\n\n")
    assert read_class_names(path) == ("cat", "dog")
