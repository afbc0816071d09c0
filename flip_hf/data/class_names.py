"""Checks that the given class names match the labels of the data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # options are parsed before the modules that open data are imported
    from flip_hf.data.sources import Source

# Meanings of a label that is a string.
TextLabels = Literal["index", "name"]
TEXTS: tuple[TextLabels, ...] = get_args(TextLabels)
# No class has an index with more digits.
_MAX_DIGITS = 18


def index_of(text: str) -> int | None:
    """Parses an index in ASCII digits; returns None for digits of other scripts, or too many of them."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS else None


def spoken(name: str) -> str:
    """Returns a class name as it stands in a sentence: with spaces for underscores, and single ones."""
    return " ".join(name.replace("_", " ").split())


def names_an_index(class_names: Sequence[str]) -> str | None:
    """Returns the first name that is the index of another class, such as "1" for class 0, or None.

    A string label "1" could then be either the name or the index.
    """
    for index, name in enumerate(class_names):
        number = index_of(name)
        if number is not None and number != index and number < len(class_names):
            return name
    return None


def check_class_names(source: "Source", class_names: Sequence[str], texts: str | None, advice: str) -> None:
    """Checks that labels and class names cannot be confused.

    Args:
        source: the labelled data.
        class_names: the classes, in the order of the indices.
        texts: how to read a string label, `index` or `name`, if that was chosen.
        advice: a sentence on how to choose.

    Raises:
        ValueError: a string label could be an index or a name, or the data and `class_names` give the same name to
            different classes.
    """
    if source.has_text_targets and texts is None:
        check_text_labels(source.name, source.target_column, class_names, advice)
    check_class_order(source.name, source.class_names or (), class_names)


def check_text_labels(data: str, column: str | None, class_names: Sequence[str], advice: str) -> None:
    """Checks that a label written as text cannot be both an index and a name.

    Raises:
        ValueError: it can; the message ends with the advice.
    """
    name = names_an_index(class_names)
    if name is not None:
        raise ValueError(
            f"The labels of {data!r} in {column!r} are texts, and classes have numbers for names: "
            f"{name!r} could be the name of class {class_names.index(name)} or the index of another. {advice}"
        )


def check_class_order(data: str, own: Sequence[str], class_names: Sequence[str]) -> None:
    """Checks that the class names given do not contradict the data's own.

    Raises:
        ValueError: both have the same name for different classes.
    """
    for index, (known, given) in enumerate(zip(own, class_names, strict=False)):
        if given != known and given in own and known in class_names:
            raise ValueError(
                f"The data set {data!r} calls class {index} {known!r}, and the class names given call it "
                f"{given!r}, which is another class of the data. Put them in the order of the data's indices: "
                f"{', '.join(map(repr, own[:5]))}{', ...' if len(own) > 5 else ''}."
            )


def check_class_count(data: str, column: str | None, own: Sequence[str], class_names: Sequence[str]) -> None:
    """Checks that as many class names are given as the data have classes.

    Raises:
        ValueError: there are more or fewer.
    """
    if len(own) != len(class_names):
        raise ValueError(
            f"--class_names has {len(class_names)} names, but {data!r} has {len(own)} classes in {column!r}. Give one "
            "line a class, in the order of the labels."
        )
