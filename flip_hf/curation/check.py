"""Checks a data set: reads all of it once, finds what training would skip and what is in it twice, and reports."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flip_hf.console.files import replacing
from flip_hf.console.json_types import JsonObject
from flip_hf.console.names import short_name
from flip_hf.curation.comparing import compare, write_overlap
from flip_hf.curation.duplicates import find_duplicates
from flip_hf.curation.examination import Examination
from flip_hf.curation.findings import looks_of
from flip_hf.curation.listing import SAMPLES, examine, list_duplicates, near_examples
from flip_hf.curation.loader_speed import loader_rate
from flip_hf.curation.picture import EXAMPLES, Pairs, draw_report
from flip_hf.curation.report import make_report
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.data.sources import Source

REPORT = "report.json"
PICTURE = "report.png"


@dataclass(frozen=True)
class CheckOptions:
    """Options of a check.

    Attributes:
        workers: processes that read; 0 reads in this one.
        distance: bits in which the perceptual hashes of images that look alike may differ.
        image_size: side of the images that the loader's speed is measured with, in pixels.
        seconds: duration of that measurement; 0 measures nothing.
        samples_per_second: what a GPU trains on, to compute the workers that it needs; None if unknown.
        background: colour of transparent parts.
    """

    workers: int
    distance: int
    image_size: int
    seconds: float
    samples_per_second: float | None = None
    background: Colour = WHITE


def check(
    source: Source,
    folder: Path,
    options: CheckOptions,
    about: JsonObject,
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None,
    evaluation: Sequence[Source] = (),
) -> JsonObject:
    """Checks a data set and writes what was found into a folder.

    Args:
        source: the data.
        folder: the folder; files of an earlier check in it are replaced.
        options: the options.
        about: facts that the report begins with.
        count_tokens: maps captions to their numbers of tokens.
        evaluation: data that it is compared with, opened as images alone.

    Returns:
        The report, as it is in [`REPORT`].

    Raises:
        WorkFailed: the data cannot be read.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rate = loader_rate(source, options.image_size, options.seconds, options.background) if options.seconds else None
    start = time.perf_counter()
    work = Examination(source, count_tokens, options.background)
    findings = examine(work, folder / SAMPLES, options.workers, "checking")
    (folder / REPORT).unlink(missing_ok=True)  # that of an earlier check, which the new tables do not belong to
    seconds = time.perf_counter() - start
    records = findings.records()
    duplicates = find_duplicates(records["image"], records["caption"], looks_of(records), options.distance)
    compared = [
        compare(each, records, folder, options.distance, options.workers, options.background) for each in evaluation
    ]
    listed = list_duplicates(records["place"], duplicates, folder)
    write_overlap(compared, folder)
    speed = {
        "workers": max(1, options.workers),
        "checked_per_second": findings.samples / seconds,
        "image_size": options.image_size,
        "loaded_per_second_and_worker": rate,
        "wanted_per_second": options.samples_per_second,
    }
    groups = len(listed["group"].unique())
    found = make_report(source, findings, duplicates, options.distance, groups)
    report = {**about, **found, "eval_overlap": [each.facts for each in compared], "speed": speed}
    alike = [Pairs("samples, and below each one that looks like it", source, source, near_examples(listed, EXAMPLES))]
    for each in compared:
        title = f"samples, and below each one of {short_name(each.source.name)} that looks like it"
        alike.append(Pairs(title, source, each.source, each.examples(EXAMPLES)))
    with replacing(folder / PICTURE) as path:
        draw_report(report, findings, alike, path, options.background)
    with replacing(folder / REPORT) as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
