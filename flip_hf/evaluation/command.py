"""The command: what `scripts/evaluate.py` does."""

import logging
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from flip_hf.data.workers import cores_per_process
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.evaluate import check_tasks, evaluate
from flip_hf.evaluation.model_index import eval_results, write_card
from flip_hf.evaluation.options import EvaluationOptions, parse_options
from flip_hf.evaluation.pictures import draw
from flip_hf.evaluation.registry import all_data_sets, data_set
from flip_hf.evaluation.report import table, to_json, write_report
from flip_hf.redaction import install


def list_data_sets() -> None:
    """Prints what is known, a line a data set."""
    for name in all_data_sets():
        known = data_set(name)
        where = known.path or "not on the Hub"
        print(f"{name:<24} {known.task:<15} {known.metric:<15} {', '.join(known.groups):<22} {where}")


def results_folder(model: str, options: EvaluationOptions) -> Path:
    """Where results go: as asked, else into the model folder, else below runs/."""
    if options.output_dir is not None:
        return Path(options.output_dir)
    folder = Path(model)
    return folder / "evaluation" if folder.is_dir() else Path("runs") / "evaluation" / folder.name


def main() -> None:
    """Parses, loads, measures, reports; a mistake ends in one line, before anything is measured."""
    install()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    argv = sys.argv[1:]
    if argv == ["--list"]:
        return list_data_sets()
    model, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    try:
        options = parse_options(rest)
        if model is None:
            raise ValueError(
                "Name the model first: a folder or Hub id of a FLIP, CLIP or SigLIP model, or of a FLIP vision tower."
            )
        if options.card and not Path(model).is_dir():
            raise ValueError(f"--card writes into a model folder, and {model} is none.")
        data_sets = options.data_sets()
        accelerator = Accelerator()
        if accelerator.device.type == "cpu":
            torch.set_num_threads(cores_per_process())  # `accelerate launch` leaves one thread to a process
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        encoder = Encoder.from_pretrained(model, device=accelerator.device, dtype=dtype)
        check_tasks(encoder, options.tasks)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    results, skipped = evaluate(encoder, data_sets, options, accelerator)
    if accelerator.is_main_process:
        folder = results_folder(model, options)
        write_report(folder, to_json(model, options, results, skipped), table(results, skipped))
        draw(results, folder, Path(model).name)
        if options.card and results:
            write_card(Path(model), eval_results(results, data_sets))
        print(f"\n{table(results, skipped)}\nWritten to {folder}")
    accelerator.end_training()
    if not results:
        sys.exit("error: nothing could be measured.")
