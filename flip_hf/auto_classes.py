"""The entries of Transformers' Auto classes; importing this module makes them, once in a process."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForTextEncoding,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flip_hf.modeling import (
    FlipConfig,
    FlipForImageClassification,
    FlipForPreTraining,
    FlipImageProcessor,
    FlipImageProcessorPil,
    FlipModel,
    FlipPreTrainingConfig,
    FlipProcessor,
    FlipTextConfig,
    FlipTextModel,
    FlipTextModelWithProjection,
    FlipVisionConfig,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)


def _register_auto_classes() -> None:
    """Makes the Auto classes know FLIP in this process."""
    for config_class in (FlipConfig, FlipTextConfig, FlipVisionConfig, FlipPreTrainingConfig):
        AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(FlipConfig, FlipModel)
    # Of several classes, Auto classes choose the one that the folder was saved by, or else the first.
    text_models: Any = (FlipTextModel, FlipTextModelWithProjection)
    vision_models: Any = (FlipVisionModel, FlipVisionModelWithProjection)
    AutoModel.register(FlipTextConfig, text_models)
    AutoModel.register(FlipVisionConfig, vision_models)
    AutoModelForTextEncoding.register(FlipTextConfig, FlipTextModel)
    AutoModelForZeroShotImageClassification.register(FlipConfig, FlipModel)
    AutoModelForImageClassification.register(FlipConfig, FlipForImageClassification)
    AutoModelForPreTraining.register(FlipPreTrainingConfig, FlipForPreTraining)
    AutoProcessor.register(FlipConfig, FlipProcessor)
    image_processors: dict[str, type] = {"pil": FlipImageProcessorPil, "torchvision": FlipImageProcessor}
    for config_class in (FlipConfig, FlipVisionConfig):
        AutoImageProcessor.register(config_class, image_processor_classes=dict(image_processors))


def _publish_code() -> None:
    """Makes `save_pretrained` put the modeling files beside the weights, for users without this package."""
    for config_class in (FlipConfig, FlipTextConfig, FlipVisionConfig, FlipPreTrainingConfig):
        config_class.register_for_auto_class()
    for model_class in (
        FlipModel,
        FlipTextModel,
        FlipTextModelWithProjection,
        FlipVisionModel,
        FlipVisionModelWithProjection,
    ):
        model_class.register_for_auto_class("AutoModel")
    FlipForImageClassification.register_for_auto_class("AutoModelForImageClassification")
    FlipForPreTraining.register_for_auto_class("AutoModelForPreTraining")
    FlipProcessor.register_for_auto_class("AutoProcessor")
    for image_processor_class in (FlipImageProcessor, FlipImageProcessorPil):
        image_processor_class.register_for_auto_class("AutoImageProcessor")


_register_auto_classes()
_publish_code()
