"""Builds the parts of the page's tabs: inputs with checks, outputs, and errors in plain words (Gradio 6)."""

import functools
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import gradio as gr
from PIL import Image

from flip_hf.data.decode import RefusedSample, decode_image
from flip_hf.data.files import StoredFile
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.demo.search import Picture, fit_to_show

P = ParamSpec("P")
T = TypeVar("T")

MAX_EXAMPLES = 6
MAX_MASK = 90  # percent
# One at a time over all tabs: masks are drawn from torch's default generator, and models share a CPU badly.
MODEL_AT_WORK: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}


@dataclass(frozen=True)
class Example:
    """An image to begin with, and its class if known."""

    image: Image.Image
    label: str | None


def choose_examples(pictures: Sequence[Picture], background: Colour = WHITE) -> list[Example]:
    """Chooses a few sound pictures from the whole range, and at most one of each class."""
    found: list[Example] = []
    for picture in pictures[:: max(1, (len(pictures) - 1) // MAX_EXAMPLES)]:
        if picture.label is None or all(picture.label != example.label for example in found):
            try:
                found.append(Example(fit_to_show(picture.decode(background)), picture.label))
            except RefusedSample:
                continue
    return found[:MAX_EXAMPLES]


def image_input(examples: Sequence[Example], background: Colour = WHITE) -> gr.Image:
    """Makes an image input that decodes within this project's limits, and refuses other images with a clear message.

    Gradio's own input decodes images of any size, and answers a damaged one with a traceback. The method is replaced in
    the object, because Gradio writes a file beside the source of every class derived from a component.
    """
    first = examples[0].image if examples else None
    image = gr.Image(
        first, type="pil", show_label=False, label="Image", height=250, format="png", buttons=[], elem_classes="picture"
    )

    def preprocess(payload: Any) -> Image.Image | None:
        try:
            return None if payload is None else decode_image(StoredFile(payload.path), background)
        except RefusedSample as error:
            raise as_told(f"This image cannot be used: {error.reason}.") from None

    image.preprocess = preprocess  # pyright: ignore[reportAttributeAccessIssue]
    if examples:
        gr.Examples([[e.image] for e in examples], image, label="Or one of these", examples_per_page=MAX_EXAMPLES)
    return image


def picture_output(title: str, height: int = 250) -> gr.Image:
    """Makes a picture under a title, as Gradio's own label would cover a corner of it."""
    with gr.Column(min_width=140):
        gr.Markdown(title)
        return gr.Image(
            show_label=False,
            interactive=False,
            format="png",
            buttons=[],
            height=height,
            alt_text=title,
            elem_classes="picture",
        )


def mask_inputs(*, visible: bool, value: int, minimum: int = 0) -> tuple[gr.Slider, gr.Number]:
    """Makes inputs for the percentage dropped and the mask's seed, with a button for the next seed."""
    with gr.Row(visible=visible):
        masked = gr.Slider(minimum, MAX_MASK, value, step=5, label="Patches dropped, %", scale=4, buttons=[])
        with gr.Column(scale=2, min_width=140):
            seed = gr.Number(0, label="Seed of the mask", precision=0, minimum=0, maximum=2**31)
            again = gr.Button("Draw again", size="sm")
    again.click(lambda seed: int(seed or 0) + 1, seed, seed, api_visibility="private")
    return masked, seed


def answer_image(
    page: gr.Blocks,
    function: Callable[..., Sequence[object]],
    inputs: list[Any],
    outputs: list[Any],
    triggers: list[Callable],
    *,
    at_once: bool,
) -> None:
    """Calls a function on the triggers, and whenever the first input, the image, changes.

    Args:
        page: the page of the components.
        function: maps the inputs to the outputs; a ValueError is shown on the page.
        inputs, outputs: components.
        triggers: events that call the function.
        at_once: whether a page that begins with an image also begins with an answer.
    """
    image = inputs[0]
    call = in_words(function)
    options: dict[str, Any] = {**MODEL_AT_WORK, "show_progress": "minimal", "trigger_mode": "always_last"}
    if at_once and image.value is not None:
        triggers = [page.load, *triggers]
    gr.on(triggers, call, inputs, outputs, api_name=function.__name__, **options)

    def see(given: Image.Image | None, *others: object) -> Sequence[object]:
        # Removing the image removes the answer, without an error message.
        return [None] * len(outputs) if given is None else call(given, *others)

    image.change(see, inputs, outputs, api_visibility="private", **options)


def in_words(function: Callable[P, T]) -> Callable[P, T]:
    """Wraps a function so that errors in its input (ValueError) are shown on the page."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise as_told(str(error)) from None

    return call


def as_told(message: str) -> gr.Error:
    """Makes Gradio's error of a message, escaped because Gradio treats it as HTML."""
    return gr.Error(html.escape(message, quote=False), title="That did not work", print_exception=False)
