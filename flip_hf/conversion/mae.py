"""Converts Transformers' ViTMAE to a FLIP vision tower or, with its decoder, to a model for further pre-training.

FLIP then starts from masked autoencoding.
"""

from collections.abc import Iterable
from typing import Any

from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel, ViTMAEPreTrainedModel

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.folder import Converted, card_data
from flip_hf.conversion.pretrained import load_pretrained, local_folder, read_config
from flip_hf.conversion.processors import find_image_processor
from flip_hf.conversion.sizes import check_mask_ratio, configuring
from flip_hf.conversion.tables import FLAT, ROWS, ConversionError, Entry, Layout, blocks, load, shapes_of, to_ours
from flip_hf.modeling import FlipForPreTraining, FlipPreTrainingConfig, FlipVisionConfig, FlipVisionModel

_LINEAR = ("weight", "bias")
EMBEDDINGS = [
    Entry("embeddings.cls_token", "embeddings.class_embedding", FLAT),
    Entry("embeddings.position_embeddings", "embeddings.position_embedding.weight", ROWS),
    Entry("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embedding.weight"),
    Entry("embeddings.patch_embeddings.projection.bias", "embeddings.patch_embedding.bias"),
]
BLOCK = [
    Entry(f"{theirs}.{kind}", f"{ours}.{kind}")
    for theirs, ours in (
        ("layernorm_before", "layer_norm1"),
        ("layernorm_after", "layer_norm2"),
        ("attention.q_proj", "self_attn.q_proj"),
        ("attention.k_proj", "self_attn.k_proj"),
        ("attention.v_proj", "self_attn.v_proj"),
        ("attention.o_proj", "self_attn.out_proj"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    )
    for kind in _LINEAR
]
LAST_NORM = [Entry(f"layernorm.{kind}", f"post_layernorm.{kind}") for kind in _LINEAR]
DECODER = [
    Entry("mask_token", "mask_token", FLAT),
    Entry("decoder_pos_embed", "position_embedding.weight", ROWS),
    *[
        Entry(f"{theirs}.{kind}", f"{ours}.{kind}")
        for theirs, ours in (("decoder_embed", "token_projection"), ("decoder_norm", "layer_norm"))
        for kind in _LINEAR
    ],
]
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "initializer_range",
)


def vision_fields(config: ViTMAEConfig) -> JsonObject:
    """Returns the fields of the FLIP vision tower, without its mask ratio.

    Raises:
        ConversionError: the attention has no biases.
    """
    if not config.qkv_bias:
        raise ConversionError("This ViTMAE has no biases in its attention (qkv_bias=False); FLIP's towers have them.")
    fields = {name: getattr(config, name) for name in _FIELDS}
    return {**fields, "attention_dropout": config.attention_probs_dropout_prob}


def _encoder_entries(config: ViTMAEConfig) -> list[Entry]:
    count = config.num_hidden_layers
    return [*EMBEDDINGS, *blocks(BLOCK, "layers.{}.", "encoder.layers.{}.", count), *LAST_NORM]


def _decoder_entries(config: Any) -> list[Entry]:
    patch_size = config.patch_size
    channels = config.num_channels
    # A patch's pixels are (P, P, C) in ViTMAE and (C, P, P) here, as in a convolution's kernel.
    pixels = Layout(
        lambda t: (t.unflatten(0, (patch_size, patch_size, channels)).movedim(2, 0).flatten(0, 2),),
        lambda t: t.unflatten(0, (channels, patch_size, patch_size)).movedim(0, 2).flatten(0, 2),
    )
    prediction = [Entry(f"decoder_pred.{kind}", f"pixel_projection.{kind}", pixels) for kind in _LINEAR]
    return [*DECODER, *blocks(BLOCK, "decoder_layers.{}.", "layers.{}.", config.decoder_num_hidden_layers), *prediction]


def _within(theirs: str, ours: str, entries: Iterable[Entry]) -> list[Entry]:
    """Returns the entries with prefixed names."""
    return [Entry(theirs + e.theirs, tuple(ours + name for name in e.targets), e.layout) for e in entries]


def mae_to_vision_tower(mae: ViTMAEPreTrainedModel, mask_ratio: float = 0.5) -> FlipVisionModel:
    """Converts the encoder of a ViTMAE to a FLIP vision tower with the same tokens on the same visible patches.

    Args:
        mae: a `ViTMAEModel`, or a `ViTMAEForPreTraining`, whose decoder is dropped.
        mask_ratio: fraction of the patches dropped in FLIP's training.

    Raises:
        ConversionError: the attention has no biases, or the weights do not fit the configuration.
    """
    encoder: Any = mae.vit if isinstance(mae, ViTMAEForPreTraining) else mae
    config = FlipVisionConfig(**vision_fields(mae.config), mask_ratio=mask_ratio)
    tensors = to_ours(
        _encoder_entries(mae.config), encoder.state_dict(), shapes_of(FlipVisionModel, config), what="The ViTMAE"
    )
    # Copies, so that the tower does not share weights with its source.
    return load(FlipVisionModel, config, {name: tensor.clone() for name, tensor in tensors.items()})


def mae_to_pretraining(
    mae: ViTMAEForPreTraining, mask_ratio: float | None = None, **flip_fields: Any
) -> FlipForPreTraining:
    """Converts a ViTMAE with its decoder to a model for further training with one of its two losses or both.

    On the same visible patches it predicts the same pixels, in the layout of `cut_patches`, and has the same loss.

    Args:
        mae: encoder and decoder.
        mask_ratio: fraction of the patches dropped in training; ViTMAE's by default.
        flip_fields: fields of [`FlipConfig`], such as `text_config`. The text tower, the projections and the
            temperature are initialised as in a new model.

    Returns:
        The model in evaluation mode.

    Raises:
        ConversionError: the attention has no biases, or the weights do not fit the configuration.
    """
    theirs = mae.config
    ratio = theirs.mask_ratio if mask_ratio is None else mask_ratio
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = FlipPreTrainingConfig(
        flip_config={**flip_fields, "vision_config": {**vision_fields(theirs), "mask_ratio": ratio}},
        decoder_config={
            **{name: getattr(theirs, f"decoder_{name}") for name in sizes},
            **{name: getattr(theirs, name) for name in ("hidden_act", "layer_norm_eps", "initializer_range")},
            "attention_dropout": theirs.attention_probs_dropout_prob,
        },
        norm_pixel_target=theirs.norm_pix_loss,
    )
    parts = ("flip.vision_model.", "decoder.")
    shapes = {name: s for name, s in shapes_of(FlipForPreTraining, config).items() if name.startswith(parts)}
    entries = _within("vit.", parts[0], _encoder_entries(theirs)) + _within(
        "decoder.", parts[1], _decoder_entries(theirs)
    )
    tensors = to_ours(entries, mae.state_dict(), shapes, what="The ViTMAE")
    model = FlipForPreTraining._from_config(config, dtype=mae.dtype)
    model.load_state_dict(tensors, strict=False)  # these parts are complete, as to_ours has compared the names
    return model.eval()


def convert_from_mae(source: str, *, mask_ratio: float = 0.5, decoder: bool = False, **flip_fields: Any) -> Converted:
    """Converts a ViTMAE to a folder with a FLIP vision tower, for `FlipVisionModel.from_pretrained`.

    Args:
        source: folder or Hub id.
        mask_ratio: fraction of the patches dropped in FLIP's training.
        decoder: keep the decoder, too, for `FlipForPreTraining.from_pretrained`; the text tower is then a new one.
        flip_fields: with the decoder, see [`mae_to_pretraining`].

    Raises:
        ConversionError: the source has another architecture, or tensors are missing.
    """
    check_mask_ratio(mask_ratio)
    folder = local_folder(source)
    config = read_config(folder, ViTMAEConfig, model="ViTMAE")
    model_class = ViTMAEForPreTraining if decoder else ViTMAEModel
    may_stay = () if decoder else ("decoder.",)
    mae = load_pretrained(model_class, folder, config, may_stay=may_stay)
    to_flip: Any = mae_to_pretraining if decoder else mae_to_vision_tower
    if decoder:
        title = "A ViTMAE and its decoder as a FLIP model"
        note = "the text tower is a new one, not trained"
    else:
        title = "A ViTMAE encoder as a FLIP vision tower"
        note = "the decoder is left behind"
    with configuring(source):
        model = to_flip(mae, mask_ratio, **flip_fields)
    return Converted(
        model=model,
        processor=find_image_processor(source),
        title=title,
        about=f"Converted with `flip-hf convert`; {note}. The source's licence holds.",
        data=card_data(source),
    )
