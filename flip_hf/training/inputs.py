"""The training data of a run and its batches, checked before anything else."""

from dataclasses import replace
from functools import partial
from typing import Literal

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from flip_hf.data.captions import Prompts, in_words
from flip_hf.data.files import has_extension
from flip_hf.data.frequencies import WordFrequencies
from flip_hf.data.loader import TrainLoader
from flip_hf.data.opening import SHARD_EXTENSIONS
from flip_hf.data.reading import Reader
from flip_hf.data.sources import Source, open_source
from flip_hf.data.stream import PatchPlan, TrainStream
from flip_hf.data.transforms import TrainTransform
from flip_hf.evaluation.loading import read_classes
from flip_hf.modeling import FlipConfig
from flip_hf.redaction import shown_apart
from flip_hf.training.arguments import Arguments, DataArguments, ObjectiveArguments
from flip_hf.training.hardware import num_workers
from flip_hf.training.masks import TextMasks
from flip_hf.training.packing import Tokenize
from flip_hf.training.patches import Views, cut_bytes
from flip_hf.training.phases import plan_phases
from flip_hf.training.stage_checks import check_text_lengths


def open_training_data(data: DataArguments, captions: bool = True) -> list[Source]:
    """Opens the training data's sources, images alone without `captions`; raises what [`open_source`] raises.

    Several shard files of one kind without weights are one source: a shell expands an unquoted `*.tar` like that.

    Raises:
        ValueError: an option about labels is given and no caption is made of labels, or pictures with such captions are
            to be held out; see also [`open_source`].
    """
    names = data.train_data or []  # never empty: the arguments require it
    options = (data.train_config or [None], data.image_column or [None], data.caption_column or [None])
    one_kind = any(all(has_extension(name, extension) for name in names) for extension in SHARD_EXTENSIONS)
    groups = [names] if len(names) > 1 and one_kind and data.train_weights is None else names
    configs, images, targets = (values * len(groups) if len(values) == 1 else values for values in options)
    kind = "caption" if captions else "image"
    classes = read_classes(data.class_names) if captions and data.class_names is not None else None
    prompts = Prompts(data.read_prompts("caption_templates"), classes, data.caption_templates is not None)
    sources = [
        open_source(
            name,
            split=data.train_split,
            config=config,
            image_column=image,
            target_column=target if captions else None,
            kind=kind,
            prompts=prompts if captions else None,
        )
        for name, config, image, target in zip(groups, configs, images, targets, strict=False)
    ]
    if captions:
        _check_labels(data, sources)
    sources = [replace(source, holdout=data.holdout) for source in sources]
    if len(sources) == 1:
        return sources
    return [replace(source, name=name) for source, name in zip(sources, shown_apart(names), strict=True)]


def _check_labels(data: DataArguments, sources: list[Source]) -> None:
    """Checks the options about labels against what the training data hold.

    Raises:
        ValueError: they are given and no caption is made of a label, or such captions are to be held out.
    """
    with_labels = [source for source in sources if any(column.labels is not None for column in source.captions)]
    if not with_labels and data.caption_templates is not None:
        columns = ", ".join(f"{source.target_column!r} of {source.name!r}" for source in sources)
        raise ValueError(
            f"--caption_templates makes captions of labels, and {columns} holds captions. Leave it out, or name a "
            "column of labels with --caption_column; if these are names, as texts, give them all in --class_names FILE."
        )
    if not with_labels and data.class_names is not None and data.eval_caption_column is not None:
        raise ValueError("--class_names names labels, and neither the training data nor the evaluation data hold any.")
    alone = next((source.name for source in with_labels if source.captions_from_labels), None)
    if alone is not None and data.holdout:
        raise ValueError(
            f"--holdout compares held-out pictures with their captions, and those of {alone!r} are made of labels, "
            "equal for all pictures of a class. Evaluate on labelled pictures: --eval_data."
        )


def label_column(sources: list[Source]) -> str | None:
    """Returns the column of labels that captions of the training data are made of, or None."""
    found = (column.name for source in sources for column in source.captions if column.labels is not None)
    return next(found, None)


def captions_in_words(objective: ObjectiveArguments, sources: list[Source]) -> list[str]:
    """Describes, a sentence each, captions that are made of labels or drawn from several columns, and positives."""
    described = [f"Captions of {source.name}: {in_words(source.captions)}." for source in sources if source.captions]
    if objective.contrasts and positives(objective, sources) == "caption":
        described.append("Positives of an image: all texts of the batch that equal its own.")
    return described


def positives(objective: ObjectiveArguments, sources: list[Source]) -> Literal["pair", "caption"]:
    """Returns the kind of positives: where captions are made of labels, all equal ones if not configured."""
    if objective.positives is not None:
        return objective.positives
    return "caption" if any(source.captions_from_labels for source in sources) else "pair"


def make_train_loader(
    arguments: Arguments,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase | None,
    accelerator: Accelerator,
    config: FlipConfig,
    micro_batches: tuple[int, int],
    states: list[dict] | None,
    frequencies: WordFrequencies | None = None,
) -> TrainLoader:
    """Makes the loader of this process's training batches.

    Args:
        arguments: the run's arguments; where nothing is contrasted, no text is read.
        sources: its training data.
        tokenizer: its tokenizer.
        accelerator: the process layer.
        config: the model's configuration.
        micro_batches: the size of a micro-batch and their number per step.
        states: what to resume from, one per process; None to begin.
        frequencies: those of the words in the captions, where texts are masked by them.

    Raises:
        ValueError: a stage cuts texts to less than a word.
    """
    data = arguments.data
    objective = arguments.objective
    tokenize = None
    context = 0
    phases = plan_phases(arguments)
    if objective.contrasts and tokenizer is not None:
        check_text_lengths(phases, tokenizer)
        text_config = config.get_text_config()
        context = text_config.max_position_embeddings
        masks = TextMasks(arguments.model, text_config, tokenizer, frequencies)
        by_caption = positives(objective, sources) == "caption"
        # torch.compile takes a minute or more for each shape of a large model.
        fewest_shapes = arguments.optimization.compile
        tokenize = Tokenize(tokenizer, text_config, masks, by_caption, fewest_shapes)
    plan = PatchPlan(
        TrainTransform((data.crop_area[0], data.crop_area[1]), flip=data.flip, background=data.background_colour()),
        partial(cut_bytes, patch_size=config.vision_config.patch_size),
        Views(arguments.model.mask_strategy, config.vision_config, phases, context),
        micro_batches[1],
        whole=objective.reconstructs,
    )
    stream = TrainStream(
        sources,
        plan,
        tokenize,
        batch_size=micro_batches[0],
        process=Reader(accelerator.process_index, accelerator.num_processes),
        seed=arguments.run.seed,
        shuffle_block=data.shuffle_block,
        weights=data.train_weights,
        max_bad_fraction=data.max_bad_fraction,
    )
    pin_memory = accelerator.device.type == "cuda"
    return TrainLoader(stream, num_workers=num_workers(data), pin_memory=pin_memory, states=states)
