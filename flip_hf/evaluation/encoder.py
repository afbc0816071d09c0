"""Encoders for evaluation, from images and texts to features: any model like CLIP, or a vision tower alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flip_hf.console.loading import check_loaded, loading
from flip_hf.data.decode import bounded_shape, open_picture
from flip_hf.data.rendering import background_of
from flip_hf.evaluation.colours import colour_table, looked_up
from flip_hf.evaluation.zero_shot import TextInputs, normalized
from flip_hf.modeling import (
    FlipForPreTraining,
    FlipPreTrainingConfig,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)
from flip_hf.modeling.masking_flip import num_kept

# Places of images in their data set: (shard, row) of each.
Places = list[tuple[int, int]]
EncodeImages = Callable[[torch.Tensor, Places], torch.Tensor]


def keeps_aspect(image_processor: object) -> bool:
    """Returns whether an image processor resizes the short side to a given length, whatever the long side becomes."""
    size = getattr(image_processor, "size", None)
    if size is None:  # another library's: its pictures may have any shape
        return True
    sides = dict(size)
    return bool(sides.get("shortest_edge")) and not sides.get("longest_edge")


class ImageTransform:
    """Turns one image into (3, S, S) by a model's image processor; can be sent to loader workers.

    Images are PIL's, opened as by [`open_picture`], or arrays (H, W, C). One of extreme shape is first cropped to its
    centre, see [`bounded_shape`].

    Attributes:
        background: colour behind transparent parts.

    Raises:
        ValueError: the image processor's background is not a colour; or later, a PIL image is damaged.
    """

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor
        self.background = background_of(image_processor)
        self._colours = colour_table(self.image_processor, self._processed)

    def __call__(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        return self._processed(image)

    def pixels(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        """Returns an image as bytes (3, S, S), a quarter of the memory, for [`ImageTransform.normalize`].

        Of an image processor whose arithmetic is not known to act on each byte alone, they are normalised numbers.
        """
        if self._colours is None:
            return self._processed(image)
        return self._processed(image, do_rescale=False, do_normalize=False)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns bytes (B, 3, S, S) into what the model takes, on their device, to the bits of the image processor.

        Numbers are returned as they are.
        """
        if self._colours is None or pixels.dtype != torch.uint8:
            return pixels
        return looked_up(pixels, self._colours.to(pixels.device))

    def _processed(self, image: Image.Image | np.ndarray, **options: Any) -> torch.Tensor:
        if isinstance(image, Image.Image):
            image = open_picture(image, self.background)
        if keeps_aspect(self.image_processor) and isinstance(image, (Image.Image, np.ndarray)):
            image = bounded_shape(image)
        # Explicit, since a processor may have been saved without it, and would leave grey images (MNIST) grey.
        options["do_convert_rgb"] = True
        if isinstance(image, np.ndarray) and image.ndim == 3:  # else one of 1 or 3 rows passes for (C, H, W)
            options["input_data_format"] = "channels_last"
        return self.image_processor(images=image, return_tensors="pt", **options)["pixel_values"][0]


class Encoder:
    """A model and its processor.

    Args:
        model: has `get_image_features`, `get_text_features` and a `vision_model`: FlipModel, CLIPModel, SiglipModel. Or
            a FlipVisionModel, which has no texts: `images` and `texts` do not work with it.
        processor: has an image processor and a tokenizer; for a tower, its image processor.
        name: the folder or Hub id of both.

    Attributes:
        knows_texts: true for a model of images and texts.
        vision_model: its vision tower.
        image_processor: its image processor.
        transform: transform of an image, for the loader workers.
        text_inputs: tokenization of texts, if it has any.

    Raises:
        ValueError: the model is of another kind, or does not take plain images.
    """

    def __init__(self, model: Any, processor: Any, name: str = ""):
        self.knows_texts = not isinstance(model, FlipVisionModel)
        missing = [n for n in ("get_image_features", "get_text_features", "vision_model") if not hasattr(model, n)]
        if missing and self.knows_texts:
            raise ValueError(
                f"{name} holds a {type(model).__name__}, which has no {missing[0]}; give a model of images and texts, "
                "or a FLIP vision tower (`flip-hf convert vit-mae` converts a ViTMAE)."
            )
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name
        self.vision_model = model.vision_model if self.knows_texts else model
        self.image_processor = processor.image_processor if self.knows_texts else processor
        inputs = self.image_processor.model_input_names
        if list(inputs) != ["pixel_values"]:
            raise ValueError(f"{name} takes images as {', '.join(inputs)}. Give a model of one fixed image size.")
        self.transform = ImageTransform(self.image_processor)
        if self.knows_texts:
            self.text_inputs = TextInputs(processor.tokenizer, model.config)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        **kwargs: Any,
    ) -> "Encoder":
        """Loads model and processor from a folder or Hub id; of a FlipForPreTraining, only the vision tower.

        Args:
            name_or_path: the folder or id.
            device, dtype: device and precision of the model.
            kwargs: `revision`, `cache_dir`, `token` or `trust_remote_code`, for both.

        Raises:
            ModelUnreadable: there is no such folder or repository, or it is damaged or has no processor.
            ValueError: it is neither a complete model of images and texts nor a complete FLIP vision tower, or does not
                take plain images.
        """
        kwargs.setdefault("trust_remote_code", False)  # or Transformers asks at the terminal
        weights = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        with loading(name_or_path):
            config = AutoConfig.from_pretrained(name_or_path, **kwargs)
            model_class = FlipForPreTraining if isinstance(config, FlipPreTrainingConfig) else AutoModel
            loaded: Any = model_class.from_pretrained(name_or_path, **weights, **kwargs)
        model, report = loaded
        check_loaded(name_or_path, model, report)
        if isinstance(model, FlipForPreTraining):
            model = model.flip.vision_model
        elif isinstance(model, FlipVisionModelWithProjection):
            model = model.vision_model
        processor_class = AutoImageProcessor if isinstance(model, FlipVisionModel) else AutoProcessor
        with loading(name_or_path, "processor"):
            processor = processor_class.from_pretrained(name_or_path, **kwargs)
        model = model.to(device)  # pyright: ignore[reportArgumentType]
        return cls(model, processor, str(name_or_path))

    @property
    def knows_masks(self) -> bool:
        """True if it encodes parts of an image, as FlipModel does."""
        return hasattr(self.model.config, "mask_ratio")

    @property
    def vision_config(self) -> Any:
        """The vision tower's configuration."""
        return self.vision_model.config

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    def images(self, pixel_values: torch.Tensor, places: object = None, **masking: Any) -> torch.Tensor:
        """Returns normalised features (B, E) of images (B, 3, S, S); `masking` is passed to FlipModel.

        Here and in the methods below, images are what [`ImageTransform`] makes of them: numbers, or bytes.
        """
        pixel_values = self._values(pixel_values)
        return normalized(self.model.get_image_features(pixel_values=pixel_values, **masking).pooler_output)

    def _values(self, images: torch.Tensor) -> torch.Tensor:
        return self.transform.normalize(images).to(self.model.dtype)

    def trunk(self, pixel_values: torch.Tensor, places: object = None) -> torch.Tensor:
        """Returns features (B, D) of images before the projection, for linear probes as in CLIP's paper, section 3.2.

        They are pooled as the tower pools. For a tower trained by MAE that is FLIP's mean over all tokens: MAE's
        decoder reads them all, and its paper finds the mean as good as the class token (appendix A.1).
        """
        return self.vision_model(pixel_values=self._values(pixel_values)).pooler_output

    def class_token(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns the class token (B, D) of images after the last LayerNorm, as in MAE's linear probe.

        Raises:
            ValueError: the tower has no class token.
        """
        if getattr(self.vision_model.embeddings, "class_embedding", None) is None:
            raise ValueError(
                f"{type(self.model).__name__} has no class token, which MAE's probe needs; use --probe flip."
            )
        outputs = self.vision_model(pixel_values=self._values(pixel_values))
        if getattr(self.vision_config, "normalizes_tokens", False):
            return outputs.last_hidden_state[:, 0]
        if getattr(self.vision_config, "pooling_type", "cls") == "cls":
            return outputs.pooler_output
        return self.vision_model.post_layernorm(outputs.last_hidden_state[:, 0])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns normalised features (B, E) of B texts."""
        inputs = self.text_inputs(texts).to(self.model.device)
        return normalized(self.model.get_text_features(**inputs).pooler_output)


# -- masked inference (FLIP, Table 1d) ---------------------------------------------------------------------------------


def complementary_masks(places: Places, num_patches: int, mask_ratio: float, seed: int) -> torch.Tensor:
    """Draws patch indices (V, B, K) of the V disjoint views that cover an image: 2 at mask ratio 0.5, 4 at 0.75.

    Views are drawn for each image from the seed and its place, so that processes and batches do not matter. Where V
    does not divide the number of patches, no view sees the remainder.

    Raises:
        ValueError: a view would be the whole image, or empty.
    """
    kept = num_kept(num_patches, mask_ratio)
    if kept == num_patches:
        raise ValueError(
            f"A mask ratio of {mask_ratio} keeps {kept} of {num_patches} patches, which is not a masked view."
        )
    views = num_patches // kept
    drawn = [np.random.default_rng((seed, *place)).permutation(num_patches)[: views * kept] for place in places]
    ids = torch.from_numpy(np.stack(drawn)).unflatten(1, (views, kept))  # (B, V, K)
    return ids.sort(dim=2).values.transpose(0, 1)


def masked_images(encoder: Encoder, mask_ratio: float, *, ensemble: bool, seed: int = 0) -> EncodeImages:
    """Makes the encoding of FLIP's Table 1d: one masked view of each image, or the mean over complementary views.

    Args:
        encoder: the encoder of a FlipModel.
        mask_ratio: fraction of the patches dropped from a view.
        ensemble: use all views of an image, not only the first.
        seed: seed of the masks.

    Returns:
        A function from images (B, 3, S, S) and their places to normalised features (B, E).

    Raises:
        ValueError: the model is not a FlipModel.
    """
    if not encoder.knows_masks:
        raise ValueError(f"{type(encoder.model).__name__} encodes whole images only; convert it by `flip-hf convert`.")

    def encode(pixel_values: torch.Tensor, places: Places) -> torch.Tensor:
        masks = complementary_masks(places, encoder.num_patches, mask_ratio, seed).to(pixel_values.device)
        views = [encoder.images(pixel_values, ids_keep=ids) for ids in (masks if ensemble else masks[:1])]
        return nn.functional.normalize(torch.stack(views).mean(dim=0), dim=-1)

    return encode
