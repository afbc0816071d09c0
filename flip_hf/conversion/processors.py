"""Carries image processors and tokenizers over in a conversion, or translates them to the other format."""

import logging
import os
from enum import IntEnum
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling  # pyright: ignore[reportPrivateImportUsage]
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.errors import ConversionError, reason
from flip_hf.conversion.files import check_file, parse_json, read_file
from flip_hf.conversion.pretrained import local_folder
from flip_hf.conversion.sentence_pieces import has_siglip_tokenizer, read_siglip_tokenizer
from flip_hf.conversion.sizes import number, whole_number
from flip_hf.modeling import FlipProcessor

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# Other files that Transformers may open.
OTHER_FILES = (
    *("config.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
    *("chat_template.json", "video_preprocessor_config.json", "sentencepiece.bpe.model", "tokenizer.model"),
)
CHAT_TEMPLATES = "additional_chat_templates"
# The largest tokenizers, with 250,000 pieces, have 35 MB.
MAX_FILE_BYTES = 128 * 2**20
MAX_CONFIG_BYTES = 8 * 2**20
RESAMPLING = {"bicubic": PILImageResampling.BICUBIC, "bilinear": PILImageResampling.BILINEAR}
MAX_SIDE = 2**13


def _check_files(folder: Path) -> None:
    """Checks all files that Transformers may open for a processor.

    Raises:
        ConversionError: one is not a regular file inside the folder, is too large, or is not a JSON object.
    """
    names = (*TOKENIZER_FILES, *IMAGE_PROCESSOR_FILES, *OTHER_FILES)
    templates = (folder / CHAT_TEMPLATES).glob("*") if (folder / CHAT_TEMPLATES).is_dir() else ()
    for path in (*(folder / name for name in names), *templates):
        if not os.path.lexists(path):
            continue
        if path.name.endswith("_config.json"):
            config = parse_json(read_file(path, MAX_CONFIG_BYTES, root=folder), str(path))
            for field in ("fast_tokenizer_files", "model_input_names"):
                names = config.get(field) or []
                # Transformers chooses one of these files by its version; none may be in another folder.
                if not isinstance(names, list) or any(not isinstance(n, str) or Path(n).name != n for n in names):
                    raise ConversionError(f"{path}: {field} must be a list of plain names, got {names!r:.200}.")
        else:
            check_file(path, MAX_FILE_BYTES, root=folder)


def _found(
    kind: str, auto_class: type[AutoTokenizer] | type[AutoImageProcessor], source: str, files: tuple[str, ...]
) -> Any:
    """Returns the source's image processor or tokenizer, or None with a warning.

    Raises:
        ConversionError: its files are damaged or need code from outside Transformers.
    """
    # Check for files first: without them, AutoTokenizer makes an empty tokenizer of the model's type.
    folder = None if Path(source).is_file() else local_folder(source, (*files, *OTHER_FILES))
    there = [name for name in files if folder is not None and os.path.lexists(folder / name)]
    if folder is None or not there:
        logger.warning("%s has no %s, so the result has none either.", source, kind)
        return None
    _check_files(folder)
    if auto_class is AutoTokenizer and has_siglip_tokenizer(folder):
        return read_siglip_tokenizer(folder)
    try:
        found = auto_class.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions, Transformers nearly every type
        raise ConversionError(
            f"The {kind} of {source} cannot be loaded ({reason(error)}). Fix {', '.join(there)}, or remove all of its "
            "files to convert the model without it."
        ) from error
    # Drop names of code beside the source's weights, which the result must not have.
    for fields in (found.__dict__, getattr(found, "init_kwargs", {})):
        fields.pop("auto_map", None)
    return found


def find_tokenizer(source: str, context_length: int) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer of a folder or Hub id, limited to the model's context; None with a warning if there is none.

    Raises:
        ConversionError: the tokenizer is damaged.
    """
    tokenizer = _found("tokenizer", AutoTokenizer, source, TOKENIZER_FILES)
    if tokenizer is not None:
        length = tokenizer.model_max_length
        if type(length) not in (int, float) or length < 1 or length != int(length):
            raise ConversionError(f"{source}: the tokenizer's model_max_length is {length!r:.80}, not a whole number.")
        tokenizer.model_max_length = min(length, context_length)
    return tokenizer


def find_image_processor(source: str) -> Any:
    """Loads the image processor of a folder or Hub id; None with a warning if there is none.

    Raises:
        ConversionError: the image processor is damaged.
    """
    found = _found("image processor", AutoImageProcessor, source, IMAGE_PROCESSOR_FILES)
    if found is not None:
        _check_image_processor(found, f"{source}: the image processor's")
    return found


def _check_image_processor(found: object, what: str) -> None:
    """Checks the values of an image processor.

    Raises:
        ConversionError: a size, a mean, a deviation or a switch is invalid.
    """
    for name in ("size", "crop_size"):
        for side in dict(getattr(found, name, None) or {}).values():
            if side is not None:
                whole_number(f"{what} {name}", side, MAX_SIDE)
    for name, least in (("image_mean", -1e4), ("image_std", 1e-6)):
        values = getattr(found, name, None)
        if values is not None and (not isinstance(values, (list, tuple)) or len(values) not in (1, 3)):
            raise ConversionError(f"{what} {name} must be three numbers, got {values!r:.80}.")
        for value in values or ():
            number(f"{what} {name}", value, least, 1e4)
    for name, value in vars(found).items():
        _check_switch(f"{what} {name}", name, value)


def _check_switch(where: str, name: str, value: object) -> None:
    if value is None:
        return
    if name.startswith("do_") and type(value) is not bool:
        raise ConversionError(f"{where} must be true or false, got {value!r:.80}.")
    if name == "rescale_factor":
        number(where, value, 0.0, 1e4)
    if name == "resample":
        whole_number(where, int(value) if isinstance(value, IntEnum) else value, 5, least=0)


def join(
    image_processor: BaseImageProcessor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    processor_class: type[ProcessorMixin] = FlipProcessor,
) -> ProcessorMixin | BaseImageProcessor | PreTrainedTokenizerBase | None:
    """Returns a processor of both, or the one that exists, or None."""
    if image_processor is not None and tokenizer is not None:
        return processor_class(image_processor, tokenizer)
    return image_processor if image_processor is not None else tokenizer


def image_processor_from_open_clip(preprocess: JsonObject, image_size: int) -> CLIPImageProcessorPil:
    """Converts open_clip's `preprocess_cfg` to an image processor.

    Raises:
        ConversionError: it resizes or interpolates in a way that CLIP's image processor does not support, or a mean or
            deviation is not a number.
    """
    for name, least in (("mean", -1e4), ("std", 1e-6)):
        values = preprocess.get(name, OPENAI_CLIP_MEAN)
        if not isinstance(values, (list, tuple)) or len(values) != 3:
            raise ConversionError(f"The preprocessing's {name} must be three numbers, got {values!r:.80}.")
        for value in values:
            number(f"The preprocessing's {name}", value, least, 1e4)
    mode = preprocess.get("resize_mode", "shortest")
    interpolation = preprocess.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in (*RESAMPLING,):
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


def image_processor_to_open_clip(image_processor: Any, image_size: int) -> JsonObject:
    """Converts an image processor of CLIP's kind to open_clip's `preprocess_cfg`.

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
