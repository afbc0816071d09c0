"""FLIP in PyTorch: CLIP's two towers, with a vision tower that encodes only the kept patches.

Written after the paper (Li et al., CVPR 2023, arXiv 2212.00794) in the style of Transformers' CLIP: parameter names,
inputs and outputs are CLIP's wherever the part is CLIP's. Switches in the configuration, not subclasses, distinguish
FLIP from CLIP.

Letters: B samples, L patches, K kept patches, T tokens, D width, A heads, E length of the shared embedding.
"""

# No `from __future__ import annotations` here: Transformers reads the `config` annotations as types.
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel, SiglipModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack  # pyright: ignore[reportAttributeAccessIssue]
from transformers.utils.generic import (
    ModelOutput,
    TransformersKwargs,
    can_return_tuple,
    maybe_autocast,
    merge_with_config_defaults,
)
from transformers.utils.output_capturing import capture_outputs

from .blocks_flip import FlipAttention, FlipAttentionPooling, FlipEncoder, FlipEncoderLayer, FlipQueryKeyValue
from .clip_flip import flip_config_from_clip, flip_tensors, load_clip, make_clip
from .configuration_flip import FlipConfig, FlipTextConfig, FlipVisionConfig
from .masking_flip import check_ids_keep, cut_patches, draw_mask, num_kept, pooled_token
from .resizing_flip import FlipSincosPositions, Resizable, resize_patch_kernel, sincos_positions
from .siglip_flip import flip_config_from_siglip, flip_tensors_of_siglip, load_siglip, make_siglip

# ---------------------------------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class FlipVisionOutput(BaseModelOutputWithPooling):
    """Output of [`FlipVisionModel`].

    Args:
        last_hidden_state: (B, 1 + K, D), class token first. With `pooling_type="mean"` after the last LayerNorm; with
            `"cls"` before it, as in CLIP.
        pooler_output: (B, D), the image's feature; from `get_image_features` (B, E), projected.
        hidden_states: tuple of (B, 1 + K, D): the input of the first block and the output of each.
        attentions: tuple of (B, A, 1 + K, 1 + K), one a block; eager attention only.
        ids_keep: (B, K), the visible patches in raster order; None if all were.
    """

    ids_keep: torch.Tensor | None = None


@dataclass
class FlipVisionModelOutput(ModelOutput):
    """Output of [`FlipVisionModelWithProjection`].

    Args:
        image_embeds: (B, E), projected, not normalised.
        last_hidden_state, hidden_states, attentions, ids_keep: as in [`FlipVisionOutput`].
    """

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    ids_keep: torch.Tensor | None = None


@dataclass
class FlipTextModelOutput(ModelOutput):
    """Output of [`FlipTextModelWithProjection`].

    Args:
        text_embeds: (B, E), projected, not normalised.
        last_hidden_state: (B, T, D), after the last LayerNorm.
        hidden_states: tuple of (B, T, D): the input of the first block and the output of each.
        attentions: tuple of (B, A, T, T), one a block; eager attention only.
    """

    text_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class FlipOutput(ModelOutput):
    """Output of [`FlipModel`]: CLIPOutput's fields, and the mask.

    Args:
        loss: scalar, the contrastive loss of this batch; with `return_loss=True`.
        logits_per_image: (images, texts), float32, cosine similarities times the clipped `exp(logit_scale)`, plus the
            `logit_bias` of a model that has one.
        logits_per_text: (texts, images), its transpose.
        text_embeds: (texts, E), projected and normalised.
        image_embeds: (images, E), projected and normalised.
        text_model_output: the text tower's output.
        vision_model_output: the vision tower's output.
        ids_keep: (images, K), the visible patches in raster order; None if all were.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: FlipVisionOutput | None = None
    ids_keep: torch.Tensor | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings
# ---------------------------------------------------------------------------------------------------------------------


class FlipPatchEmbedding(nn.Module):
    """The patch projection, with the parameters of a convolution whose stride is its kernel size.

    It is a matrix product over patches instead of a convolution over the image, so it runs on any subset of them.
    """

    def __init__(self, config: FlipVisionConfig):
        super().__init__()
        side = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.num_channels, side, side))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.patch_embedding_bias else None

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Projects patches (B, K, C * P * P) to (B, K, D)."""
        return nn.functional.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class FlipVisionEmbeddings(nn.Module):
    """Embeds visible patches and, if there is one, the class token, with their positions."""

    def __init__(self, config: FlipVisionConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if config.use_class_token else None
        self.patch_embedding = FlipPatchEmbedding(config)
        if config.position_embedding_type == "learned":
            self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)
        else:
            side = config.image_size // config.patch_size
            self.position_embedding = FlipSincosPositions(side, config.hidden_size, config.use_class_token)
        self.position_ids = nn.Buffer(torch.arange(config.num_positions), persistent=False)

    def grid(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> tuple[int, int]:
        """Returns the rows and columns of patches in these images.

        Raises:
            ValueError: the images do not have the model's size and positions may not be interpolated.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be of shape (batch, {self.config.num_channels}, height, width), "
                f"got {tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[-2:]
        size = self.config.image_size
        if not interpolate_pos_encoding and (height != size or width != size):
            raise ValueError(
                f"Input image size ({height}*{width}) doesn't match model ({size}*{size}). Resize the images, or pass "
                "interpolate_pos_encoding=True."
            )
        return height // self.config.patch_size, width // self.config.patch_size

    @torch.no_grad()
    def resize(self, side: int, patch_size: int) -> None:
        """Resizes to `side` x `side` patches of `patch_size`: recomputes fixed positions, interpolates learned ones."""
        if patch_size == self.config.patch_size and side == self.config.image_size // patch_size:
            return
        module: Any = self.position_embedding
        learned = self.config.position_embedding_type == "learned"
        table = self.positions(side, side) if learned else _fixed_positions(side, self.config)
        # New tensors, not new values: the shape changes. An optimizer must be made after this.
        table = table.to(module.weight)
        module.weight = nn.Parameter(table) if learned else nn.Buffer(table)
        if learned:
            module.num_embeddings = table.shape[0]
        self.position_ids = nn.Buffer(torch.arange(table.shape[0], device=table.device), persistent=False)
        if patch_size != self.config.patch_size:
            kernel = resize_patch_kernel(self.patch_embedding.weight, patch_size)
            self.patch_embedding.weight = nn.Parameter(kernel)
        self.config.patch_size = patch_size
        self.config.image_size = side * patch_size

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """Returns the position table, interpolated if the grid is not the model's own.

        It has a row for each patch, (rows * columns, D), after that of the class token, if there is one.
        """
        table = self.position_embedding(self.position_ids)  # (L, D) or (1 + L, D)
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return table
        first = int(self.config.use_class_token)
        grid = table[first:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, H, W)
        grid = nn.functional.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([table[:first], grid.flatten(2)[0].T])

    def patch_grid(
        self,
        patches: torch.Tensor,
        ids_keep: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        grid: tuple[int, int] | None = None,
    ) -> tuple[int, int]:
        """Returns the rows and columns of patches in the images that these patches come from: `grid`, if it is known.

        Raises:
            ValueError: the patches do not have the model's length, or some are missing without `ids_keep`.
        """
        channels = self.config.num_channels
        side = self.config.patch_size
        num_patches = self.config.num_patches if grid is None else grid[0] * grid[1]
        interpolate_pos_encoding = interpolate_pos_encoding and grid is None
        if patches.ndim != 3 or patches.shape[2] != channels * side**2:
            raise ValueError(
                f"patches must be of shape (batch, K, {channels * side**2}), each of {channels} channels of {side} x "
                f"{side} pixels, got {tuple(patches.shape)}."
            )
        if interpolate_pos_encoding and ids_keep is None:
            num_patches = patches.shape[1]
            if math.isqrt(num_patches) ** 2 != num_patches:
                raise ValueError(f"{num_patches} patches do not form a square image. Pass pixel_values instead.")
        elif ids_keep is None and patches.shape[1] != num_patches:
            raise ValueError(
                f"Got {patches.shape[1]} of an image's {num_patches} patches: pass ids_keep, which tells which ones."
            )
        elif ids_keep is not None and (interpolate_pos_encoding or ids_keep.shape[1:] != patches.shape[1:2]):
            raise ValueError(
                f"ids_keep must name the place of each of the {patches.shape[1]} patches in an image of the model's "
                f"own size, or of the given grid, got ids_keep of shape {tuple(ids_keep.shape)}, {grid=} and "
                f"{interpolate_pos_encoding=}."
            )
        return grid or (math.isqrt(num_patches), math.isqrt(num_patches))

    def forward(
        self, patches: torch.Tensor, ids_keep: torch.Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Embeds patches (B, K, C * P * P) of images with this grid (the model's own if None).

        Returns:
            (B, 1 + K, D), the class token first; (B, K, D) where there is none.
        """
        side = self.config.image_size // self.config.patch_size
        positions = self.positions(*(grid or (side, side)))
        of_patches = positions[int(self.config.use_class_token) :]
        embeds = self.patch_embedding(patches)  # (B, K, D)
        if ids_keep is None:
            embeds = embeds + of_patches
        else:
            embeds = embeds + nn.functional.embedding(ids_keep, of_patches)
        if self.class_embedding is None:
            return embeds
        class_token = self.class_embedding + positions[0]  # (D), FLIP's row 0 is zero
        return torch.cat([class_token.expand(embeds.shape[0], 1, -1), embeds], dim=1)


class FlipTextEmbeddings(nn.Module):
    """Embeds tokens with their positions."""

    def __init__(self, config: FlipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.position_ids = nn.Buffer(torch.arange(config.max_position_embeddings).expand((1, -1)), persistent=False)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Embeds token ids (B, T) as (B, T, D).

        Raises:
            ValueError: there are more tokens than positions.
        """
        length = input_ids.shape[-1]
        context = self.position_embedding.num_embeddings
        if length > context:
            raise ValueError(
                f"The text has {length} tokens, but the model's context is {context} (max_position_embeddings). "
                f"Shorten it, or tokenize with truncation=True, max_length={context} (FlipProcessor does)."
            )
        if position_ids is None:
            position_ids = self.position_ids[:, :length]
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation
# ---------------------------------------------------------------------------------------------------------------------
# Outside of Transformers itself, `_init_weights` is not called for a module without its own parameters (it counts as
# loaded). So every rule is tied to the module that holds the parameter, and none to a parent such as FlipAttention.


def _xavier(weight: torch.Tensor, fan_in: int, fan_out: int, factor: float) -> None:
    """Applies Xavier-uniform initialisation with given fans."""
    bound = factor * math.sqrt(6 / (fan_in + fan_out))
    init.uniform_(weight, -bound, bound)


def _fixed_positions(side: int, config: FlipVisionConfig) -> torch.Tensor:
    return sincos_positions(side, config.hidden_size, config.use_class_token)


def _init_vision_embeddings(module: FlipVisionEmbeddings) -> None:
    config = module.config
    patch_embedding = module.patch_embedding
    std = config.initializer_range * config.initializer_factor
    if module.class_embedding is not None:
        init.normal_(module.class_embedding, std=std)
    _xavier(patch_embedding.weight, patch_embedding.weight[0].numel(), config.hidden_size, config.initializer_factor)
    if patch_embedding.bias is not None:
        init.zeros_(patch_embedding.bias)
    if config.position_embedding_type == "sincos2d":
        table = _fixed_positions(config.image_size // config.patch_size, config)
        init.copy_(module.position_embedding.weight, table)
    else:
        init.normal_(module.position_embedding.weight, std=std)
    init.copy_(module.position_ids, torch.arange(config.num_positions))


class FlipPreTrainedModel(Resizable, PreTrainedModel):
    """Base class of all FLIP models: loading, saving, initialisation."""

    config: FlipConfig
    base_model_prefix = "flip"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]
    _no_split_modules = ["FlipTextEmbeddings", "FlipVisionEmbeddings", "FlipEncoderLayer"]
    supports_gradient_checkpointing = True
    # Losses are means over the batch: with accumulated gradients, Trainer must divide by the number of steps.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": FlipEncoderLayer, "attentions": FlipAttention}
    # The class of the same file that each auto class loads from a folder with published code.
    _published_as: dict[str, str] = {}

    def post_init(self) -> None:
        """Ends `__init__`; loading ignores only this class's own unexpected keys.

        Transformers adds those of the parts, but what a tower ignores, the whole model must not.
        """
        super().post_init()
        self._keys_to_ignore_on_load_unexpected = set(type(self)._keys_to_ignore_on_load_unexpected or ())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Applies the official code's initialisers (not those of Transformers' CLIP, which swap two scales)."""
        super()._init_weights(module)
        factor = self.config.initializer_factor
        if isinstance(module, nn.Linear):
            # A quantised layer may have no weight.
            if getattr(module, "weight", None) is not None:
                fused = 3 if isinstance(module, FlipQueryKeyValue) else 1
                _xavier(module.weight, module.in_features, fused * module.out_features, factor)
        elif isinstance(module, FlipVisionEmbeddings):
            _init_vision_embeddings(module)
        elif isinstance(module, FlipAttentionPooling):
            width = module.probe.shape[-1]
            _xavier(module.probe, width, width, factor)
        elif isinstance(module, FlipTextEmbeddings):
            std = self.config.get_text_config().initializer_range * factor
            init.normal_(module.token_embedding.weight, std=std)
            init.normal_(module.position_embedding.weight, std=std)
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
        elif isinstance(module, FlipModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            bias = self.config.logit_bias_init_value
            if module.logit_bias is not None and bias is not None:
                init.constant_(module.logit_bias, bias)

    def save_pretrained(self, *args, **kwargs):
        """Saves like `PreTrainedModel`; a published folder names every auto class that can load it.

        Transformers writes one auto class per model. Pipelines and classifiers need others, and a name left over from
        the model's checkpoint would point to another class.
        """
        if self._auto_class is not None:
            config_file = type(self.config).__module__.split(".")[-1]
            model_file = type(self).__module__.split(".")[-1]
            self.config.auto_map = {"AutoConfig": f"{config_file}.{type(self.config).__name__}"}
            for auto_class, name in self._published_as.items():
                self.config.auto_map[auto_class] = f"{model_file}.{name}"
        return super().save_pretrained(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Towers
# ---------------------------------------------------------------------------------------------------------------------


class FlipTextModel(FlipPreTrainedModel):
    """The text tower, without projection."""

    config: FlipTextConfig
    # With this prefix the tower loads straight from a full checkpoint.
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _published_as = {"AutoModel": "FlipTextModel", "AutoModelForTextEncoding": "FlipTextModel"}
    _input_embed_layer = "token_embedding"
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"_projection\.", r"^logit_", r"^classifier\."]

    def __init__(self, config: FlipTextConfig):
        super().__init__(config)
        self.embeddings = FlipTextEmbeddings(config)
        self.encoder = FlipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _pad_to_context(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Pads token ids (B, T) to the context with the padding id: the official model always reads 32 tokens."""
        missing = self.config.max_position_embeddings - input_ids.shape[1]
        # A text that is too long is left for the embeddings to refuse.
        return nn.functional.pad(input_ids, (0, max(missing, 0)), value=self.config.pad_token_id)

    def _visible_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Returns a mask (B, T) of tokens that are text, None if all are; an empty text keeps its first position."""
        if attention_mask is None:
            if self.config.causal or self.config.pad_token_id is None:
                return None
            attention_mask = input_ids != self.config.pad_token_id
        if attention_mask.ndim != 2 or self.config.causal:
            return attention_mask
        visible = attention_mask.bool()
        first = torch.arange(visible.shape[1], device=visible.device) == 0  # (T)
        return visible | (first & ~visible.any(dim=1, keepdim=True))

    def _pool(self, hidden_states: torch.Tensor, input_ids: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """Pools the features of tokens (B, T, D) into that of the sentence (B, D)."""
        pooling_type = self.config.pooling_type
        if pooling_type == "first":
            return hidden_states[:, 0]
        if pooling_type == "last":
            return hidden_states[:, -1]
        if pooling_type == "mean":
            if visible is None or visible.ndim != 2:
                return hidden_states.mean(dim=1)
            weights = visible[:, :, None].to(hidden_states.dtype)  # (B, T, 1)
            return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1)
        index = pooled_token(input_ids, pooling_type, self.config.eos_token_id)  # (B)
        return hidden_states[torch.arange(hidden_states.shape[0], device=index.device), index]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""Encodes texts.

        Args:
            input_ids: (B, T) token ids, padded on the right, T at most the context. Padding never changes a result.
            attention_mask: (B, T), 1 for text and 0 for padding. If absent, it follows from `pad_token_id` in a
                bidirectional model; a causal one needs none.
            position_ids: (B, T); 0 ... T - 1 if absent.
            token_type_ids: not used; accepted because BERT tokenizers return it.

        Raises:
            ValueError: no ids, or a text longer than the context.
        """
        if input_ids is None:
            raise ValueError("You have to specify input_ids")
        input_ids = input_ids.view(-1, input_ids.shape[-1])  # (B, T)
        if self.config.attend_to_padding:
            input_ids = self._pad_to_context(input_ids)
            position_ids = None
            visible = None
        else:
            visible = self._visible_tokens(input_ids, attention_mask)

        hidden_states = self.embeddings(input_ids, position_ids)  # (B, T, D)
        kwargs.pop("is_causal", None)
        if self.config.causal:
            # By position: Transformers renames the (absent) cache from past_key_values to cache.
            mask = create_causal_mask(self.config, hidden_states, visible, None)
        else:
            mask = create_bidirectional_mask(self.config, hidden_states, attention_mask=visible)
        hidden_states = self.encoder(hidden_states, mask, is_causal=self.config.causal, **kwargs)
        hidden_states = self.final_layer_norm(hidden_states)

        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self._pool(hidden_states, input_ids, visible)
        )


def check_image_inputs(
    pixel_values: torch.Tensor | None,
    patches: torch.Tensor | None,
    mask_ratio: float | None,
    ids_keep: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the images or the patches, whichever is given.

    Raises:
        ValueError: neither or both are given, or a mask in addition to something already masked.
    """
    pixels = pixel_values if patches is None else patches
    if pixels is None:
        raise ValueError("You have to specify pixel_values or patches")
    if pixel_values is not None and patches is not None:
        raise ValueError("Pass pixel_values or patches, not both: patches are the visible part of the images.")
    if patches is not None and mask_ratio is not None:
        raise ValueError("Pass patches or mask_ratio, not both: none of the patches are dropped.")
    if ids_keep is not None and mask_ratio is not None:
        raise ValueError("Pass ids_keep or mask_ratio, not both: ids_keep already tells what is visible.")
    return pixels


class FlipVisionModel(FlipPreTrainedModel):
    """The vision tower, without projection, which encodes the kept patches."""

    config: FlipVisionConfig
    # With this prefix the tower loads straight from a full checkpoint.
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _published_as = {"AutoModel": "FlipVisionModel"}
    _input_embed_layer = "patch_embedding"
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"_projection\.", r"^logit_", r"^classifier\."]

    def __init__(self, config: FlipVisionConfig):
        super().__init__(config)
        self.embeddings = FlipVisionEmbeddings(config)
        if config.use_pre_layernorm:
            self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = FlipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = FlipAttentionPooling(config) if config.pooling_type == "attention" else None
        self.post_init()

    def _pool(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools the last block's output (B, S, D).

        Returns:
            The features of the tokens (B, S, D), normalised where the pooling reads them normalised, and that of the
            image (B, D).
        """
        if self.config.pooling_type == "cls":
            return hidden_states, self.post_layernorm(hidden_states[:, 0])
        if self.config.pooling_type == "patch_mean":
            return hidden_states, self.post_layernorm(self.patch_tokens(hidden_states).mean(dim=1))
        hidden_states = self.post_layernorm(hidden_states)
        return hidden_states, hidden_states.mean(dim=1) if self.head is None else self.head(hidden_states)

    def patch_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the features of the patches (B, K, D), without that of the class token, if there is one."""
        return hidden_states[:, int(self.config.use_class_token) :]

    def _choose_patches(
        self, pixel_values: torch.Tensor, grid: tuple[int, int], mask_ratio: float | None
    ) -> torch.Tensor | None:
        """Draws the visible patches (B, K) at the ratio in effect; None if all are visible."""
        num_patches = grid[0] * grid[1]
        if mask_ratio is None:
            mask_ratio = self.config.mask_ratio if self.training else 0
        if num_kept(num_patches, mask_ratio) == num_patches:
            return None
        strategy = self.config.mask_strategy
        return draw_mask(strategy, pixel_values.shape[0], grid, mask_ratio, pixel_values.device)

    def _embed(
        self,
        pixel_values: torch.Tensor | None,
        patches: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        mask_ratio: float | None,
        ids_keep: torch.Tensor | None,
        grid: tuple[int, int] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Makes the first block's input, (B, 1 + K, D) with a class token, and the patches in it, (B, K) or None for
        all.
        """
        pixels = check_image_inputs(pixel_values, patches, mask_ratio, ids_keep)
        if patches is not None:
            grid = self.embeddings.patch_grid(patches, ids_keep, interpolate_pos_encoding, grid)
        elif grid is not None:
            raise ValueError("Pass grid with patches alone: pixel_values have a size, and interpolate_pos_encoding.")
        else:
            grid = self.embeddings.grid(pixels, interpolate_pos_encoding)
        if ids_keep is not None:
            check_ids_keep(ids_keep, pixels.shape[0], grid[0] * grid[1])
            ids_keep = ids_keep.to(pixels.device)
        if patches is None:
            ids_keep = self._choose_patches(pixels, grid, mask_ratio) if ids_keep is None else ids_keep
            patches = cut_patches(pixels, self.config.patch_size, ids_keep)
        return self.embeddings(patches, ids_keep, grid), ids_keep

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        mask_ratio: float | None = None,
        ids_keep: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlipVisionOutput:
        r"""Encodes whole images, or patches that were cut out of them before.

        Args:
            pixel_values: (B, C, height, width), normalised.
            interpolate_pos_encoding: accept images of other sizes by bicubic interpolation of the positions; for
                `patches`, all patches of a square image.
            mask_ratio: fraction of the patches dropped in this call, training or not. If absent: `config.mask_ratio`
                in training mode, 0 in evaluation mode.
            ids_keep: (B, K) patches to encode, in raster order, chosen by the caller instead of drawn.
            patches: (B, K, C * P * P) in place of `pixel_values`: the patches that `ids_keep` names, normalised and
                flattened as by `cut_patches`. Without `ids_keep`, all of the image; none is dropped.
            grid: rows and columns of patches in the images that `patches` were cut from, where that is not the model's
                own size; positions are interpolated.

        Raises:
            ValueError: the images' size, the ratio or the shape of `patches` or `ids_keep` does not fit, or arguments
                are redundant.
        """
        images = (pixel_values, patches, interpolate_pos_encoding, mask_ratio, ids_keep, grid)
        hidden_states, ids_keep = self._embed(*images)
        if self.config.use_pre_layernorm:
            hidden_states = self.pre_layernorm(hidden_states)
        hidden_states = self.encoder(hidden_states, None, **kwargs)

        hidden_states, pooled = self._pool(hidden_states)
        return FlipVisionOutput(last_hidden_state=hidden_states, pooler_output=pooled, ids_keep=ids_keep)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def make_visual_projection(config: FlipVisionConfig) -> nn.Module:
    """Makes the projection of pooled image features to the shared embedding, which SigLIP leaves as they are."""
    if not config.use_projection:
        return nn.Identity()
    return nn.Linear(config.hidden_size, config.projection_dim, bias=config.projection_bias)


def image_text_contrastive_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """Computes the symmetric cross-entropy of matched rows and columns (N, N): the mean of both directions."""
    labels = torch.arange(logits_per_text.shape[0], device=logits_per_text.device)
    return (
        nn.functional.cross_entropy(logits_per_text, labels) + nn.functional.cross_entropy(logits_per_text.T, labels)
    ) / 2


def image_text_sigmoid_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """Computes SigLIP's loss of matched rows and columns (N, N): every cell is a decision, yes on the diagonal."""
    signs = 2 * torch.eye(logits_per_text.shape[0], device=logits_per_text.device) - 1
    return -nn.functional.logsigmoid(signs * logits_per_text).sum(dim=-1).mean()


def normalize(embeds: torch.Tensor) -> torch.Tensor:
    """Divides embeddings (B, E) by their length, plus the official code's 1e-8."""
    return embeds / (embeds.pow(2).sum(dim=-1, keepdim=True).sqrt() + 1e-8)


class FlipModel(FlipPreTrainedModel):
    """Both towers, their projections and the learned temperature: CLIPModel's interface, and a mask.

    With `config.logit_bias_init_value` it has SigLIP's bias as well, and SigLIP's loss.
    """

    _published_as = {
        "AutoModel": "FlipModel",
        "AutoModelForZeroShotImageClassification": "FlipModel",
        "AutoModelForImageClassification": "FlipForImageClassification",  # with a new head
    }
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # of a FlipForPreTraining

    def __init__(self, config: FlipConfig):
        super().__init__(config)
        self.text_model = FlipTextModel._from_config(config.text_config)
        self.vision_model = FlipVisionModel._from_config(config.vision_config)
        self.visual_projection = make_visual_projection(config.vision_config)
        width = config.text_config.hidden_size
        self.text_projection = nn.Linear(width, config.projection_dim, bias=config.projection_bias)
        # Of shape (1,), as in the official checkpoints: FSDP2 refuses parameters without dimensions.
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
        bias = config.logit_bias_init_value
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), float(bias)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the text tower's, as SiglipModel does: tools that quantise or resize vocabularies need them here."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the text tower's input embeddings."""
        self.text_model.set_input_embeddings(value)

    @classmethod
    def from_clip(cls, clip: CLIPModel | str, mask_ratio: float = 0.5, **kwargs: Any) -> "FlipModel":
        r"""Makes a FlipModel with a CLIPModel's weights: the same numbers on whole images, and masked training.

        Args:
            clip: a CLIPModel, or the folder or Hub id of one (safetensors only). The weights are copied.
            mask_ratio: fraction of the patches dropped in training.
            kwargs: with a folder or id: `revision`, `subfolder`, `token`, `dtype`, ... for `CLIPModel.from_pretrained`.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: the checkpoint is not a complete CLIPModel.

        Example:

        ```python
        >>> flip = FlipModel.from_clip("openai/clip-vit-large-patch14", mask_ratio=0.5)
        >>> # ... train it on half of the patches ...
        >>> flip.to_clip().save_pretrained("my-clip")  # a stock CLIPModel
        ```
        """
        if not isinstance(clip, CLIPModel):
            clip = load_clip(clip, **kwargs)
        flip = cls._from_config(
            flip_config_from_clip(clip.config, mask_ratio),
            dtype=clip.dtype,
            attn_implementation=clip.config._attn_implementation,
        )
        flip.load_state_dict(flip_tensors(clip))
        return flip.to(clip.device).eval()  # pyright: ignore[reportArgumentType]

    def to_clip(self) -> CLIPModel:
        """Makes a stock CLIPModel that computes the same numbers, in evaluation mode; the weights are copied.

        Raises:
            ValueError: CLIPModel does not have this architecture; the message names the switches in the way.
        """
        tensors = {**self.state_dict(), "logit_scale": self.clipped_logit_scale()}
        clip = make_clip(self.config, tensors, self.dtype)
        return clip.to(self.device).eval()  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_siglip(cls, siglip: SiglipModel | str, mask_ratio: float = 0.5, **kwargs: Any) -> "FlipModel":
        r"""Makes a FlipModel with the weights of SigLIP, or of SigLIP 2 at a fixed resolution.

        It computes the same numbers on whole images, for texts that are padded to the context as SigLIP needs them.
        Shorter ones are padded here with `text_config.pad_token_id`, which must be the tokenizer's: the checkpoints of
        SigLIP 2 do not say that theirs is 0.

        Args:
            siglip: a SiglipModel, or the folder or Hub id of one (safetensors only). The weights are copied.
            mask_ratio: fraction of the patches dropped in training.
            kwargs: with a folder or id: `revision`, `subfolder`, `token`, ... for `SiglipModel.from_pretrained`.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: the checkpoint is not a complete SiglipModel, or one for images of any shape (NaFlex).
        """
        if not isinstance(siglip, SiglipModel):
            siglip = load_siglip(siglip, **kwargs)
        flip = cls._from_config(
            flip_config_from_siglip(siglip.config, mask_ratio),
            dtype=siglip.dtype,
            attn_implementation=siglip.config._attn_implementation,
        )
        flip.load_state_dict(flip_tensors_of_siglip(siglip))
        return flip.to(siglip.device).eval()  # pyright: ignore[reportArgumentType]

    def to_siglip(self) -> SiglipModel:
        """Makes a stock SiglipModel that computes the same numbers, in evaluation mode; the weights are copied.

        Raises:
            ValueError: SiglipModel does not have this architecture; the message names the switches in the way.
        """
        tensors = {**self.state_dict(), "logit_scale": self.clipped_logit_scale()}
        siglip = make_siglip(self.config, tensors, self.dtype)
        return siglip.to(self.device).eval()  # pyright: ignore[reportArgumentType]

    def _clipped(self) -> torch.Tensor:
        if self.config.max_logit_scale is None:
            return self.logit_scale
        return self.logit_scale.clamp(0, math.log(self.config.max_logit_scale))

    def clipped_logit_scale(self) -> torch.Tensor:
        """Returns the `logit_scale` (1,) that the forward pass uses, without gradient, for models that never clip."""
        return self._clipped().detach()

    def get_logit_scale(self) -> torch.Tensor:
        """Returns the factor on cosine similarities, (1,): `exp(logit_scale)`, clipped to [1, config.max_logit_scale].

        The clip is part of the forward pass, as in the official code: outside it, the gradient is zero.
        """
        return self._clipped().exp()

    def _logits_per_text(self, text_embeds: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        """Makes logits (texts, images) of cosines, in float32: bfloat16 at a scale of 100 is off by up to 0.1."""
        device = text_embeds.device  # the towers may be on two devices
        with maybe_autocast(device.type, enabled=False):
            cosines = text_embeds.float() @ image_embeds.float().T.to(device)
            logits = cosines * self.get_logit_scale().float().to(device)
            return logits if self.logit_bias is None else logits + self.logit_bias.float().to(device)

    def _loss(self, logits_per_text: torch.Tensor) -> torch.Tensor:
        compute_loss = image_text_contrastive_loss if self.logit_bias is None else image_text_sigmoid_loss
        return compute_loss(logits_per_text)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""Returns the text tower's output, with `pooler_output` (B, E) projected and not normalised.

        Arguments and errors are those of [`FlipTextModel`].

        Example:

        ```python
        >>> inputs = processor(text=["a photo of a cat", "a photo of a dog"], return_tensors="pt")
        >>> text_embeds = model.get_text_features(**inputs).pooler_output
        ```
        """
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            return_dict=True,
            **kwargs,
        )
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        mask_ratio: float | None = None,
        ids_keep: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlipVisionOutput:
        r"""Returns the vision tower's output, with `pooler_output` (B, E) projected and not normalised.

        Arguments and errors are those of [`FlipVisionModel`].

        Example:

        ```python
        >>> inputs = processor(images=image, return_tensors="pt")
        >>> image_embeds = model.get_image_features(**inputs).pooler_output
        ```
        """
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            mask_ratio=mask_ratio,
            ids_keep=ids_keep,
            patches=patches,
            return_dict=True,
            **kwargs,
        )
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        token_type_ids: torch.Tensor | None = None,
        mask_ratio: float | None = None,
        ids_keep: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlipOutput:
        r"""Compares images with texts.

        Args:
            input_ids, attention_mask, position_ids, token_type_ids: see [`FlipTextModel`].
            pixel_values, interpolate_pos_encoding, mask_ratio, ids_keep, patches, grid: see [`FlipVisionModel`].
            return_loss: also return the loss, SigLIP's where there is a bias; needs as many texts as images, paired.

        Example:

        ```python
        >>> inputs = processor(text=["a photo of a cat", "a photo of a dog"], images=image, return_tensors="pt")
        >>> probabilities = model(**inputs).logits_per_image.softmax(dim=1)
        ```
        """
        if input_ids is None or (pixel_values is None and patches is None):
            raise ValueError("FlipModel needs input_ids and pixel_values; for one of them use get_*_features.")
        vision_outputs: Any = self.get_image_features(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            mask_ratio=mask_ratio,
            ids_keep=ids_keep,
            patches=patches,
            grid=grid,
            return_dict=True,
            **kwargs,
        )
        text_outputs: Any = self.get_text_features(
            input_ids, attention_mask, position_ids, token_type_ids, return_dict=True, **kwargs
        )
        image_embeds = normalize(vision_outputs.pooler_output)  # (images, E)
        text_embeds = normalize(text_outputs.pooler_output)  # (texts, E)
        logits_per_text = self._logits_per_text(text_embeds, image_embeds)
        return FlipOutput(
            loss=self._loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
            ids_keep=vision_outputs.ids_keep,
        )


class FlipTextModelWithProjection(FlipPreTrainedModel):
    """The text tower and its projection; loads from a full checkpoint."""

    config: FlipTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _published_as = {"AutoModel": "FlipTextModelWithProjection", "AutoModelForTextEncoding": "FlipTextModel"}
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", r"^logit_"]

    def __init__(self, config: FlipTextConfig):
        super().__init__(config)
        self.text_model = FlipTextModel._from_config(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=config.projection_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlipTextModelOutput:
        """Embeds texts; arguments and errors are those of [`FlipTextModel`]."""
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            return_dict=True,
            **kwargs,
        )
        return FlipTextModelOutput(
            text_embeds=self.text_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FlipVisionModelWithProjection(FlipPreTrainedModel):
    """The vision tower and its projection; loads from a full checkpoint."""

    config: FlipVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _published_as = {"AutoModel": "FlipVisionModelWithProjection"}
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_"]

    def __init__(self, config: FlipVisionConfig):
        super().__init__(config)
        self.vision_model = FlipVisionModel._from_config(config)
        self.visual_projection = make_visual_projection(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        mask_ratio: float | None = None,
        ids_keep: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlipVisionModelOutput:
        """Embeds images; arguments and errors are those of [`FlipVisionModel`]."""
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            mask_ratio=mask_ratio,
            ids_keep=ids_keep,
            patches=patches,
            return_dict=True,
            **kwargs,
        )
        return FlipVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            ids_keep=outputs.ids_keep,
        )


class FlipForImageClassification(FlipPreTrainedModel):
    """The vision tower with a linear classifier on the mean of its patch tokens, as CLIPForImageClassification.

    In training mode it drops patches at `config.mask_ratio` like the other models; set it to 0 to fine-tune on whole
    images, as the paper does.
    """

    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _published_as = {"AutoModelForImageClassification": "FlipForImageClassification"}
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"(^|\.)head\.", r"_projection\.", r"^logit_"]

    def __init__(self, config: FlipConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.vision_model = FlipVisionModel._from_config(config.vision_config)
        self.vision_model.head = None  # as in SiglipForImageClassification: nothing reads the pooled feature
        width = config.vision_config.hidden_size
        self.classifier = nn.Linear(width, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        mask_ratio: float | None = None,
        ids_keep: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values, interpolate_pos_encoding, mask_ratio, ids_keep, patches: see [`FlipVisionModel`].
            labels: (B,) class indices, or (B, labels) for several labels or regression; gives the loss.
        """
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            mask_ratio=mask_ratio,
            ids_keep=ids_keep,
            patches=patches,
            return_dict=True,
            **kwargs,
        )
        tokens = self.vision_model.patch_tokens(outputs.last_hidden_state)  # (B, K, D)
        logits = self.classifier(tokens.mean(dim=1))  # (B, labels)
        loss = self.loss_function(labels, logits, self.config) if labels is not None else None
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "FlipForImageClassification",
    "FlipModel",
    "FlipPreTrainedModel",
    "FlipTextModel",
    "FlipTextModelWithProjection",
    "FlipVisionModel",
    "FlipVisionModelWithProjection",
]
