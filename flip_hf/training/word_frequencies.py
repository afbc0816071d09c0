"""The word frequencies by which a run masks its texts: counted once by the main process, and kept when it resumes."""

import logging
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from flip_hf.data.frequencies import (
    FILE,
    WordFrequencies,
    count_words,
    mixture_of,
    read_frequencies,
    write_frequencies,
)
from flip_hf.data.processes import from_main
from flip_hf.data.sources import Source
from flip_hf.training.arguments import Arguments
from flip_hf.training.phases import plan_phases

logger = logging.getLogger(__name__)


def shared_frequencies(
    arguments: Arguments,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase | None,
    accelerator: Accelerator,
    checkpoint: Path | None,
) -> WordFrequencies | None:
    """Returns the word frequencies of a run, the same in all processes; None where no text is masked by them.

    The main process reads them from the checkpoint, or else counts them, and writes them into the run's folder.

    Raises:
        ValueError: those of the checkpoint are damaged.
    """
    is_masked = any(phase.text_mask_ratio > 0 for phase in plan_phases(arguments))
    if tokenizer is None or not is_masked or arguments.model.text_mask_strategy != "frequency":
        return None
    return from_main(accelerator, partial(_frequencies, arguments, sources, tokenizer, checkpoint))


def _frequencies(
    arguments: Arguments, sources: list[Source], tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None
) -> WordFrequencies:
    weights = arguments.data.train_weights
    if checkpoint is not None and (checkpoint / FILE).is_file():
        frequencies = read_frequencies(checkpoint)
        _compare(frequencies, mixture_of(sources, weights), checkpoint)
        print(f"{frequencies.in_words()}, from {checkpoint.name}.")
    else:
        if checkpoint is not None:
            logger.warning("%s has no word frequencies: they are counted now.", checkpoint.name)
        print("Counting the words of the training captions, for minutes at most.", flush=True)
        frequencies = count_words(sources, weights, tokenizer)
        print(f"{frequencies.in_words()}.")
    write_frequencies(frequencies, tokenizer, Path(arguments.run.output_dir))
    return frequencies


def _compare(frequencies: WordFrequencies, mixture: dict[str, float], checkpoint: Path) -> None:
    """Warns if the words of a checkpoint were counted in other data than the run now reads."""
    if frequencies.mixture() != mixture:
        logger.warning(
            "The words of %s were counted in %s, and this run reads %s: its texts are still masked by the frequencies "
            "of the former. To count them anew, start a new run from its weights: --model_name_or_path %s.",
            checkpoint.name,
            _in_words(frequencies.mixture()),
            _in_words(mixture),
            checkpoint,
        )


def _in_words(mixture: dict[str, float]) -> str:
    if len(mixture) == 1:
        return next(iter(mixture))
    return ", ".join(f"{share:.3g} x {name}" for name, share in mixture.items())
