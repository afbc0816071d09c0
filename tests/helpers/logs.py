"""The log of a run, `log.jsonl`, as a test reads it."""

import json
from pathlib import Path


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logged(folder: Path, key: str) -> dict[int, float]:
    """The values under a key, by the samples seen, of the records that have one."""
    return {record["samples"]: record[key] for record in records(folder) if key in record}
