"""Features of whole images and of texts, as a user asks for them: in evaluation mode, without gradients.

flip_hf and CLIPModel encode texts padded to the longest of the batch, open_clip to its context of 77.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from flip_hf.benchmarks.candidates import CLIP, OPEN_CLIP, OPEN_CLIP_CONTEXT, OURS, autocast, peer_versions, wait
from flip_hf.benchmarks.measuring import about, alternate, spread
from flip_hf.benchmarks.models import Inputs, make_clip, make_flip, make_inputs, make_open_clip

IMAGES = "images"
TEXTS = "texts"


def make_encoders(options: argparse.Namespace, inputs: Inputs) -> dict[str, dict[str, Callable[[], Any]]]:
    """Makes the functions that encode images and texts, by candidate."""
    texts = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    makers = {OURS: make_flip, CLIP: make_clip} if "clip" in options.peers else {OURS: make_flip}
    encoders: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, make in makers.items():
        model: Any = make(options.architecture).to(options.device).eval()
        encoders[name] = {
            IMAGES: lambda model=model: model.get_image_features(pixel_values=inputs.pixel_values),
            TEXTS: lambda model=model: model.get_text_features(**texts),
        }
    if "open_clip" in options.peers:
        peer = make_open_clip(options.architecture, OPEN_CLIP_CONTEXT).to(options.device).eval()
        padded = inputs.padded_ids(OPEN_CLIP_CONTEXT)
        encoders[OPEN_CLIP] = {
            IMAGES: lambda: peer.encode_image(inputs.pixel_values),
            TEXTS: lambda: peer.encode_text(padded),
        }
    return encoders


def benchmark_inference(options: argparse.Namespace) -> dict:
    """Seconds of the features of a batch of images, and of a batch of texts."""
    inputs = make_inputs(options.batch_size, options.device)
    encoders = make_encoders(options, inputs)

    def run(encode: Callable[[], Any]) -> None:
        with torch.inference_mode(), autocast(options):
            encode()
        wait(options.device)

    runs = {
        f"{kind}: {name}": lambda encode=encode[kind]: run(encode)
        for kind in (IMAGES, TEXTS)
        for name, encode in encoders.items()
    }
    return {
        "question": "inference",
        **{name: getattr(options, name) for name in ("architecture", "batch_size", "precision")},
        **inputs.describe(),
        "peers": peer_versions(),
        "seconds": alternate(runs, options.repeats, warm_up=5 if options.device == "cuda" else 1),
    }


def inference_markdown(result: dict) -> str:
    """A table of medians, spread, features per second, and ratios to flip_hf."""
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    runs = len(next(iter(result["seconds"].values())))
    versions = "".join(f", {name} {number}" for name, number in result["peers"].items())
    lines = [
        f"Features of {result['batch_size']} whole images and of as many texts, ViT-{result['architecture']}, "
        f"{result['precision']}; texts of {result['caption_tokens']:g} tokens on average, padded to "
        f"{result['text_tokens']}, by open_clip to {OPEN_CLIP_CONTEXT}{versions}. {about(result, runs)}",
        "| features | candidate | seconds a batch (min - max) | a second | flip_hf is faster by |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in result["seconds"].items():
        (kind, candidate) = name.split(": ")
        median = medians[name]
        lines.append(
            f"| {kind} | {candidate} | {spread(seconds, '.3f')} "
            f"| {result['batch_size'] / median:,.1f} | {median / medians[f'{kind}: {OURS}']:.2f}x |"
        )
    return "\n".join(lines) + "\n"
