"""Builds a run, new or resumed, up to its first step, and reports what is wrong with it."""

import logging
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from flip_hf.console.files import try_folder
from flip_hf.console.loading import loading
from flip_hf.console.lock import lock_folder, unlock_folder
from flip_hf.data import processes
from flip_hf.data.pool import FEW
from flip_hf.data.processes import from_main
from flip_hf.data.sources import Source
from flip_hf.data.tokenization import load_tokenizer
from flip_hf.hub.push import HubRefused
from flip_hf.modeling import FlipConfig, FlipForPreTraining, FlipModel
from flip_hf.training import inputs, models
from flip_hf.training.arguments import Arguments, OptimizationArguments, RunArguments
from flip_hf.training.checkpoint import load_data_states, tidy
from flip_hf.training.encoder import flip_of
from flip_hf.training.engine import Trainer
from flip_hf.training.evaluation_data import (
    Evaluation,
    check_evaluation,
    held_out_pairs,
    open_evaluation_data,
    overlap_in_words,
    with_pairs,
)
from flip_hf.training.freezing import in_words, read_frozen
from flip_hf.training.hardware import autocast_dtype
from flip_hf.training.logit_bias import change_in_words
from flip_hf.training.lora import adapters_in_words, check_processes, read_ranks
from flip_hf.training.publishing import begin_pushing, check_publishing
from flip_hf.training.resume import check_finished, check_fit, check_output, shared_checkpoint
from flip_hf.training.retained_data import open_retained_data, shared_retained_pairs, unmeasured_in_words
from flip_hf.training.speed_ups import check_hardware
from flip_hf.training.stage_checks import check_stages_fit
from flip_hf.training.word_frequencies import shared_frequencies

logger = logging.getLogger(__name__)

VALIDATION = "validation"  # the folder of the held-out pairs
# Raised by [`build_trainer`] for a user's mistake; the message names it and the fix.
MISTAKES = (ValueError, FileNotFoundError, FileExistsError, StrictDataclassError, HubRefused)


def build_trainer(arguments: Arguments) -> Trainer:
    """Builds a run, new or resumed, up to its first step.

    Raises:
        One of `MISTAKES`: the arguments or the data do not fit.
        RunFinished: there is nothing left to train.
    """
    try:
        return _build(arguments)
    except BaseException:
        unlock_folder(Path(arguments.run.output_dir))
        raise


def _build(arguments: Arguments) -> Trainer:
    # Mistakes are found before a device is touched.
    config = check(arguments)
    objective = arguments.objective
    sources = inputs.open_training_data(arguments.data, captions=objective.contrasts)
    evaluation, retained = open_evaluations(arguments, sources)

    accelerator, micro_batches, checkpoint = start(arguments)
    about_data = [*inputs.captions_in_words(objective, sources), *overlap_in_words(sources, evaluation)]
    say(accelerator, [*about_data, *unmeasured_in_words(arguments, sources, evaluation)])
    evaluation = shared_pairs(arguments, sources, evaluation, accelerator, resumed=checkpoint is not None)
    retained = shared_retained_pairs(arguments, retained, accelerator, resumed=checkpoint is not None)
    pusher = begin_pushing(arguments.hub, arguments.run, accelerator)
    text_config = config.get_text_config()
    tokenizer = shared_tokenizer(arguments, sources, text_config.max_position_embeddings, accelerator, checkpoint)
    set_seed(arguments.run.seed)
    model = models.make_model(arguments, config, tokenizer)
    say(accelerator, start_in_words(arguments, model))
    config = flip_of(model).config  # its sizes may have changed
    processor = models.make_processor(config, tokenizer, arguments.model, arguments.data.background_colour())
    if checkpoint is not None:
        check_fit(accelerator, arguments, model, checkpoint, arguments.optimization.ema_half_life is not None)
    frequencies = shared_frequencies(arguments, sources, tokenizer, accelerator, checkpoint)
    loader = inputs.make_train_loader(
        arguments,
        sources,
        tokenizer,
        accelerator,
        config,
        micro_batches,
        load_data_states(checkpoint) if checkpoint is not None else None,
        frequencies,
    )
    trainer = Trainer(arguments, accelerator, model, processor, loader, micro_batches[1], evaluation, retained, pusher)
    trainer.frequencies = frequencies
    begin(trainer, checkpoint, arguments.run.seed)
    if accelerator.is_main_process:
        tidy(Path(arguments.run.output_dir), trainer.state.samples)
    return trainer


def check(arguments: Arguments) -> FlipConfig:
    """Checks the options of a run against its folder and its model; returns the configuration of the model.

    Raises:
        One of `MISTAKES`: they do not fit.
        RunFinished: there is nothing left to train.
    """
    try_folder(Path(arguments.run.output_dir), "--output_dir")
    check_finished(arguments)
    config = models.make_config(arguments.model, arguments.objective)
    check_stages_fit(arguments, config)
    check_publishing(arguments.hub, arguments.objective, config)
    return config


def start(arguments: Arguments) -> tuple[Accelerator, tuple[int, int], Path | None]:
    """Starts the process layer and the trackers, and takes the folder for this run.

    Returns:
        The process layer; size and number of each process's micro-batches; the checkpoint to resume from, if any.

    Raises:
        One of `MISTAKES`: the options do not fit the processes or the hardware, or the folder is another run's.
    """
    options = arguments.optimization
    output_dir = Path(arguments.run.output_dir)
    accelerator = make_accelerator(arguments.run)
    check_processes(read_ranks(arguments.model.lora), accelerator)
    micro_batches = split_batch(options, accelerator.num_processes)
    dtype = autocast_dtype(options.precision)
    check_hardware(
        options.speed_ups or (),
        accelerator.device,
        dtype,
        num_micro=micro_batches[1],
        num_processes=accelerator.num_processes,
    )
    take_folder(accelerator, output_dir)
    checkpoint = shared_checkpoint(accelerator, arguments.run.resume_from_checkpoint, output_dir)
    if checkpoint is None:
        check_output(output_dir)
    start_trackers(accelerator, arguments)
    return accelerator, micro_batches, checkpoint


def begin(trainer: Trainer, checkpoint: Path | None, seed: int) -> None:
    """Restores a checkpoint, or seeds the generators of each process for a new run."""
    if checkpoint is not None:
        return trainer.restore(checkpoint)
    # From here on each process draws its own dropout, if the model has any; masks come with the batches.
    set_seed(seed, device_specific=True)


def say(accelerator: Accelerator, sentences: list[str]) -> None:
    """Prints sentences, a line each, on the main process."""
    if accelerator.is_main_process:
        for sentence in sentences:
            print(sentence)


def open_evaluations(arguments: Arguments, sources: list[Source]) -> tuple[Evaluation, Evaluation]:
    """Opens and checks the run's own evaluation data and its retained data; `sources` are those of its training.

    Raises:
        ValueError: some of them cannot be used, or there is nothing to evaluate on where evaluations end the run.
    """
    likely = inputs.label_column(sources)
    evaluation = open_evaluation_data(arguments.data, labels=arguments.objective.contrasts, likely=likely)
    check_evaluation(arguments, evaluation)
    return evaluation, open_retained_data(arguments)


def start_in_words(arguments: Arguments, model: FlipModel | FlipForPreTraining) -> list[str]:
    """Says in sentences what a run does with the model that it starts from: its class, its loss, what is frozen."""
    options = arguments.model
    name = options.model_name_or_path
    sentences = []
    stock = models.stock_class(options)
    if stock is not None:
        sentences.append(f"{name} is a {stock}; training continues as a FlipModel with its weights")
    saved = None if name is None else models.saved_config(options)
    said = change_in_words(name, saved, arguments.objective.loss)
    if said is not None:
        sentences.append(said)
    if options.freeze:
        sentences.append(in_words(flip_of(model), read_frozen(options.freeze)))
    if options.lora:
        sentences.append(adapters_in_words(flip_of(model), read_ranks(options.lora)))
    return sentences


def shared_tokenizer(
    arguments: Arguments, sources: list[Source], context_length: int, accelerator: Accelerator, checkpoint: Path | None
) -> PreTrainedTokenizerBase | None:
    """Makes one tokenizer for all processes and the whole of a resumed run; None where no text is read.

    Word pieces are learned once, by the main process.

    Raises:
        ValueError: the checkpoint has no tokenizer.
    """
    if not arguments.objective.contrasts:
        return None
    if checkpoint is not None:
        if not (checkpoint / "tokenizer.json").is_file():
            raise ValueError(
                f"{checkpoint} is of a run that read no texts. Resume it with --objective reconstruction, or give a "
                f"new model its vision tower with --init_vision_from {checkpoint}."
            )
        with loading(checkpoint, "tokenizer"):
            return load_tokenizer(str(checkpoint), context_length=context_length, special_tokens=True)
    if accelerator.num_processes == 1:
        return models.make_tokenizer(arguments, sources, context_length)
    return from_main(accelerator, partial(models.make_tokenizer, arguments, sources, context_length))


def shared_pairs(
    arguments: Arguments,
    sources: list[Source],
    evaluation: Evaluation,
    accelerator: Accelerator,
    resumed: bool,
) -> Evaluation:
    """Adds the run's held-out pairs to the evaluation, the same in all processes; the main one finds them.

    Raises:
        ValueError: there are too few pairs.
    """
    folder = Path(arguments.run.output_dir) / VALIDATION
    find = partial(held_out_pairs, arguments, sources, evaluation, folder, resumed)
    facts = from_main(accelerator, find)
    if facts is None:
        return evaluation
    if accelerator.is_main_process:
        print(facts.in_words())
        if facts.images < FEW:
            logger.warning(
                "There are only %d held-out images: a single image is %.1f %% of them. A larger --holdout or "
                "--eval_data tells more.",
                facts.images,
                100 / facts.images,
            )
    return with_pairs(evaluation, facts, folder, captions=arguments.objective.contrasts)


def take_folder(accelerator: Accelerator, output_dir: Path) -> None:
    """Creates the output folder and locks it for this run, on the main process; all must call it.

    Raises:
        FolderInUse: another run uses it; raised on every process.
    """

    def take() -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock_folder(output_dir)

    from_main(accelerator, take)


def make_accelerator(run: RunArguments) -> Accelerator:
    """Makes Accelerate's process layer; the encoder handles precision itself."""
    trackers = [name for name in run.report_to if name != "none"]
    return processes.make_accelerator(
        mixed_precision="no", log_with=trackers or None, project_dir=str(Path(run.output_dir))
    )


def start_trackers(accelerator: Accelerator, arguments: Arguments) -> None:
    """Starts the run's trackers, which write into its folder."""
    if accelerator.log_with:
        plain = {k: v for k, v in arguments.to_recipe().items() if isinstance(v, (int, float, str, bool))}
        accelerator.init_trackers("logs", config=plain)


def split_batch(options: OptimizationArguments, num_processes: int) -> tuple[int, int]:
    """Returns the size and the number of each process's micro-batches.

    Raises:
        ValueError: the batch cannot be divided; the message names a size that can.
    """
    batch_size = options.batch_size
    micro = options.micro_batch_size
    unit = num_processes * (micro or 1)
    if batch_size % unit != 0:
        nearest = max(1, round(batch_size / unit)) * unit
        each = f" of {micro} samples a micro-batch" if micro else ""
        raise ValueError(
            f"--batch_size {batch_size} cannot be divided over {num_processes} processes{each}; use {nearest}."
        )
    local = batch_size // num_processes
    return micro or local, local // (micro or local)
