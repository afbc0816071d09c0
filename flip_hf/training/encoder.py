"""The model as training calls it: a micro-batch in, the inputs of its losses out.

One module with one forward pass, so that every wrapper that gathers or reduces parameters around `forward`
(DistributedDataParallel, FSDP2, DeepSpeed) sees all of them used, including temperature and bias. `FlipModel.forward`
would also compute the similarities of the micro-batch, which the loss over all processes does not need.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from flip_hf.modeling import FlipForPreTraining, FlipModel
from flip_hf.modeling.modeling_flip import FlipEncoderLayer, normalize
from flip_hf.training.packing import packed_attention_mask

IMAGE_INPUTS = ("patches", "pixel_values", "ids_keep", "mask_ratio", "interpolate_pos_encoding", "grid")


class Embeddings(NamedTuple):
    """Embeddings of images and texts (B, E), the factor on their cosines and the bias (1,), or the gradients of all.

    The bias is None for the softmax loss, and there for the sigmoid loss.
    """

    images: torch.Tensor
    texts: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None = None


class Encoded(NamedTuple):
    """The inputs of a micro-batch's losses; a tuple, since FSDP2 looks for tensors only in those.

    Attributes:
        image_embeds, text_embeds: (B, E), normalised, float32 or wider; None where nothing is contrasted.
        logit_scale: the factor on their cosines, (1,); None where nothing is contrasted.
        logit_bias: added to the scaled cosines, (1,); None where nothing is contrasted, or by a softmax.
        reconstruction_loss: mean over the images, a scalar; None where nothing is reconstructed.
    """

    image_embeds: torch.Tensor | None
    text_embeds: torch.Tensor | None
    logit_scale: torch.Tensor | None
    logit_bias: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None

    @property
    def embeddings(self) -> Embeddings:
        """The embeddings that are contrasted, of a micro-batch with texts."""
        assert self.image_embeds is not None and self.text_embeds is not None and self.logit_scale is not None
        return Embeddings(self.image_embeds, self.text_embeds, self.logit_scale, self.logit_bias)


class PairEncoder(nn.Module):
    """Encodes images and texts, and reconstructs dropped patches where the model has a decoder.

    Weights stay in float32 and the towers run under autocast, so that the numbers are the same with every wrapper.

    Args:
        model: a FlipModel, or a [`FlipForPreTraining`] whose `config.objective` is trained on.
        autocast_dtype: dtype of matrix products; None for the weights' own precision.
    """

    def __init__(self, model: FlipModel | FlipForPreTraining, autocast_dtype: torch.dtype | None = None):
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast_dtype
        self._no_split_modules = model._no_split_modules  # where FSDP2 cuts
        self.train(model.training)

    def train(self, mode: bool = True) -> "PairEncoder":
        """Sets the mode; frozen blocks stay in evaluation mode, so without dropout: they cannot adapt to it."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, FlipEncoderLayer) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    @property
    def flip(self) -> FlipModel:
        """The FlipModel, without a decoder."""
        return flip_of(self.model)

    def autocast(self) -> torch.autocast:
        """Returns the context that the towers run in."""
        return torch.autocast(self.model.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def forward(self, target_patches: torch.Tensor | None = None, **batch: Any) -> Encoded:
        """Encodes a micro-batch; the arguments are FlipModel's, with packed texts or padded ones.

        Args:
            target_patches: (B, L, C * P * P), all patches of the images, normalised, to be reconstructed; None skips
                the decoder.
            batch: inputs of the model; without texts, nothing is contrasted.
        """
        images = {name: batch.pop(name) for name in IMAGE_INPUTS if name in batch}
        if "input_ids" not in batch:
            with self.autocast():
                vision = self.flip.vision_model(**images)
            return Encoded(None, None, None, reconstruction_loss=self._reconstruct(vision, target_patches))
        vision = self.get_image_features(**images)
        texts = self.get_text_features(**batch)
        bias = self.flip.logit_bias
        bias = None if bias is None else bias.clone()  # the parameter itself would be logged after its update
        embeds = (_unit(vision.pooler_output), _unit(texts.pooler_output), self.flip.get_logit_scale(), bias)
        # Last, so that a pass without it draws the same dropout up to here.
        return Encoded(*embeds, None if target_patches is None else self._reconstruct(vision, target_patches))

    def _reconstruct(self, vision: Any, target_patches: Any) -> torch.Tensor:
        model: Any = self.model
        with self.autocast():
            predicted = model.reconstruct(vision.last_hidden_state, vision.ids_keep)
        return model.reconstruction_loss(predicted, target_patches, vision.ids_keep)

    def get_image_features(self, **inputs: Any) -> Any:
        """Calls FlipModel's method under autocast."""
        with self.autocast():
            return self.flip.get_image_features(**inputs)

    def get_text_features(self, **inputs: Any) -> Any:
        """Calls FlipModel's method under autocast; unpacks packed texts (see packing.py), in their order."""
        with self.autocast():
            if "pooled_tokens" not in inputs:
                return self.flip.get_text_features(**inputs)
            pooled_tokens = inputs.pop("pooled_tokens")
            causal = self.flip.config.get_text_config().causal
            mask = packed_attention_mask(inputs["position_ids"], causal)
            outputs = self.flip.text_model(attention_mask=mask, **inputs)
            tokens = outputs.last_hidden_state.flatten(0, 1)  # (R * W, D)
            outputs.pooler_output = self.flip.text_projection(tokens[pooled_tokens])  # (B, E)
            return outputs


def flip_of(model: FlipModel | FlipForPreTraining) -> FlipModel:
    """Returns the FlipModel of a model with or without a decoder."""
    return model.flip if isinstance(model, FlipForPreTraining) else model


def recompute_activations(model: PreTrainedModel, options: dict[str, Any] | None = None) -> None:
    """Makes the blocks recompute their activations in backward: less memory, more time.

    Args:
        model: any FLIP model.
        options: for `torch.utils.checkpoint.checkpoint`, such as `{"use_reentrant": False}`; Transformers' defaults if
            absent.
    """
    # Transformers 5.24 has renamed the call and warns of the old name.
    renamed = getattr(model, "activation_checkpointing_enable", None)
    enable: Any = renamed or model.gradient_checkpointing_enable
    enable(options)


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    embeds = embeds if embeds.dtype == torch.float64 else embeds.float()
    return normalize(embeds)
