"""The model, tokenizer and processor that a run starts with, checked before anything else."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPConfig, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin, SiglipConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flip_hf.console.endings import one_line
from flip_hf.console.fields import OptionError
from flip_hf.console.json_types import JsonObject
from flip_hf.console.loading import load_complete, loading
from flip_hf.conversion.clip import load_clip
from flip_hf.conversion.pretrained import local_folder
from flip_hf.conversion.sentence_pieces import SIGLIP_FILES, has_siglip_tokenizer, read_siglip_tokenizer
from flip_hf.conversion.siglip import fit_padding, load_siglip
from flip_hf.data.captions import prompts_of
from flip_hf.data.coverage import measure_coverage
from flip_hf.data.decode import RefusedSample
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.data.sources import Source
from flip_hf.data.tokenization import (
    check_pooling,
    check_vocabulary,
    fit_tokenizer,
    load_tokenizer,
    train_wordpiece,
)
from flip_hf.modeling import (
    FlipConfig,
    FlipDecoderConfig,
    FlipForPreTraining,
    FlipModel,
    FlipPreTrainingConfig,
    FlipProcessor,
    FlipTextConfig,
    FlipVisionConfig,
)
from flip_hf.modeling.clip_flip import flip_config_from_clip
from flip_hf.modeling.configuration_flip import LOGIT_SCALE_INIT
from flip_hf.modeling.siglip_flip import NAFLEX, NAFLEX_REFUSED, flip_config_from_siglip
from flip_hf.training.arguments import IMAGE_MEAN, IMAGE_STD, Arguments, ModelArguments, ObjectiveArguments
from flip_hf.training.donor import find_image_processor, load_tower, tower_fields
from flip_hf.training.encoder import flip_of, recompute_activations
from flip_hf.training.freezing import check_depth, freeze, read_frozen
from flip_hf.training.logit_bias import SIGMOID_LOGIT_SCALE_INIT, Loss, fit_bias, set_loss
from flip_hf.training.lora import add_adapters, check_ranks, read_ranks
from flip_hf.training.masks import check_masks
from flip_hf.training.memory_limit import check_memory
from flip_hf.training.resizing import new_sizes, resized_image_processor
from flip_hf.training.speed_ups import speed_up

# Enough captions to measure what a tokenizer loses.
MEASURED_CAPTIONS = 1000
# Model types that `--model_name_or_path` takes as they are.
STOCK = {CLIPConfig.model_type: "CLIPModel", SiglipConfig.model_type: "SiglipModel"}
_FLIP_TYPES = (FlipConfig.model_type, FlipPreTrainingConfig.model_type)
# The text tower of a new model that only reconstructs: nothing trains it, so it is tiny.
UNUSED_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 16,
}


def _read_captions(sources: list[Source], limit: int) -> Iterator[str]:
    rng = np.random.default_rng(0)
    for source in sources:
        if source.captions_from_labels:  # all that there can be, known without reading a row
            yield from itertools.islice(prompts_of(source.captions), limit // len(sources))
            continue
        for row in itertools.islice(source.rows(), limit // len(sources)):
            try:
                yield source.caption(row, rng)
            except RefusedSample:
                continue  # counted when training reads it


def make_tokenizer(arguments: Arguments, sources: list[Source], context_length: int) -> PreTrainedTokenizerBase:
    """Makes the run's tokenizer: the named one, else that of the starting model, else one learned from the captions.

    Prints what it loses of the first captions. Remote data are not read just for that.

    Raises:
        ValueError: it cannot be loaded; the message names it and the fix.
    """
    data = arguments.data
    saved = arguments.model.model_name_or_path
    name = data.tokenizer or saved
    if name is None:
        first: list[str] = []
        captions = _keep_first(_read_captions(sources, data.tokenizer_samples), first)
        tokenizer = train_wordpiece(captions, vocab_size=data.tokenizer_vocab_size, context_length=context_length)
    else:
        special_tokens = data.tokenizer is None or data.special_tokens
        with loading(name, "tokenizer"):
            folder = _siglip_tokenizer(arguments, name)
            options: dict[str, Any] = {"context_length": context_length, "special_tokens": special_tokens}
            if folder is None:
                tokenizer = load_tokenizer(name, **options)
            else:
                tokenizer = fit_tokenizer(read_siglip_tokenizer(folder), name, **options)
        is_local = not any(source.shards.remote for source in sources)
        first = list(_read_captions(sources, MEASURED_CAPTIONS)) if is_local else []
    if first:
        print(f"Tokenizer {name or 'learned'}: {len(tokenizer):,} tokens; {measure_coverage(tokenizer, first)}.")
    return tokenizer


def _siglip_tokenizer(arguments: Arguments, name: str) -> Path | None:
    """Returns the folder of the named tokenizer if it is SigLIP 1's, which Transformers has no fast class for."""
    starts_there = arguments.data.tokenizer is None and stock_class(arguments.model) == "SiglipModel"
    if not starts_there and not Path(name).is_dir():
        return None
    folder = local_folder(name, SIGLIP_FILES)
    return folder if has_siglip_tokenizer(folder) else None


def _keep_first(captions: Iterator[str], kept: list[str]) -> Iterator[str]:
    """Yields captions, and adds the first [`MEASURED_CAPTIONS`] to a list."""
    for caption in captions:
        if len(kept) < MEASURED_CAPTIONS:
            kept.append(caption)
        yield caption


# -- the model ---------------------------------------------------------------------------------------------------------


def make_config(model: ModelArguments, objective: ObjectiveArguments | None = None) -> FlipConfig:
    """Makes the configuration of the run's model, without a decoder.

    Raises:
        ValueError: a field has the wrong type, fields do not fit together, or there is no model or vision tower to
            start with.
    """
    if objective is not None and objective.reconstructs:
        _check_fields("decoder_config", FlipDecoderConfig, objective.decoder_fields())
    loss = None if objective is None else objective.loss
    if model.model_name_or_path is not None:
        config = saved_config(model)
    else:
        towers = model.tower_configs()
        tower = tower_fields(model.init_vision_from) if model.init_vision_from is not None else {}
        unused = UNUSED_TEXT if objective is not None and not objective.contrasts else {}
        text_config = towers["text_config"] or unused
        vision_config = {**tower, **towers["vision_config"]}
        _check_fields("text_config", FlipTextConfig, text_config)
        _check_fields("vision_config", FlipVisionConfig, vision_config)
        config = FlipConfig(
            text_config=text_config,
            vision_config=vision_config,
            projection_dim=model.projection_dim,
            logit_scale_init_value=_start_of_scale(model, loss),
        )
        config.mask_ratio = model.mask_ratio
        config.mask_strategy = model.drawn_strategy
    set_loss(config, loss)
    sizes = new_sizes(model, config)
    check_masks(model, config.text_config, (sizes["image_size"] // sizes["patch_size"]) ** 2)
    check_depth(read_frozen(model.freeze), config)
    check_ranks(read_ranks(model.lora), config)
    return config


def _start_of_scale(model: ModelArguments, loss: Loss | None) -> float:
    """Returns the start of a new model's logarithm of the inverse temperature; the loss's own if not configured."""
    if model.logit_scale_init_value is not None:
        return model.logit_scale_init_value
    return SIGMOID_LOGIT_SCALE_INIT if loss == "sigmoid" else LOGIT_SCALE_INIT


def _check_fields(option: str, config_class: type[PreTrainedConfig], fields: JsonObject) -> None:
    """Validates fields by making a configuration of them alone, so that an error can name the option.

    Raises:
        OptionError: a field has the wrong type or is out of range, or fields do not fit together.
    """
    try:
        config_class(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise OptionError(f"--{option}: {one_line(error)}") from error


def saved_config(model: ModelArguments) -> FlipConfig:
    """Reads the configuration of the starting model, with the run's masks and its own loss.

    Raises:
        ModelUnreadable: it cannot be read.
        ValueError: it is a model of another kind.
    """
    name = str(model.model_name_or_path)
    masking = {"mask_ratio": model.mask_ratio, "mask_strategy": model.drawn_strategy}
    with loading(name):
        kind = _kind_of(name)
        if kind in _FLIP_TYPES:
            return FlipConfig.from_pretrained(name, **masking)
    if kind in STOCK:
        with loading(name):
            config = _stock_config(name, kind, model.mask_ratio)
        config.mask_strategy = model.drawn_strategy
        return config
    if kind == NAFLEX:
        raise ValueError(f"--model_name_or_path: {NAFLEX_REFUSED.format(name)}")
    raise ValueError(
        f"--model_name_or_path {name} is a model of type {kind!r}, neither a FLIP nor a CLIP nor a SigLIP. `flip-hf "
        "convert` converts some others."
    )


def _stock_config(name: str, kind: str, mask_ratio: float) -> FlipConfig:
    if kind == CLIPConfig.model_type:
        return flip_config_from_clip(CLIPConfig.from_pretrained(name), mask_ratio)
    return flip_config_from_siglip(SiglipConfig.from_pretrained(name), mask_ratio)


def _kind_of(name: str) -> str | None:
    """Reads the type of a saved model."""
    return PreTrainedConfig.get_config_dict(name)[0].get("model_type")


def stock_class(model: ModelArguments) -> str | None:
    """Returns the name of the class of Transformers' own that the run starts from and makes a FlipModel of, or None."""
    return None if model.model_name_or_path is None else STOCK.get(str(_kind_of(model.model_name_or_path)))


def make_model(
    arguments: Arguments, config: FlipConfig, tokenizer: PreTrainedTokenizerBase | None
) -> FlipModel | FlipForPreTraining:
    """Makes the model, in training mode, with a decoder where the objective needs one.

    Raises:
        ValueError: the tokenizer has more tokens than the model's table, the vision tower or decoder to start with has
            another shape or is damaged, or the model does not fit into this machine's memory.
    """
    model = arguments.model
    objective = arguments.objective
    if tokenizer is not None:
        _fit_vocabulary(model, config.text_config, tokenizer)
    check_memory(config)
    if model.model_name_or_path is None:
        flip = FlipModel._from_config(config, attn_implementation=model.attn_implementation)
        if model.init_vision_from is not None:
            load_tower(flip, model.init_vision_from)
        made: FlipModel | FlipForPreTraining = flip
    else:
        made = _load(arguments, saved_config(model), tokenizer)
        fit_bias(flip_of(made), config)
    flip = flip_of(made)
    sizes = new_sizes(model, config)
    if sizes != {name: getattr(config.vision_config, name) for name in sizes}:
        flip.resize_patch_embeddings(**sizes)
    if objective.reconstructs and isinstance(made, FlipModel):
        made = FlipForPreTraining.from_flip(flip, decoder_config=objective.decoder_fields())
    if isinstance(made, FlipForPreTraining):
        for name in ("objective", "reconstruction_weight", "norm_pixel_target"):
            setattr(made.config, name, getattr(objective, name))
    if not objective.contrasts:
        _freeze_texts(flip)
    ranks = read_ranks(model.lora)
    whole: dict[str, int | None] = dict.fromkeys(ranks)  # a tower with adapters keeps its own weights
    freeze(flip, {**read_frozen(model.freeze), **whole}, new_projection=model.init_vision_from is not None)
    add_adapters(flip, ranks)
    if model.gradient_checkpointing:
        recompute_activations(made, {"use_reentrant": False})
        # Transformers makes the embeddings require a gradient, for the other kind: frozen blocks would keep a graph.
        made.disable_input_require_grads()
    speed_up(made, arguments.optimization.speed_ups or ())
    return made.train()


def _fit_vocabulary(model: ModelArguments, text_config: FlipTextConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a new model's token table the tokenizer's size unless the recipe sets one, and checks that they fit."""
    if model.model_name_or_path is None:
        if "vocab_size" not in model.tower_configs()["text_config"]:
            text_config.vocab_size = len(tokenizer)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text_config, name, getattr(tokenizer, name))
    check_vocabulary(tokenizer, text_config.vocab_size)
    check_pooling(tokenizer, text_config)


def _load_stock(name: str, config: FlipConfig, tokenizer: PreTrainedTokenizerBase | None, attention: str) -> FlipModel:
    """Makes a FlipModel of this configuration with the weights of a CLIPModel or a SiglipModel, in float32.

    Raises:
        ConversionError: the weights are damaged, or do not match the configuration.
    """
    made = FlipModel._from_config(config, attn_implementation=attention)
    if _kind_of(name) == CLIPConfig.model_type:
        flip = FlipModel.from_clip(load_clip(name))
    else:
        flip = FlipModel.from_siglip(load_siglip(name))
        if tokenizer is not None:
            fit_padding(made.config.text_config, tokenizer)
    made.load_state_dict(flip.state_dict())
    return made


def _load(
    arguments: Arguments, config: FlipConfig, tokenizer: PreTrainedTokenizerBase | None
) -> FlipModel | FlipForPreTraining:
    """Loads the saved model, of this configuration, with its decoder where it has one and the objective needs it.

    Raises:
        ValueError: options ask for a decoder of another shape.
        ModelUnreadable: its weights are damaged, or do not match its configuration.
    """
    model = arguments.model
    name = str(arguments.model.model_name_or_path)
    if stock_class(model) is not None:
        return _load_stock(name, config, tokenizer, model.attn_implementation)
    options = {"attn_implementation": model.attn_implementation, "dtype": torch.float32}
    with loading(name):
        saved = PreTrainedConfig.get_config_dict(name)[0]
    if not arguments.objective.reconstructs or saved.get("model_type") != FlipPreTrainingConfig.model_type:
        return load_complete(FlipModel, name, config=config, **options)
    new_shape = [n for n in ("decoder_config", "image_size", "patch_size") if _given(arguments, n)]
    if new_shape:
        raise ValueError(
            f"{name} has a decoder, made for its own images and patches: leave out --{new_shape[0]}, or start from its "
            f"vision tower alone with --init_vision_from {name}."
        )
    with loading(name):
        whole = FlipPreTrainingConfig.from_pretrained(name, flip_config=config)
    return load_complete(FlipForPreTraining, name, config=whole, **options)


def _given(arguments: Arguments, name: str) -> bool:
    return bool(getattr(arguments.model, name, None) or getattr(arguments.objective, name, None))


def _freeze_texts(flip: FlipModel) -> None:
    """Freezes the parts that a reconstruction does not reach: a wrapper would wait for their gradients."""
    for part in (flip.text_model, flip.text_projection, flip.visual_projection, flip.vision_model.head):
        if part is not None:
            part.requires_grad_(False)
    flip.logit_scale.requires_grad_(False)
    if flip.logit_bias is not None:
        flip.logit_bias.requires_grad_(False)


# -- the processor -----------------------------------------------------------------------------------------------------


def make_processor(
    config: FlipConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: ModelArguments | None = None,
    background: Colour = WHITE,
) -> FlipProcessor | BaseImageProcessor:
    """Makes the processor that is saved beside the weights, for users' images and texts.

    It is saved with the PIL backend; where torchvision is installed, Transformers picks its own at loading.

    Args:
        config: gives the image size.
        tokenizer: for the texts; None gives the image processor alone.
        model: tells what the run started from. A model's image processor is kept except for the image size; a vision
            tower's gives mean and standard deviation.
        background: background colour for transparent pictures; saved with the rest, for evaluation.

    Returns:
        A [`FlipProcessor`] or an image processor.

    Raises:
        ValueError: the starting model has no image processor.
    """
    size = config.vision_config.image_size
    if model is not None and model.model_name_or_path is not None:
        image_processor: Any = resized_image_processor(_saved_image_processor(model.model_name_or_path), size)
    else:
        donor = model.init_vision_from if model is not None else None
        found = find_image_processor(donor) if donor is not None else None
        image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=list(IMAGE_MEAN if found is None else found.image_mean),
            image_std=list(IMAGE_STD if found is None else found.image_std),
        )
    image_processor.background = list(background)
    return image_processor if tokenizer is None else FlipProcessor(image_processor, tokenizer)


def _saved_image_processor(name: str) -> BaseImageProcessor:
    with loading(name, "image processor"):
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)


def image_processor_of(processor: ProcessorMixin | BaseImageProcessor) -> Any:
    """Returns the image processor of what [`make_processor`] makes."""
    return getattr(processor, "image_processor", processor)
