"""A checkpoint's vision tower with a new head, for fine-tuning as an image classifier."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, CLIPConfig, PreTrainedConfig

from flip_hf.console.loading import loading
from flip_hf.modeling import (
    FlipConfig,
    FlipForImageClassification,
    FlipForPreTraining,
    FlipModel,
    FlipPreTrainingConfig,
    FlipVisionConfig,
    FlipVisionModel,
)

# MAE's: at the start the logits are nearly zero, and the head sends no noise into the tower.
HEAD_STD = 2e-5


def _load_tower(name: str, config: PreTrainedConfig) -> FlipVisionModel:
    """Loads the vision tower of any kind of FLIP folder, and nothing else of it.

    Raises:
        ValueError: the tower is not complete.
    """
    model_class = FlipForPreTraining if isinstance(config, FlipPreTrainingConfig) else FlipVisionModel
    with loading(name):
        loaded: Any = model_class.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    model, report = loaded
    missing = report["missing_keys"]
    if isinstance(model, FlipForPreTraining):
        missing = [each for each in missing if each.startswith("flip.vision_model.")]
        model = model.flip.vision_model
    if missing:
        raise ValueError(f"{name} has no complete vision tower: missing {sorted(missing)}.")
    return model


def make_classifier(name_or_path: str | Path, num_labels: int) -> FlipForImageClassification:
    """Makes a classifier of a checkpoint's vision tower and a new head, in float32; by itself it drops no patches.

    The head sees the mean of the patches after the tower's own last LayerNorm. MAE's code takes the mean first and
    applies a new LayerNorm; MAE's paper uses the class token, and finds the mean as good.

    Args:
        name_or_path: folder or Hub id of a FLIP model, one with MAE's decoder, a vision tower (for example converted
            from a ViTMAE) or a CLIPModel; safetensors only.
        num_labels: number of classes.

    Raises:
        ModelUnreadable: there is no such model, or it is damaged.
        ValueError: it has another architecture, or its vision tower is not complete.
    """
    name = str(name_or_path)
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if isinstance(config, CLIPConfig):
        with loading(name):
            flip = FlipModel.from_clip(name, dtype=torch.float32)
        config = flip.config
        tower = flip.vision_model
    elif isinstance(config, (FlipConfig, FlipVisionConfig, FlipPreTrainingConfig)):
        tower = _load_tower(name, config)
        if not isinstance(config, FlipConfig):
            config = FlipConfig(vision_config=tower.config)
    else:
        raise ValueError(
            f"{name} is a checkpoint of type {config.model_type!r}. Fine-tuning takes FLIP models and CLIPModels; "
            "`flip-hf convert` converts others."
        )
    config.num_labels = num_labels
    config.mask_ratio = 0.0
    model = FlipForImageClassification._from_config(config, dtype=torch.float32)
    model.vision_model.load_state_dict(tower.state_dict())
    head = model.classifier
    if isinstance(head, nn.Linear):  # there are labels
        nn.init.trunc_normal_(head.weight, std=HEAD_STD)
        nn.init.zeros_(head.bias)
    return model
