"""A check that a model can fit into this machine's memory at all, before it is allocated."""

import os

from flip_hf.modeling import FlipConfig


def parameters_at_least(config: FlipConfig) -> int:
    """Counts the parameters of blocks and tables, which are nearly all, from the configuration alone."""
    total = 0
    for tower in (config.text_config, config.vision_config):
        block = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
        total += tower.num_hidden_layers * block + tower.hidden_size * tower.projection_dim
    text = config.text_config
    vision = config.vision_config
    positions = text.max_position_embeddings * text.hidden_size + vision.num_patches * vision.hidden_size
    patches = vision.num_channels * vision.patch_size**2 * vision.hidden_size
    return total + text.vocab_size * text.hidden_size + positions + patches


def check_memory(config: FlipConfig) -> None:
    """Checks that the weights alone, in float32, fit into the memory of this machine.

    Raises:
        ValueError: they do not.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count = parameters_at_least(config)
    if 4 * count > there:
        raise ValueError(
            f"A model of {count / 1e9:,.1f} billion parameters takes {4 * count / 1e9:,.0f} GB for its weights; this "
            f"machine has {there / 1e9:,.0f} GB. Check --vision_config and --text_config."
        )
