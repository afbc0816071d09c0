"""The vision tower that a new model starts with: an MAE's, a FLIP's, or that of Transformers' ViTMAE."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ViTMAEConfig

from flip_hf.console.json_types import JsonObject
from flip_hf.console.loading import loading
from flip_hf.conversion.mae import convert_from_mae, vision_fields
from flip_hf.conversion.processors import find_image_processor
from flip_hf.modeling import (
    FlipConfig,
    FlipForPreTraining,
    FlipModel,
    FlipPreTrainedModel,
    FlipPreTrainingConfig,
    FlipVisionConfig,
    FlipVisionModel,
)

__all__ = ["find_image_processor", "load_tower", "tower_fields"]

# Fields that a tower's weights depend on; masks and the projection belong to the new model.
_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout"),
    *("pooling_type", "position_embedding_type", "use_pre_layernorm", "patch_embedding_bias"),
    *("use_class_token", "ignore_remainder"),
)


def tower_fields(source: str) -> JsonObject:
    """Reads the fields of the source's vision tower, for a `vision_config`.

    Raises:
        ValueError: the source cannot be read, or is a model of another kind.
    """
    config = _read_config(source)
    if isinstance(config, ViTMAEConfig):
        return vision_fields(config)
    if isinstance(config, FlipPreTrainingConfig):
        config = config.flip_config
    if isinstance(config, FlipConfig):
        config = config.vision_config
    if not isinstance(config, FlipVisionConfig):
        raise ValueError(
            f"--init_vision_from {source} is a checkpoint of type {config.model_type!r}; give a ViTMAE, a FlipModel, a "
            "FlipVisionModel or a FlipForPreTraining. `flip-hf convert` converts other models."
        )
    return {name: getattr(config, name) for name in _FIELDS}


def _read_config(source: str) -> PreTrainedConfig:
    with loading(source, "model of --init_vision_from"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _read_tower(source: str) -> FlipVisionModel:
    """Loads the source's vision tower.

    Raises:
        ValueError: weights are missing or damaged.
    """
    config = _read_config(source)
    if isinstance(config, ViTMAEConfig):
        with loading(source, "model of --init_vision_from"):
            return convert_from_mae(source).model  # pyright: ignore[reportReturnType] (without the decoder)
    classes: dict[type, type[FlipPreTrainedModel]] = {
        FlipVisionConfig: FlipVisionModel,
        FlipPreTrainingConfig: FlipForPreTraining,
    }
    model_class = classes.get(type(config), FlipModel)
    with loading(source, "model of --init_vision_from"):
        loaded: Any = model_class.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    model, report = loaded
    if isinstance(model, FlipVisionModel):
        tower = model
        missing = sorted(report["missing_keys"])
    else:
        tower = getattr(model, "flip", model).vision_model
        missing = sorted(name for name in report["missing_keys"] if "vision_model." in name)
    if missing:
        raise ValueError(f"--init_vision_from {source} has no weights for its vision tower's {missing[0]}.")
    return tower


def load_tower(flip: FlipModel, source: str) -> None:
    """Copies the weights of the source's vision tower into a new model.

    Raises:
        ValueError: the towers differ in shape.
    """
    theirs = _read_tower(source).state_dict()
    ours = flip.vision_model.state_dict()
    shapes = ({name: tuple(value.shape) for name, value in state.items()} for state in (theirs, ours))
    there, here = shapes
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"--vision_config does not fit the tower of --init_vision_from {source}: {name} is "
            f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here ({len(differing)} tensors differ). "
            "Leave these fields out; set other image and patch sizes by --image_size and --patch_size."
        )
    flip.vision_model.load_state_dict(theirs)
