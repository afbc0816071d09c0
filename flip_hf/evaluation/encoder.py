"""Any model of CLIP's kind, or a vision tower alone, as evaluation uses it: images and texts to features."""

from collections.abc import Sequence
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
from flip_hf.evaluation.zero_shot import TextInputs, normalized
from flip_hf.modeling import (
    FlipForPreTraining,
    FlipPreTrainingConfig,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)


def keeps_aspect(image_processor: Any) -> bool:
    """Whether an image processor resizes the short side to a given length, however long the other one becomes."""
    size = getattr(image_processor, "size", None)
    if size is None:  # of another library: its pictures may be any
        return True
    sides = dict(size)
    return bool(sides.get("shortest_edge")) and not sides.get("longest_edge")


class ImageTransform:
    """One image to the (3, S, S) that a model's image processor makes of it; can be sent to loader workers.

    Images are PIL's, seen as [`open_picture`] sees them, or arrays (H, W, C). The centre of one of extreme shape is cut
    out first, see [`bounded_shape`].

    Attributes:
        background: of transparent parts.

    Raises:
        ValueError: the image processor names no colour as the background; or later, a PIL image is damaged.
    """

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor
        self.background = background_of(image_processor)

    def __call__(self, image: Any) -> torch.Tensor:
        if isinstance(image, Image.Image):
            image = open_picture(image, self.background)
        if keeps_aspect(self.image_processor) and isinstance(image, (Image.Image, np.ndarray)):
            image = bounded_shape(image)
        # Asked for by name: a processor may have been saved without it, and would leave grey images (MNIST) grey.
        options: dict[str, Any] = {"do_convert_rgb": True}
        if isinstance(image, np.ndarray) and image.ndim == 3:  # else one of 1 or 3 rows passes for (C, H, W)
            options["input_data_format"] = "channels_last"
        return self.image_processor(images=image, return_tensors="pt", **options)["pixel_values"][0]


class Encoder:
    """A model and its processor.

    Args:
        model: has `get_image_features`, `get_text_features` and a `vision_model`: FlipModel, CLIPModel, SiglipModel. Or
            a FlipVisionModel, which knows no texts: `images` and `texts` are not for it.
        processor: with an image processor and a tokenizer; a tower's is its image processor.
        name: the folder or Hub id that both came from.

    Attributes:
        knows_texts: whether it is a model of images and texts.
        vision_model: its vision tower.
        image_processor: of the processor.
        transform: what an image goes through, in the loader's processes.
        text_inputs: what texts go through, if it knows any.

    Raises:
        ValueError: the model is of another kind, or does not take plain images.
    """

    def __init__(self, model: Any, processor: Any, name: str = ""):
        self.knows_texts = not isinstance(model, FlipVisionModel)
        missing = [n for n in ("get_image_features", "get_text_features", "vision_model") if not hasattr(model, n)]
        if missing and self.knows_texts:
            raise ValueError(
                f"{name} holds a {type(model).__name__}, which has no {missing[0]}; give a model of images and texts, "
                "or a FLIP vision tower (`flip-hf convert vit-mae` makes one of a ViTMAE)."
            )
        self.model, self.processor, self.name = model.eval().requires_grad_(False), processor, name
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
        cls, name_or_path: str | Path, *, device: Any = "cpu", dtype: Any = torch.float32, **kwargs: Any
    ) -> "Encoder":
        """Loads model and processor from a folder or Hub id; of a FlipForPreTraining, the vision tower alone.

        Args:
            name_or_path: the folder or id.
            device, dtype: where the model goes, and its precision.
            kwargs: `revision`, `cache_dir`, `token` or `trust_remote_code`, for both.

        Raises:
            ModelUnreadable: there is no such folder or repository, it is damaged, or its processor was not saved with
                it.
            ValueError: it is neither a whole model of images and texts nor a whole vision tower of FLIP, or does not
                take plain images.
        """
        kwargs.setdefault("trust_remote_code", False)  # or Transformers asks at the terminal
        weights: Any = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        with loading(name_or_path):
            config = AutoConfig.from_pretrained(name_or_path, **kwargs)
            model_class: Any = FlipForPreTraining if isinstance(config, FlipPreTrainingConfig) else AutoModel
            model, report = model_class.from_pretrained(name_or_path, **weights, **kwargs)
        check_loaded(name_or_path, model, report)
        if isinstance(model, FlipForPreTraining):
            model = model.flip.vision_model
        elif isinstance(model, FlipVisionModelWithProjection):
            model = model.vision_model
        processor_class = AutoImageProcessor if isinstance(model, FlipVisionModel) else AutoProcessor
        with loading(name_or_path, "processor"):
            processor = processor_class.from_pretrained(name_or_path, **kwargs)
        return cls(model.to(device), processor, str(name_or_path))

    @property
    def knows_masks(self) -> bool:
        """Whether it encodes parts of an image, as FlipModel does."""
        return hasattr(self.model.config, "mask_ratio")

    @property
    def vision_config(self) -> Any:
        """Configuration of the vision tower."""
        return self.vision_model.config

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    def images(self, pixel_values: torch.Tensor, places: Any = None, **masking: Any) -> torch.Tensor:
        """Features (B, E), normalised, of images (B, 3, S, S); `masking` as FlipModel takes it."""
        pixel_values = pixel_values.to(self.model.dtype)
        return normalized(self.model.get_image_features(pixel_values=pixel_values, **masking).pooler_output)

    def trunk(self, pixel_values: torch.Tensor, places: Any = None) -> torch.Tensor:
        """Features (B, D) of images before the projection: what CLIP's linear probes see (CLIP paper, section 3.2).

        Pooled as the tower pools. Of a tower that MAE trained that is FLIP's mean over all tokens: MAE's decoder reads
        them all, and its paper finds the mean as good as the class token (appendix A.1).
        """
        return self.vision_model(pixel_values=pixel_values.to(self.model.dtype)).pooler_output

    def class_token(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The class token (B, D) of images after the last LayerNorm: what MAE's linear probe sees.

        Raises:
            ValueError: the tower has none.
        """
        if not hasattr(self.vision_model.embeddings, "class_embedding"):
            raise ValueError(
                f"{type(self.model).__name__} has no class token, which MAE's probe sees; use --probe flip."
            )
        outputs = self.vision_model(pixel_values=pixel_values.to(self.model.dtype))
        if getattr(self.vision_config, "pooling_type", "cls") == "mean":  # FLIP's, which normalises all tokens
            return outputs.last_hidden_state[:, 0]
        return outputs.pooler_output

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features (B, E), normalised."""
        inputs = self.text_inputs(texts).to(self.model.device)
        return normalized(self.model.get_text_features(**inputs).pooler_output)


# -- masked inference (FLIP, Table 1d) ---------------------------------------------------------------------------------


def complementary_masks(places: list[tuple[int, int]], num_patches: int, mask_ratio: float, seed: int) -> torch.Tensor:
    """Patches (V, B, K) of the V views that share an image out: 2 at a mask ratio of 0.5, 4 at 0.75.

    Views are drawn for each image from the seed and its place, so that processes and batches do not matter. What is
    left over, where V does not divide the patches, no view sees.

    Raises:
        ValueError: a view would be the whole image, or empty.
    """
    kept = int(num_patches * (1 - mask_ratio))
    if not 0 < kept < num_patches:
        raise ValueError(f"A mask ratio of {mask_ratio} keeps {kept} of {num_patches} patches: that is no masked view.")
    views = num_patches // kept
    drawn = [np.random.default_rng((seed, *place)).permutation(num_patches)[: views * kept] for place in places]
    ids = torch.from_numpy(np.stack(drawn)).unflatten(1, (views, kept))  # (B, V, K)
    return ids.sort(dim=2).values.transpose(0, 1)


def masked_images(encoder: Encoder, mask_ratio: float, *, ensemble: bool, seed: int = 0) -> Any:
    """Encodes images as FLIP's Table 1d does: one masked view of each, or the mean feature of complementary views.

    Args:
        encoder: of a FlipModel.
        mask_ratio: fraction of the patches that a view does not see.
        ensemble: all views of an image, instead of its first.
        seed: of the masks.

    Returns:
        Images (B, 3, S, S) and their places to features (B, E), normalised.

    Raises:
        ValueError: the model is another.
    """
    if not encoder.knows_masks:
        raise ValueError(
            f"{type(encoder.model).__name__} encodes whole images only; make a FlipModel of it with `flip-hf convert`."
        )

    def encode(pixel_values: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
        masks = complementary_masks(places, encoder.num_patches, mask_ratio, seed).to(pixel_values.device)
        views = [encoder.images(pixel_values, ids_keep=ids) for ids in (masks if ensemble else masks[:1])]
        return nn.functional.normalize(torch.stack(views).mean(dim=0), dim=-1)

    return encode
