"""A whole training step: forward, loss, backward, fused AdamW."""

import argparse
import statistics
from collections.abc import Callable

import torch
from transformers import CLIPConfig, CLIPModel

from flip_hf import FlipConfig, FlipModel

from .measuring import about, alternate

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


def step_markdown(result: dict) -> str:
    """A table of medians, spread, images per second and ratios to the unmasked FLIP and to CLIPModel."""
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    whole = medians.get("FLIP 0% masked")
    runs = len(next(iter(result["seconds"].values())))
    lines = [
        f"Training step, ViT-{result['architecture']}, batch {result['batch_size']}, {result['precision']}, "
        f"texts padded to {result['text_tokens']} tokens. {about(result, runs)}",
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
