"""The model as training calls it: pairs in, unit embeddings and the temperature out.

One module with one forward pass, so that every wrapper that gathers or reduces parameters around `forward`
(DistributedDataParallel, FSDP2, DeepSpeed) sees all of them used, the temperature included. `FlipModel.forward` would
also compute the similarities of the micro-batch, which the loss over all processes does not need.
"""

from typing import Any

import torch
from torch import nn

from flip_hf.modeling import FlipModel
from flip_hf.modeling.modeling_flip import normalize
from flip_hf.training.packing import packed_attention_mask

IMAGE_INPUTS = ("patches", "pixel_values", "ids_keep", "mask_ratio", "interpolate_pos_encoding")


class PairEncoder(nn.Module):
    """Encodes images and texts.

    Weights stay in float32 and the towers run under autocast: the numbers are then the same with every wrapper.

    Args:
        flip: the model.
        autocast_dtype: what matrix products are computed in; None for the weights' own precision.
    """

    def __init__(self, flip: FlipModel, autocast_dtype: torch.dtype | None = None):
        super().__init__()
        self.flip, self.autocast_dtype = flip, autocast_dtype
        self._no_split_modules = flip._no_split_modules  # where FSDP2 cuts

    def autocast(self) -> torch.autocast:
        """The context that the towers run in."""
        return torch.autocast(self.flip.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def forward(self, **batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encodes the pairs of a micro-batch; the arguments are FlipModel's, with packed texts or padded ones.

        Returns:
            image_embeds (B, E) and text_embeds (B, E), normalised, and the factor on their cosines (1,); not below
            float32.
        """
        images = {name: batch.pop(name) for name in IMAGE_INPUTS if name in batch}
        image_embeds = self.get_image_features(**images).pooler_output
        text_embeds = self.get_text_features(**batch).pooler_output
        return _unit(image_embeds), _unit(text_embeds), self.flip.get_logit_scale()

    def get_image_features(self, **inputs: Any) -> Any:
        """FlipModel's, under autocast."""
        with self.autocast():
            return self.flip.get_image_features(**inputs)

    def get_text_features(self, **inputs: Any) -> Any:
        """FlipModel's, under autocast; of packed texts (see packing.py) in their order."""
        with self.autocast():
            if "pooled_tokens" not in inputs:
                return self.flip.get_text_features(**inputs)
            pooled_tokens, causal = inputs.pop("pooled_tokens"), self.flip.config.get_text_config().causal
            mask = packed_attention_mask(inputs["position_ids"], causal)
            outputs = self.flip.text_model(attention_mask=mask, **inputs)
            tokens = outputs.last_hidden_state.flatten(0, 1)  # (R * W, D)
            outputs.pooler_output = self.flip.text_projection(tokens[pooled_tokens])  # (B, E)
            return outputs


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    embeds = embeds if embeds.dtype == torch.float64 else embeds.float()
    return normalize(embeds)
