"""Checks that the names that classes are given go with the labels of the data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # options are read before what opens data is imported
    from flip_hf.data.sources import Source

# What a label written as a text can be.
TEXTS = ("index", "name")
# An index of more digits belongs to no class.
_MAX_DIGITS = 18


def index_of(text: str) -> int | None:
    """The number that a text writes in ASCII digits; None for other scripts' digits, and more than any index has."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS else None


def names_an_index(class_names: Sequence[str]) -> str | None:
    """The first name that is the number of another class, such as "1" of class 0, or None.

    Of a text label "1" nobody can then tell whether it is the name or the index.
    """
    for index, name in enumerate(class_names):
        number = index_of(name)
        if number is not None and number != index and number < len(class_names):
            return name
    return None


def check_class_names(source: "Source", class_names: Sequence[str], texts: str | None, advice: str) -> None:
    """Checks that labels are read as what they are.

    Args:
        source: the labelled data.
        class_names: the classes, in the order of the indices.
        texts: what a label written as a text is, `index` or `name`, where that was chosen.
        advice: how to choose.

    Raises:
        ValueError: a text label could be an index or a name, or the data give a name to one class and `class_names`
            give it to another.
    """
    name = names_an_index(class_names)
    if name is not None and source.has_text_targets and texts is None:
        raise ValueError(
            f"The labels of {source.name!r} in {source.target_column!r} are texts, and classes have numbers for names: "
            f"{name!r} could be the name of class {class_names.index(name)} or the index of another. {advice}"
        )
    own = source.class_names or ()
    for index, (known, given) in enumerate(zip(own, class_names, strict=False)):
        if given != known and given in own and known in class_names:
            raise ValueError(
                f"The data set {source.name!r} calls class {index} {known!r}, and the class names given call it "
                f"{given!r}, which is another class of the data. Put them in the order of the data's indices: "
                f"{', '.join(map(repr, own[:5]))}{', ...' if len(own) > 5 else ''}."
            )
