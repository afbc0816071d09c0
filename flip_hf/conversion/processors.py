"""Image processors and tokenizers of a conversion: taken over, or written in the other format's words."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_utils import PILImageResampling  # pyright: ignore[reportPrivateImportUsage]
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from flip_hf.conversion.tables import ConversionError
from flip_hf.modeling import FlipProcessor

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
RESAMPLING = {"bicubic": PILImageResampling.BICUBIC, "bilinear": PILImageResampling.BILINEAR}


def _found(kind: str, auto_class: Any, source: str, files: tuple[str, ...]) -> Any:
    """The source's image processor or tokenizer, or None with a warning."""
    reason = ""
    # Looked for first: without files, AutoTokenizer makes an empty tokenizer of the model's type.
    if not Path(source).is_dir() or any((Path(source) / name).is_file() for name in files):
        try:
            found = auto_class.from_pretrained(source)
            # Names of code beside the source's weights, which the result may not have.
            for fields in (found.__dict__, getattr(found, "init_kwargs", {})):
                fields.pop("auto_map", None)
            return found
        except (OSError, ValueError, KeyError) as error:
            reason = f" that can be loaded ({str(error).splitlines()[0]})"
    logger.warning("%s has no %s%s; the result has none either.", source, kind, reason)
    return None


def find_tokenizer(source: str, context_length: int) -> Any:
    """The tokenizer of a folder or Hub id, cut to the model's context; None with a warning if there is none."""
    tokenizer = _found("tokenizer", AutoTokenizer, source, TOKENIZER_FILES)
    if tokenizer is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, context_length)
    return tokenizer


def find_image_processor(source: str) -> Any:
    """The image processor of a folder or Hub id; None with a warning if there is none."""
    return _found("image processor", AutoImageProcessor, source, IMAGE_PROCESSOR_FILES)


def join(image_processor: Any, tokenizer: Any, processor_class: Any = FlipProcessor) -> Any:
    """A processor of both, or the one that there is, or None."""
    if image_processor is not None and tokenizer is not None:
        return processor_class(image_processor, tokenizer)
    return image_processor if image_processor is not None else tokenizer


def image_processor_from_open_clip(preprocess: Mapping[str, Any], image_size: int) -> CLIPImageProcessorPil:
    """The image processor of open_clip's `preprocess_cfg`.

    Raises:
        ConversionError: it resizes or interpolates in a way that CLIP's image processor has not.
    """
    mode, interpolation = preprocess.get("resize_mode", "shortest"), preprocess.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in RESAMPLING:
        raise ConversionError(
            f"The preprocessing has resize_mode {mode!r} and interpolation {interpolation!r}; only shortest and "
            "squash, bicubic and bilinear can be converted."
        )
    square = {"height": image_size, "width": image_size}
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size} if mode == "shortest" else square,
        crop_size=square,
        do_center_crop=mode == "shortest",
        resample=RESAMPLING[interpolation],
        image_mean=list(preprocess.get("mean", OPENAI_CLIP_MEAN)),
        image_std=list(preprocess.get("std", OPENAI_CLIP_STD)),
    )


def image_processor_to_open_clip(image_processor: Any, image_size: int) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` of an image processor of CLIP's kind.

    Raises:
        ConversionError: it is of another kind, such as the official FLIP's.
    """
    names = {resample: name for name, resample in RESAMPLING.items()}
    if not type(image_processor).__name__.startswith("CLIPImageProcessor") or image_processor.resample not in names:
        raise ConversionError(
            f"open_clip has no preprocessing like this model's image processor, {type(image_processor).__name__}."
        )
    return {
        "size": image_size,
        "mode": "RGB",
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
        "interpolation": names[image_processor.resample],
        "resize_mode": "shortest" if image_processor.do_center_crop else "squash",
    }
