"""Opens the data of a folder of features: once to encode them, and again, the same way, to show pictures of them."""

import itertools
from typing import Any

from flip_hf.data.extent import extent_of
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.sources import Source, open_source
from flip_hf.retrieval.blocks import caption_reader
from flip_hf.retrieval.options import EmbedOptions

_ROWS_LOOKED_AT = 32
_NO_TEXT = {"caption is not text", "caption is not UTF-8"}


def open_data(options: EmbedOptions) -> tuple[Source, dict[str, Any]]:
    """Opens the data: with captions, else with labels that have names, else the images alone.

    Captions that are asked for are looked at in the first rows.

    Returns:
        The data, and a description by which [`open_again`] opens them, and by which other data are told apart.

    Raises:
        ValueError, FileNotFoundError: the data cannot be opened, have no column that was named, or no captions where
            these are to be encoded, or a column that was named holds no text.
    """
    asked = {name: getattr(options, name) for name in ("split", "config", "image_column", "caption_column")}
    kind, source = _first_that_opens(options.data, asked)
    if options.texts and source.target_column is None:
        raise ValueError(f"{source.name!r} has no captions to encode: name their column with --caption_column.")
    if options.texts or options.caption_column is not None:
        _check_captions(source)
    return source, {"name": source.name, **asked, "kind": kind, **extent_of(source.shards)}


def _check_captions(source: Source) -> None:
    """Checks that captions are texts, or labels with names, judging by most of those in the first rows.

    Raises:
        ValueError: they are not.
    """
    read = caption_reader(source)
    usable = others = 0
    for row in itertools.islice(source.without_images().rows(), _ROWS_LOOKED_AT):
        try:
            read(source.target(row))
            usable += 1
        except RefusedSample as refused:
            others += refused.reason in _NO_TEXT
    if others > usable:
        raise ValueError(
            f"The column {source.target_column!r} of {source.name!r} holds neither text nor labels with names: name "
            "another one with --caption_column."
        )


def open_again(data: dict[str, Any]) -> Source:
    """Opens the data of a description.

    Raises:
        ValueError, FileNotFoundError: they cannot be opened any more, or have changed since.
    """
    source = _open(data["name"], data["kind"], data)
    changed = [name for name, value in extent_of(source.shards).items() if data.get(name) != value]
    if changed:
        raise ValueError(
            f"{source.name!r} has changed since it was embedded (in its {', '.join(changed)}): pictures may no longer "
            "be where they were. Embed it again, into a new folder."
        )
    return source


def _first_that_opens(name: str, asked: dict[str, Any]) -> tuple[str, Source]:
    """Opens data with captions, labels or neither; returns the kind, too."""
    if asked["caption_column"] is not None:
        return "caption", _open(name, "caption", asked)
    for kind in ("caption", "label"):
        try:
            source = _open(name, kind, asked)
        except ValueError:
            continue
        if kind == "caption" or source.class_names:
            return kind, source
    return "image", _open(name, "image", asked)


def _open(name: str, kind: str, asked: dict[str, Any]) -> Source:
    return open_source(
        name,
        split=asked["split"],
        config=asked["config"],
        image_column=asked["image_column"],
        target_column=asked["caption_column"],
        kind=kind,
    )
