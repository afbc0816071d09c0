"""Configuration of FLIP models.

FLIP is CLIP trained on images with 50-75 % of their patches dropped (Li et al., "Scaling Language-Image Pre-training
via Masking", CVPR 2023, arXiv 2212.00794). The defaults describe the paper's ViT-B/16 as its released code builds it.
The differences between FLIP and CLIP are switches here, so that one model class expresses both.
"""

# No `from __future__ import annotations` here: `@strict` and `config_class` need real types, not strings.
import copy
import math
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, overload

from huggingface_hub.dataclasses import as_validated_field, strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# The temperature of 0.07 that CLIP and FLIP start from, as the logarithm of its inverse.
LOGIT_SCALE_INIT = math.log(1 / 0.07)

PartT = TypeVar("PartT", bound=PreTrainedConfig)
MaskStrategy = Literal["random", "block", "grid", "gaussian"]

# Bounds of each number in a configuration, far beyond any model, so that a damaged file or a slip is refused before
# memory is allocated. Ratios, and fields that depend on others, are checked separately.
RANGES: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**16),
    "intermediate_size": (1, 2**20),
    "projection_dim": (1, 2**16),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 2**12),
    "max_position_embeddings": (1, 2**20),
    "num_channels": (1, 2**12),
    "image_size": (1, 2**14),
    "patch_size": (1, 2**14),
    "layer_norm_eps": (0, 1),
    "attention_dropout": (0, 1),
    "initializer_range": (0, 1e3),
    "initializer_factor": (0, 1e3),
    "pad_token_id": (0, 2**31),
    "bos_token_id": (0, 2**31),
    "eos_token_id": (0, 2**31),
    "logit_scale_init_value": (-80, 80),  # its exponential fits into float32
    "max_logit_scale": (1, 1e30),
    "logit_bias_init_value": (-1e3, 1e3),
    "reconstruction_weight": (0, 1e6),
}
# Patches of an image, 512 on a side.
MAX_PATCHES = 2**18


if TYPE_CHECKING:

    class Part(Generic[PartT]):
        """Type of a configuration's field that holds another configuration; at run time it is an ordinary field.

        It is given as an object, as a dict of its fields or as None for the defaults, and is an object when read:
        `__post_init__` builds it with [`build_part`].
        """

        def __get__(self, instance: object, owner: type) -> PartT: ...

        def __set__(self, instance: object, value: PartT | dict[str, Any] | None) -> None: ...


def build_part(value: PartT | dict[str, Any] | None, config_class: type[PartT]) -> PartT:
    """Builds a part's configuration object; a copy, as the caller may pass one object to two configurations."""
    return config_class(**(value or {})) if value is None or isinstance(value, dict) else copy.deepcopy(value)


def check_numbers(config: PreTrainedConfig) -> None:
    """Checks the numbers of a configuration against [`RANGES`], and its activation function.

    Raises:
        ValueError: one is NaN, infinite or out of range, or the activation is unknown; the message names the field.
    """
    for name, (low, high) in RANGES.items():
        value = getattr(config, name, None)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be between {low:,} and {high:,}, got {value}.")
    if getattr(config, "hidden_act", "gelu") not in ACT2FN:
        raise ValueError(f"hidden_act is one of {', '.join(sorted(ACT2FN))}, got {config.hidden_act!r}.")


@as_validated_field
def mask_ratio_field(value: object):
    """Dataclass field for the fraction of patches dropped, checked in the constructor and on assignment."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(
            f"mask_ratio is the fraction of patches dropped and must be a number in [0, 1), got {value!r}. "
            "Use 0 to train on whole images, 0.5 or 0.75 for the paper's settings."
        )


def check_heads(hidden_size: int, num_attention_heads: int) -> None:
    if hidden_size % num_attention_heads != 0:
        raise ValueError(
            f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_attention_heads})."
        )


def wrap_part(fields: dict[str, Any], config_class: type[PreTrainedConfig], key: str) -> dict[str, Any]:
    """Wraps the fields of a part's configuration, from a checkpoint of the part alone, into those of the whole.

    Args:
        fields: the part's fields, as in its config.json.
        config_class: the whole's configuration class.
        key: the part's name in it.
    """
    part = {name: value for name, value in fields.items() if name not in ("auto_map", "architectures")}
    whole = {name: part.pop(name) for name in ("dtype", "transformers_version") if name in part}
    return {"model_type": config_class.model_type, key: part, **whole}


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Returns the number K of patches kept, `int(L * (1 - mask_ratio))`, in floating point as in FLIP's and MAE's code.

    Raises:
        ValueError: `mask_ratio` is outside [0, 1), or there is no patch or none would be kept.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio is the fraction of patches dropped and must be in [0, 1), got {mask_ratio!r}.")
    if num_patches < 1:
        raise ValueError("The images are smaller than a patch, so nothing of them would be seen: make them larger.")
    kept = int(num_patches * (1 - mask_ratio))
    if kept < 1:
        raise ValueError(f"mask_ratio={mask_ratio} keeps none of the {num_patches} patches; use a lower one.")
    return kept


class BlockConfig(Protocol):
    """The fields of a tower's or the decoder's configuration that its Transformer blocks read."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: int | float

    @property
    def _attn_implementation(self) -> str | None: ...


class FlipTowerConfig(PreTrainedConfig):
    """The fields that both towers' configurations share."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # A tower is saved with or without its projection, and AutoModel reads here which; it cannot read None.
        self.architectures = self.architectures or []


@strict
class FlipTextConfig(FlipTowerConfig):
    r"""Configuration of the text tower.

    Args:
        vocab_size: rows of the token table. The official table has BERT's 30,522 word pieces and one unused row.
        hidden_size: width of the Transformer.
        intermediate_size: width of the MLP's hidden layer.
        projection_dim: length of the embedding shared with images.
        projection_bias: whether the projection to that embedding has a bias.
        num_hidden_layers: number of Transformer blocks.
        num_attention_heads: number of attention heads; must divide `hidden_size`.
        max_position_embeddings: the context, in tokens. Longer input raises a `ValueError` in the model.
        hidden_act: activation of the MLP (the official code uses the tanh approximation of GELU; CLIP `quick_gelu`).
        layer_norm_eps: epsilon of all LayerNorms.
        attention_dropout: dropout on attention weights.
        initializer_range: standard deviation of the normal initialisers (token and position tables).
        initializer_factor: multiplies every random initialiser.
        causal: whether a token attends only to those before it, as in CLIP. FLIP's text tower is bidirectional.
        pooling_type: the position of the sentence's feature. `"first"`: the first token (FLIP; its tokenizer adds no
            special token, so this is the first word piece). `"mean"`: the mean over tokens. `"eos"`: the first
            `eos_token_id` (CLIP). `"argmax"`: the highest token id (CLIP checkpoints whose `eos_token_id` is 2).
            `"last"`: the last position of the context, padding or not (SigLIP, CLIPA); needs `attend_to_padding`.
        attend_to_padding: reproduces the official model, SigLIP and CLIPA, which pad every text to the full context and
            attend to the padding. By default padding is never attended to.
        pad_token_id: id of the padding token. With bidirectional attention, a call without `attention_mask` treats
            these ids as padding.
        bos_token_id: id of the begin-of-sequence token, where the tokenizer has one.
        eos_token_id: id of the end-of-sequence token, where the tokenizer has one; needed by `pooling_type="eos"`.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value has the wrong type or is out of range.
    """

    model_type = "flip_text_model"
    base_config_key = "text_config"

    vocab_size: int = 30523
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    projection_bias: bool = False
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 32
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: int | float = 0.0
    initializer_range: float = 0.02
    initializer_factor: int | float = 1.0
    causal: bool = False
    pooling_type: Literal["first", "mean", "eos", "argmax", "last"] = "first"
    attend_to_padding: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def validate_architecture(self):
        """Checks that the fields fit together; part of `@strict`.

        Raises:
            ValueError: they do not; the message names the fields.
        """
        check_numbers(self)
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.pooling_type == "eos" and self.eos_token_id is None:
            raise ValueError('pooling_type="eos" needs eos_token_id.')
        if self.attend_to_padding and (self.causal or self.pad_token_id is None):
            raise ValueError("attend_to_padding needs bidirectional attention (causal=False) and a pad_token_id.")
        if self.pooling_type == "last" and not self.attend_to_padding:
            raise ValueError('pooling_type="last" needs attend_to_padding=True: a text ends where its context does.')


@strict
class FlipVisionConfig(FlipTowerConfig):
    r"""Configuration of the vision tower.

    Args:
        hidden_size: width of the Transformer.
        intermediate_size: width of the MLP's hidden layer.
        projection_dim: length of the embedding shared with texts.
        projection_bias: whether the projection to that embedding has a bias.
        use_projection: whether there is a projection. SigLIP has none: its pooled feature is the embedding, so that
            `hidden_size` must be `projection_dim`.
        num_hidden_layers: number of Transformer blocks.
        num_attention_heads: number of attention heads; must divide `hidden_size`.
        num_channels: channels of the image.
        image_size: side of the square image, in pixels; a multiple of `patch_size`.
        patch_size: side of a patch, in pixels.
        ignore_remainder: whether `image_size` need not be a multiple of `patch_size`: the last pixels of each row and
            column are not seen then, as in SigLIP so400m/14 at 384 pixels.
        hidden_act: activation of the MLP (the official code uses the tanh approximation of GELU; CLIP `quick_gelu`).
        layer_norm_eps: epsilon of all LayerNorms.
        attention_dropout: dropout on attention weights.
        initializer_range: standard deviation of the normal initialisers (class token, learned positions).
        initializer_factor: multiplies every random initialiser.
        mask_ratio: fraction of the patches dropped while `model.training`; `int(num_patches * (1 - mask_ratio))` are
            kept. Never applied in `eval()`, unless a call passes `mask_ratio` itself. The paper trains at 0.5 and 0.75.
        mask_strategy: the patches that are kept: `"random"` (FLIP), `"block"` (one block), `"grid"` (a regular pattern)
            or `"gaussian"` (more often near the centre); see `masking_flip.py`.
        pooling_type: `"mean"`: mean over all tokens, the class token included, after the last LayerNorm (FLIP's code).
            `"cls"`: the class token (CLIP). `"patch_mean"`: mean over the patches, then the last LayerNorm (CLIPA, and
            MAE's global pool). `"attention"`: a learned query attends to all tokens after the last LayerNorm, followed
            by an MLP (SigLIP).
        use_class_token: whether a class token precedes the patches. SigLIP has none.
        position_embedding_type: `"sincos2d"`: a fixed table (FLIP, MAE). `"learned"`: a trained one (CLIP).
        use_pre_layernorm: whether a LayerNorm follows the patch embedding, as in CLIP.
        patch_embedding_bias: whether the patch projection has a bias. FLIP's does, CLIP's does not.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value has the wrong type or is out of range.
    """

    model_type = "flip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    projection_bias: bool = False
    use_projection: bool = True
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    ignore_remainder: bool = False
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: int | float = 0.0
    initializer_range: float = 0.02
    initializer_factor: int | float = 1.0
    mask_ratio: int | float = mask_ratio_field(default=0.5)
    mask_strategy: MaskStrategy = "random"
    pooling_type: Literal["mean", "cls", "patch_mean", "attention"] = "mean"
    use_class_token: bool = True
    position_embedding_type: Literal["sincos2d", "learned"] = "sincos2d"
    use_pre_layernorm: bool = False
    patch_embedding_bias: bool = True

    @property
    def num_patches(self) -> int:
        """Number of patches of an image of `image_size`, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Number of tokens of a whole image: its patches and, if there is one, the class token."""
        return self.num_patches + self.use_class_token

    @property
    def normalizes_tokens(self) -> bool:
        """True if the last LayerNorm is applied to all tokens before pooling, False if to the pooled feature."""
        return self.pooling_type in ("mean", "attention")

    def validate_architecture(self):
        """Checks that the fields fit together; part of `@strict`.

        Raises:
            ValueError: they do not; the message names the fields.
        """
        check_numbers(self)
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size != 0 and not self.ignore_remainder:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size}); the nearest are "
                f"{self.image_size // self.patch_size * self.patch_size} and "
                f"{-(-self.image_size // self.patch_size) * self.patch_size}."
            )
        if self.num_patches > MAX_PATCHES:
            raise ValueError(
                f"image_size ({self.image_size}) and patch_size ({self.patch_size}) make {self.num_patches:,} "
                f"patches of an image; at most {MAX_PATCHES:,} are possible."
            )
        if self.pooling_type == "cls" and not self.use_class_token:
            raise ValueError('pooling_type="cls" needs use_class_token=True.')
        if self.position_embedding_type == "sincos2d" and self.hidden_size % 4 != 0:
            raise ValueError(f"2D sin-cos positions need a hidden_size divisible by 4, got {self.hidden_size}.")
        num_kept(self.num_patches, self.mask_ratio)


@strict
class FlipConfig(PreTrainedConfig):
    r"""Configuration of a [`FlipModel`]: two towers, their projections and the temperature.

    Args:
        text_config: a [`FlipTextConfig`] or a dict of its fields.
        vision_config: a [`FlipVisionConfig`] or a dict of its fields.
        projection_dim: length of the shared embedding; applies to both towers and overrides theirs.
        projection_bias: whether the projections have a bias; applies to both towers and overrides theirs.
        logit_scale_init_value: start value of the logarithm of the inverse temperature.
        max_logit_scale: the factor on cosine similarities is clipped to [1, max_logit_scale] in the forward pass, as
            the official code does. `None`: not clipped, as `CLIPModel`.
        logit_bias_init_value: start value of the bias that SigLIP (Zhai et al. 2023) adds to the logits, -10 there.
            `None`: there is no bias. A model with one computes SigLIP's sigmoid loss instead of CLIP's softmax loss.
        initializer_factor: multiplies the random initialisers of the projections and the classifier.

    `mask_ratio` and `mask_strategy` are aliases of those in `vision_config`: they may be passed to the constructor and
    to `from_pretrained`, read and assigned.

    Example:

    ```python
    >>> from flip_hf import FlipConfig, FlipModel

    >>> model = FlipModel(FlipConfig(mask_ratio=0.75))  # ViT-B/16, trained on a quarter of the patches
    >>> model.config.vision_config.mask_ratio
    0.75
    ```
    """

    model_type = "flip"
    # Transformers 5.17 reads `sub_configs`, 5.23 `sub_configs_defaults`; both are needed until 5.17 is dropped.
    sub_configs_defaults = {  # pyright: ignore[reportAssignmentType]
        "text_config": FlipTextConfig,
        "vision_config": FlipVisionConfig,
    }
    sub_configs = sub_configs_defaults  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    projection_dim: int = 512
    projection_bias: bool = False
    if TYPE_CHECKING:
        text_config: Part[FlipTextConfig] = Part()
        vision_config: Part[FlipVisionConfig] = Part()
    else:
        text_config: dict | FlipTextConfig | None = None
        vision_config: dict | FlipVisionConfig | None = None
    logit_scale_init_value: int | float = LOGIT_SCALE_INIT
    max_logit_scale: int | float | None = 100.0
    logit_bias_init_value: int | float | None = None
    initializer_factor: int | float = 1.0

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the fields from a folder or the Hub; a bare vision tower's become the `vision_config` of a whole.

        So a [`FlipForImageClassification`] can start from a tower that was saved alone.
        """
        fields, unused = super().get_config_dict(*args, **kwargs)
        if fields.get("model_type") == FlipVisionConfig.model_type:
            shared = {name: fields[name] for name in ("projection_dim", "projection_bias") if name in fields}
            fields = wrap_part(fields, cls, "vision_config") | shared
        return fields, unused

    def __post_init__(self, **kwargs):
        # Built here, since the base class does so only in newer versions of Transformers.
        self.text_config = build_part(self.text_config, FlipTextConfig)
        self.vision_config = build_part(self.vision_config, FlipVisionConfig)
        for tower in (self.text_config, self.vision_config):
            tower.projection_dim = self.projection_dim
            tower.projection_bias = self.projection_bias
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        # Also when `from_pretrained(..., projection_dim=...)` sets it on the built configuration.
        if name in ("projection_dim", "projection_bias"):
            for tower in (self.text_config, self.vision_config):
                if isinstance(tower, PreTrainedConfig):
                    setattr(tower, name, value)

    def validate_architecture(self):
        """Checks the fields' values; part of `@strict`.

        Raises:
            ValueError: one is out of range; the message names it.
        """
        check_numbers(self)
        vision = self.vision_config
        if isinstance(vision, FlipVisionConfig) and not vision.use_projection:
            if vision.hidden_size != self.projection_dim:
                raise ValueError(
                    f"Without a vision projection, projection_dim ({self.projection_dim}) must be the vision tower's "
                    f"hidden_size ({vision.hidden_size})."
                )

    @overload
    def get_text_config(self, decoder: Literal[True] | None = None, encoder: None = None) -> FlipTextConfig: ...

    @overload
    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig: ...

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Returns `text_config`, as Transformers' method does, and this configuration where only an encoder counts."""
        return super().get_text_config(decoder, encoder)

    @property
    def mask_ratio(self) -> float:
        """The `mask_ratio` of `vision_config`, where alone it is stored."""
        return self.vision_config.mask_ratio

    @mask_ratio.setter
    def mask_ratio(self, value: float) -> None:
        self.vision_config.mask_ratio = value

    @property
    def mask_strategy(self) -> MaskStrategy:
        """The `mask_strategy` of `vision_config`, where alone it is stored."""
        return self.vision_config.mask_strategy

    @mask_strategy.setter
    def mask_strategy(self, value: MaskStrategy) -> None:
        self.vision_config.mask_strategy = value


__all__ = ["FlipConfig", "FlipTextConfig", "FlipVisionConfig"]
