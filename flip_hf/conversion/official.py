"""Converts the official FLIP checkpoints (JAX, T5X) to FlipModel.

The facts about the format were observed on the released code: kernels are (in, out), the four of attention are
two-dimensional, the class token has no position, and the text tower attends to its padding.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from flip_hf.conversion.folder import Converted, card_data
from flip_hf.conversion.sizes import check_fields, configuring
from flip_hf.conversion.t5x import T5XCheckpoint
from flip_hf.conversion.tables import (
    FLAT,
    HWIO,
    ROWS,
    SAME,
    TRANSPOSED,
    ConversionError,
    Entry,
    blocks,
    check_names,
    load,
    shapes_of,
    to_ours,
)
from flip_hf.conversion.word_pieces import official_pieces, word_piece_tokenizer
from flip_hf.modeling import FlipConfig, FlipImageProcessorPil, FlipModel, FlipProcessor

BLOCK = [
    *(
        Entry(f"{theirs}/{leaf}", f"{ours}.{name}")
        for theirs, ours in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2"))
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    ),
    *(
        Entry(f"{theirs}/{leaf}", f"{ours}.{name}", layout)
        for theirs, ours in (
            ("MultiHeadDotProductAttention_0/query", "self_attn.q_proj"),
            ("MultiHeadDotProductAttention_0/key", "self_attn.k_proj"),
            ("MultiHeadDotProductAttention_0/value", "self_attn.v_proj"),
            ("MultiHeadDotProductAttention_0/out", "self_attn.out_proj"),
            ("MlpBlock_0/Dense_0", "mlp.fc1"),
            ("MlpBlock_0/Dense_1", "mlp.fc2"),
        )
        for leaf, name, layout in (("kernel", "weight", TRANSPOSED), ("bias", "bias", SAME))
    ),
]
VISION = [
    Entry("img_encoder/cls", "vision_model.embeddings.class_embedding", FLAT),
    Entry("img_encoder/embedding/kernel", "vision_model.embeddings.patch_embedding.weight", HWIO),
    Entry("img_encoder/embedding/bias", "vision_model.embeddings.patch_embedding.bias"),
    Entry("img_encoder/posembed_encoder/pos_embedding", "vision_model.embeddings.position_embedding.weight", ROWS),
    Entry("img_encoder/Transformer/encoder_norm/scale", "vision_model.post_layernorm.weight"),
    Entry("img_encoder/Transformer/encoder_norm/bias", "vision_model.post_layernorm.bias"),
    Entry("img_mlp1/kernel", "visual_projection.weight", TRANSPOSED),
]
TEXT = [
    Entry("txt_encoder/token_embedding/embedding", "text_model.embeddings.token_embedding.weight"),
    Entry("txt_encoder/posembed_encoder/pos_embedding", "text_model.embeddings.position_embedding.weight", ROWS),
    Entry("txt_encoder/Transformer/encoder_norm/scale", "text_model.final_layer_norm.weight"),
    Entry("txt_encoder/Transformer/encoder_norm/bias", "text_model.final_layer_norm.bias"),
    Entry("txt_mlp1/kernel", "text_projection.weight", TRANSPOSED),
]
PROJECTION_BIAS = [Entry("img_mlp1/bias", "visual_projection.bias"), Entry("txt_mlp1/bias", "text_projection.bias")]
LOGIT_SCALE = Entry("logit_scale", "logit_scale")
# Blocks and width of the vision tower, blocks and width of the text tower; the name, and the heads of both, which
# cannot be inferred from the arrays.
RELEASED: dict[tuple[int, ...], tuple[str, int, int]] = {
    (24, 1024, 12, 768): ("ViT-L/16", 16, 12),
    (32, 1280, 24, 1024): ("ViT-H/14", 16, 16),
}
# A checkpoint without a learned temperature was trained at 0.01.
FIXED_LOGIT_SCALE = math.log(100)
CARD = """\
The official [FLIP](https://arxiv.org/abs/2212.00794) weights (Li et al., "Scaling Language-Image Pre-training via
Masking", CVPR 2023; [facebookresearch/flip](https://github.com/facebookresearch/flip)), converted from JAX with
`flip-hf convert`. The model computes what the official one does on whole images, with the official word
pieces and the official evaluation's resize.

```python
from transformers import pipeline
import flip_hf  # makes Transformers know FLIP

classify = pipeline("zero-shot-image-classification", model="PATH_OF_THIS_FOLDER")
classify("photo.jpg", candidate_labels=["a cat", "a dog"], hypothesis_template="a photo of {}.")
```

**Licence: CC-BY-NC 4.0**, that of the official weights: no commercial use. The code in this folder is Apache-2.0.
"""


def _num_blocks(names: Iterable[str], tower: str) -> int:
    prefix = f"{tower}/Transformer/encoderblock_"
    return len({name[len(prefix) :].split("/")[0] for name in names if name.startswith(prefix)})


def entries_of(names: Iterable[str]) -> list[Entry]:
    """Returns the table for a checkpoint with these names, according to its numbers of blocks and its options.

    Raises:
        ConversionError: there are names of other architectures, or some are missing.
    """
    names = set(names)
    counts = [_num_blocks(names, tower) for tower in ("img_encoder", "txt_encoder")]
    entries = [
        *VISION,
        *blocks(BLOCK, "img_encoder/Transformer/encoderblock_{:02d}/", "vision_model.encoder.layers.{}.", counts[0]),
        *TEXT,
        *blocks(BLOCK, "txt_encoder/Transformer/encoderblock_{:02d}/", "text_model.encoder.layers.{}.", counts[1]),
    ]
    if any(entry.theirs in names for entry in PROJECTION_BIAS):
        entries += PROJECTION_BIAS
    if LOGIT_SCALE.theirs in names:
        entries.append(LOGIT_SCALE)
    return entries


# Number of dimensions of the parameters from which the configuration is read.
_RANKS = {
    "img_encoder/posembed_encoder/pos_embedding": 3,
    "img_encoder/embedding/kernel": 4,
    "txt_encoder/token_embedding/embedding": 2,
    "txt_encoder/posembed_encoder/pos_embedding": 3,
    "img_mlp1/kernel": 2,
    "img_encoder/Transformer/encoderblock_00/MlpBlock_0/Dense_0/kernel": 2,
    "txt_encoder/Transformer/encoderblock_00/MlpBlock_0/Dense_0/kernel": 2,
}


def _check_ranks(shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, rank in _RANKS.items():
        if name not in shapes:
            raise ConversionError(f"There is no {name}, which determines the sizes of the model.")
        if len(shapes[name]) != rank:
            raise ConversionError(f"{name} has the shape {tuple(shapes[name])}, expected {rank} dimensions.")


def _heads(option: str, given: int | None, known: int | None, width: int) -> int | None:
    """Returns the attention heads of a tower: those given, or the known ones, or None if there are neither."""
    if given is None:
        return known
    if type(given) is not int or given < 1 or width % given:
        raise ConversionError(
            f"{option} {given!r:.40} is not a number of attention heads for the width {width}: it must be a positive "
            "whole number that divides the width."
        )
    return given


def _tower(shapes: Mapping[str, tuple[int, ...]], tower: str) -> dict[str, int]:
    width, hidden = shapes[f"{tower}/Transformer/encoderblock_00/MlpBlock_0/Dense_0/kernel"]
    return {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": _num_blocks(shapes, tower)}


def _image_size(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Returns the sides of an image and of a patch, in pixels.

    Raises:
        ConversionError: the patches do not form a square grid.
    """
    num_patches = shapes["img_encoder/posembed_encoder/pos_embedding"][1] - 1
    grid = math.isqrt(num_patches)
    patch_size = shapes["img_encoder/embedding/kernel"][0]
    if num_patches < 1 or grid**2 != num_patches:
        raise ConversionError(f"The {num_patches} image positions are not those of a square grid of patches.")
    return grid * patch_size, patch_size


def config_of(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    image_pooling: str = "mean",
    text_pooling: str = "first",
) -> FlipConfig:
    """Infers the configuration of an official checkpoint from the shapes of its parameters.

    Args:
        shapes: shape of every parameter, by official name.
        vision_heads, text_heads: numbers of attention heads; known for the released sizes.
        image_pooling: `"mean"` as released, or `"cls"`.
        text_pooling: `"first"` as released, or `"mean"`.

    Raises:
        ConversionError: the heads are not known or do not divide the width, the positions are not a square grid, or
            sizes are out of range.
    """
    _check_ranks(shapes)
    vision = _tower(shapes, "img_encoder")
    text = _tower(shapes, "txt_encoder")
    sizes = tuple(tower[name] for tower in (vision, text) for name in ("num_hidden_layers", "hidden_size"))
    _, known_vision, known_text = RELEASED.get(sizes, (None, None, None))
    vision_heads = _heads("--vision_heads", vision_heads, known_vision, vision["hidden_size"])
    text_heads = _heads("--text_heads", text_heads, known_text, text["hidden_size"])
    if vision_heads is None or text_heads is None:
        raise ConversionError(
            f"This checkpoint has neither of the released sizes: {vision['num_hidden_layers']} blocks of width "
            f"{vision['hidden_size']} for images, {text['num_hidden_layers']} of {text['hidden_size']} for text. The "
            "arrays do not reveal the number of attention heads: give --vision_heads and --text_heads."
        )
    image_size, patch_size = _image_size(shapes)
    vocab_size, _ = shapes["txt_encoder/token_embedding/embedding"]
    fields = {
        "text_config": {
            **text,
            "num_attention_heads": text_heads,
            "vocab_size": vocab_size,
            "max_position_embeddings": shapes["txt_encoder/posembed_encoder/pos_embedding"][1],
            "pooling_type": text_pooling,
            "attend_to_padding": True,
        },
        "vision_config": {
            **vision,
            "num_attention_heads": vision_heads,
            "image_size": image_size,
            "patch_size": patch_size,
            "num_channels": shapes["img_encoder/embedding/kernel"][2],
            "pooling_type": image_pooling,
        },
        "projection_dim": shapes["img_mlp1/kernel"][1],
        "projection_bias": "img_mlp1/bias" in shapes,
    }
    check_fields(fields, "The checkpoint")
    with configuring("The checkpoint"):
        return FlipConfig(**fields)


def read_official(path: str | Path, **options: Any) -> FlipModel:
    """Reads an official checkpoint as a FlipModel, float32.

    Args:
        path: a T5X checkpoint folder, or a folder or zip with one somewhere inside.
        options: options of [`config_of`].

    Raises:
        ConversionError: see [`T5XCheckpoint`], [`entries_of`] and [`config_of`].
    """
    checkpoint = T5XCheckpoint(path)
    entries = entries_of(checkpoint)
    check_names((entry.theirs for entry in entries), checkpoint, str(path))
    config = config_of({name: checkpoint.shape(name) for name in checkpoint}, **options)
    shapes = shapes_of(FlipModel, config)
    fixed_temperature = LOGIT_SCALE.theirs not in checkpoint
    if fixed_temperature:
        del shapes[LOGIT_SCALE.theirs]
    tensors = to_ours(entries, checkpoint, shapes, what=str(path))
    if fixed_temperature:
        tensors["logit_scale"] = torch.full((1,), FIXED_LOGIT_SCALE)
    # The official class token has no position; the row reserved for it may hold anything.
    tensors["vision_model.embeddings.position_embedding.weight"][0] = 0
    return load(FlipModel, config, tensors)


def convert_official(path: str | Path, vocab: str, **options: Any) -> Converted:
    """Converts an official checkpoint to a complete model: weights, processor, card.

    Args:
        path, options: see [`read_official`].
        vocab: the vocabulary's file, or a Hub repository with a `vocab.txt`.
    """
    model = read_official(path, **options)
    text = model.config.text_config
    vision = model.config.vision_config
    sizes = vision.num_hidden_layers, vision.hidden_size, text.num_hidden_layers, text.hidden_size
    name, *_ = RELEASED.get(sizes, (None,))
    pieces = official_pieces(vocab, text.vocab_size, released=name is not None)
    tokenizer = word_piece_tokenizer(pieces, context_length=text.max_position_embeddings)
    size = {"height": vision.image_size, "width": vision.image_size}
    return Converted(
        model=model,
        processor=FlipProcessor(FlipImageProcessorPil(size=size), tokenizer),
        title=f"FLIP {name}, official weights" if name else "FLIP, from a checkpoint in the official format",
        about=CARD,
        data=card_data(license="cc-by-nc-4.0", datasets=["laion/laion2B-en"] if name else None, language="en"),
    )
