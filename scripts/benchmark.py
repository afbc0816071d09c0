#!/usr/bin/env python
"""Measures speed as ratios against a peer, in one run, on this machine.

    python scripts/benchmark.py step --repeats 7

`step` is a whole training step (forward, loss, backward, fused AdamW): FLIP at several mask ratios, and Transformers'
CLIPModel of the same shapes on the same images and texts. Candidates take turns, so that a machine whose speed drifts
drifts for all; medians and ratios are printed, and written as JSON and Markdown under scripts/results.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel

from flip_hf import FlipConfig, FlipModel

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


def to_markdown(result: dict) -> str:
    """A table of medians, spread, images per second and ratios to the unmasked FLIP and to CLIPModel."""
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    whole = medians.get("FLIP 0% masked")
    lines = [
        f"Training step, ViT-{result['architecture']}, batch {result['batch_size']}, {result['precision']}, "
        f"texts padded to {result['text_tokens']} tokens. {result['hardware']}; {result['threads']} threads, "
        f"torch {result['torch']}, transformers {result['transformers']}. "
        f"Medians of {len(next(iter(result['seconds'].values())))} alternating steps.",
        "",
        f"`{result['command']}`",
        "",
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


def make_parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    parser = argparse.ArgumentParser(description="Speed against peers, as ratios in one run.")
    parser.add_argument("question", choices=["step"], help="what is measured")
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
    result = {**benchmark_step(options), **environment(options.device)}
    table = to_markdown(result)
    print(table)
    if options.output:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.output}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (RESULTS / f"{options.output}.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
