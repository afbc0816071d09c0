"""The work behind `flip-hf evaluate`."""

import logging
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from flip_hf.console.endings import end_with
from flip_hf.console.files import try_folder
from flip_hf.console.json_types import JsonObject
from flip_hf.data.processes import make_accelerator
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.evaluate import check_tasks, evaluate
from flip_hf.evaluation.model_index import eval_results, write_eval_results
from flip_hf.evaluation.options import EvaluationOptions
from flip_hf.evaluation.pictures import draw
from flip_hf.evaluation.registry import DataSet
from flip_hf.evaluation.report import table, to_json, write_report
from flip_hf.evaluation.result import Result


def results_folder(model: str, options: EvaluationOptions) -> Path:
    """Returns the folder for results: as configured, else in the model folder, else below runs/."""
    if options.output_dir is not None:
        return Path(options.output_dir)
    folder = Path(model)
    return folder / "evaluation" if folder.is_dir() else Path("runs") / "evaluation" / folder.name


def _report(report: JsonObject, options: EvaluationOptions, data_sets: list[DataSet], results: list[Result]) -> None:
    """Prints the results, then writes them, so that a full disk does not lose them."""
    model = report["model"]
    skipped = report["skipped"]
    print(f"\n{table(results, skipped)}")
    folder = results_folder(model, options)
    try:
        write_report(folder, report, table(results, skipped))
        draw(results, folder, Path(model).name)
        if options.card and results:
            write_eval_results(Path(model), eval_results(results, data_sets))
    except OSError as error:
        end_with(f"The results above could not be written: {error}.")
    print(f"Written to {folder}")


def run(model: str, options: EvaluationOptions, command: str) -> None:
    """Loads, measures and reports; a mistake ends in one line, before anything is measured.

    Args:
        model: folder or Hub id.
        options: the parsed options.
        command: the command that they were parsed from, for the report.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    try:
        try_folder(results_folder(model, options), "--output_dir")
        if options.card:
            try_folder(model, "--card")
        data_sets = options.data_sets()
        accelerator = make_accelerator()
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        encoder = Encoder.from_pretrained(model, device=accelerator.device, dtype=dtype)
        check_tasks(encoder, options.tasks)
    except (ValueError, OSError) as error:
        end_with(error)
    results, skipped = evaluate(encoder, data_sets, options, accelerator)
    if accelerator.is_main_process:
        _report(to_json(model, options, results, skipped, command), options, data_sets, results)
    accelerator.end_training()
    if not results:
        end_with("nothing could be measured.")
