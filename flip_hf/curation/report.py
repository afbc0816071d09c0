"""The report of a check: as JSON, and as the text that is printed."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flip_hf.console.endings import one_line
from flip_hf.console.json_types import JsonObject
from flip_hf.console.names import counted
from flip_hf.curation.duplicates import Duplicates, Kind
from flip_hf.curation.findings import EXAMPLES, Findings
from flip_hf.data.extent import extent_of
from flip_hf.data.sources import Source

QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)


def make_report(source: Source, findings: Findings, duplicates: Duplicates, distance: int, groups: int) -> JsonObject:
    """Makes the report of what was found.

    Args:
        source: the data.
        findings: what their examination found.
        duplicates: their duplicates.
        distance: bits in which perceptual hashes of images that look alike may differ.
        groups: number of groups of duplicates.
    """
    records = findings.records()
    return {
        "data": source.name,
        "extent": extent_of(source.shards),
        "image_column": source.image_column,
        "caption_column": source.target_column,
        "samples": findings.samples,
        "usable": findings.usable,
        "unusable": {
            reason: {
                "count": count,
                "examples": [
                    {**example._asdict(), "shard_name": source.shards.name(example.shard)}
                    for example in findings.examples[reason]
                ],
            }
            for reason, count in sorted(findings.refused.items(), key=lambda item: (-item[1], item[0]))
        },
        "damage": damage_of(findings),
        "images": _image_sizes(records),
        "captions": _caption_lengths(findings, records),
        "duplicates": {
            "groups": groups,
            "same_pair": int((duplicates.kind == Kind.PAIR).sum()),
            "same_image": int((duplicates.kind == Kind.IMAGE).sum()),
            "near": int((duplicates.kind == Kind.NEAR).sum()),
            "distinct_images": int((duplicates.kind == Kind.FIRST).sum()),
            "without_structure": int((~records["has_looks"]).sum()),
            "distance": distance,
            "is_complete": duplicates.is_complete,
        },
    }


def damage_of(findings: Findings) -> JsonObject:
    """Returns how often files were found damaged, with examples, by reason."""
    reasons: Counter[str] = Counter()
    for damage, count in findings.damage.items():
        reasons[damage.reason] += count
    return {
        reason: {
            "count": count,
            "examples": sorted({each.where for each in findings.damage if each.reason == reason})[:EXAMPLES],
        }
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    }


def _image_sizes(records: np.ndarray) -> JsonObject:
    width = records["width"]
    height = records["height"]
    return {
        "short_side": quantiles(np.minimum(width, height)),
        "long_side": quantiles(np.maximum(width, height)),
        "aspect": quantiles(width / np.maximum(height, 1)),
        "bytes": quantiles(records["bytes"]),
    }


def _caption_lengths(findings: Findings, records: np.ndarray) -> JsonObject:
    distinct = len(np.unique(records["caption"]))
    return {
        "count": findings.captions,
        "samples_with_captions_of_others": len(records) - distinct,
        **{name: counted_quantiles(counts) for name, counts in vars(findings.lengths).items() if counts},
    }


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Returns the smallest, 1 %, median, 99 % and largest of some values; None if there are none."""
    if not len(values):
        return None
    found = np.quantile(values, QUANTILES, method="lower")
    return _named(found.tolist())


def counted_quantiles(counts: Counter[int]) -> dict[str, float] | None:
    """Returns the same of values given with their counts."""
    values = sorted(counts)
    sums = np.cumsum([counts[value] for value in values])
    if not values:
        return None
    places = [math.floor(fraction * (int(sums[-1]) - 1)) for fraction in QUANTILES]
    return _named([values[int(np.searchsorted(sums, place, side="right"))] for place in places])


def _named(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("min", "1 %", "median", "99 %", "max"), values, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------

_UNITS = {
    "short_side": "short side, pixels",
    "long_side": "long side, pixels",
    "aspect": "width / height",
    "bytes": "bytes of an image",
    "characters": "characters of a caption",
    "words": "words of a caption",
    "tokens": "tokens of a caption",
}


def in_words(report: JsonObject) -> str:
    """Writes a report as Markdown."""
    unusable = report["samples"] - report["usable"]
    lines = [
        f"{report['data']}: {counted(report['samples'], 'sample')} in {counted(report['extent']['shards'], 'shard')}. "
        f"{report['usable']:,} can be used, {unusable:,} cannot.",
        "",
        *_losses(report),
        *_sizes({**report["images"], **report["captions"]}),
        *_duplicates(report),
        *itertools.chain.from_iterable(map(_overlap, report["eval_overlap"])),
        *_speed(report["speed"]),
    ]
    return "\n".join(lines)


def _losses(report: JsonObject) -> list[str]:
    if not report["unusable"] and not report["damage"]:
        return []
    lines = ["| cannot be used | count | for example |", "|---|---:|---|"]
    for reason, found in report["unusable"].items():
        first = found["examples"][0]
        lines.append(f"| {reason} | {found['count']:,} | {_cell(first['key'])}, row {first['row'] + 1:,} |")
    for reason, found in report["damage"].items():
        lines.append(f"| {reason} | {found['count']:,} | {_cell(found['examples'][0])} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """Returns a text of the data as a cell of a table, without control characters."""
    return one_line(text).replace("|", "\\|")


def _sizes(facts: Mapping[str, Any]) -> list[str]:
    if not any(facts.get(name) for name in _UNITS):
        return []
    names = ("min", "1 %", "median", "99 %", "max")
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for name, unit in _UNITS.items():
        values = facts.get(name)
        if values is not None:
            form = "{:.2f}" if name == "aspect" else "{:,.0f}"
            lines.append(f"| {unit} | {' | '.join(form.format(values[each]) for each in names)} |")
    return [*lines, ""]


def _duplicates(report: JsonObject) -> list[str]:
    found = report["duplicates"]
    more = "" if found["is_complete"] else " So many images look alike that not all of them were found."
    lines = [
        f"Surplus samples: {found['same_pair']:,} repeat an image and its captions, {found['same_image']:,} repeat an "
        f"image with other captions, {found['near']:,} look like an earlier image (at most {found['distance']} bits of "
        f"their perceptual hashes differ); {counted(found['groups'], 'group')} in all.{more}",
    ]
    if found["without_structure"]:
        images = counted(found["without_structure"], "image")
        lines.append(f"{images} with too little structure to be compared by their looks.")
    others = report["captions"]["samples_with_captions_of_others"]
    if report["captions"]["count"]:
        lines.append(f"{counted(others, 'sample')} with the captions of an earlier sample.")
    return lines


def _overlap(found: JsonObject) -> list[str]:
    """Describes the overlap with one set of evaluation data, and what could not be compared because of damage."""
    lost = [
        f"Not all of {found['data']} was compared: {each['count']:,} x {reason}, such as {_cell(each['examples'][0])}."
        for reason, each in found["damage"].items()
    ]
    unusable = found["samples"] - found["usable"]
    compared = counted(found["usable"], "sample") + (f", {unusable:,} cannot be used" if unusable else "")
    same = f"{counted(found['same_image'], 'sample')} {'has' if found['same_image'] == 1 else 'have'}"
    near = f"{found['near']:,} {'looks' if found['near'] == 1 else 'look'}"
    in_data = found["eval_same_image"] + found["eval_near"]
    share = in_data / max(1, found["usable"])
    more = "" if found["is_complete"] else " So many images look alike that not all of them were found."
    return [
        f"Overlap with {found['data']} ({compared}): {same} an image of it, {near} like one. "
        f"{in_data:,} of its images ({share:.2%}) are in the data: "
        f"{found['eval_same_image']:,} as they are, {found['eval_near']:,} that look alike.{more}",
        *lost,
    ]


def _speed(speed: JsonObject) -> list[str]:
    lines = [f"Checked {speed['checked_per_second']:,.0f} samples/s with {counted(speed['workers'], 'process')}."]
    rate = speed["loaded_per_second_and_worker"]
    if rate is None:
        return lines
    lines.append(f"The training loader makes {rate:,.0f} samples/s per worker at {speed['image_size']} pixels.")
    wanted = speed["wanted_per_second"]
    if wanted is not None:
        workers = math.ceil(wanted / rate)
        lines.append(
            f"A GPU that trains on {wanted:,.0f} samples/s needs {counted(workers, 'worker')} on cores like these."
        )
    return lines
