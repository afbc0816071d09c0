"""Converts folders of Transformers' SiglipModel to FLIP folders and back, with `FlipModel.from_siglip` and `to_siglip`.

These are SigLIP, and SigLIP 2 at a fixed resolution.
"""

from transformers import PreTrainedTokenizerBase, SiglipConfig, SiglipModel, SiglipProcessor

from flip_hf.conversion.clip import load_flip
from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.files import read_json
from flip_hf.conversion.folder import Converted, card_data
from flip_hf.conversion.pretrained import CONFIG, load_pretrained, local_folder, read_config
from flip_hf.conversion.processors import find_image_processor, find_tokenizer, join
from flip_hf.conversion.sizes import check_mask_ratio, configuring
from flip_hf.modeling import FlipModel, FlipTextConfig
from flip_hf.modeling.siglip_flip import NAFLEX, NAFLEX_REFUSED


def convert_from_siglip(source: str, *, mask_ratio: float = 0.5) -> Converted:
    """Converts a SiglipModel, given by folder or Hub id, to a complete FLIP folder.

    Args:
        source: folder or Hub id; safetensors only.
        mask_ratio: fraction of the patches dropped in training.

    Raises:
        ConversionError: the source is not a complete SiglipModel with finite weights, or a processor's files are
            damaged.
    """
    check_mask_ratio(mask_ratio)
    siglip = load_siglip(source)
    with configuring(source):
        flip = FlipModel.from_siglip(siglip, mask_ratio=mask_ratio)
    text = flip.config.text_config
    tokenizer = find_tokenizer(source, text.max_position_embeddings)
    if tokenizer is not None:
        fit_padding(text, tokenizer)
    return Converted(
        model=flip,
        processor=join(find_image_processor(source), tokenizer),
        title="A SiglipModel as a FlipModel",
        about=(
            "Converted from Transformers' `SiglipModel` with `flip-hf convert`: the same numbers on whole images; in "
            f"training, {mask_ratio:.0%} of the patches are dropped. The licence is that of the source."
        ),
        data=card_data(source),
    )


def fit_padding(text_config: FlipTextConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes a text tower that attends to padding, and its tokenizer, pad alike: on the right, with the same token.

    SigLIP's models read it, and the configurations of SigLIP 2 do not name the token of theirs.
    """
    tokenizer.padding_side = "right"
    padding = tokenizer.pad_token_id
    if isinstance(padding, int):
        text_config.pad_token_id = padding


def load_siglip(source: str) -> SiglipModel:
    """Loads the complete SiglipModel of a folder or Hub id, safetensors only.

    Raises:
        ConversionError: the source is something else, or its weights are incomplete, damaged or not finite.
    """
    folder = local_folder(source)
    if (folder / CONFIG).exists() and read_json(folder / CONFIG, root=folder).get("model_type") == NAFLEX:
        raise ConversionError(NAFLEX_REFUSED.format(source))
    return load_pretrained(SiglipModel, folder, read_config(folder, SiglipConfig, model="SiglipModel"))


def convert_to_siglip(source: str) -> Converted:
    """Converts a FLIP folder to a stock SiglipModel, which needs none of our code.

    Raises:
        ConversionError: SiglipModel does not support the architecture, and the message names the options in the way; or
            the source is not a complete FlipModel, see [`load_flip`][flip_hf.conversion.clip.load_flip].
    """
    flip = load_flip(source)
    try:
        siglip = flip.to_siglip()
    except ValueError as error:
        raise ConversionError(f"{source}: {error}") from error
    tokenizer = find_tokenizer(source, flip.config.text_config.max_position_embeddings)
    if tokenizer is not None:
        tokenizer.model_input_names = ["input_ids"]  # a mask would hide the padding, which SigLIP reads
    return Converted(
        model=siglip,
        processor=join(find_image_processor(source), tokenizer, SiglipProcessor),
        title="A FlipModel as a SiglipModel",
        about="Exported with `flip-hf convert` of flip_hf; a stock `SiglipModel`, to be used like any other.",
        data=card_data(source),
    )
