"""The files that are published beside weights on the Hub.

This folder is imported as `flip_hf.modeling` and under no other name: a second name would define every class twice,
and `isinstance` would then fail far from here.
"""

if __name__ != "flip_hf.modeling":
    raise ImportError(
        f"This folder was imported as {__name__!r}. Import `flip_hf.modeling` (or `flip_hf`) instead: a second import "
        "name would define every class twice."
    )

from .configuration_flip import FlipConfig, FlipTextConfig, FlipVisionConfig
from .configuration_pretraining_flip import FlipDecoderConfig, FlipPreTrainingConfig
from .image_processing_flip import FlipImageProcessor, FlipImageProcessorPil
from .modeling_flip import (
    FlipForImageClassification,
    FlipModel,
    FlipPreTrainedModel,
    FlipTextModel,
    FlipTextModelWithProjection,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)
from .pretraining_flip import FlipForPreTraining
from .processing_flip import FlipProcessor

__all__ = [
    "FlipConfig",
    "FlipDecoderConfig",
    "FlipForImageClassification",
    "FlipForPreTraining",
    "FlipImageProcessor",
    "FlipImageProcessorPil",
    "FlipModel",
    "FlipPreTrainedModel",
    "FlipPreTrainingConfig",
    "FlipProcessor",
    "FlipTextConfig",
    "FlipTextModel",
    "FlipTextModelWithProjection",
    "FlipVisionConfig",
    "FlipVisionModel",
    "FlipVisionModelWithProjection",
]
