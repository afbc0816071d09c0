"""FLIP with MAE's reconstruction beside the contrastive loss (FLIP, table 1f; He et al., CVPR 2022, arXiv 2111.06377).

One mask and one pass of the encoder serve both losses: the contrastive one uses the pooled feature of the visible
patches, the decoder their tokens. The decoder is discarded after training: `model.flip` is a plain FlipModel.

Letters: B samples, L patches, K kept patches, D the vision tower's width, W the decoder's, C channels, P patch side.
"""

# No `from __future__ import annotations` here, as in the other published files.
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack  # pyright: ignore[reportAttributeAccessIssue]
from transformers.utils.generic import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_pretraining_flip import OBJECTIVES, FlipPreTrainingConfig
from .decoder_flip import FlipDecoder
from .masking_flip import cut_patches
from .modeling_flip import FlipModel, FlipPreTrainedModel, FlipVisionOutput


@dataclass
class FlipForPreTrainingOutput(ModelOutput):
    """Output of [`FlipForPreTraining`]; entries that the objective does not need are None.

    Args:
        loss: scalar, the training loss: the contrastive loss, plus the weighted reconstruction loss.
        contrastive_loss: scalar, of this batch.
        reconstruction_loss: scalar, unweighted.
        logits_per_image: (images, texts), float32, as from [`FlipModel`].
        logits_per_text: (texts, images), its transpose.
        reconstruction: (B, L, C * P * P), all predicted patches, in the layout of `cut_patches`; with
            `norm_pixel_target` each on the scale of its own mean and standard deviation.
        ids_keep: (B, K), the visible patches in raster order; None if all were.
        text_model_output: the text tower's output.
        vision_model_output: the vision tower's output; `pooler_output` is projected where images and texts
            are compared.
    """

    loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    ids_keep: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: FlipVisionOutput | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes mean and standard deviation (B, L, 1) of each patch's pixels (B, L, C * P * P).

    The variance is unbiased, and 1e-6 is added to it, as in MAE's code.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def _check_dropped(ids_keep: torch.Tensor | None, num_patches: int) -> torch.Tensor:
    """Returns the visible patches (B, K) as indices to scatter by.

    Raises:
        ValueError: all patches are visible.
    """
    if ids_keep is None or ids_keep.shape[1] >= num_patches:
        raise ValueError(
            f"Nothing to reconstruct: all {num_patches} patches are visible. Pass mask_ratio above 0, or ids_keep, or "
            "set config.flip_config.mask_ratio."
        )
    return ids_keep.long()


class FlipForPreTraining(FlipPreTrainedModel):
    """A FlipModel with a decoder, for training, that reconstructs the patches dropped by the mask.

    A training loop with its own contrastive loss, such as one over several processes, calls the parts:

    ```python
    >>> images = model.flip.get_image_features(pixel_values, mask_ratio=0.5)  # the only pass of the encoder
    >>> reconstruction = model.reconstruct(images.last_hidden_state, images.ids_keep)
    >>> loss = model.reconstruction_loss(reconstruction, cut_patches(pixel_values, 16), images.ids_keep)
    ```
    """

    config: FlipPreTrainingConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["FlipTextEmbeddings", "FlipVisionEmbeddings", "FlipEncoderLayer", "FlipDecoder"]
    _published_as = {"AutoModelForPreTraining": "FlipForPreTraining"}

    def __init__(self, config: FlipPreTrainingConfig):
        super().__init__(config)
        self.flip = FlipModel._from_config(config.flip_config)
        self.decoder = FlipDecoder._from_config(config.decoder_config, vision_config=config.flip_config.vision_config)
        self.post_init()

    @classmethod
    def from_flip(cls, flip: FlipModel, **kwargs: Any) -> "FlipForPreTraining":
        """Wraps a FlipModel, which is not copied: training one trains the other. The decoder is new.

        Args:
            flip: the FlipModel, with `config.mask_ratio` above 0 for training.
            kwargs: fields of [`FlipPreTrainingConfig`].
        """
        model = cls._from_config(
            FlipPreTrainingConfig(flip_config=flip.config, **kwargs),
            dtype=flip.dtype,
            attn_implementation=flip.config._attn_implementation,
        )
        model.flip = flip
        model.config.flip_config = flip.config
        return model.to(flip.device).train(flip.training)  # pyright: ignore[reportArgumentType]

    def reconstruct(self, last_hidden_state: torch.Tensor, ids_keep: torch.Tensor | None) -> torch.Tensor:
        """Predicts all patches of images from the visible ones.

        Args:
            last_hidden_state: (B, 1 + K, D), from the vision tower; (B, K, D) without a class token.
            ids_keep: (B, K), the patches that it encodes.

        Returns:
            (B, L, C * P * P), in the layout of `cut_patches`.

        Raises:
            ValueError: all patches are visible, or the tower was resized.
        """
        tower = self.flip.vision_model
        if tower.config.num_patches != self.decoder.side**2:
            raise ValueError(
                f"The vision tower was resized to {tower.config.num_patches} patches after its decoder of "
                f"{self.decoder.side**2} was made. Make a new one with FlipForPreTraining.from_flip."
            )
        ids_keep = _check_dropped(ids_keep, tower.config.num_patches)
        if not tower.config.normalizes_tokens:
            last_hidden_state = tower.post_layernorm(last_hidden_state)
        return self.decoder(last_hidden_state, ids_keep)

    def reconstruction_loss(
        self,
        reconstruction: torch.Tensor,
        target_patches: torch.Tensor,
        ids_keep: torch.Tensor | None,
        per_image: bool = False,
    ) -> torch.Tensor:
        """Computes the mean squared error on the dropped patches, in float32 or above.

        Args:
            reconstruction: (B, L, C * P * P), from [`~FlipForPreTraining.reconstruct`].
            target_patches: (B, L, C * P * P), all patches of the images, flattened as by `cut_patches`.
            ids_keep: (B, K), the visible patches.
            per_image: return a loss for each image, (B,), instead of the mean.

        Raises:
            ValueError: the targets are not all patches, or all patches are visible.
        """
        if target_patches.shape != reconstruction.shape:
            raise ValueError(
                f"The targets must be all {self.decoder.side**2} patches of each image, of shape "
                f"{tuple(reconstruction.shape)}, got {tuple(target_patches.shape)}."
            )
        ids_keep = _check_dropped(ids_keep, reconstruction.shape[1])
        dtype = torch.promote_types(reconstruction.dtype, torch.float32)
        target = target_patches.to(reconstruction.device, dtype)
        if self.config.norm_pixel_target:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        errors = (reconstruction.to(dtype) - target).pow(2).mean(dim=-1)  # (B, L)
        dropped = torch.ones_like(errors).scatter(1, ids_keep, 0)
        losses = (errors * dropped).sum(dim=1) / dropped.sum(dim=1)  # (B)
        return losses if per_image else losses.mean()

    def _check_objective(self, objective: str | None, input_ids: torch.Tensor | None) -> str:
        """Returns the objective of this call.

        Raises:
            ValueError: there is no such objective, or it lacks texts.
        """
        objective = self.config.objective if objective is None else objective
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")
        if objective != "reconstruction" and input_ids is None:
            raise ValueError(f"{objective=} compares images with texts: pass input_ids, or objective='reconstruction'.")
        return objective

    def _targets(self, pixel_values: torch.Tensor | None, target_patches: torch.Tensor | None) -> torch.Tensor:
        """Returns all patches of the images, (B, L, C * P * P).

        Raises:
            ValueError: they are given twice or not at all.
        """
        if pixel_values is not None and target_patches is None:
            return cut_patches(pixel_values, self.flip.vision_model.config.patch_size)
        if pixel_values is None and target_patches is not None:
            return target_patches
        raise ValueError(
            "With patches, which are the visible ones, pass target_patches, all patches of each image; with "
            "pixel_values, leave it out."
        )

    def _mask_ratio(self, objective: str, chosen: bool) -> float | None:
        """Returns the default fraction of patches dropped: for a reconstruction, images are always masked."""
        return None if chosen or objective == "contrastive" else self.flip.vision_model.config.mask_ratio

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        mask_ratio: float | None = None,
        ids_keep: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        target_patches: torch.Tensor | None = None,
        objective: str | None = None,
        reconstruction_weight: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlipForPreTrainingOutput:
        """Compares the visible patches with texts, reconstructs the dropped ones, or both.

        Args:
            pixel_values, ids_keep, patches: see [`FlipVisionModel`].
            input_ids, attention_mask: see [`FlipTextModel`]; not read for `objective="reconstruction"`.
            mask_ratio: fraction of the patches dropped in this call. If absent: the configuration's, also in evaluation
                mode where patches are reconstructed; for `objective="contrastive"` as in [`FlipVisionModel`].
            return_loss: also return the losses; the contrastive one needs as many texts as images, paired.
            target_patches: (B, L, C * P * P), with `patches`: all patches, flattened as by `cut_patches`.
            objective: `"contrastive"`, `"reconstruction"` or `"both"`; `config.objective` if absent.
            reconstruction_weight: weight where both are added; `config.reconstruction_weight` if absent.

        Raises:
            ValueError: there is no such objective, it lacks texts or targets, or no patch is dropped.
        """
        objective = self._check_objective(objective, input_ids)
        if mask_ratio is None:
            mask_ratio = self._mask_ratio(objective, chosen=ids_keep is not None or patches is not None)
        images = {"pixel_values": pixel_values, "mask_ratio": mask_ratio, "ids_keep": ids_keep, "patches": patches}
        if objective == "reconstruction":
            vision = self.flip.vision_model(**images, return_dict=True, **kwargs)
            found: dict[str, Any] = {}
        else:
            texts = {"input_ids": input_ids, "attention_mask": attention_mask}
            pairs = self.flip(**texts, **images, return_loss=return_loss, return_dict=True, **kwargs)
            vision = pairs.vision_model_output
            found = {name: pairs[name] for name in ("logits_per_image", "logits_per_text", "text_model_output")}
            found["loss"] = found["contrastive_loss"] = pairs.loss
        if objective != "contrastive":
            found["reconstruction"] = self.reconstruct(vision.last_hidden_state, vision.ids_keep)
        if objective != "contrastive" and return_loss:
            targets = self._targets(pixel_values, target_patches)
            loss = self.reconstruction_loss(found["reconstruction"], targets, vision.ids_keep)
            weight = self.config.reconstruction_weight if reconstruction_weight is None else reconstruction_weight
            found["reconstruction_loss"] = loss
            found["loss"] = (
                loss if objective == "reconstruction" else found["loss"] + weight * loss.to(found["loss"].device)
            )
        return FlipForPreTrainingOutput(**found, ids_keep=vision.ids_keep, vision_model_output=vision)


__all__ = ["FlipForPreTraining"]
