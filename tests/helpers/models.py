"""Tiny models."""

import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from flip_hf import FlipConfig

IMAGE_SIZE = 32
PATCH_SIZE = 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2


def tiny_config(text: dict | None = None, vision: dict | None = None, **kwargs) -> FlipConfig:
    """Two blocks a tower; other fields as given."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FlipConfig(
        text_config={**size, "vocab_size": 600, "max_position_embeddings": 16, **(text or {})},
        vision_config={**size, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **(vision or {})},
        **{"projection_dim": 24, **kwargs},
    )


def randomize(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Moves every trainable parameter off its initial value: biases and norms count then."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return model


def tiny_clip(eos_token_id: int) -> CLIPModel:
    size = {"intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"vocab_size": 100, "hidden_size": 48, "max_position_embeddings": 20, "eos_token_id": eos_token_id}
    vision = {"hidden_size": 64, "image_size": 48, "patch_size": 16}
    config = CLIPConfig(
        text_config={**size, **text, "bos_token_id": 98, "pad_token_id": 99},
        vision_config={**size, **vision},
        projection_dim=40,
    )
    return randomize(CLIPModel(config), std=0.05).eval()


def tiny_siglip(image_size: int = 48, attention: str = "sdpa") -> SiglipModel:
    """Towers of 3 and 2 blocks, a context of 12 tokens, patches of 16 pixels."""
    size = {"hidden_size": 40, "intermediate_size": 96, "num_attention_heads": 4}
    text = {"vocab_size": 100, "num_hidden_layers": 2, "max_position_embeddings": 12, "projection_size": 64}
    vision = {**size, "hidden_size": 64, "num_hidden_layers": 3, "image_size": image_size, "patch_size": 16}
    config = SiglipConfig(text_config={**size, **text}, vision_config=vision)
    config._attn_implementation = attention
    return randomize(SiglipModel(config), std=0.05).eval()


DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
