"""Architectures that the questions about speed measure, and inputs that all candidates share."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, ViTMAEConfig, ViTMAEForPreTraining

from flip_hf import FlipConfig, FlipForPreTraining, FlipModel, FlipPreTrainingConfig
from flip_hf.benchmarks.names import ARCHITECTURES

VOCAB_SIZE = 30522
CONTEXT = 32
IMAGE_SIZE = 224
EOS = VOCAB_SIZE - 1  # the highest id, by which open_clip finds the end of a text
# Tokens of a caption, special ones included: log-normal, as of captions from the web; 16 on average.
MEDIAN_TOKENS = 14.5
SIGMA = 0.5
FEWEST_TOKENS = 4


def tower_fields(name: str) -> tuple[dict, dict, int]:
    """Configuration fields of the text and the vision tower that FLIP and CLIP share, and the shared embedding."""
    shape: dict[str, Any] = ARCHITECTURES[name]

    def fields(width: int, blocks: int, heads: int) -> dict:
        return {
            **{"hidden_size": width, "intermediate_size": 4 * width},
            **{"num_hidden_layers": blocks, "num_attention_heads": heads, "hidden_act": "gelu_pytorch_tanh"},
        }

    text = {**fields(*shape["text"]), "vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT}
    vision = {**fields(*shape["vision"]), "image_size": IMAGE_SIZE, "patch_size": shape["patch"]}
    return text, vision, shape["embed"]


def make_flip(name: str) -> FlipModel:
    """A new FlipModel of this architecture."""
    text, vision, embed = tower_fields(name)
    return FlipModel(FlipConfig(text_config=text, vision_config=vision, projection_dim=embed))


def make_clip(name: str) -> CLIPModel:
    """A new CLIPModel of the same shapes and activation."""
    text, vision, embed = tower_fields(name)
    text = {**text, "bos_token_id": EOS - 1, "eos_token_id": EOS, "pad_token_id": 0}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=embed))


def make_open_clip(name: str, context: int) -> Any:
    """A new open_clip CLIP of the same shapes, with open_clip's own activation (the exact GELU) and causal text."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # pyright: ignore[reportMissingImports]

    shape: dict[str, Any] = ARCHITECTURES[name]
    width, blocks, heads = shape["vision"]
    vision = CLIPVisionCfg(
        layers=blocks, width=width, head_width=width // heads, patch_size=shape["patch"], image_size=IMAGE_SIZE
    )
    width, blocks, heads = shape["text"]
    text = CLIPTextCfg(context_length=context, vocab_size=VOCAB_SIZE, width=width, heads=heads, layers=blocks)
    return CLIP(shape["embed"], vision, text, output_dict=True)


def make_mae(name: str, decoder_blocks: int, attention: str) -> FlipForPreTraining:
    """A new FlipForPreTraining on reconstruction alone, with MAE's decoder and activation.

    What MAE has not is frozen, and the text tower tiny.
    """
    vision = {**tower_fields(name)[1], "hidden_act": "gelu"}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    flip_config = FlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    decoder = {"num_hidden_layers": decoder_blocks}
    config = FlipPreTrainingConfig(flip_config=flip_config, decoder_config=decoder, objective="reconstruction")
    model: Any = FlipForPreTraining._from_config(config, attn_implementation=attention)
    model.requires_grad_(False)
    model.flip.vision_model.requires_grad_(True)
    model.decoder.requires_grad_(True)
    return model


def make_vit_mae(name: str, decoder_blocks: int, attention: str) -> ViTMAEForPreTraining:
    """A new ViTMAEForPreTraining of the same shapes and activation."""
    vision = {**tower_fields(name)[1], "hidden_act": "gelu"}
    config = ViTMAEConfig(**vision, decoder_num_hidden_layers=decoder_blocks, norm_pix_loss=True)
    return ViTMAEForPreTraining._from_config(config, attn_implementation=attention)


@dataclass(frozen=True)
class Inputs:
    """A batch of pairs on its device, the same for every candidate.

    Attributes:
        pixel_values: (B, 3, S, S), normalised.
        input_ids, attention_mask: (B, T), padded to the longest caption.
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def padded_ids(self, length: int) -> torch.Tensor:
        """Token ids (B, length), as tokenizers pad that know one length only."""
        return nn.functional.pad(self.input_ids, (0, length - self.input_ids.shape[1]))

    def describe(self) -> dict[str, float]:
        """Length of the captions: `text_tokens` with padding, `caption_tokens` without it, on average."""
        lengths = self.attention_mask.sum(dim=1).float()
        return {"text_tokens": self.input_ids.shape[1], "caption_tokens": round(lengths.mean().item(), 2)}


def make_inputs(batch_size: int, device: str) -> Inputs:
    """Random images, and captions whose lengths are the quantiles of their distribution, in random order.

    Quantiles and not draws: a small batch has the lengths of a large one.
    """
    generator = torch.Generator().manual_seed(0)
    quantiles = [NormalDist(0, SIGMA).inv_cdf((i + 0.5) / batch_size) for i in range(batch_size)]
    lengths = (MEDIAN_TOKENS * torch.tensor(quantiles).exp()).round().long().clamp(FEWEST_TOKENS, CONTEXT)
    lengths = lengths[torch.randperm(batch_size, generator=generator)]  # (B)
    attention_mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()  # (B, T)
    input_ids = torch.randint(1, EOS - 1, attention_mask.shape, generator=generator)
    input_ids[torch.arange(batch_size), lengths - 1] = EOS
    pixel_values = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return Inputs(*(value.to(device) for value in (pixel_values, input_ids * attention_mask, attention_mask)))
