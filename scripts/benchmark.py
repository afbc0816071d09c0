#!/usr/bin/env python
"""Measures speed as ratios against a peer, in one run, on this machine.

    python scripts/benchmark.py step --repeats 7
    python scripts/benchmark.py zero-shot --repeats 3

`step` is a whole training step (forward, loss, backward, fused AdamW): FLIP at several mask ratios, and Transformers'
CLIPModel of the same shapes on the same images and texts. `zero-shot` is the classification of images by 1,000 labels
with a tiny model: ZeroShotClassifier, its labels encoded, and Transformers' pipeline on the same model. Candidates take
turns, so that a machine whose speed drifts drifts for all; medians and ratios are printed, and written as JSON and
Markdown under scripts/results.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flip_hf import FlipConfig, FlipModel, FlipProcessor, ZeroShotClassifier
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.evaluation.labels import prompt_set

RESULTS = Path(__file__).parent / "results"

# Width, blocks and heads of the two towers, patch side, shared embedding (the paper's Table 9).
ARCHITECTURES = {
    "B/16": {"vision": (768, 12, 12), "text": (512, 12, 8), "patch": 16, "embed": 512},
    "L/16": {"vision": (1024, 24, 16), "text": (768, 12, 12), "patch": 16, "embed": 768},
    "L/14": {"vision": (1024, 24, 16), "text": (768, 12, 12), "patch": 14, "embed": 768},
    "H/14": {"vision": (1280, 32, 16), "text": (1024, 24, 16), "patch": 14, "embed": 1024},
}
VOCAB_SIZE, CONTEXT = 30522, 32
EOS = VOCAB_SIZE - 1
COLOURS = ("red", "green", "blue", "yellow", "striped", "large", "small", "wooden")
LABELS, IMAGES = 1000, 64  # of the question `zero-shot`


def tower_fields(name: str) -> tuple[dict, dict, int]:
    """Configuration fields of the text and the vision tower that FLIP and CLIP share, and the shared embedding."""
    shape = ARCHITECTURES[name]

    def fields(width: int, blocks: int, heads: int) -> dict:
        return {
            **{"hidden_size": width, "intermediate_size": 4 * width},
            **{"num_hidden_layers": blocks, "num_attention_heads": heads, "hidden_act": "gelu_pytorch_tanh"},
        }

    text = {**fields(*shape["text"]), "vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT}
    vision = {**fields(*shape["vision"]), "image_size": 224, "patch_size": shape["patch"]}
    return text, vision, shape["embed"]


def make_flip(name: str, mask_ratio: float) -> FlipModel:
    """A new FlipModel of this architecture."""
    text, vision, embed = tower_fields(name)
    return FlipModel(
        FlipConfig(text_config=text, vision_config={**vision, "mask_ratio": mask_ratio}, projection_dim=embed)
    )


def make_clip(name: str) -> CLIPModel:
    """A new CLIPModel of the same shapes and activation."""
    text, vision, embed = tower_fields(name)
    text = {**text, "bos_token_id": EOS - 1, "eos_token_id": EOS, "pad_token_id": 0}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=embed))


def make_inputs(batch_size: int, device: str) -> dict[str, torch.Tensor]:
    """Images, and captions of 8 to 32 tokens (16 in the mean), padded to the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = (8 + torch.distributions.Exponential(1 / 8.0).sample((batch_size,))).int().clamp(max=CONTEXT)
    attention_mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    input_ids = torch.randint(1, EOS - 1, attention_mask.shape, generator=generator)
    input_ids[torch.arange(batch_size), lengths.long() - 1] = EOS
    inputs = {
        "pixel_values": torch.randn(batch_size, 3, 224, 224, generator=generator),
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
    }
    return {name: value.to(device) for name, value in inputs.items()}


def make_step(model: torch.nn.Module, inputs: dict, device: str, bf16: bool) -> Callable[[], None]:
    """A function that takes one whole training step and returns when it is done."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def alternate(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, the candidates taking turns after one warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with tqdm(total=(repeats + 1) * len(steps), unit="step", file=sys.stderr) as bar:
        for turn in range(repeats + 1):
            for name, step in steps.items():
                bar.set_description(name)
                start = time.perf_counter()
                step()
                if turn > 0:
                    seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


def benchmark_step(options: argparse.Namespace) -> dict:
    """The whole training step, FLIP at several ratios against CLIPModel."""
    inputs = make_inputs(options.batch_size, options.device)
    candidates: dict[str, torch.nn.Module] = {"CLIPModel": make_clip(options.architecture)}
    for ratio in options.mask_ratios:
        candidates[f"FLIP {ratio:.0%} masked"] = make_flip(options.architecture, ratio)
    steps = {
        name: make_step(model, inputs, options.device, options.precision == "bf16")
        for name, model in candidates.items()
    }
    seconds = alternate(steps, options.repeats)
    return {
        "question": "step",
        "architecture": options.architecture,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "text_tokens": inputs["input_ids"].shape[1],
        "seconds": seconds,
    }


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


def environment(device: str) -> dict:
    """What a figure depends on."""
    return {
        "command": "python scripts/benchmark.py " + " ".join(sys.argv[1:]),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def about(result: dict) -> str:
    """On what, and by which command, a result was measured."""
    return (
        f"{result['hardware']}; {result['threads']} threads, torch {result['torch']}, transformers "
        f"{result['transformers']}. Medians of {len(next(iter(result['seconds'].values())))} alternating runs.\n\n"
        f"`{result['command']}`\n"
    )


def zero_shot_markdown(result: dict) -> str:
    """A table of seconds an image and ratios to ZeroShotClassifier."""
    first = statistics.median(next(iter(result["seconds"].values())))
    lines = [
        f"Zero-shot classification by {result['labels']:,} labels, tiny model, after encoding the labels once "
        f"({result['encoding_seconds']:.1f} s for 80 templates). {about(result)}",
        "| candidate | milliseconds an image (min - max) | times ZeroShotClassifier's |",
        "|---|---|---|",
    ]
    for name, values in result["seconds"].items():
        low, middle, high = (1000 * f(values) for f in (min, statistics.median, max))
        lines.append(f"| {name} | {middle:,.2f} ({low:,.2f} - {high:,.2f}) | {middle / 1000 / first:,.0f} |")
    return "\n".join(lines) + "\n"


def step_markdown(result: dict) -> str:
    """A table of medians, spread, images per second and ratios to the unmasked FLIP and to CLIPModel."""
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    whole = medians.get("FLIP 0% masked")
    lines = [
        f"Training step, ViT-{result['architecture']}, batch {result['batch_size']}, {result['precision']}, "
        f"texts padded to {result['text_tokens']} tokens. {about(result)}",
        "| candidate | seconds a step (min - max) | images/s | time / CLIPModel's | time / unmasked FLIP's |",
        "|---|---|---|---|---|",
    ]
    for name, values in result["seconds"].items():
        to_whole = f"{medians[name] / whole:.3f}" if whole else "-"
        lines.append(
            f"| {name} | {medians[name]:.3f} ({min(values):.3f} - {max(values):.3f}) "
            f"| {result['batch_size'] / medians[name]:.1f} | {medians[name] / medians['CLIPModel']:.3f} | {to_whole} |"
        )
    return "\n".join(lines) + "\n"


QUESTIONS = {"step": (benchmark_step, step_markdown), "zero-shot": (benchmark_zero_shot, zero_shot_markdown)}


def make_parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    parser = argparse.ArgumentParser(description="Speed against peers, as ratios in one run.")
    parser.add_argument("question", choices=sorted(QUESTIONS), help="what is measured")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="B/16")
    parser.add_argument("--mask_ratios", type=float, nargs="+", default=[0.0, 0.5, 0.75])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7, help="counted steps of each candidate")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="name of the result files; not written if not given")
    return parser


def main() -> None:
    """Measures, prints, and writes what was measured."""
    options = make_parser().parse_args()
    torch.manual_seed(0)
    measure, to_markdown = QUESTIONS[options.question]
    result = {**measure(options), **environment(options.device)}
    table = to_markdown(result)
    print(table)
    if options.output:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.output}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (RESULTS / f"{options.output}.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
