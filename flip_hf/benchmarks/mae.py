"""MAE's training step at several mask ratios against the encoding of full images with the same decoder.

What He et al. (CVPR 2022, arXiv 2111.06377, table 2) give as wall-clock time: at 75 %, ViT-L trains 2.8 times as fast
with a decoder of 8 blocks, 3.7 times with one of a single block; ViT-H 3.5 and 4.1 times. A step is forward, loss,
backward and AdamW of

- `flip_hf`: FlipForPreTraining on reconstruction alone. The encoder sees the patches that the mask keeps, the decoder
  (of width 512) all of them. The text tower, the projections and the temperature take no part: frozen.
- `full image`: the same model, whose encoder sees all patches. Decoder, masks and loss, which is over the dropped
  patches, are the same. MAE's baseline puts mask tokens into the encoder where patches are dropped; here the patches
  themselves stay there, which is the same work.
- `ViTMAEForPreTraining` of Transformers, of the same shapes.

Model FLOPs, those of one forward and one backward pass as mathematics needs them, say what could be gained at most if
all of them took the same time; AdamW, LayerNorms and activations are not in them.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from flip_hf import FlipForPreTraining
from flip_hf.benchmarks.candidates import LEARNING_RATE, OURS, VIT_MAE, autocast, wait
from flip_hf.benchmarks.measuring import about, alternate, spread
from flip_hf.benchmarks.models import IMAGE_SIZE, make_inputs, make_mae, make_vit_mae

FULL_IMAGE = "full image"
MAE_RATIO = 0.75  # of the mask whose dropped patches the full image's loss is over; its time does not depend on it

Loss = Callable[[torch.Tensor], torch.Tensor]
Pair = tuple[str, float]  # a candidate and its mask ratio


def full_image_loss(model: FlipForPreTraining, images: torch.Tensor) -> torch.Tensor:
    """The loss on dropped patches of images (B, 3, S, S) whose encoder has seen all patches.

    B images, L patches, K of them kept, C channels, P patch side, D the tower's width.
    """
    vision: Any = model.flip.vision_model
    tokens = vision(pixel_values=images, mask_ratio=0).last_hidden_state  # (B, 1 + L, D)
    targets = functional.pixel_unshuffle(images, vision.config.patch_size).flatten(2).mT  # (B, L, C * P * P)
    noise = torch.rand(targets.shape[:2], device=images.device)  # (B, L)
    kept = noise.argsort(dim=1)[:, : int(noise.shape[1] * (1 - MAE_RATIO))]  # (B, K)
    every = torch.arange(noise.shape[1], device=images.device).expand_as(noise)  # (B, L)
    return model.reconstruction_loss(model.decoder(tokens, every), targets, kept)


def our_losses(model: FlipForPreTraining, mask_ratios: list[float]) -> dict[Pair, Loss]:
    """The loss of full images, and of masked ones at each ratio."""

    def masked_loss(mask_ratio: float, images: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=images, mask_ratio=mask_ratio).loss

    masked = {(OURS, ratio): partial(masked_loss, ratio) for ratio in mask_ratios}
    return {(FULL_IMAGE, 0.0): partial(full_image_loss, model), **masked}


def peer_losses(model: Any, mask_ratios: list[float]) -> dict[Pair, Loss]:
    """ViTMAEForPreTraining's, which reads its mask ratio from its configuration."""

    def masked_loss(mask_ratio: float, images: torch.Tensor) -> torch.Tensor:
        model.config.mask_ratio = mask_ratio
        return model(pixel_values=images).loss

    return {(VIT_MAE, ratio): partial(masked_loss, ratio) for ratio in mask_ratios}


def make_losses(
    options: argparse.Namespace, device: str, attention: str = "sdpa"
) -> list[tuple[torch.nn.Module, dict[Pair, Loss]]]:
    """New models, each with the losses that it is trained on in turn."""
    ratios = [ratio for ratio in options.mask_ratios if ratio > 0]
    with torch.device(device):
        ours = make_mae(options.architecture, options.decoder_blocks, attention).train()
        losses: list[tuple[torch.nn.Module, dict[Pair, Loss]]] = [(ours, our_losses(ours, ratios))]
        if "vit_mae" in options.peers:
            peer = make_vit_mae(options.architecture, options.decoder_blocks, attention).train()
            losses.append((peer, peer_losses(peer, ratios)))
    return losses


def count_flops(options: argparse.Namespace) -> dict[Pair, int]:
    """Model FLOPs of an image's training step by torch's counter, on tensors without values.

    Attention is the eager one: fused kernels compute the scores twice, and not every torch counts the CPU's.
    """
    flops: dict[Pair, int] = {}
    image = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta")
    for _, losses in make_losses(options, "meta", attention="eager"):
        for pair, loss in losses.items():
            with FlopCounterMode(display=False) as counter:
                loss(image).backward()
            flops[pair] = counter.get_total_flops()
    return flops


def make_steps(options: argparse.Namespace) -> dict[Pair, Callable[[], None]]:
    """A training step for every candidate and mask ratio."""
    images = make_inputs(options.batch_size, options.device).pixel_values

    def step(loss: Loss, optimizer: torch.optim.Optimizer) -> None:
        with autocast(options):
            value = loss(images)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(options.device)

    steps: dict[Pair, Callable[[], None]] = {}
    for model, losses in make_losses(options, options.device):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        steps |= {pair: partial(step, loss, optimizer) for pair, loss in losses.items()}
    return steps


def benchmark_mae(options: argparse.Namespace) -> dict:
    """A training step on full images, and on masked ones at every mask ratio above 0."""
    flops = count_flops(options)
    steps = make_steps(options)
    runs = {f"{name} {ratio:.0%}": step for (name, ratio), step in steps.items()}
    seconds = alternate(runs, options.repeats, warm_up=5 if options.device == "cuda" else 1)
    return {
        "question": "mae",
        **{name: getattr(options, name) for name in ("architecture", "decoder_blocks", "batch_size", "precision")},
        "rows": [
            {"candidate": name, "mask_ratio": ratio, "flops": flops[name, ratio], "seconds": seconds[label]}
            for (name, ratio), label in zip(steps, runs, strict=True)
        ],
    }


def mae_markdown(result: dict) -> str:
    """A table of medians, spread, images per second, and ratios to full images, of which the turns have a spread."""
    full, *_ = result["rows"]
    medians = {(row["candidate"], row["mask_ratio"]): statistics.median(row["seconds"]) for row in result["rows"]}
    batch = result["batch_size"]
    whole = medians[FULL_IMAGE, 0.0]
    lines = [
        f"Training step of MAE, ViT-{result['architecture']} with a decoder of {result['decoder_blocks']} blocks, "
        f"batch {batch}, {result['precision']}. {about(result, len(full['seconds']))}",
        "| candidate | masked | seconds a step (min - max) | images/s | faster than the full image (min - max) "
        "| by model FLOPs | flip_hf is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        name = row["candidate"]
        ratio = row["mask_ratio"]
        seconds = row["seconds"]
        median = medians[name, ratio]
        ours = medians.get((OURS, ratio))
        faster = f"{median / ours:.2f}x" if ours else "-"
        turns = [theirs / own for theirs, own in zip(full["seconds"], seconds, strict=True)]
        lines.append(
            f"| {name} | {ratio:.0%} | {spread(seconds, '.3f')} | {batch / median:,.1f} "
            f"| {whole / median:.2f}x ({min(turns):.2f} - {max(turns):.2f}) | {full['flops'] / row['flops']:.2f}x "
            f"| {faster} |"
        )
    return "\n".join(lines) + "\n"
