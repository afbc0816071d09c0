"""A checkpoint's vision tower with a new head, to be fine-tuned as an image classifier."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, CLIPConfig

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

# MAE's: at the start, the logits are next to nothing and the head sends no noise into the tower.
HEAD_STD = 2e-5


def _load_tower(name: str, config: Any) -> FlipVisionModel:
    """The vision tower of a FLIP folder of any kind; what else lies there is left.

    Raises:
        ValueError: it is not complete.
    """
    model_class = FlipForPreTraining if isinstance(config, FlipPreTrainingConfig) else FlipVisionModel
    options: Any = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    with loading(name):
        loaded: Any = model_class.from_pretrained(name, **options)
    model, report = loaded
    missing = report["missing_keys"]
    if isinstance(model, FlipForPreTraining):
        missing = [each for each in missing if each.startswith("flip.vision_model.")]
        model = model.flip.vision_model
    if missing:
        raise ValueError(f"{name} has no complete vision tower: missing {sorted(missing)}.")
    return model


def make_classifier(name_or_path: str | Path, num_labels: int) -> FlipForImageClassification:
    """A classifier with a checkpoint's vision tower and a new head, in float32; it drops no patches by itself.

    The head sees the mean of the patches behind the tower's own last LayerNorm. MAE's code takes the mean first and
    gives it a new LayerNorm; MAE's paper has the class token, and finds the mean as good.

    Args:
        name_or_path: folder or Hub id of a FLIP model, one with MAE's decoder, a vision tower (converted from a ViTMAE,
            say) or a CLIPModel; safetensors only.
        num_labels: classes.

    Raises:
        ModelUnreadable: there is none, or it is damaged.
        ValueError: it is another architecture, or the vision tower is not complete.
    """
    name = str(name_or_path)
    with loading(name):
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if isinstance(config, CLIPConfig):
        with loading(name):
            flip = FlipModel.from_clip(name, dtype=torch.float32)
        config, tower = flip.config, flip.vision_model
    elif isinstance(config, (FlipConfig, FlipVisionConfig, FlipPreTrainingConfig)):
        tower = _load_tower(name, config)
        if not isinstance(config, FlipConfig):
            config = FlipConfig(vision_config=tower.config)
    else:
        raise ValueError(
            f"{name} is a checkpoint of type {config.model_type!r}. Fine-tuning takes FLIP models and CLIPModels; "
            "`flip-hf convert` makes FLIP models of others."
        )
    config.num_labels, config.mask_ratio = num_labels, 0.0
    model = FlipForImageClassification._from_config(config, dtype=torch.float32)
    model.vision_model.load_state_dict(tower.state_dict())
    head: Any = model.classifier
    nn.init.trunc_normal_(head.weight, std=HEAD_STD)
    nn.init.zeros_(head.bias)
    return model
