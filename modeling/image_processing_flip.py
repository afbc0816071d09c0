"""Image processors of the official FLIP: the whole short side, and TensorFlow's legacy bicubic resize.

Checkpoints trained here use Transformers' CLIP image processors. The official ones were evaluated with a different
resampling, which neither Pillow nor torch offers: no half-pixel shift, no antialiasing, a = -0.75, weights from a table
of 1,024 steps, and values that are neither clipped nor rounded. An antialiased resize is off by 2 to 18 grey levels.

As in Transformers, there is one image processor on Pillow and NumPy, and one on torchvision, which takes batches and
also runs on a GPU. `AutoImageProcessor` gives the latter where torchvision is installed. Their normalised pixels differ
by less than 1e-5.
"""

# No `from __future__ import annotations` here, as in the other published files.
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import PILImageResampling
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.import_utils import requires_backends

ImageT = TypeVar("ImageT", np.ndarray, torch.Tensor)

CUBIC_A = -0.75
TABLE_STEPS = 1024


def square_crop(image: ImageT) -> ImageT:
    """Crops images (..., H, W), an array or a tensor, to the central square; the larger uneven margin comes first."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top = (height - side + 1) // 2
    left = (width - side + 1) // 2
    return image[..., top : top + side, left : left + side]


def _cubic_weights(offset: np.ndarray) -> np.ndarray:
    """Computes weights (..., 4) of the four neighbours of a point that is `offset` / 1024 past the second of them."""

    def near(x: np.ndarray) -> np.ndarray:  # a neighbour less than one pixel away
        return ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:  # a neighbour one to two pixels away
        return ((CUBIC_A * x - 5 * CUBIC_A) * x + 8 * CUBIC_A) * x - 4 * CUBIC_A

    x = offset / TABLE_STEPS
    return np.stack([far(1 + x), near(x), near(1 - x), far(2 - x)], axis=-1)


@lru_cache(maxsize=64)
def _taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the four input pixels (out, 4) of each output pixel along one axis, and their weights (out, 4)."""
    # Positions in float32, like the reference: in float64 some would fall on the next step of the table.
    positions = np.arange(size_out, dtype=np.float32) * (np.float32(size_in) / np.float32(size_out))
    first = np.floor(positions)
    weights = _cubic_weights(np.rint((positions - first) * np.float32(TABLE_STEPS)).astype(np.float64))
    indices = np.clip(first[:, None].astype(np.int64) + np.arange(-1, 3), 0, size_in - 1)
    return indices, weights.astype(np.float32)


def legacy_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an image (C, H, W) to (C, height, width), float32, as `tf.compat.v1.image.resize_bicubic` does.

    The result is not clipped: values from about -25 to 280 occur at sharp edges.
    """
    image = image.astype(np.float32)
    rows, row_weights = _taps(image.shape[1], height)
    columns, column_weights = _taps(image.shape[2], width)
    resized = np.zeros((image.shape[0], image.shape[1], width), dtype=np.float32)
    for tap in range(4):
        resized += image[:, :, columns[:, tap]] * column_weights[:, tap]
    result = np.zeros((image.shape[0], height, width), dtype=np.float32)
    for tap in range(4):
        result += resized[:, rows[:, tap]] * row_weights[:, tap, None]
    return result


def legacy_bicubic_tensor(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes images (..., C, H, W) to (..., C, height, width) on their device, as [`legacy_bicubic`] does."""
    images = images.float()
    rows, row_weights = (torch.from_numpy(taps).to(images.device) for taps in _taps(images.shape[-2], height))
    columns, column_weights = (torch.from_numpy(taps).to(images.device) for taps in _taps(images.shape[-1], width))
    resized = images.new_zeros(*images.shape[:-1], width)
    for tap in range(4):
        resized += images[..., columns[:, tap]] * column_weights[:, tap]
    result = images.new_zeros(*images.shape[:-2], height, width)
    for tap in range(4):
        result += resized[..., rows[:, tap], :] * row_weights[:, tap, None]
    return result


class OfficialDefaults:
    """Base of both image processors: the official evaluation's settings, and their publication."""

    size = {"height": 224, "width": 224}
    default_to_square = True
    # Both are unused, but Transformers requires them with the switches: the crop is the whole short side, taken before
    # the resize, and the resize is the legacy bicubic.
    resample = PILImageResampling.BICUBIC
    crop_size = {"height": 224, "width": 224}
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields to save; where code is published, with the classes of both backends."""
        fields = super().to_dict()  # pyright: ignore[reportAttributeAccessIssue]
        if "auto_map" in fields:
            module = type(self).__module__.split(".")[-1]
            backends = {"pil": f"{module}.FlipImageProcessorPil", "torchvision": f"{module}.FlipImageProcessor"}
            fields["auto_map"] = {"AutoImageProcessor": backends}
        return fields


class FlipImageProcessorPil(OfficialDefaults, PilBackend):
    r"""Makes `pixel_values` of images as in the official evaluation: the central square, a legacy bicubic resize,
    ImageNet statistics. On Pillow and NumPy.

    Args:
        size: `{"height": H, "width": W}` of the result, in pixels.
        do_center_crop: whether to crop to the central square first; otherwise the image is squeezed.
        do_resize, do_rescale, rescale_factor, do_normalize, image_mean, image_std, do_convert_rgb: as in
            `CLIPImageProcessor`.
    """

    def _preprocess(  # noqa: PLR0913  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images,
        do_resize,
        size,
        do_center_crop,
        do_rescale,
        rescale_factor,
        do_normalize,
        image_mean,
        image_std,
        return_tensors,
        **kwargs,
    ) -> BatchFeature:
        """Processes images (C, H, W) of any sizes."""
        pixel_values = []
        for image in images:
            if do_center_crop:
                image = square_crop(image)
            if do_resize:
                image = legacy_bicubic(image, size.height, size.width)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            pixel_values.append(np.asarray(image, dtype=np.float32))
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


class FlipImageProcessor(OfficialDefaults, TorchvisionBackend):
    r"""Makes the `pixel_values` of [`FlipImageProcessorPil`] with torchvision: in batches, on any device.

    Args:
        size, do_center_crop, do_resize, ...: as in [`FlipImageProcessorPil`].

    Raises:
        ImportError: torchvision is not installed.
    """

    def __init__(self, **kwargs):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def _preprocess(  # noqa: PLR0913  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images,
        do_resize,
        size,
        do_center_crop,
        do_rescale,
        rescale_factor,
        do_normalize,
        image_mean,
        image_std,
        disable_grouping,
        return_tensors,
        **kwargs,
    ) -> BatchFeature:
        """Processes images (C, H, W), grouped by size."""
        groups, places = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, stack in groups.items():  # (N, C, H, W)
            if do_center_crop:
                stack = square_crop(stack)
            if do_resize:
                stack = legacy_bicubic_tensor(stack, size.height, size.width)
            stack = self.rescale_and_normalize(stack, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            groups[shape] = stack
        return BatchFeature(data={"pixel_values": reorder_images(groups, places)}, tensor_type=return_tensors)


__all__ = ["FlipImageProcessor", "FlipImageProcessorPil"]
