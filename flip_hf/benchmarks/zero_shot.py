"""The classification of images by 1,000 labels with a tiny model."""

import argparse
import statistics
import time
from typing import Any

import numpy as np
from PIL import Image
from transformers import pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flip_hf import FlipConfig, FlipModel, FlipProcessor, ZeroShotClassifier
from flip_hf.benchmarks.measuring import about, alternate, spread
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.evaluation.templates import prompt_set

COLOURS = ("red", "green", "blue", "yellow", "striped", "large", "small", "wooden")
LABELS = 1000
IMAGES = 64
CONTEXT = 32


def make_zero_shot(labels: list[str], device: str) -> tuple[Any, FlipProcessor]:
    """A tiny model and a processor whose tokenizer knows the labels."""
    prompts = [template.format(label) for label in labels for template in prompt_set("clip_7")]
    tokenizer = train_wordpiece(prompts, vocab_size=2000, context_length=CONTEXT)
    size = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = FlipConfig(
        text_config={**size, "vocab_size": len(tokenizer)},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    side = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)
    model: Any = FlipModel(config).eval()
    return model.to(device), FlipProcessor(image_processor, tokenizer)


def benchmark_zero_shot(options: argparse.Namespace) -> dict:
    """Images by 1,000 labels: ZeroShotClassifier with its labels encoded, and the pipeline, which encodes them anew."""
    rng = np.random.default_rng(0)
    labels = [f"{COLOURS[i % len(COLOURS)]} thing number {i}" for i in range(LABELS)]
    images = [Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(IMAGES)]
    model, processor = make_zero_shot(labels, options.device)
    classifier = ZeroShotClassifier(model, processor)
    start = time.perf_counter()
    encoded = classifier.encode_labels(labels, "clip_80")
    encoding = time.perf_counter() - start
    stock: Any = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        device=options.device,
    )

    def pipeline_with(templates: tuple[str, ...], count: int) -> None:
        for template in templates:
            stock(images[:count], candidate_labels=labels, hypothesis_template=template)

    steps = {
        "ZeroShotClassifier, 80 templates": lambda: classifier(images, encoded),
        "pipeline, 1 template": lambda: pipeline_with(prompt_set("clip_1"), IMAGES),
        "pipeline, 80 templates": lambda: pipeline_with(prompt_set("clip_80"), 1),
    }
    images_each = {"pipeline, 80 templates": 1}
    seconds = alternate(steps, options.repeats)
    return {
        "question": "zero-shot",
        "labels": len(labels),
        "encoding_seconds": encoding,
        "seconds": {name: [s / images_each.get(name, IMAGES) for s in values] for name, values in seconds.items()},
    }


def zero_shot_markdown(result: dict) -> str:
    """A table of seconds an image and ratios to ZeroShotClassifier."""
    first = statistics.median(next(iter(result["seconds"].values())))
    runs = len(next(iter(result["seconds"].values())))
    lines = [
        f"Zero-shot classification by {result['labels']:,} labels, tiny model, after encoding the labels once "
        f"({result['encoding_seconds']:.1f} s for 80 templates). {about(result, runs)}",
        "| candidate | milliseconds an image (min - max) | times ZeroShotClassifier's |",
        "|---|---|---|",
    ]
    for name, values in result["seconds"].items():
        milliseconds = spread([1000 * each for each in values], ",.2f")
        lines.append(f"| {name} | {milliseconds} | {statistics.median(values) / first:,.0f} |")
    return "\n".join(lines) + "\n"
