"""FlipProcessor: images and texts to the inputs of a FlipModel, with CLIPProcessor's call."""

# No `from __future__ import annotations` here, as in the other published files.
import os
from typing import Any

from transformers.dynamic_module_utils import custom_object_save
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

# Defaults of a call, which can override each. Over-long text is cut, as the official pipeline does; the model would
# refuse it.
TEXT_KWARGS = {"padding": True, "truncation": True}


class FlipProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call; the defaults stand here for Transformers 5.17, newer versions read the processor's."""

    _defaults = {"text_kwargs": TEXT_KWARGS}  # pyright: ignore[reportGeneralTypeIssues]


class FlipProcessor(ProcessorMixin):
    r"""Wraps an image processor and a tokenizer.

    Args:
        image_processor: a CLIP image processor (`CLIPImageProcessor`, with or without torchvision).
        tokenizer: any fast tokenizer that pads on the right; its `model_max_length` is where texts are cut.

    Raises:
        ValueError: the tokenizer pads on the left: the text tower counts positions from the first token.
    """

    valid_processor_kwargs = FlipProcessorKwargs
    text_kwargs: Any = TEXT_KWARGS

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if tokenizer is not None and getattr(tokenizer, "padding_side", "right") != "right":
            raise ValueError(
                "FlipProcessor needs a tokenizer that pads on the right, this one pads on the left. "
                'Set tokenizer.padding_side = "right".'
            )
        super().__init__(image_processor, tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Saves as `ProcessorMixin` does, but names the code of this class for the processor alone.

        Transformers names it for image processor and tokenizer too, in their files and in memory: saved elsewhere, they
        would ask for a file that is not there.
        """
        published = self._auto_class is not None
        if published:
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(self, save_directory, config=self)  # pyright: ignore[reportArgumentType]
            self._auto_class = None  # of this object, for as long as it is saved
        try:
            files = super().save_pretrained(save_directory)
        finally:
            if published:
                del self._auto_class
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, **kwargs)
        return files


__all__ = ["FlipProcessor"]
