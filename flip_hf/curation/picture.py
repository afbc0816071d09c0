"""Draw the report of a check on one page: sizes, captions, losses, and images that look alike."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from flip_hf.console.json_types import JsonObject
from flip_hf.curation.findings import Findings
from flip_hf.data.decode import decode_crop, open_image, upright_size
from flip_hf.data.reading import Reader, read_rows
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.rendering import Colour
from flip_hf.data.sources import Source

_DPI = 120
_BINS = 40
# Groups of images that look alike of which two are drawn, and the side of a drawn image in pixels.
_GROUPS = 6
_SIDE = 128
_BARS = 10
# Images of more extreme shapes are drawn at the edge.
_MAX_ASPECT = 4.0


def draw_report(
    report: JsonObject,
    findings: Findings,
    source: Source,
    listed: Sequence[Mapping[str, Any]],
    path: Path,
    background: Colour,
) -> Figure:
    """Draws the report, and returns the figure.

    Args:
        report: the report.
        findings: what the examination found.
        source: the data, of which a few images are read again.
        listed: the samples of all groups of duplicates, in the order of their groups.
        path: the file to write.
        background: colour of transparent parts.
    """
    pairs = near_examples(listed)
    rows = 3 if pairs else 2
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    parts: Any = figure.subfigures(rows, 1)
    sizes, losses, *alike = parts
    _draw_sizes(sizes, findings)
    _draw_losses(losses, report)
    for part in alike:
        part.suptitle("samples, and below each one that looks like it", fontsize=10)
        axes = part.subplots(2, _GROUPS)
        for number, place in itertools.product(range(_GROUPS), range(2)):
            _draw_image(axes[place, number], pairs[number][place] if number < len(pairs) else None, source, background)
    title = f"{report['data']}: {report['usable']:,} of {report['samples']:,} samples can be used"
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=_DPI)
    return figure


def _draw_sizes(part: SubFigure, findings: Findings) -> None:
    records = findings.records()
    width, height = records["width"], records["height"]
    sides, aspect, lengths = part.subplots(1, 3)
    _draw_histogram(sides, Counter(np.minimum(width, height).tolist()), "short side, pixels", "images")
    ratios = np.round(width / np.maximum(height, 1), 2)
    _draw_histogram(aspect, Counter(ratios.clip(0, _MAX_ASPECT).tolist()), "width / height", "images")
    _draw_histogram(lengths, findings.lengths.characters, "characters", "captions")


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
    _draw_bars(surplus, named, "surplus samples")


def near_examples(listed: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Returns the first sample and one that looks like it, of the first few groups that have such a sample."""
    found: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    for _, members in itertools.groupby(listed, key=lambda each: each["group"]):
        first, *others = members
        near = next((each for each in others if each["surplus"] == "near"), None)
        if near is not None:
            found.append((first, near))
        if len(found) == _GROUPS:
            break
    return found


def _draw_histogram(axes: Axes, counts: Counter, label: str, of: str) -> None:
    values = list(counts)
    axes.hist(values, bins=_BINS, weights=list(counts.values()), color="0.6")
    axes.set(xlabel=label, ylabel=of)


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
        decoded = decode_crop(opened, (0, 0, *upright_size(opened)), _SIDE, background)
    except RefusedSample:
        return None
    decoded.thumbnail((_SIDE, _SIDE))
    return decoded
