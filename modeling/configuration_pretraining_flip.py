"""Configuration of pre-training with a contrastive and MAE's reconstruction loss: a FlipModel and a decoder."""

# No `from __future__ import annotations` here, as in the other published files.
from typing import TYPE_CHECKING, Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_flip import FlipConfig, build_part, check_heads, check_numbers, wrap_part

if TYPE_CHECKING:
    from .configuration_flip import Part

Objective = Literal["contrastive", "reconstruction", "both"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@strict
class FlipDecoderConfig(PreTrainedConfig):
    r"""Configuration of the decoder that reconstructs dropped patches; the defaults are MAE's (He et al. 2022).

    Args:
        hidden_size: width of the Transformer.
        intermediate_size: width of the MLP's hidden layer.
        num_hidden_layers: number of Transformer blocks; MAE's ablation finds 1 as good for fine-tuning.
        num_attention_heads: number of attention heads; must divide `hidden_size`.
        hidden_act: activation of the MLP.
        layer_norm_eps: epsilon of all LayerNorms.
        attention_dropout: dropout on attention weights.
        initializer_range: standard deviation of the normal initialiser (mask token).
        initializer_factor: multiplies every random initialiser.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value has the wrong type or is out of range.
    """

    model_type = "flip_decoder"
    base_config_key = "decoder_config"

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: int | float = 0.0
    initializer_range: float = 0.02
    initializer_factor: int | float = 1.0

    def validate_architecture(self):
        """Checks that the fields fit together; part of `@strict`.

        Raises:
            ValueError: they do not; the message names the fields.
        """
        check_numbers(self)
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.hidden_size % 4 != 0:
            raise ValueError(f"2D sin-cos positions need a hidden_size divisible by 4, got {self.hidden_size}.")


@strict
class FlipPreTrainingConfig(PreTrainedConfig):
    r"""Configuration of a [`FlipForPreTraining`].

    Args:
        flip_config: a [`FlipConfig`] or a dict of its fields. Its `mask_ratio` applies to both losses.
        decoder_config: a [`FlipDecoderConfig`] or a dict of its fields.
        objective: what to train on: `"contrastive"` (FLIP), `"reconstruction"` (MAE) or `"both"` (FLIP, table 1f).
        reconstruction_weight: weight of the reconstruction loss where it is added to the contrastive one. The paper
            does not give it.
        norm_pixel_target: whether the target is each patch's pixels minus their mean, divided by their standard
            deviation, as in MAE's better models and in FLIP's table 1f.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value has the wrong type or is out of range.
    """

    model_type = "flip_pretraining"
    # Transformers 5.17 reads `sub_configs`, 5.23 `sub_configs_defaults`; both are needed until 5.17 is dropped.
    sub_configs_defaults = {  # pyright: ignore[reportAssignmentType]
        "flip_config": FlipConfig,
        "decoder_config": FlipDecoderConfig,
    }
    sub_configs = sub_configs_defaults  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    if TYPE_CHECKING:
        flip_config: Part[FlipConfig] = Part()
        decoder_config: Part[FlipDecoderConfig] = Part()
    else:
        flip_config: dict | FlipConfig | None = None
        decoder_config: dict | FlipDecoderConfig | None = None
    objective: Objective = "both"
    reconstruction_weight: int | float = 1.0
    norm_pixel_target: bool = True

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the fields from a folder or the Hub; a FlipModel's become the `flip_config` of a whole.

        So a [`FlipForPreTraining`] can start from a FlipModel, with a new decoder.
        """
        fields, unused = super().get_config_dict(*args, **kwargs)
        if fields.get("model_type") == FlipConfig.model_type:
            fields = wrap_part(fields, cls, "flip_config")
        return fields, unused

    def __post_init__(self, **kwargs):
        self.flip_config = build_part(self.flip_config, FlipConfig)
        self.decoder_config = build_part(self.decoder_config, FlipDecoderConfig)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks the fields' values; part of `@strict`.

        Raises:
            ValueError: one is out of range; the message names it.
        """
        check_numbers(self)

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the fields to save, without the private path of the inner FlipModel."""
        fields = super().to_diff_dict()
        fields["flip_config"].pop("_name_or_path", None)
        return fields


__all__ = ["FlipDecoderConfig", "FlipPreTrainingConfig"]
