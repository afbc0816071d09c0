"""MAE's decoder, which reconstructs dropped patches from the visible ones (He et al., CVPR 2022, arXiv 2111.06377).

Letters: B samples, L patches, K kept patches, D the vision tower's width, W the decoder's, C channels, P patch side.
"""

# No `from __future__ import annotations` here, as in the other published files.
import torch
from torch import nn
from transformers import initialization as init

from .blocks_flip import FlipEncoderLayer
from .configuration_flip import FlipVisionConfig
from .configuration_pretraining_flip import FlipDecoderConfig
from .modeling_flip import FlipPreTrainedModel
from .resizing_flip import FlipSincosPositions, sincos_positions


class FlipDecoder(FlipPreTrainedModel):
    """MAE's decoder: a small Transformer over the visible patches' tokens and a mask token for each dropped patch."""

    config: FlipDecoderConfig
    base_model_prefix = "decoder"
    input_modalities = ("image",)

    def __init__(self, config: FlipDecoderConfig, vision_config: FlipVisionConfig):
        super().__init__(config)
        width = config.hidden_size
        self.side = vision_config.image_size // vision_config.patch_size
        self.token_projection = nn.Linear(vision_config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.use_class_token = vision_config.use_class_token
        self.position_embedding = FlipSincosPositions(self.side, width, self.use_class_token)
        self.layers = nn.ModuleList([FlipEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pixel_projection = nn.Linear(width, vision_config.num_channels * vision_config.patch_size**2)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Applies MAE's initialisers, which FLIP uses too."""
        super()._init_weights(module)
        if isinstance(module, FlipDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range * self.config.initializer_factor)
            table = sincos_positions(self.side, self.config.hidden_size, self.use_class_token)
            init.copy_(module.position_embedding.weight, table)

    def forward(self, tokens: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """Predicts all patches (B, L, C * P * P) from the normalised tokens (B, 1 + K, D) of the patches `ids_keep`
        (B, K), in any order, after that of the class token, if there is one.
        """
        tokens = self.token_projection(tokens)  # (B, 1 + K, W)
        first = int(self.use_class_token)
        patches = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], self.side**2, -1)
        places = ids_keep[:, :, None].expand(-1, -1, tokens.shape[2])
        patches = patches.scatter(1, places, tokens[:, first:])  # (B, L, W)
        hidden_states = torch.cat([tokens[:, :first], patches], dim=1) + self.position_embedding.weight
        for layer in self.layers:
            hidden_states = layer(hidden_states, None)
        return self.pixel_projection(self.layer_norm(hidden_states[:, first:]))


__all__ = ["FlipDecoder"]
