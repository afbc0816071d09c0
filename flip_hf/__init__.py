"""FLIP for the Hugging Face ecosystem: CLIP pre-training on masked images.

Importing this package registers the model with Transformers' Auto classes, so that `AutoModel.from_pretrained` and
`pipeline` accept a FLIP folder. It imports neither Transformers nor torch itself, which takes seconds: the names below
are loaded when they are used, and the classes are registered as soon as Transformers is imported (`registration.py`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flip_hf.registration import register_with_transformers

if TYPE_CHECKING:
    from flip_hf.evaluation.classifier import ZeroShotClassifier
    from flip_hf.modeling import (
        FlipConfig,
        FlipDecoderConfig,
        FlipForImageClassification,
        FlipForPreTraining,
        FlipImageProcessor,
        FlipImageProcessorPil,
        FlipModel,
        FlipPreTrainedModel,
        FlipPreTrainingConfig,
        FlipProcessor,
        FlipTextConfig,
        FlipTextModel,
        FlipTextModelWithProjection,
        FlipVisionConfig,
        FlipVisionModel,
        FlipVisionModelWithProjection,
    )

__version__ = "0.1.0.dev0"

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
    "ZeroShotClassifier",
]


def __getattr__(name: str) -> Any:
    """Loads a public class when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "flip_hf.evaluation.classifier" if name == "ZeroShotClassifier" else "flip_hf.modeling"
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    """Lists the public classes beside what is loaded."""
    return sorted({*globals(), *__all__})


register_with_transformers()
