"""The page: tabs, what they hold, and what happens when (Gradio 6)."""

import functools
import html
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from flip_hf.data.decode import RefusedSample, decode_image
from flip_hf.data.files import MAX_FILE_BYTES
from flip_hf.demo.answers import comparison_table, ratio_in_words, read_labels, read_prompt
from flip_hf.demo.model import DemoModel
from flip_hf.demo.search import ImageSearch, Picture, fit_to_show

MASK_RATIOS = (0.0, 0.5, 0.75)  # the paper's
MAX_MASK = 90  # per cent
MAX_TEXT = 20_000  # characters of the labels
FOUND = 12
EXAMPLES = 6
PROMPT = "a photo of a {}."
CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
table.comparison { width: 100%; border-collapse: collapse; font-size: 14px; }
table.comparison th { text-align: left; font-weight: 500; padding: 4px 8px; white-space: nowrap; }
table.comparison thead th { color: var(--body-text-color-subdued); font-weight: 400; }
table.comparison td { position: relative; width: 25%; padding: 4px 8px; font-variant-numeric: tabular-nums; }
table.comparison .bar { position: absolute; inset: 3px auto 3px 0; border-radius: 3px; background: var(--color-accent-soft); }
table.comparison td span:last-child { position: relative; }
"""
# One at a time, whatever the tab: masks are drawn from torch's default generator, and a CPU is shared badly.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal"}


def make_page(model: DemoModel, pictures: Sequence[Picture]) -> gr.Blocks:
    """The page of a model.

    Args:
        model: what is tried; without texts or without a decoder, the page lacks those tabs.
        pictures: what is searched; the first ones that are sound are the examples.
    """
    examples = _examples(pictures)
    with gr.Blocks(title=f"Try {model.title}", analytics_enabled=False) as page:
        gr.Markdown(f"# {model.title}\n{model.about()}")
        if model.encoder is not None:
            with gr.Tab("What is it?"):
                _labels_tab(page, model, examples)
            with gr.Tab("Search"):
                _search_tab(ImageSearch(model, pictures), examples)
        if model.pretraining is not None:
            with gr.Tab("Reconstruction"):
                _reconstruction_tab(page, model, examples)
    return page


def serve(page: gr.Blocks, **options: Any) -> Any:
    """Serves the page until it is interrupted; nothing is asked of any other host, fonts included.

    Args:
        page: from [`make_page`].
        options: `server_port`, `share` and others of `gr.Blocks.launch`.
    """
    theme = gr.themes.Soft(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return page.launch(
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,  # which would take Node
        max_file_size=MAX_FILE_BYTES,
        **options,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tabs
# ---------------------------------------------------------------------------------------------------------------------


def _labels_tab(page: gr.Blocks, model: DemoModel, examples: list[tuple[str, Image.Image]]) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            image = _image_input(examples)
            names = list(dict.fromkeys(name for name, _ in examples))
            labels = gr.Textbox(", ".join(names), label="Labels, apart by commas or lines", lines=2, max_length=MAX_TEXT)
            prompt = gr.Textbox(PROMPT, label="Prompt", info="{} is the label", max_length=500)
            ask = gr.Button("Ask the model", variant="primary")
        with gr.Column(scale=3):
            with gr.Row():
                seen = gr.Image(label="What the model sees", interactive=False, format="png", buttons=[], height=260)
                answer = gr.Label(label="Answer", num_top_classes=5)
            masked, seed, again = _mask_inputs(visible=model.knows_masks, value=50 if model.knows_masks else 0)
            table = gr.HTML(visible=model.knows_masks, label="The answer under masks")

    def classify(image: Image.Image | None, labels: str, prompt: str, percent: float, seed: float | None) -> Any:
        picture, names, checked = _given(image), read_labels(labels), read_prompt(prompt)
        if len(names) == 1:
            gr.Warning("A label alone has a probability of 100 %. Give another one to compare it with.")
        _warn_of_cuts(model, [checked.replace("{}", name) for name in names])
        asked, number = percent / 100, int(seed or 0)
        mask_ratios = sorted({*MASK_RATIOS, asked}) if model.knows_masks else [0.0]
        answers = model.classify(picture, names, checked, mask_ratios, number)
        shown = fit_to_show(model.seen(picture, asked, number))
        return shown, answers[mask_ratios.index(asked)], comparison_table(mask_ratios, answers)

    triggers = [ask.click, labels.submit, prompt.submit, masked.change, seed.change]
    _answer(page, classify, [image, labels, prompt, masked, seed], [seen, answer, table], triggers)
    again.click(lambda seed: int(seed or 0) + 1, seed, seed, api_visibility="private")


def _search_tab(search: ImageSearch, examples: list[tuple[str, Image.Image]]) -> None:
    first = f"a {examples[0][0]}" if examples and "." not in examples[0][0] else ""
    with gr.Row(equal_height=True):
        text = gr.Textbox(first, label="What to look for", placeholder="a photo of a dog", max_length=1000, scale=5)
        ask = gr.Button("Search", variant="primary", scale=1)
    told = gr.Markdown(f"{len(search.pictures):,} pictures, which the first search encodes.")
    gallery = gr.Gallery(label="Found, by cosine similarity", columns=6, height="auto", format="png", buttons=[])

    def find(text: str | None, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008 (how Gradio finds it)
        wanted = (text or "").strip()
        if not wanted:
            raise ValueError("Write what to look for.")
        _warn_of_cuts(search.model, [wanted])
        embeds = search.encode(lambda done, total: progress((done, total), desc="Encoding pictures", unit="pictures"))
        skipped = f"; {search.refused.total()} could not be used ({search.reasons()})" if search.refused else ""
        found = search.search(wanted, FOUND)
        captioned = [(picture, f"{score:.3f} · {name}") for picture, name, score in found]
        return captioned, f"The best of {len(embeds):,} pictures{skipped}."

    gr.on([ask.click, text.submit], _in_words(find), text, [gallery, told], api_name="search", **ONE_AT_A_TIME)


def _reconstruction_tab(page: gr.Blocks, model: DemoModel, examples: list[tuple[str, Image.Image]]) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            image = _image_input(examples)
            masked, seed, again = _mask_inputs(visible=True, value=75, minimum=10)
            ask = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=3):
            options: dict[str, Any] = {"interactive": False, "format": "png", "buttons": [], "height": 260}
            with gr.Row():
                names = ("Original", "Masked", "Reconstructed")
                shown = [gr.Image(label=name, min_width=120, **options) for name in names]
            gr.Markdown(
                "The decoder sees the visible patches alone. Where it predicts normalised pixels, each patch has the mean "
                "and the contrast of the original, as in MAE's demo."
            )

    def reconstruct(image: Image.Image | None, percent: float, seed: float | None) -> Any:
        return [fit_to_show(found) for found in model.reconstruct(_given(image), percent / 100, int(seed or 0))]

    _answer(page, reconstruct, [image, masked, seed], shown, [ask.click, masked.change, seed.change])
    again.click(lambda seed: int(seed or 0) + 1, seed, seed, api_visibility="private")


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _examples(pictures: Sequence[Picture]) -> list[tuple[str, Image.Image]]:
    """The first sound pictures, each with a name of its own."""
    found: dict[str, Image.Image] = {}
    for picture in pictures:
        if len(found) == EXAMPLES:
            break
        if picture.name not in found:
            try:
                found[picture.name] = fit_to_show(picture.decode())
            except RefusedSample:
                continue
    return list(found.items())


def _image_input(examples: list[tuple[str, Image.Image]]) -> gr.Image:
    """An input whose image is decoded within this project's limits, or refused in words.

    Gradio's own decodes images of any size, and answers a damaged one with a traceback. The method is replaced in the
    object, because Gradio writes a file beside the source of every class that is derived from a component.
    """
    image = gr.Image(examples[0][1] if examples else None, type="pil", label="Image", height=260, format="png", buttons=[])

    def preprocess(payload: Any) -> Image.Image | None:
        try:
            return None if payload is None else decode_image({"path": payload.path})
        except RefusedSample as error:
            raise _error(f"This image cannot be used: {error.reason}.") from None

    image.preprocess = preprocess  # pyright: ignore[reportAttributeAccessIssue]
    if examples:
        gr.Examples([[picture] for _, picture in examples], image, label="Or one of these")
    return image


def _mask_inputs(*, visible: bool, value: int, minimum: int = 0) -> tuple[gr.Slider, gr.Number, gr.Button]:
    """How much is dropped, the mask's seed, and a button for another one."""
    with gr.Row(visible=visible, equal_height=True):
        masked = gr.Slider(minimum, MAX_MASK, value, step=5, label="Patches dropped, %", scale=4, buttons=[])
        seed = gr.Number(0, label="Seed of the mask", precision=0, minimum=0, maximum=2**31, min_width=100, scale=2)
        again = gr.Button("Draw again", min_width=100, scale=1)
    return masked, seed, again


def _given(image: Image.Image | None) -> Image.Image:
    if image is None:
        raise ValueError("Drop in an image first, or choose an example.")
    return image


def _warn_of_cuts(model: DemoModel, texts: Sequence[str]) -> None:
    cut = model.too_long(texts)
    if cut:
        shown = html.escape(cut[0] if len(cut[0]) <= 60 else f"{cut[0][:60]}…", quote=False)
        more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        gr.Warning(f"Too long for this model, which reads its beginning alone: “{shown}”{more}.")


def _error(message: str) -> gr.Error:
    return gr.Error(html.escape(message, quote=False), title="That did not work", print_exception=False)


def _in_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with mistakes of its input told on the page."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except ValueError as error:
            raise _error(str(error)) from None

    return call


def _answer(
    page: gr.Blocks,
    function: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    triggers: list[Any],
) -> None:
    """Has a function called by the triggers and whenever its first input, the image, is another one."""
    image, call = inputs[0], _in_words(function)
    if image.value is not None:
        triggers = [page.load, *triggers]
    gr.on(triggers, call, inputs, outputs, api_name=function.__name__, trigger_mode="always_last", **ONE_AT_A_TIME)

    def see(given: Image.Image | None, *others: Any) -> Any:
        # Who takes the image away takes the answer away, and need not be told what is missing.
        return [None] * len(outputs) if given is None else call(given, *others)

    image.change(see, inputs, outputs, api_visibility="private", **ONE_AT_A_TIME)
