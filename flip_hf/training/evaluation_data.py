"""The data that a run is evaluated on, checked before anything else: labelled images, held-out pairs, or both."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from flip_hf.data.class_names import check_class_count, check_class_names
from flip_hf.data.eval_stream import EvalStream
from flip_hf.data.extent import shared_file
from flip_hf.data.loader import make_loader
from flip_hf.data.opening import EITHER, LISTED_COLUMNS
from flip_hf.data.pool import PoolFacts, collect, open_pool, read_facts, write_pool
from flip_hf.data.reading import Reader
from flip_hf.data.sources import EMBEDDED, Source, open_source
from flip_hf.data.transforms import EvalTransform
from flip_hf.evaluation.loading import read_class_names
from flip_hf.modeling import FlipVisionConfig
from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.redaction import shown
from flip_hf.training.arguments import GENERIC_TEMPLATE, Arguments, DataArguments
from flip_hf.training.hardware import num_workers


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


def open_evaluation_data(data: DataArguments, labels: bool = True, likely: str | None = None) -> Evaluation:
    """Opens the evaluation data, images alone without `labels`; by default the embedded data's own test split.

    `likely` is a column of labels that is taken, if it exists, before those with usual names.

    Raises:
        ValueError: the class names are unknown, or fewer than the labels; the data have both labels and captions and
            neither is chosen; or there are two kinds of held-out pairs.
    """
    name = evaluation_name(data)
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


def overlap_in_words(sources: list[Source], evaluation: Evaluation) -> list[str]:
    """Says in a sentence that a file is both trained on and evaluated on, if one is, by its name."""
    opened = [source for source in (evaluation.images, evaluation.pairs) if source is not None]
    for source in sources:
        for other in opened:
            shared = shared_file(other.shards, source.shards)
            if shared is not None:
                return [f"Evaluation on training data: {shown(shared)} is both, so its results do not hold for others."]
    return []


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


def evaluation_name(data: DataArguments) -> str | None:
    """Returns the name of the evaluation data."""
    own = data.train_data[0] if data.train_data and len(data.train_data) == 1 else None
    return data.eval_data or (own if own in EMBEDDED else None)


def templates(data: DataArguments) -> list[str]:
    """Returns the prompts of the evaluation: those given, the embedded data's own, or those of training."""
    embedded = EMBEDDED.get(evaluation_name(data) or "")
    if data.templates != [GENERIC_TEMPLATE]:
        return list(data.read_prompts("templates"))
    return list(embedded.templates if embedded else data.read_prompts("caption_templates"))


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
