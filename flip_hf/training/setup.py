"""Opens a run's data and makes its batches; what is wrong with them is said here, first. The model: models.py."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from flip_hf.data.eval_stream import EvalStream
from flip_hf.data.files import has_extension
from flip_hf.data.loader import TrainLoader, make_loader
from flip_hf.data.opening import SHARD_EXTENSIONS
from flip_hf.data.reading import Reader
from flip_hf.data.sources import EMBEDDED, Source, open_source
from flip_hf.data.stream import PatchPlan, TrainStream
from flip_hf.data.targets import ClassIndex, nothing
from flip_hf.data.transforms import EvalTransform, TrainTransform
from flip_hf.evaluation.loading import read_class_names
from flip_hf.modeling import FlipConfig
from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.redaction import shown, shown_apart
from flip_hf.training.arguments import GENERIC_TEMPLATE, Arguments, DataArguments
from flip_hf.training.hardware import num_workers
from flip_hf.training.optimization import plan_phases
from flip_hf.training.packing import Tokenize
from flip_hf.training.patches import Views

# Where a run is evaluated: images, and the names of their classes.
Evaluation = tuple[Source, tuple[str, ...]]


def open_training_data(data: DataArguments, captions: bool = True) -> list[Source]:
    """The training data's sources, images alone without `captions`; see [`open_source`] for what it raises.

    Several shard files of one kind without weights are one source: a shell's reading of an unquoted `*.tar`.
    """
    names = data.train_data or []  # its arguments require it
    options = (data.train_config or [None], data.image_column or [None], data.caption_column or [None])
    one_kind = any(all(has_extension(name, extension) for name in names) for extension in SHARD_EXTENSIONS)
    groups = [names] if len(names) > 1 and one_kind and data.train_weights is None else names
    configs, images, targets = (values * len(groups) if len(values) == 1 else values for values in options)
    kind = "caption" if captions else "image"
    sources = [
        open_source(
            name,
            split=data.train_split,
            config=config,
            image_column=image,
            target_column=target if captions else None,
            kind=kind,
        )
        for name, config, image, target in zip(groups, configs, images, targets, strict=False)
    ]
    if len(sources) == 1:
        return sources
    return [replace(source, name=name) for source, name in zip(sources, shown_apart(names), strict=True)]


def open_evaluation_data(data: DataArguments, labels: bool = True) -> Evaluation | None:
    """The evaluation data, images alone without `labels`; the embedded data's own test where nothing else is named.

    Raises:
        ValueError: the class names are not known, or are fewer than the labels.
    """
    name = _evaluated(data)
    if name is None:
        return None
    source = open_source(
        name,
        split=data.eval_split,
        config=data.eval_config,
        image_column=data.eval_image_column,
        target_column=data.label_column if labels else None,
        kind="label" if labels else "image",
    )
    if not labels:
        return source, ()
    if data.class_names is not None:
        return source, read_class_names(data.class_names)
    if source.class_names is None:
        raise ValueError(
            f"The data set {shown(name)!r} does not name its classes in {source.target_column!r}. Give "
            "--class_names FILE, one name a line in the order of the labels."
        )
    return source, source.class_names


def _evaluated(data: DataArguments) -> str | None:
    """The name of the evaluation data."""
    own = data.train_data[0] if data.train_data and len(data.train_data) == 1 else None
    return data.eval_data or (own if own in EMBEDDED else None)


def templates(data: DataArguments) -> list[str]:
    """The prompts of the evaluation; the embedded data's own where none were given."""
    embedded = EMBEDDED.get(_evaluated(data) or "")
    return list(embedded.templates) if embedded and data.templates == [GENERIC_TEMPLATE] else data.templates


def make_train_loader(
    arguments: Arguments,
    sources: list[Source],
    tokenizer: Any,
    accelerator: Accelerator,
    config: FlipConfig,
    micro_batches: tuple[int, int],
    states: list[dict] | None,
) -> TrainLoader:
    """The training batches of this process, from where `states`, one of each process, stopped.

    `micro_batches` are the samples of one and how many make a step; without a contrast, no text is read.
    """
    data, objective = arguments.data, arguments.objective
    tokenize = Tokenize(tokenizer, config.get_text_config(), arguments.model.text_mask_ratio)
    plan = PatchPlan(
        TrainTransform(crop_area=(data.crop_area[0], data.crop_area[1]), flip=data.flip),
        partial(cut_patches, patch_size=config.vision_config.patch_size),  # pyright: ignore
        Views(arguments.model.mask_strategy, config.vision_config, plan_phases(arguments)),
        micro_batches[1],
        whole=objective.reconstructs,
    )
    stream = TrainStream(
        sources,
        plan,
        tokenize if objective.contrasts else None,
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
    data: DataArguments, source: Source, class_names: tuple[str, ...], vision_config: Any, accelerator: Accelerator
) -> torch.utils.data.DataLoader:
    """One pass over this process's part of the evaluation data: all patches (B, L, 3 * P * P) of its images."""
    stream = EvalStream(
        source,
        partial(_whole_patches, EvalTransform(vision_config.image_size), vision_config.patch_size),
        ClassIndex(class_names) if source.target_column is not None else nothing,
        batch_size=data.eval_batch_size,
        process=Reader(accelerator.process_index, accelerator.num_processes),
    )
    return make_loader(stream, num_workers=num_workers(data))
