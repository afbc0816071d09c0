"""Draws the report of a check on one page: sizes, captions, losses, and images that look alike."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from flip_hf.console.json_types import JsonObject
from flip_hf.console.names import short_name
from flip_hf.curation.findings import Findings
from flip_hf.data.decode import decode_crop, open_image, upright_size
from flip_hf.data.reading import Reader, read_rows
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.rendering import Colour
from flip_hf.data.sources import Source

_DPI = 120
_BINS = 40
# Pairs of images that look alike that are drawn of each kind, and the side of a drawn image in pixels.
EXAMPLES = 6
_SIDE = 128
_BARS = 10
# Images of more extreme shapes are drawn at the edge.
_MAX_ASPECT = 4.0


class Pairs(NamedTuple):
    """Pairs of samples that look alike: the first of each is of `source`, the second of `other`."""

    title: str
    source: Source
    other: Source
    members: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def draw_report(
    report: JsonObject, findings: Findings, alike: Sequence[Pairs], path: Path, background: Colour
) -> Figure:
    """Draws the report, and returns the figure.

    Args:
        report: the report.
        findings: what the examination found.
        alike: of each kind, at most [`EXAMPLES`] pairs, whose images are read again.
        path: the file to write.
        background: colour of transparent parts.
    """
    alike = [each for each in alike if each.members]
    rows = 2 + len(alike)
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    parts: Any = figure.subfigures(rows, 1)
    sizes, losses, *more = parts
    _draw_sizes(sizes, findings)
    _draw_losses(losses, report)
    for part, pairs in zip(more, alike, strict=True):
        _draw_pairs(part, pairs, background)
    title = f"{report['data']}: {report['usable']:,} of {report['samples']:,} samples can be used"
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=_DPI)
    return figure


def _draw_pairs(part: SubFigure, pairs: Pairs, background: Colour) -> None:
    part.suptitle(pairs.title, fontsize=10, parse_math=False)
    axes = part.subplots(2, EXAMPLES)
    for number, (place, source) in itertools.product(range(EXAMPLES), enumerate((pairs.source, pairs.other))):
        member = pairs.members[number][place] if number < len(pairs.members) else None
        _draw_image(axes[place, number], member, source, background)


def _draw_sizes(part: SubFigure, findings: Findings) -> None:
    records = findings.records()
    width = records["width"]
    height = records["height"]
    sides, aspect, lengths = part.subplots(1, 3)
    _draw_histogram(sides, np.minimum(width, height), "short side, pixels")
    _draw_histogram(aspect, (width / np.maximum(height, 1)).clip(0, _MAX_ASPECT), "width / height")
    counts = findings.lengths.characters
    _draw_histogram(lengths, np.array(list(counts)), "characters", np.array(list(counts.values())))


def _draw_losses(part: SubFigure, report: JsonObject) -> None:
    losses, surplus = part.subplots(1, 2)
    _draw_bars(
        losses,
        {reason: found["count"] for reason, found in {**report["unusable"], **report["damage"]}.items()},
        "cannot be used",
    )
    found = report["duplicates"]
    named = {
        "same image and captions": found["same_pair"],
        "same image, other captions": found["same_image"],
        "looks like an earlier one": found["near"],
    }
    overlap = {
        f"{words} {short_name(each['data'])}": each[name]
        for each in report["eval_overlap"]
        for name, words in (("same_image", "same image as in"), ("near", "looks like one of"))
    }
    _draw_bars(surplus, {**named, **overlap}, "surplus samples" + " and overlap" * bool(overlap))


def _draw_histogram(axes: Axes, values: np.ndarray, label: str, weights: np.ndarray | None = None) -> None:
    axes.hist(values, bins=_BINS, weights=weights, color="0.6")
    axes.set(xlabel=label, ylabel="images" if weights is None else "captions")


def _draw_bars(axes: Axes, counts: Mapping[str, int], title: str) -> None:
    shown = dict(sorted(counts.items(), key=lambda item: -item[1])[:_BARS])
    bars = axes.barh(range(len(shown)), list(shown.values()), color="0.6")
    axes.bar_label(bars, labels=[f"{count:,}" for count in shown.values()], padding=3)
    axes.set_yticks(range(len(shown)), list(shown), parse_math=False)
    axes.invert_yaxis()
    axes.set_title(title if shown else f"{title}: none", fontsize=10)
    axes.set_xlim(0, 1.2 * max([1, *shown.values()]))
    if not shown:
        axes.axis("off")


def _draw_image(axes: Axes, member: Mapping[str, Any] | None, source: Source, background: Colour) -> None:
    axes.axis("off")
    if member is None:
        return
    image = _read_image(source, member["shard"], member["row"], background)
    if image is not None:
        axes.imshow(image)
    label = str(member["key"])
    axes.set_title(label if len(label) <= 20 else f"...{label[-17:]}", fontsize=7, parse_math=False)


def _read_image(source: Source, shard: int, row: int, background: Colour) -> Image.Image | None:
    """Reads one image again; None if it cannot be read this time."""
    rows = read_rows(
        source.shards,
        Reader(0, 1),
        epoch=0,
        seed=None,
        start=(shard, row),
        stop=shard + 1,
        report=lambda reason, detail: None,
    )
    found = next(rows, None)
    try:
        if found is None or found[0] != (shard, row):
            return None
        opened = open_image(source.image(found[1]))
        decoded = Image.fromarray(decode_crop(opened, (0, 0, *upright_size(opened)), _SIDE, background))
    except RefusedSample:
        return None
    decoded.thumbnail((_SIDE, _SIDE))
    return decoded
