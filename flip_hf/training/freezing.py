"""Frozen parts of the towers (`--freeze`), which keep the weights that they start with.

A whole tower is frozen with its projection, so that its embeddings stay as they are: LiT's locked tower (Zhai et al.,
CVPR 2022, arXiv 2111.07991), and open_clip's `--lock-image` and `--lock-text`. Autograd records nothing of what has no
trainable weight below it, so a frozen tower, or its first blocks, keep no activations and have no backward pass.

Options are read without torch, as all of arguments.py.
"""

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flip_hf.console.fields import OptionError, require
from flip_hf.console.ranges import integer

if TYPE_CHECKING:
    from torch import nn

    from flip_hf.modeling import FlipConfig, FlipModel
    from flip_hf.training.arguments import Arguments, ModelArguments

# Of a tower, the number of frozen blocks below which all is frozen, too; None for the whole tower.
Frozen = Mapping[str, int | None]
TOWERS = ("image", "text")
_BLOCKS = integer(1, 4096, says="must be {range}", note="leave the tower out to train all of it")


def read_frozen(values: Sequence[str] | None) -> dict[str, int | None]:
    """Reads the parts that `--freeze` names, such as `image` or `text:6`, by tower; None names none.

    Raises:
        OptionError: there is no such tower, one is named twice, or a number of blocks is not positive.
    """
    frozen: dict[str, int | None] = {}
    for value in values or ():
        tower, colon, count = value.partition(":")
        require(tower in TOWERS, f"--freeze takes image, text, or their first blocks as image:8, got {value!r}.")
        require(tower not in frozen, f"--freeze names the {tower} tower twice, {' '.join(values or ())}; name it once.")
        try:
            frozen[tower] = int(_BLOCKS(count)) if colon else None
        except ArgumentTypeError as error:
            raise OptionError(f"--freeze {value}: the number of blocks {error}") from None
    return frozen


def check_trained_parts(arguments: "Arguments") -> None:
    """Checks that what is frozen has weights to keep, and what has a learning rate of its own is trained.

    Raises:
        OptionError: a frozen tower would be new or unused, nothing would learn, or a learning rate is of no use.
    """
    model = arguments.model
    objective = arguments.objective
    frozen = read_frozen(model.freeze)
    for tower in frozen:
        require_weights(model, tower, f"--freeze {tower}")
    require(
        objective.contrasts or ("text" not in frozen and arguments.optimization.text_lr_scale == 1),
        "--freeze text and --text_lr_scale are about texts, and --objective reconstruction reads none. Leave them out.",
    )
    whole = [tower for tower, blocks in frozen.items() if blocks is None]
    require(
        "image" not in whole or not objective.reconstructs,
        f"With --freeze image, --objective {objective.objective} would train nothing but the decoder on the "
        "reconstruction. Freeze the first blocks alone, as image:8, or set --objective contrastive.",
    )
    require(
        len(whole) < 2,
        "--freeze image text leaves nothing to train but the temperature. Freeze one of the towers, or the first "
        "blocks alone, as image:8.",
    )
    for tower in whole:
        factor = getattr(arguments.optimization, f"{tower}_lr_scale")
        require(
            factor == 1 or model.model_name_or_path is None,  # the projection beside --init_vision_from is trained
            f"--{tower}_lr_scale {factor:g} is the learning rate of what --freeze {tower} freezes. Leave one of them "
            "out.",
        )


def require_weights(model: "ModelArguments", tower: str, option: str) -> None:
    """Checks that a tower, whose own weights an option keeps, starts with weights of a model.

    Raises:
        OptionError: it would be new.
    """
    is_image = tower == "image"
    names = "--model_name_or_path or --init_vision_from" if is_image else "--model_name_or_path"
    require(
        model.model_name_or_path is not None or (is_image and model.init_vision_from is not None),
        f"{option} would keep the random weights of a new {tower} tower. Name the model to start from with {names}, or "
        "leave it out.",
    )


def check_depth(frozen: Frozen, config: "FlipConfig") -> None:
    """Checks that the towers have as many blocks as are frozen.

    Raises:
        OptionError: one has fewer.
    """
    depths = {
        "image": config.vision_config.num_hidden_layers,
        "text": config.text_config.num_hidden_layers,
    }
    for tower, blocks in frozen.items():
        require(
            blocks is None or blocks <= depths[tower],
            f"--freeze {tower}:{blocks}: the {tower} tower has {depths[tower]} blocks. Give at most so many, or "
            f"{tower} for the whole tower with its projection.",
        )


def freeze(flip: "FlipModel", frozen: Frozen, new_projection: bool = False) -> None:
    """Freezes parts of a model.

    Args:
        flip: the model.
        frozen: the parts, from [`read_frozen`].
        new_projection: the image tower's projection is new, beside a loaded tower, and is trained.
    """
    for tower, blocks in frozen.items():
        for module in _modules(flip, tower, blocks, with_projection=not (tower == "image" and new_projection)):
            module.requires_grad_(False)


def in_words(flip: "FlipModel", frozen: Frozen) -> str:
    """Says in a sentence what of a model is frozen."""
    names = []
    for tower, blocks in frozen.items():
        projection = flip.visual_projection if tower == "image" else flip.text_projection
        trained = [parameter.requires_grad for parameter in projection.parameters()]
        if blocks is not None:
            first = f"{blocks} blocks" if blocks > 1 else "block"
            names.append(f"the embeddings and the first {first} of the {tower} tower")
        elif not trained:  # as SigLIP's image tower, which has no projection
            names.append(f"the {tower} tower")
        else:
            names.append(f"the {tower} tower {'without its new' if any(trained) else 'with its'} projection")
    total = sum(parameter.numel() for parameter in flip.parameters())
    parts = [part for each in frozen.items() for part in _modules(flip, *each, with_projection=True)]
    of_parts = [parameter for part in parts for parameter in part.parameters()]
    fixed = sum(parameter.numel() for parameter in of_parts if not parameter.requires_grad)
    return f"Frozen: {', '.join(names)}; {fixed:,} of {total:,} parameters."


def _modules(flip: "FlipModel", tower: str, blocks: int | None, with_projection: bool) -> list["nn.Module"]:
    """Lists the modules of a tower that are frozen."""
    model: Any = flip.vision_model if tower == "image" else flip.text_model
    if blocks is None:
        projection = flip.visual_projection if tower == "image" else flip.text_projection
        return [model, projection] if with_projection else [model]
    norm = getattr(model, "pre_layernorm", None)  # CLIP's, between the embeddings and the first block
    return [model.embeddings, *([norm] if norm is not None else []), *model.encoder.layers[:blocks]]
