"""Converts folders of Transformers' CLIPModel to FLIP folders and back, with `FlipModel.from_clip` and `to_clip`."""

from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.folder import Converted, card_data
from flip_hf.conversion.pretrained import load_pretrained, local_folder, read_config
from flip_hf.conversion.processors import find_image_processor, find_tokenizer, join
from flip_hf.conversion.sizes import check_mask_ratio, configuring
from flip_hf.modeling import FlipConfig, FlipModel


def convert_from_clip(source: str, *, mask_ratio: float = 0.5) -> Converted:
    """Converts a CLIPModel, given by folder or Hub id, to a complete FLIP folder.

    Args:
        source: folder or Hub id; safetensors only.
        mask_ratio: fraction of the patches dropped in training.

    Raises:
        ConversionError: the source is not a complete CLIPModel with finite weights, or a processor's files are damaged.
    """
    check_mask_ratio(mask_ratio)
    clip = load_clip(source)
    with configuring(source):
        flip = FlipModel.from_clip(clip, mask_ratio=mask_ratio)
    text = flip.config.text_config
    return Converted(
        model=flip,
        processor=join(find_image_processor(source), find_tokenizer(source, text.max_position_embeddings)),
        title="A CLIPModel as a FlipModel",
        about=(
            "Converted from Transformers' `CLIPModel` with `flip-hf convert`: the same numbers on whole "
            f"images; in training, {mask_ratio:.0%} of the patches are dropped. The licence is that of the source."
        ),
        data=card_data(source),
    )


def load_clip(source: str) -> CLIPModel:
    """Loads the complete CLIPModel of a folder or Hub id, safetensors only.

    Raises:
        ConversionError: the source is something else, or its weights are incomplete, damaged or not finite.
    """
    folder = local_folder(source)
    return load_pretrained(CLIPModel, folder, read_config(folder, CLIPConfig, model="CLIPModel"))


def load_flip(source: str) -> FlipModel:
    """Loads the complete FlipModel of a folder or Hub id, to be written in another format.

    Raises:
        ConversionError: the source is something else, or its weights are incomplete, damaged or not finite.
    """
    folder = local_folder(source)
    return load_pretrained(FlipModel, folder, read_config(folder, FlipConfig, model="FlipModel"))


def convert_to_clip(source: str) -> Converted:
    """Converts a FLIP folder to a stock CLIPModel, which needs none of our code.

    Raises:
        ConversionError: CLIPModel does not support the architecture, and the message names the options in the way; or
            the source is not a complete FlipModel, see [`load_flip`].
    """
    flip = load_flip(source)
    try:
        clip = flip.to_clip()
    except ValueError as error:
        raise ConversionError(f"{source}: {error}") from error
    image_processor = find_image_processor(source)
    if image_processor is not None and not type(image_processor).__module__.startswith("transformers."):
        raise ConversionError(
            f"{source} has an image processor that Transformers does not have, {type(image_processor).__name__}."
        )
    tokenizer = find_tokenizer(source, flip.config.text_config.max_position_embeddings)
    return Converted(
        model=clip,
        processor=join(image_processor, tokenizer, CLIPProcessor),
        title="A FlipModel as a CLIPModel",
        about="Exported with `flip-hf convert` of flip_hf; a stock `CLIPModel`, to be used like any other.",
        data=card_data(source),
    )
