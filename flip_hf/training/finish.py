"""The end of a run: the model folder, the results, and the lines a person reads."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin

from flip_hf.modeling import FlipModel
from flip_hf.training.arguments import Arguments, write_recipe
from flip_hf.training.checkpoint import TrainState


def save_run(
    output_dir: Path,
    flip: FlipModel,
    weights: dict[str, torch.Tensor],
    processor: ProcessorMixin,
    arguments: Arguments,
    results: dict[str, Any],
) -> None:
    """Writes the model, its processor, the resolved recipe and `results.json`."""
    flip.eval().save_pretrained(output_dir, state_dict=weights)
    processor.save_pretrained(output_dir)
    write_recipe(arguments, output_dir / "recipe.yaml")
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def summary(
    flip: FlipModel,
    arguments: Arguments,
    state: TrainState,
    metrics: dict[str, float],
    class_names: tuple[str, ...],
    refused: Counter[str],
) -> str:
    """What was trained, how well it does, what was skipped, where it lies, how to use it.

    Args:
        flip: the trained model.
        arguments: of the run.
        state: at its end.
        metrics: of the final evaluation; empty if there was none.
        class_names: the evaluation's classes, for an example.
        refused: samples that could not be used, by reason.
    """
    vision: Any = flip.config.vision_config
    output_dir = Path(arguments.run.output_dir)
    result = "not evaluated: name labelled data with --eval_data"
    if metrics:
        result = (
            f"zero-shot top-1 {metrics['top1']:.1%}, top-5 {metrics['top5']:.1%} on {metrics['images']:.0f} images "
            f"of {len(class_names)} classes (chance {1 / len(class_names):.1%})"
        )
    skipped = [f"{count} x {reason}" for reason, count in refused.most_common()]
    if state.skipped_steps:
        skipped.append(f"{state.skipped_steps} steps that were not finite")
    quoted = " ".join(f'"{label}"' for label in class_names[:2] or ("a cat", "a dog"))
    return "\n".join(
        (
            f"Trained   ViT of {vision.num_hidden_layers} x {vision.hidden_size}, patch {vision.patch_size}, "
            f"{flip.num_parameters() / 1e6:.1f} M parameters, {state.samples:,} samples at mask ratio "
            f"{arguments.model.mask_ratio:g} in {_duration(state.seconds)}",
            f"Result    {result}",
            f"Skipped   {', '.join(skipped) or 'none'}",
            f"Saved     {output_dir} (curves: {output_dir / 'training_curves.png'})",
            f"Use it    python scripts/zero_shot.py {output_dir} IMAGE --labels {quoted}",
        )
    )
