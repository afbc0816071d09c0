"""Wraps a model for the page: classifies images, finds images for a text, shows masks and reconstructions."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig
from transformers.image_processing_utils import BaseImageProcessor

from flip_hf.console.loading import loading
from flip_hf.data.texts import bound_text
from flip_hf.evaluation.encoder import Encoder, ImageTransform
from flip_hf.evaluation.reconstruction import grey_out, load_pretraining, reconstruct, to_colours, visible_pixels
from flip_hf.evaluation.reconstruction_error import draw_masks
from flip_hf.evaluation.templates import resolve_templates
from flip_hf.evaluation.zero_shot import check_alternatives, class_embeddings, label_probabilities
from flip_hf.modeling import FlipForPreTraining, FlipPreTrainingConfig, FlipProcessor

# Sets of labels whose embeddings are cached, because a visitor mostly changes the mask.
LABEL_SETS = 32


class DemoModel:
    """A FlipModel, a CLIPModel, or a FlipForPreTraining.

    Args:
        title: the model's name on the page.
        encoder: encodes images and texts; None if the text tower is untrained.
        pretraining: the model with its decoder, or None.
        image_processor: the model's image processor.

    Raises:
        ValueError: the model does not treat labels as alternatives (SigLIP).
    """

    def __init__(
        self,
        title: str,
        encoder: Encoder | None,
        pretraining: FlipForPreTraining | None,
        image_processor: BaseImageProcessor,
    ):
        if encoder is not None:
            check_alternatives(encoder.model)
        self.title = title
        self.encoder = encoder
        self.pretraining = pretraining
        self.transform = ImageTransform(image_processor)
        self._label_embeddings = lru_cache(maxsize=LABEL_SETS)(self._embed_labels)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, title: str | None = None) -> "DemoModel":
        """Loads model and processor from a folder or Hub id, onto a GPU if there is one.

        Args:
            name_or_path: the folder or id.
            title: the model's name on the page; by default the id, or the folder's name.

        Raises:
            ModelUnreadable: there is no such folder or repository, it is damaged, or it has no processor.
            ValueError: it is neither a complete model of images and texts nor one with a decoder.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        path = Path(name_or_path)
        title = title or (path.name if path.is_absolute() else str(name_or_path))
        with loading(name_or_path):
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        if isinstance(config, FlipPreTrainingConfig):
            pretraining, image_processor = load_pretraining(name_or_path)
            pretraining.to(device)  # pyright: ignore[reportArgumentType]
            encoder = None
            if config.objective != "reconstruction":
                with loading(name_or_path, "processor"):
                    processor = FlipProcessor.from_pretrained(name_or_path, trust_remote_code=False)
                encoder = Encoder(pretraining.flip, processor, title)
            decodes = config.objective != "contrastive"  # or nothing has trained the decoder
            return cls(title, encoder, pretraining if decodes else None, image_processor)
        encoder = Encoder.from_pretrained(name_or_path, device=device)
        if not encoder.knows_texts:
            raise ValueError(f"{name_or_path} is only a vision tower, without texts and without a decoder.")
        return cls(title, encoder, None, encoder.image_processor)

    def save_pretrained(self, folder: Path) -> None:
        """Writes only the model and its processor, without other files beside them."""
        self.model.save_pretrained(folder)
        (self.transform.image_processor if self.encoder is None else self.encoder.processor).save_pretrained(folder)

    @property
    def model(self) -> Any:
        """The whole model, including its decoder if it has one."""
        return self._texts_encoder().model if self.pretraining is None else self.pretraining

    @property
    def knows_masks(self) -> bool:
        """True if parts of an image can be encoded; CLIPModel sees only whole images."""
        return self.encoder is None or self.encoder.knows_masks

    @property
    def vision_config(self) -> Any:
        """The configuration of the vision tower."""
        towers = self.model if self.pretraining is None else self.pretraining.flip
        return towers.vision_model.config

    def about(self) -> str:
        """The kind and size of the model, in one line."""
        vision = self.vision_config
        kind = "FLIP: CLIP trained on masked images" if self.knows_masks else "CLIP, which sees whole images"
        return (
            f"{kind}. {vision.num_hidden_layers} blocks of width {vision.hidden_size}, {vision.patch_size} × "
            f"{vision.patch_size} patches, {vision.image_size} × {vision.image_size} pixels, "
            f"{self.model.num_parameters() / 1e6:,.1f} M parameters."
        )

    # -- images -------------------------------------------------------------------------------------------------------

    def _pixel_values(self, image: Image.Image) -> torch.Tensor:
        return self.transform(image)[None].to(self.model.device)  # (1, C, S, S)

    def _mask(self, mask_ratio: float, seed: int) -> torch.Tensor | None:
        """Draws the visible patches (1, K) of an image; None if all are visible."""
        if mask_ratio == 0:
            return None
        return draw_masks(self.model, [(0, 0)], mask_ratio, seed).to(self.model.device)

    def _pictures(self, pixel_values: torch.Tensor) -> torch.Tensor:
        processor = self.transform.image_processor
        return to_colours(pixel_values, (processor.image_mean, processor.image_std))

    def _masked_picture(self, pixel_values: torch.Tensor, ids_keep: torch.Tensor | None) -> torch.Tensor:
        pictures = self._pictures(pixel_values)
        if ids_keep is None:
            return pictures
        vision = self.vision_config
        return grey_out(pictures, visible_pixels(ids_keep, vision.num_patches, vision.patch_size))

    def seen(self, image: Image.Image, mask_ratio: float, seed: int) -> Image.Image:
        """Renders the image as the model sees it: cropped, resized, and grey where patches are dropped.

        Args:
            image: an RGB image.
            mask_ratio: fraction of the patches dropped.
            seed: seed of the mask.

        Raises:
            ValueError: no patch would be left.
        """
        return _picture(self._masked_picture(self._pixel_values(image), self._mask(mask_ratio, seed)))

    @torch.no_grad()
    def reconstruct(
        self, image: Image.Image, mask_ratio: float, seed: int
    ) -> tuple[Image.Image, Image.Image, Image.Image]:
        """Returns the image, its visible patches, and the decoder's reconstruction; arguments as in [`DemoModel.seen`].

        Raises:
            ValueError: no patch would be left, or none dropped.
        """
        assert self.pretraining is not None
        pixel_values = self._pixel_values(image)
        ids_keep = draw_masks(self.pretraining, [(0, 0)], mask_ratio, seed).to(pixel_values.device)
        _, pasted = reconstruct(self.pretraining, pixel_values, ids_keep)
        masked = self._masked_picture(pixel_values, ids_keep)
        return _picture(self._pictures(pixel_values)), _picture(masked), _picture(self._pictures(pasted["model"]))

    # -- images and texts ---------------------------------------------------------------------------------------------

    def _texts_encoder(self) -> Encoder:
        assert self.encoder is not None, "the page has no tab that asks this of a model without texts"
        return self.encoder

    @torch.no_grad()
    def _embed_labels(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> torch.Tensor:
        encoder = self._texts_encoder()
        model = encoder.model
        return class_embeddings(model, encoder.processor.tokenizer, labels, templates, model.device)

    @torch.no_grad()
    def classify(
        self, image: Image.Image, labels: Sequence[str], prompt: str, mask_ratios: Sequence[float], seed: int
    ) -> list[dict[str, float]]:
        """Computes the probabilities of the labels, one dictionary per mask ratio.

        Args:
            image: an RGB image.
            labels: the alternatives.
            prompt: a prompt with `{}` for the label, or the name of a prompt set.
            mask_ratios: fractions of the patches dropped; only 0 if `knows_masks` is False.
            seed: seed of the masks.

        Raises:
            ValueError: no patch would be left, or the prompt has no `{}`.
        """
        encoder = self._texts_encoder()
        pixel_values = self._pixel_values(image)
        label_embeds = self._label_embeddings(tuple(labels), resolve_templates(prompt))  # (C, E)
        answers = []
        for mask_ratio in mask_ratios:
            ids_keep = self._mask(mask_ratio, seed)
            image_embeds = encoder.images(pixel_values, **({} if ids_keep is None else {"ids_keep": ids_keep}))
            probabilities = label_probabilities(encoder.model, image_embeds, label_embeds)[0].tolist()
            answers.append(dict(zip(labels, probabilities, strict=True)))
        return answers

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Returns the texts that exceed the model's context and are truncated."""
        inputs = self._texts_encoder().text_inputs
        lengths = [len(ids) for ids in inputs.tokenizer(list(map(bound_text, texts)), verbose=False)["input_ids"]]
        return [text for text, length in zip(texts, lengths, strict=True) if length > inputs.max_length]

    @torch.no_grad()
    def embed_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes whole images (B, C, S, S) from `transform` to normalised features (B, E), on the CPU."""
        return self._texts_encoder().images(pixel_values.to(self.model.device)).cpu()

    def embed_text(self, text: str) -> torch.Tensor:
        """Encodes a text to normalised features (E,), on the CPU."""
        return self._texts_encoder().texts([text])[0].cpu()


def _picture(colours: torch.Tensor) -> Image.Image:
    """Converts the first of images (B, height, width, 3) in [0, 1] to a picture."""
    return Image.fromarray((colours[0].numpy() * 255).round().astype(np.uint8))
