"""Continuing from a saved model at another image or patch size: 224 to 336, or the paper's L/14 from its L/16."""

from transformers.image_processing_utils import BaseImageProcessor

from flip_hf.modeling import FlipConfig, FlipVisionConfig
from flip_hf.training.arguments import ModelArguments


def new_sizes(model: ModelArguments, config: FlipConfig) -> dict[str, int]:
    """Returns the `image_size` and `patch_size` of a run that continues from the model of `config`.

    Raises:
        huggingface_hub.errors.StrictDataclassError: the patches do not fill the image, or the mask keeps none of them.
    """
    sizes = {name: getattr(model, name) or getattr(config.vision_config, name) for name in ("image_size", "patch_size")}
    ignores = config.vision_config.ignore_remainder and not (model.image_size or model.patch_size)
    FlipVisionConfig(**sizes, mask_ratio=model.mask_ratio, ignore_remainder=ignores)
    return sizes


def resized_image_processor(image_processor: BaseImageProcessor, image_size: int) -> BaseImageProcessor:
    """Returns the image processor for images of this size; the same object if it already fits.

    If it resizes the short side to more than the crop, it still does, in proportion. SigLIP's resizes to a square and
    crops nothing.
    """
    fields = image_processor.to_dict()
    crop = fields.get("crop_size")
    old = (crop or fields["size"])["height"]
    if old == image_size:
        return image_processor
    square = {"height": image_size, "width": image_size}
    edge = fields["size"].get("shortest_edge")
    size = square if edge is None else {"shortest_edge": round(edge * image_size / old)}
    sizes = {"size": size} if crop is None else {"size": size, "crop_size": square}
    resized = type(image_processor).from_dict(fields, **sizes)
    return resized  # pyright: ignore[reportReturnType] (a tuple only with return_unused_kwargs)
