"""FlipProcessor, which prepares images and texts for a FlipModel, with CLIPProcessor's interface."""

# No `from __future__ import annotations` here, as in the other published files.
import os
from typing import Any

from transformers.dynamic_module_utils import custom_object_save
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs

# Defaults that a call can override. Too long text is truncated, as in the official pipeline; the model would refuse it.
TEXT_KWARGS: TextKwargs = {"padding": True, "truncation": True}


class FlipProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call; the defaults are here for Transformers 5.17, newer versions read the processor's."""

    _defaults = {"text_kwargs": TEXT_KWARGS}  # pyright: ignore[reportGeneralTypeIssues]


class FlipProcessor(ProcessorMixin):
    r"""Wraps an image processor and a tokenizer.

    Args:
        image_processor: a CLIP image processor (`CLIPImageProcessor`, with or without torchvision).
        tokenizer: any fast tokenizer that pads on the right; texts are truncated to its `model_max_length`.

    Raises:
        ValueError: the tokenizer pads on the left, but the text tower counts positions from the first token.
    """

    valid_processor_kwargs = FlipProcessorKwargs
    text_kwargs = TEXT_KWARGS

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if tokenizer is not None and getattr(tokenizer, "padding_side", "right") != "right":
            raise ValueError(
                "FlipProcessor needs a tokenizer that pads on the right; this one pads on the left. "
                'Set tokenizer.padding_side = "right".'
            )
        super().__init__(image_processor, tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Saves like `ProcessorMixin`, but names the code of this class only for the processor itself.

        Transformers also names it for image processor and tokenizer, in their files and in memory: saved elsewhere,
        they would refer to a missing file.
        """
        published = self._auto_class is not None
        if published:
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(self, save_directory, config=self)  # pyright: ignore[reportArgumentType]
            self._auto_class = None  # on this object, while it is saved
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
