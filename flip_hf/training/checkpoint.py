"""Checkpoints: everything a run needs to go on, written aside and renamed, old ones removed."""

import itertools
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import ProcessorMixin

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"


@dataclass
class TrainState:
    """Where a run stands, in samples of all processes and in steps."""

    samples: int = 0
    steps: int = 0
    seconds: float = 0.0


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    numbered = ((_NAME.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*"))
    found = [(int(match.group(1)), path) for match, path in numbered if match and (path / _STATE).is_file()]
    return [path for _, path in sorted(found)]


def resolve_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: a folder, or the newest of the run for `latest`; None for a new run.

    Raises:
        FileNotFoundError: the folder is no checkpoint, or there is none to resume from.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        found = find_checkpoints(output_dir)
        if not found:
            raise FileNotFoundError(f"There is no checkpoint in {output_dir} to resume from.")
        return found[-1]
    if not (Path(wanted) / _STATE).is_file():
        raise FileNotFoundError(f"{wanted} is not a checkpoint: it has no {_STATE}.")
    return Path(wanted)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: TrainState,
    data_state: dict[str, Any],
    processor: ProcessorMixin,
    keep: int,
) -> Path:
    """Writes model, optimizer, processor, generators and data positions; a reader never sees half of it."""
    final = output_dir / f"checkpoint-{state.samples:012d}"
    partial = output_dir / f"partial-{final.name}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    (partial / f"data_{accelerator.process_index}.json").write_text(json.dumps(data_state), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        processor.save_pretrained(partial)
        (partial / _STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in find_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_data_states(checkpoint: Path) -> list[dict[str, Any]]:
    """The data positions of all processes that wrote the checkpoint, by rank."""
    paths = (checkpoint / f"data_{rank}.json" for rank in itertools.count())
    return [json.loads(p.read_text(encoding="utf-8")) for p in itertools.takewhile(Path.is_file, paths)]


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> TrainState:
    """Restores prepared model, optimizer and generators, and returns where the run stood."""
    accelerator.load_state(str(checkpoint))
    return TrainState(**json.loads((checkpoint / _STATE).read_text(encoding="utf-8")))
