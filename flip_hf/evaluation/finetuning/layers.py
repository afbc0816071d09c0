"""The layers of a tower that layer-wise learning rates count, as in BEiT's and MAE's fine-tuning."""

import re

_BLOCK = re.compile(r"(?:vision|text)_model\.encoder\.layers\.(\d+)\.")
_EMBEDDINGS = ("vision_model.embeddings.", "vision_model.pre_layernorm.", "text_model.embeddings.")


def layer_of(name: str, num_layers: int) -> int:
    """Returns the layer of a tower's parameter, counted from the input.

    0: the embeddings, of patches or tokens, with class token, positions and CLIP's LayerNorm after them; 1 to
    `num_layers`: the blocks; then the last LayerNorm and the projection, or the head of a classifier.

    Args:
        name: the parameter's name in a FlipModel or [`FlipForImageClassification`].
        num_layers: number of the tower's blocks.
    """
    block = _BLOCK.match(name)
    if block:
        return int(block[1]) + 1
    return 0 if name.startswith(_EMBEDDINGS) else num_layers + 1
