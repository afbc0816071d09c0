"""Builds the page: its tabs, their contents and their events (Gradio 6)."""

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.themes import Default
from PIL import Image

from flip_hf.data.files import MAX_FILE_BYTES
from flip_hf.demo.answers import (
    MAX_LABELS_TEXT,
    MAX_PROMPT,
    MAX_QUERY,
    comparison_table,
    read_labels,
    read_prompt,
    read_query,
    view_in_words,
)
from flip_hf.demo.model import DemoModel
from flip_hf.demo.parts import (
    MODEL_AT_WORK,
    Example,
    answer_image,
    choose_examples,
    image_input,
    in_words,
    mask_inputs,
    picture_output,
)
from flip_hf.demo.search import ImageSearch, Picture, fit_to_show
from flip_hf.evaluation.templates import resolve_templates

MASK_RATIOS = (0.0, 0.5, 0.75)  # the paper's
FOUND = 12
PROMPT = "a photo of a {}."
CSS = """
.gradio-container { width: 100%; max-width: 1080px !important; margin: 0 auto !important; }
.picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.comparison { width: 100%; border-collapse: collapse; font-size: 14px; }
.comparison, .comparison tr, .comparison th, .comparison td { border: 0 !important; }
.comparison th { text-align: left; font-weight: 400; padding: 4px 8px; }
.comparison thead th { color: var(--body-text-color-subdued) !important; }
.comparison td { position: relative; width: 25%; padding: 4px 8px; font-variant-numeric: tabular-nums; }
.comparison .bar { position: absolute; inset: 3px auto 3px 0; max-width: calc(100% - 6px); border-radius: 3px; }
.comparison .bar { background: var(--primary-500); opacity: 0.3; }
.comparison td span:last-child { position: relative; }
"""


def make_page(model: DemoModel, pictures: Sequence[Picture]) -> gr.Blocks:
    """Makes the page of a model.

    Args:
        model: the model to try; without texts or without a decoder, the page lacks those tabs.
        pictures: the pictures to search; some of them are the examples.
    """
    examples = choose_examples(pictures, model.transform.background)
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


def serve(page: gr.Blocks, **options: Any) -> object:
    """Serves the page until it is interrupted; it requests nothing from other hosts, not even fonts.

    Args:
        page: from [`make_page`].
        options: `server_port`, `share` and other options of `gr.Blocks.launch`.
    """
    fonts = ["system-ui", "sans-serif"]
    theme = Default(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=fonts)
    return page.launch(
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,  # it would need Node
        max_file_size=MAX_FILE_BYTES,
        **options,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tabs
# ---------------------------------------------------------------------------------------------------------------------


def _labels_tab(page: gr.Blocks, model: DemoModel, examples: list[Example]) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            image = image_input(examples, model.transform.background)
            known = [example.label for example in examples if example.label is not None]
            labels = gr.Textbox(
                ", ".join(known), label="Labels, separated by commas or lines", lines=2, max_length=MAX_LABELS_TEXT
            )
            prompt = gr.Textbox(PROMPT, label="Prompt", info="{} is the label", max_length=MAX_PROMPT)
            ask = gr.Button("Ask the model", variant="primary")
        with gr.Column(scale=3):
            with gr.Row():
                seen = picture_output("What the model sees")
                with gr.Column():
                    caption = gr.Markdown("What it answers")
                    answer = gr.Label(show_label=False, num_top_classes=5)
            masked, seed = mask_inputs(visible=model.knows_masks, value=50 if model.knows_masks else 0)
            table = gr.HTML(visible=model.knows_masks, label="The answer under masks")

    def classify(
        image: Image.Image | None, labels: str, prompt: str, percent: float | None, seed: float | None
    ) -> Sequence[object]:
        picture = _given(image)
        names = read_labels(labels)
        checked = read_prompt(prompt)
        if len(names) == 1:
            gr.Warning("A label alone has a probability of 100 %. Give another one to compare it with.")
        _warn_of_cuts(model, [resolve_templates(checked)[0].format(name) for name in names])
        asked = (percent or 0) / 100 if model.knows_masks else 0.0
        number = int(seed or 0)
        mask_ratios = sorted({*MASK_RATIOS, asked}) if model.knows_masks else [0.0]
        answers = model.classify(picture, names, checked, mask_ratios, number)
        shown = fit_to_show(model.seen(picture, asked, number))
        heading = f"What it answers, of {view_in_words(asked)}"
        return shown, heading, answers[mask_ratios.index(asked)], comparison_table(mask_ratios, answers)

    triggers = [ask.click, labels.submit, prompt.submit, masked.change, seed.change]
    answer_image(
        page,
        classify,
        [image, labels, prompt, masked, seed],
        [seen, caption, answer, table],
        triggers,
        at_once=bool(known),
    )


def _search_tab(search: ImageSearch, examples: list[Example]) -> None:
    first = f"a {examples[0].label}" if examples and examples[0].label else ""
    with gr.Row(equal_height=True):
        text = gr.Textbox(
            first, label="What to look for", placeholder="a photo of a dog", max_length=MAX_QUERY, scale=5
        )
        ask = gr.Button("Search", variant="primary", scale=1)
    status = gr.Markdown(f"{len(search.pictures):,} pictures, which the first search encodes.")
    gallery = gr.Gallery(show_label=False, columns=6, height="auto", format="png", buttons=[])

    def find(
        text: str | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio finds it)
    ) -> Sequence[object]:
        wanted = read_query(text)
        _warn_of_cuts(search.model, [wanted])
        embeds = search.encode(lambda done, total: progress((done, total), desc="Encoding pictures", unit="pictures"))
        skipped = f"; {search.refused.total()} could not be used ({search.reasons()})" if search.refused else ""
        found = search.search(wanted, FOUND)
        captioned = [(picture, f"{score:.2f} · {name}") for picture, name, score in found]
        return captioned, f"The best of {len(embeds):,} pictures, with their cosine similarity{skipped}."

    options: dict[str, Any] = {**MODEL_AT_WORK, "show_progress_on": gallery, "api_name": "search"}
    gr.on([ask.click, text.submit], in_words(find), text, [gallery, status], **options)


def _reconstruction_tab(page: gr.Blocks, model: DemoModel, examples: list[Example]) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            image = image_input(examples, model.transform.background)
            ask = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=3):
            with gr.Row():
                shown = [picture_output(name, height=190) for name in ("Original", "Masked", "Reconstructed")]
            masked, seed = mask_inputs(visible=True, value=75, minimum=10)
            gr.Markdown(
                "The decoder sees the visible patches alone. Where it predicts normalised pixels, each patch has the "
                "mean and the contrast of the original, as in MAE's demo."
            )

    def reconstruct(image: Image.Image | None, percent: float, seed: float | None) -> Sequence[object]:
        return [fit_to_show(found) for found in model.reconstruct(_given(image), percent / 100, int(seed or 0))]

    answer_image(page, reconstruct, [image, masked, seed], shown, [ask.click, masked.change, seed.change], at_once=True)


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
