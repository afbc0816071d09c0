"""FlipProcessor: images and texts to the inputs of a FlipModel, with CLIPProcessor's call."""

from transformers.processing_utils import ProcessingKwargs, ProcessorMixin


class FlipProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of a call; each can be overridden in the call."""

    # Over-long text is cut, as the official pipeline does; the model would refuse it.
    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}  # pyright: ignore[reportGeneralTypeIssues]


class FlipProcessor(ProcessorMixin):
    r"""Wraps an image processor and a tokenizer.

    Args:
        image_processor: a CLIP image processor (`CLIPImageProcessor`, with or without torchvision).
        tokenizer: any fast tokenizer that pads on the right; its `model_max_length` is where texts are cut.

    Raises:
        ValueError: the tokenizer pads on the left: the text tower counts positions from the first token.
    """

    valid_processor_kwargs = FlipProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if tokenizer is not None and getattr(tokenizer, "padding_side", "right") != "right":
            raise ValueError(
                "FlipProcessor needs a tokenizer that pads on the right, this one pads on the left. "
                'Set tokenizer.padding_side = "right".'
            )
        super().__init__(image_processor, tokenizer)


__all__ = ["FlipProcessor"]
