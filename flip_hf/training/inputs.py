"""The data and batches of a run, checked before anything else; the model is in models.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from PIL import Image
from transformers import PreTrainedTokenizerBase

from flip_hf.data.captions import Prompts, in_words
from flip_hf.data.class_names import check_class_count, check_class_names
from flip_hf.data.eval_stream import EvalStream
from flip_hf.data.extent import shared_file
from flip_hf.data.files import has_extension
from flip_hf.data.frequencies import WordFrequencies
from flip_hf.data.loader import TrainLoader, make_loader
from flip_hf.data.opening import EITHER, LISTED_COLUMNS, SHARD_EXTENSIONS
from flip_hf.data.pool import PoolFacts, collect, open_pool, read_facts, write_pool
from flip_hf.data.reading import Reader
from flip_hf.data.sources import EMBEDDED, Source, open_source
from flip_hf.data.stream import PatchPlan, TrainStream
from flip_hf.data.transforms import EvalTransform, TrainTransform
from flip_hf.evaluation.loading import read_class_names, read_classes
from flip_hf.modeling import FlipConfig, FlipVisionConfig
from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.redaction import shown, shown_apart
from flip_hf.training.arguments import GENERIC_TEMPLATE, Arguments, DataArguments, ObjectiveArguments
from flip_hf.training.hardware import num_workers
from flip_hf.training.masks import TextMasks
from flip_hf.training.packing import Tokenize
from flip_hf.training.patches import Views, cut_bytes
from flip_hf.training.phases import plan_phases
from flip_hf.training.stage_checks import check_text_lengths


@dataclass(frozen=True)
class Evaluation:
    """The data that a run is evaluated on: labelled images, pairs, or both.

    Attributes:
        images: images with labels, or alone where nothing is contrasted.
        class_names: names of the labels.
        pairs: held-out images with their captions.
        key: identifies the data: only results with the same key are comparable.
    """

    images: Source | None = None
    class_names: tuple[str, ...] = ()
    pairs: Source | None = None
    key: str = ""


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


def overlap_in_words(sources: list[Source], evaluation: Evaluation) -> list[str]:
    """Says in a sentence that a file is both trained on and evaluated on, if one is, by its name."""
    opened = [source for source in (evaluation.images, evaluation.pairs) if source is not None]
    for source in sources:
        for other in opened:
            shared = shared_file(other.shards, source.shards)
            if shared is not None:
                return [f"Evaluation on training data: {shown(shared)} is both, so its results do not hold for others."]
    return []


def open_evaluation_data(data: DataArguments, labels: bool = True, likely: str | None = None) -> Evaluation:
    """Opens the evaluation data, images alone without `labels`; by default the embedded data's own test split.

    `likely` is a column of labels that is taken, if it exists, before those with usual names.

    Raises:
        ValueError: the class names are unknown, or fewer than the labels; the data have both labels and captions and
            neither is chosen; or there are two kinds of held-out pairs.
    """
    name = evaluation_data(data)
    if name is None:
        return Evaluation()
    kind = _kind_of_target(data, name, likely) if labels else "image"
    try:
        source = open_source(
            name,
            split=data.eval_split,
            config=data.eval_config,
            image_column=data.eval_image_column,
            target_column=(data.eval_caption_column or data.label_column) if labels else None,
            kind=kind,
            likely_column=likely if labels and kind == EITHER else None,
        )
    except ValueError as error:  # it names the options of the training data
        message = str(error).replace("--image_column", "--eval_image_column")
        raise ValueError(message.replace("--caption_column", "--eval_caption_column")) from error
    if not labels:
        return Evaluation(source, key=source.name)
    found = (source.target_column or "").split(";")[0]
    is_likely = likely is not None and source.target_column == likely
    if kind == "caption" or (kind == EITHER and found in LISTED_COLUMNS["caption"] and not is_likely):
        if data.holdout:
            raise ValueError(
                f"--eval_data {shown(name)} holds pairs, and --holdout takes others from the training data to validate "
                "on. Give one of them."
            )
        return Evaluation(pairs=source)
    class_names = read_class_names(data.class_names) if data.class_names is not None else source.class_names
    if class_names is None:
        raise ValueError(
            f"The data set {shown(name)!r} does not name its classes in {source.target_column!r}. Give "
            "--class_names FILE, one name a line in the order of the labels."
        )
    if source.class_names is not None:
        check_class_count(source.name, source.target_column, source.class_names, class_names)
    check_class_names(source, class_names, None, "Write the labels as numbers, or the names in words.")
    return Evaluation(source, class_names, key=source.name)


def _kind_of_target(data: DataArguments, name: str, likely: str | None) -> str:
    """Returns the kind of target that options give the evaluation data: `label`, `caption` or `either`."""
    if data.eval_caption_column is not None:
        return "caption"
    # Where training is on labels, the class names may be for them alone.
    named = data.class_names is not None and likely is None
    return "label" if name in EMBEDDED or data.label_column or named else EITHER


def check_evaluation(arguments: Arguments, evaluation: Evaluation) -> None:
    """Checks that there is something to evaluate on where evaluations can end the run.

    Raises:
        ValueError: there is nothing to evaluate on.
    """
    counts = arguments.run.early_stopping_patience is not None
    if counts and not arguments.data.holdout and evaluation == Evaluation():
        raise ValueError(
            "--early_stopping_patience counts evaluations, and there is nothing to evaluate on: hold pairs out with "
            "--holdout, or name data with --eval_data."
        )


def held_out_pairs(
    arguments: Arguments, sources: list[Source], evaluation: Evaluation, folder: Path, resumed: bool
) -> PoolFacts | None:
    """Finds the run's held-out pairs and writes them into a folder; a resumed run keeps its own.

    Let one process call it.

    Args:
        arguments: the run's arguments.
        sources: its training data.
        evaluation: its evaluation data.
        folder: folder of the pairs.
        resumed: the run resumes from a checkpoint.

    Returns:
        Facts about the pairs; None where the run holds none out.

    Raises:
        ValueError: there are fewer than two images with captions.
    """
    data = arguments.data
    found = [evaluation.pairs] if evaluation.pairs is not None else sources if data.holdout else []
    if not found:
        return None
    names = [source.name for source in found]
    wanted = {"data": names, "holdout": 0.0 if evaluation.pairs else data.holdout, "eval_pairs": data.eval_pairs}
    facts = read_facts(folder) if resumed else None
    if facts is None or facts.wanted != wanted:
        facts = write_pool(collect(found, data.eval_pairs), folder, wanted)
    if facts.images < 2:
        what = f"--holdout {data.holdout:g} holds" if not evaluation.pairs else f"--eval_data {names[0]} has"
        raise ValueError(
            f"{what} {facts.images} usable pairs in the first {facts.rows:,} rows, and two are needed to tell one from "
            "another. Hold out a larger share, or name held-out pairs with --eval_data."
        )
    return facts


def with_pairs(evaluation: Evaluation, facts: PoolFacts, folder: Path, captions: bool) -> Evaluation:
    """Adds the pairs that [`held_out_pairs`] wrote to the evaluation; images alone where no captions are read."""
    pool = open_pool(folder, captions)
    if captions:
        return replace(evaluation, pairs=pool, key=facts.key)
    return evaluation if evaluation.images is not None else replace(evaluation, images=pool, key=facts.key)


def evaluation_data(data: DataArguments) -> str | None:
    """Returns the name of the evaluation data."""
    own = data.train_data[0] if data.train_data and len(data.train_data) == 1 else None
    return data.eval_data or (own if own in EMBEDDED else None)


def templates(data: DataArguments) -> list[str]:
    """Returns the prompts of the evaluation: those given, the embedded data's own, or those of training."""
    embedded = EMBEDDED.get(evaluation_data(data) or "")
    if data.templates != [GENERIC_TEMPLATE]:
        return list(data.read_prompts("templates"))
    return list(embedded.templates if embedded else data.read_prompts("caption_templates"))


def positives(objective: ObjectiveArguments, sources: list[Source]) -> Literal["pair", "caption"]:
    """Returns the positives of the contrast: where captions are made of labels, all equal ones if not configured."""
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
        arguments: the run's arguments; without a contrast, no text is read.
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


def _whole_patches(transform: EvalTransform, patch_size: int, image: Image.Image) -> torch.Tensor:
    return cut_patches(transform(image)[None], patch_size=patch_size)[0]


def make_eval_loader(
    data: DataArguments,
    source: Source,
    read_target: Callable[[object], object],
    vision_config: FlipVisionConfig,
    accelerator: Accelerator,
) -> torch.utils.data.DataLoader:
    """Makes one pass over this process's part of the evaluation data: all patches (B, L, 3 * P * P) of its images.

    `read_target` converts a value of the target column; see [`EvalStream`].
    """
    stream = EvalStream(
        source,
        partial(_whole_patches, EvalTransform(vision_config.image_size), vision_config.patch_size),
        read_target,
        batch_size=data.eval_batch_size,
        process=Reader(accelerator.process_index, accelerator.num_processes),
        background=data.background_colour(),
    )
    return make_loader(stream, num_workers=num_workers(data))
