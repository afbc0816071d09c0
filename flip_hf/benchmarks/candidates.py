"""One training step of each candidate, as a function of the mask ratio.

A candidate is one model, which changes its mask ratio between steps, so that all fit into memory together.
"""

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator

from flip_hf.benchmarks.models import CONTEXT, Inputs, make_clip, make_flip, make_open_clip
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.distribution import Distribution
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.optimization import make_optimizer
from flip_hf.training.packing import pack_texts
from flip_hf.training.step import train_step

OURS = "flip_hf"
COMPILED = "flip_hf, compiled"
OPEN_CLIP = "open_clip"
STRONG = "open_clip, strong"
CLIP = "CLIPModel"
VIT_MAE = "ViTMAEForPreTraining"
OPEN_CLIP_CONTEXT = 77
LEARNING_RATE = 1e-5

Step = Callable[[float], None]


def wait(device: str) -> None:
    """Returns when the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def peer_versions() -> dict[str, str]:
    """Versions of the peers' packages that are installed."""
    packages = {"open_clip": "open_clip_torch", "timm": "timm"}
    return {package: version(package) for module, package in packages.items() if find_spec(module)}


def autocast(options: argparse.Namespace):
    """The precision that was asked for, as users set it."""
    return torch.autocast(options.device, torch.bfloat16) if options.precision == "bf16" else nullcontext()


def our_step(options: argparse.Namespace, inputs: Inputs, compiled: bool) -> Step:
    """A step as the engine takes it, of one micro-batch."""
    dtype = torch.bfloat16 if options.precision == "bf16" else None
    accelerator = Accelerator(mixed_precision="no", cpu=options.device == "cpu")
    encoder = PairEncoder(make_flip(options.architecture).train(), dtype)
    make = partial(make_optimizer, options=OptimizationArguments())
    compiler = "inductor" if compiled else None
    distribution = Distribution(accelerator, encoder, make, max_grad_norm=None, compiler=compiler)
    texts = pack_texts(inputs.input_ids.cpu(), inputs.attention_mask.cpu(), encoder.flip.config.get_text_config())
    texts = {name: value.to(options.device) for name, value in texts.items()}
    batch = {"pixel_values": inputs.pixel_values, **texts}

    def step(mask_ratio: float) -> None:
        result = train_step(
            distribution,
            [batch],
            prepare=lambda inputs: {**inputs, "mask_ratio": mask_ratio},
            learning_rate=LEARNING_RATE,
            reconstruction_weight=1.0,
        )
        assert math.isfinite(result.grad_norm)
        wait(options.device)

    return step


def open_clip_step(options: argparse.Namespace, inputs: Inputs, strong: bool) -> Step:
    """A step of open_clip_train: its groups of parameters, its clip of the temperature after the step."""
    from open_clip import ClipLoss  # pyright: ignore[reportMissingImports]

    context = CONTEXT if strong else OPEN_CLIP_CONTEXT
    model = make_open_clip(options.architecture, context).to(options.device).train()
    model.visual.patch_dropout = dropout = open_clip_dropout(strong)
    texts = inputs.padded_ids(context)
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or "ln" in name or "bias" in name]
    decayed = [p for name, p in model.named_parameters() if not (p.ndim < 2 or "ln" in name or "bias" in name)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6, fused=True if strong else None)
    loss_fn = ClipLoss(cache_labels=True)
    torch.backends.cudnn.benchmark = True  # as open_clip_train sets it, for the convolution that cuts patches
    forward = torch.compile(model, dynamic=False) if strong else model

    def step(mask_ratio: float) -> None:
        dropout.prob = mask_ratio
        optimizer.zero_grad()
        with autocast(options):
            loss = loss_fn(**forward(inputs.pixel_values, texts))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        wait(options.device)

    return step


def open_clip_dropout(strong: bool) -> Any:
    """open_clip's own module, which draws on the CPU, or timm's, which draws on the device."""
    if strong:
        from timm.layers.patch_dropout import PatchDropout  # pyright: ignore[reportMissingImports]
    else:
        from open_clip.transformer import PatchDropout  # pyright: ignore[reportMissingImports]
    return PatchDropout(0.0)


def clip_step(options: argparse.Namespace, inputs: Inputs) -> Step:
    """A step of Transformers' CLIPModel on whole images, texts padded to the longest."""
    model = make_clip(options.architecture).to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(mask_ratio: float) -> None:
        with autocast(options):
            loss = model(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                pixel_values=inputs.pixel_values,
                return_loss=True,
            ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(options.device)

    return step


def make_steps(options: argparse.Namespace, inputs: Inputs) -> dict[str, Step]:
    """The candidates that were asked for."""
    steps = {OURS: our_step(options, inputs, compiled=False)}
    if options.compile:
        steps[COMPILED] = our_step(options, inputs, compiled=True)
    if "open_clip" in options.peers:
        steps[OPEN_CLIP] = open_clip_step(options, inputs, strong=False)
    if "open_clip-strong" in options.peers:
        steps[STRONG] = open_clip_step(options, inputs, strong=True)
    if "clip" in options.peers:
        steps[CLIP] = clip_step(options, inputs)
    return steps
