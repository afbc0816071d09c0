"""Makes the caption of a sample: a text, a prompt around the name of its class, or one of several columns by weight.

Every draw comes from the sample's own generator, so that captions are as reproducible as crops.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Features, LargeList, List, Value

from flip_hf.data.class_names import check_class_count, check_class_order, check_text_labels, index_of, spoken
from flip_hf.data.columns import column_value
from flip_hf.data.decode import choose_caption
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.targets import Captions, ClassIndex
from flip_hf.data.texts import read_caption

_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_NUMBER_TYPES = ("int", "uint", "float", "bool")
_INTERNAL = ("__key__", "__url__")  # columns that we add
_MAX_LISTED = 32  # columns listed in a message
_ADVICE = "Write the labels as numbers, or the names in words."


@dataclass(frozen=True)
class Prompts:
    """The user's choices for captions that are made of labels.

    Attributes:
        templates: prompts, each with one `{}` for the class.
        classes: names of each class, the usual one first, in the order of the labels; None takes the data's own.
        chosen: whether the user named the templates, and so expects labels.
    """

    templates: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...] | None = None
    chosen: bool = False


class LabelCaptions:
    """Turns a label into a caption: a random template around a random name of its class.

    Args:
        classes: names of each class, in the order of the labels; the first one is what a label in words says.
            Underscores become spaces in captions.
        templates: prompts, each with one `{}` for the class.
    """

    def __init__(self, classes: Sequence[Sequence[str]], templates: Sequence[str]):
        self.index = ClassIndex(tuple(names[0] for names in classes))
        self.classes = [[name for name in map(spoken, names) if name] for names in classes]
        self.templates = list(templates)

    def __call__(self, value: Any, rng: np.random.Generator) -> str:
        """Draws the caption of a label, an index or a name; see [`ClassIndex`].

        Raises:
            RefusedSample: there is no label, or no class with a name has it.
        """
        if value is None or (isinstance(value, (bytes, str)) and not value.strip()):
            raise RefusedSample("missing label")
        try:
            names = self.classes[self.index(value)]
        except RefusedSample as refused:
            unnamed = refused.reason == "unknown label"
            raise RefusedSample("label without a class name" if unnamed else refused.reason) from None
        if not names:
            raise RefusedSample("label without a class name")
        template = self.templates[int(rng.integers(len(self.templates)))]
        return read_caption(template.format(names[int(rng.integers(len(names)))]))

    def texts(self) -> Iterator[str]:
        """Yields captions forever, in which every name and every template recurs, to learn a vocabulary from."""
        names = [name for each in self.classes for name in each]
        for template, name in zip(itertools.cycle(self.templates), itertools.cycle(names), strict=False):
            yield template.format(name)


@dataclass(frozen=True)
class CaptionColumn:
    """A column that captions are drawn from.

    Attributes:
        name: its name; dots lead into nested values, `;` separates alternatives.
        weight: how often it is drawn, relative to the others.
        labels: turns its labels into captions; None if it holds texts.
    """

    name: str
    weight: float = 1.0
    labels: LabelCaptions | None = None

    def draw(self, row: dict, rng: np.random.Generator) -> str:
        """Draws a caption of a row from this column; raises [`RefusedSample`] if it has none."""
        value = column_value(row, self.name)
        return choose_caption(value, rng) if self.labels is None else self.labels(value, rng)


def draw_caption(row: dict, columns: Sequence[CaptionColumn], rng: np.random.Generator) -> str:
    """Draws a caption of a row from one of several columns by their weights.

    If the column drawn has no usable caption in this row, another one is drawn from the rest.

    Raises:
        RefusedSample: no column has one; the reason is that of the column drawn first.
    """
    left = list(columns)
    first: RefusedSample | None = None
    while left:
        column = left.pop(_draw_place([each.weight for each in left], rng))
        try:
            return column.draw(row, rng)
        except RefusedSample as refused:
            first = first or refused
    raise first or RefusedSample("missing caption")


def _draw_place(weights: list[float], rng: np.random.Generator) -> int:
    if len(weights) == 1:
        return 0
    bounds = np.cumsum(np.array(weights) / max(weights))
    return int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))


def all_texts(row: dict, columns: Sequence[CaptionColumn]) -> list[str]:
    """Returns all captions that a row has as texts, each once; captions made of labels are not among them.

    Raises:
        RefusedSample: it has none; the reason is that of the first column.
    """
    found: dict[str, None] = {}
    first: RefusedSample | None = None
    for column in columns:
        if column.labels is not None:
            continue
        try:
            found.update(dict.fromkeys(Captions()(column_value(row, column.name))))
        except RefusedSample as refused:
            first = first or refused
    if not found:
        raise first or RefusedSample("missing caption")
    return list(found)


def in_words(columns: Sequence[CaptionColumn]) -> str:
    """Describes for the log what captions are drawn from."""
    found: list[str] = []
    for column in columns:
        times = f"{column.weight:g} x " if len(columns) > 1 else ""
        labels = column.labels
        if labels is None:
            found.append(f"{times}texts in {column.name!r}")
        else:
            counts = f"{len(labels.classes):,} classes, prompts: {len(labels.templates):,}"
            found.append(f"{times}labels in {column.name!r} ({counts})")
    return ", ".join(found)


def prompts_of(columns: Sequence[CaptionColumn]) -> Iterator[str]:
    """Yields captions made of labels forever, of each column in turn; see [`LabelCaptions.texts`]."""
    texts = [column.labels.texts() for column in columns if column.labels is not None]
    return itertools.chain.from_iterable(zip(*texts, strict=False))


# ---------------------------------------------------------------------------------------------------------------------
# What a column holds
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Facts that are known of a data set before it is read.

    Attributes:
        data: its name for messages.
        columns: the names of its columns.
        features: their types, where the format has types.
        rows: its first rows.
    """

    data: str
    columns: list[str]
    features: Mapping[str, Any] | None
    rows: list[dict]


def open_column(table: Table, name: str, weight: float, prompts: Prompts) -> CaptionColumn:
    """Finds out how a column gives captions: by its type, else by its values in the first rows.

    A class-label type means labels. Numbers, also as text (`.cls` members, CSV), are labels if class names are given,
    and so are texts that are class names if templates are given, too. Any other text is a caption.

    Raises:
        ValueError: it holds neither text nor labels with names, or the class names given do not fit the labels.
    """
    feature = feature_at(table.features or {}, name)
    values = _values(table.rows, name)
    is_text = _holds_text(feature, values)
    own = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    if own is None and is_text and not _names_classes(values, prompts):
        return CaptionColumn(name, weight)
    if own is None and not (is_text or _holds_numbers(feature, values)):
        raise _neither(table, name, _described(feature, values))
    if own is None and prompts.classes is None:
        advice = " If they are labels, give --class_names FILE, one name a line in the order of the labels."
        raise _neither(table, name, "numbers", advice)
    return CaptionColumn(name, weight, _label_captions(table.data, name, own, is_text, prompts))


def _label_captions(
    data: str, column: str, own: tuple[str, ...] | None, is_text: bool, prompts: Prompts
) -> LabelCaptions:
    """Makes the captions of a column's labels from the names given, else from the data's own.

    Raises:
        ValueError: the names given do not fit the labels.
    """
    if prompts.classes is None:
        return LabelCaptions([(name,) for name in own or ()], prompts.templates)
    names = tuple(each[0] for each in prompts.classes)
    if own is not None:
        check_class_count(data, column, own, names)
        check_class_order(data, own, names)
    if is_text:
        check_text_labels(data, column, names, _ADVICE)
    return LabelCaptions(prompts.classes, prompts.templates)


def feature_at(features: Mapping[str, Any], column: str) -> Any:
    """Returns the type of a column, or of a field that dots lead to; None if it is unknown."""
    for name in column.split(";"):
        if name in features:
            return features[name]
        found: Any = features
        for part in name.split("."):
            found = found.get(part) if isinstance(found, (dict, Features)) else None
        if found is not None:
            return found
    return None


def _values(rows: list[dict], column: str) -> list[Any]:
    """Returns the values of a column in some rows, without those that are missing or cannot be read."""
    found: list[Any] = []
    for row in rows:
        try:
            value = column_value(row, column)
        except RefusedSample:  # counted when it is read
            continue
        if value is not None:
            found.append(value)
    return found


def _names_classes(values: list[Any], prompts: Prompts) -> bool:
    """Returns whether texts are labels: most are numbers or, if templates are given, names of classes."""
    if prompts.classes is None or not all(isinstance(value, (bytes, str)) for value in values):
        return False
    texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    texts = [text.strip() for text in texts if text.strip()]
    names = {each[0] for each in prompts.classes} if prompts.chosen else set()
    labels = [text for text in texts if text in names or index_of(text.removeprefix("-")) is not None]
    return 2 * len(labels) > len(texts)


def _holds_text(feature: Any, values: list[Any]) -> bool:
    """Returns whether a column holds texts or lists of them; True if neither type nor values say."""
    if isinstance(feature, (List, LargeList)):
        return _holds_text(feature.feature, [])
    if isinstance(feature, Value) and feature.dtype != "null":
        return feature.dtype in _TEXT_TYPES
    if isinstance(feature, dict) or _is_known(feature):
        return False
    flat = [each for value in values for each in (value if isinstance(value, (list, tuple)) else [value])]
    return not flat or any(isinstance(each, str) or _is_utf8(each) for each in flat)


def _is_utf8(value: Any) -> bool:
    if not isinstance(value, bytes):
        return False
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_known(feature: Any) -> bool:
    """Returns whether a type says what values are: one of `datasets`' own for media, arrays and labels."""
    return feature is not None and type(feature).__name__ not in ("Value", "Json")


def _holds_numbers(feature: Any, values: list[Any]) -> bool:
    if isinstance(feature, Value) and feature.dtype != "null":
        return feature.dtype.startswith(_NUMBER_TYPES)
    return bool(values) and all(isinstance(value, (int, float)) for value in values)


def _described(feature: Any, values: list[Any]) -> str:
    """Describes what a column holds, for a message."""
    if isinstance(feature, (List, LargeList)) or (values and isinstance(values[0], (list, tuple))):
        return "lists without texts"
    if isinstance(feature, dict) or (values and isinstance(values[0], dict) and not _is_known(feature)):
        return "several fields (a dot leads to one of them)"
    if isinstance(feature, Value):
        return f"values of type {feature.dtype}"
    if feature is None and isinstance(values[0], bytes):
        return "bytes that are not UTF-8 text"
    return f"values of type {type(values[0] if feature is None else feature).__name__}"


def _neither(table: Table, column: str, what: str, advice: str = "") -> ValueError:
    """Makes the error for a column that holds neither text nor labels, with the columns that could be meant."""
    problem = f"The column {column!r} of {table.data!r} holds {what}: neither text nor labels with names.{advice}"
    if table.features is None:
        others = sorted(set(table.columns) - {column, *_INTERNAL})
        return ValueError(f"{problem} Its other columns are: {_listed(others)}. Name one with --caption_column.")
    texts = sorted(name for name, each in table.features.items() if each is not None and _holds_text(each, []))
    labels = sorted(name for name, each in table.features.items() if isinstance(each, ClassLabel))
    found = [f"{kind}: {_listed(names)}" for kind, names in (("text", texts), ("labels", labels)) if names]
    if not found:
        return ValueError(f"{problem} It has no columns of text or labels.")
    return ValueError(f"{problem} Columns of {'; of '.join(found)}. Name one with --caption_column.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{', '.join(names[:_MAX_LISTED]) or 'none'}{more}"
