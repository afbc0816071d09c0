"""Builds what a run needs from its arguments: tokenizer, model, processor, data. Everything is checked here, first."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flip_hf.data.decode import RefusedSample, choose_caption
from flip_hf.data.eval_stream import EvalStream
from flip_hf.data.loader import TrainLoader, make_loader
from flip_hf.data.reading import Reader
from flip_hf.data.shapes import TEMPLATES
from flip_hf.data.sources import EMBEDDED, SHARD_EXTENSIONS, Source, open_source
from flip_hf.data.stream import PatchPlan, TrainStream
from flip_hf.data.targets import ClassIndex
from flip_hf.data.tokenization import check_vocabulary, load_tokenizer, train_wordpiece
from flip_hf.data.transforms import EvalTransform, TrainTransform
from flip_hf.modeling import FlipConfig, FlipModel, FlipProcessor
from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.training.arguments import (
    GENERIC_TEMPLATE,
    IMAGE_MEAN,
    IMAGE_STD,
    Arguments,
    DataArguments,
    ModelArguments,
)
from flip_hf.training.hardware import num_workers
from flip_hf.training.masks import check_masks
from flip_hf.training.optimization import plan_phases
from flip_hf.training.packing import Tokenize
from flip_hf.training.patches import Views
from flip_hf.training.resizing import new_sizes, resized_image_processor

# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def _read_captions(sources: list[Source], limit: int):
    import numpy as np

    rng = np.random.default_rng(0)
    for source in sources:
        for row in itertools.islice(source.rows(), limit // len(sources)):
            try:
                yield choose_caption(source.target(row), rng)
            except RefusedSample:
                continue  # counted when it is met in training


def make_tokenizer(arguments: Arguments, sources: list[Source], context_length: int) -> PreTrainedTokenizerBase:
    """The named tokenizer, else that of the model gone on with, else one learned from the captions."""
    data, saved = arguments.data, arguments.model.model_name_or_path
    if data.tokenizer is None and saved is not None:
        return load_tokenizer(saved, context_length=context_length, special_tokens=True)
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer, context_length=context_length, special_tokens=data.special_tokens)
    captions = _read_captions(sources, data.tokenizer_samples)
    return train_wordpiece(captions, vocab_size=data.tokenizer_vocab_size, context_length=context_length)


def make_config(model: ModelArguments) -> FlipConfig:
    """The configuration of the run's model.

    Raises:
        ValueError: a field has the wrong type, or fields do not fit together.
    """
    if model.model_name_or_path is not None:
        masking = {"mask_ratio": model.mask_ratio, "mask_strategy": model.drawn_strategy}
        config = FlipConfig.from_pretrained(model.model_name_or_path, **masking)
    else:
        towers = model.tower_configs()
        config = FlipConfig(
            text_config=towers["text_config"],
            vision_config=towers["vision_config"],
            projection_dim=model.projection_dim,
            logit_scale_init_value=model.logit_scale_init_value,
        )
        config.mask_ratio, config.mask_strategy = model.mask_ratio, model.drawn_strategy
    sizes = new_sizes(model, config)
    check_masks(model, config.get_text_config(), (sizes["image_size"] // sizes["patch_size"]) ** 2)
    return config


def make_model(model: ModelArguments, config: FlipConfig, tokenizer: PreTrainedTokenizerBase) -> FlipModel:
    """The model, in training mode; a new one's token table has the tokenizer's size unless the recipe gives one.

    Raises:
        ValueError: the tokenizer has more tokens than the table.
    """
    text_config = config.get_text_config()
    if model.model_name_or_path is None:
        if "vocab_size" not in model.tower_configs()["text_config"]:
            text_config.vocab_size = len(tokenizer)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text_config, name, getattr(tokenizer, name))
    check_vocabulary(tokenizer, text_config.vocab_size)
    if model.model_name_or_path is None:
        flip = FlipModel._from_config(config, attn_implementation=model.attn_implementation)
    else:
        flip = FlipModel.from_pretrained(
            model.model_name_or_path, config=config, attn_implementation=model.attn_implementation, dtype=torch.float32
        )
        flip.resize_patch_embeddings(**new_sizes(model, config))
    if model.gradient_checkpointing:
        flip.gradient_checkpointing_enable()
    return flip.train()


def make_processor(config: FlipConfig, tokenizer: PreTrainedTokenizerBase, saved: str | None = None) -> FlipProcessor:
    """The processor saved beside the weights: what users' images and texts go through.

    The PIL backend is written down; where torchvision is installed, Transformers picks its own at loading.

    Args:
        config: gives the image size.
        tokenizer: the text's side.
        saved: a model folder or Hub id whose image processor is taken over, statistics and all but the image size.

    Raises:
        ValueError: there is none.
    """
    size = config.vision_config.image_size  # pyright: ignore
    if saved is not None:
        try:
            image_processor = AutoImageProcessor.from_pretrained(saved)
        except OSError as error:
            raise ValueError(f"{saved!r} has no image processor; save one beside the model.") from error
        return FlipProcessor(resized_image_processor(image_processor, size), tokenizer)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return FlipProcessor(image_processor, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def open_training_data(data: DataArguments) -> list[Source]:
    """The training data's sources; see [`open_source`] for what it raises.

    Several shard files of one kind without weights are one source: a shell's reading of an unquoted `*.tar`.
    """
    names = data.train_data or []  # its arguments require it
    options = (data.train_config or [None], data.image_column or [None], data.caption_column or [None])
    one_kind = any(all(name.endswith(extension) for name in names) for extension in SHARD_EXTENSIONS)
    groups = [names] if len(names) > 1 and one_kind and data.train_weights is None else names
    configs, images, captions = (values * len(groups) if len(values) == 1 else values for values in options)
    return [
        open_source(name, split=data.train_split, config=config, image_column=image, target_column=caption)
        for name, config, image, caption in zip(groups, configs, images, captions, strict=False)
    ]


def open_evaluation_data(data: DataArguments) -> tuple[Source, tuple[str, ...]] | None:
    """The evaluation data's source and class names; the embedded data's own test where nothing else is named.

    Raises:
        ValueError: the class names are not known, or are fewer than the labels.
    """
    name = data.eval_data or (EMBEDDED if data.train_data == [EMBEDDED] else None)
    if name is None:
        return None
    source = open_source(
        name,
        split=data.eval_split,
        config=data.eval_config,
        image_column=data.eval_image_column,
        target_column=data.label_column,
        kind="label",
    )
    if data.class_names is not None:
        lines = Path(data.class_names).read_text(encoding="utf-8").splitlines()
        return source, tuple(line.strip() for line in lines if line.strip())
    if source.class_names is None:
        raise ValueError(
            f"The data set {name!r} does not name its classes in {source.target_column!r}. Give --class_names FILE, "
            "one name a line in the order of the labels."
        )
    return source, source.class_names


def templates(data: DataArguments) -> list[str]:
    """The prompts of the evaluation; the embedded data's own where none were given."""
    embedded = data.eval_data in (None, EMBEDDED) and data.templates == [GENERIC_TEMPLATE]
    return list(TEMPLATES) if embedded else data.templates


def make_train_loader(
    arguments: Arguments,
    sources: list[Source],
    processor: FlipProcessor,
    accelerator: Accelerator,
    config: FlipConfig,
    micro_batches: tuple[int, int],
    states: list[dict] | None,
) -> TrainLoader:
    """The training batches of this process, from where `states`, one of each process, stopped.

    `micro_batches` are the samples of one and how many make a step.
    """
    data, tokenizer = arguments.data, processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    text_config, text_mask_ratio = config.get_text_config(), arguments.model.text_mask_ratio
    plan = PatchPlan(
        TrainTransform(crop_area=(data.crop_area[0], data.crop_area[1]), flip=data.flip),
        partial(cut_patches, patch_size=config.vision_config.patch_size),  # pyright: ignore
        Views(arguments.model.mask_strategy, config.vision_config, plan_phases(arguments)),
        micro_batches[1],
    )
    stream = TrainStream(
        sources,
        plan,
        Tokenize(tokenizer, text_config, text_mask_ratio),
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
        ClassIndex(class_names),
        batch_size=data.eval_batch_size,
        process=Reader(accelerator.process_index, accelerator.num_processes),
    )
    return make_loader(stream, num_workers=num_workers(data))
