"""The encoder of Transformers' ViTMAE to a Flip vision tower: FLIP that starts from masked autoencoding."""

from typing import Any

from transformers import AutoConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel, ViTMAEPreTrainedModel

from flip_hf.conversion.folder import Converted, card_data
from flip_hf.conversion.processors import find_image_processor
from flip_hf.conversion.tables import FLAT, ROWS, ConversionError, Entry, blocks, load, shapes_of, to_ours
from flip_hf.modeling import FlipVisionConfig, FlipVisionModel

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


def mae_to_vision_tower(mae: ViTMAEPreTrainedModel, mask_ratio: float = 0.5) -> FlipVisionModel:
    """The encoder of a ViTMAE as a Flip vision tower; on the same visible patches it gives the same tokens.

    Args:
        mae: a `ViTMAEModel`, or a `ViTMAEForPreTraining`, whose decoder is left behind.
        mask_ratio: fraction of the patches dropped in FLIP's training.

    Raises:
        ConversionError: the attention has no biases, or the weights do not fit the configuration.
    """
    if not mae.config.qkv_bias:
        raise ConversionError("This ViTMAE has no biases in its attention (qkv_bias=False); FLIP's towers have them.")
    encoder: Any = mae.vit if isinstance(mae, ViTMAEForPreTraining) else mae
    config = FlipVisionConfig(
        **{name: getattr(mae.config, name) for name in _FIELDS},
        attention_dropout=mae.config.attention_probs_dropout_prob,
        mask_ratio=mask_ratio,
    )
    entries = [*EMBEDDINGS, *blocks(BLOCK, "layers.{}.", "encoder.layers.{}.", config.num_hidden_layers), *LAST_NORM]
    tensors = to_ours(entries, encoder.state_dict(), shapes_of(FlipVisionModel, config), what="The ViTMAE")
    # Copies: the tower does not share its weights with the model that it came from.
    return load(FlipVisionModel, config, {name: tensor.clone() for name, tensor in tensors.items()})


def convert_from_mae(source: str, *, mask_ratio: float = 0.5) -> Converted:
    """A ViTMAE's folder or Hub id as a folder with a Flip vision tower, for `FlipVisionModel.from_pretrained`.

    Raises:
        ConversionError: it is another architecture, or tensors are missing.
    """
    config = AutoConfig.from_pretrained(source)
    if not isinstance(config, ViTMAEConfig):
        raise ConversionError(f"{source} is a checkpoint of type {config.model_type!r}, not a ViTMAE.")
    loaded: Any = ViTMAEModel.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    mae, report = loaded
    surplus = [name for name in report["unexpected_keys"] if not name.startswith("decoder.")]
    if report["missing_keys"] or surplus:
        raise ConversionError(
            f"{source} is no complete ViTMAE: missing {sorted(report['missing_keys'])}, left over {sorted(surplus)}."
        )
    return Converted(
        model=mae_to_vision_tower(mae, mask_ratio),
        processor=find_image_processor(source),
        title="A ViTMAE encoder as a Flip vision tower",
        about="Converted with `scripts/convert.py` of flip_hf; the decoder is left behind. The source's licence holds.",
        data=card_data(source),
    )
