"""The runs that repeat the paper's Figure 1 and Table 1, and the masks of later work, at any scale.

Sizes are relative to one number, the samples of the longest run, in the paper's proportions where its text gives them.
Every run is `flip-hf pretrain` with the same recipe.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flip_hf.training.recipes import parse_arguments

SEEDS = (0, 1, 2)
MASKS = {0: 0.0, 50: 0.5, 75: 0.75}  # percent, as runs are named
LENGTHS = {"quarter": 0.25, "half": 0.5, "full": 1, "double": 2, "quadruple": 4}  # of the longest unmasked run
MAIN = "half"  # the length of Table 1
TUNING = 0.05  # of a run's samples: the paper tunes for 0.32 epochs after 6.4
TUNING_LR = 0.3  # factor on the recipe's: does well on the embedded data
# Sets of runs about claims: all of them on captioned data; Figure 1, masks and positives on labelled data.
SETS = ("paper", "photos")
FINETUNING = "finetuning"  # the set of ways to fine-tune, in choices.py
PAIRS = "pairs"  # runs without equal captions as positives
STAGES = "stages"  # runs on small images first
SIDES = (1 / 2, 3 / 4, 1)  # of their images, as fractions of the model's: Perception Encoder has 98, 154, 224 pixels
STRATEGIES = ("block", "edges", "gaussian", "resize")
BEST_STRATEGY = "grid"  # on the embedded data, so that it is run at every length too


@dataclass(frozen=True)
class Scale:
    """The size of the runs.

    Attributes:
        samples: samples of the longest unmasked run.
        batch: samples per step, standing for the paper's 32k; half and twice as much stand for its 16k and 64k.
        base_lr: learning rate of training, for 256 samples.
        decoder: decoder for reconstruction: one layer, half as wide as the image tower, as MAE's for ViT-L.
        image_size, patch_size: sides of the model's images and patches, in pixels.
    """

    samples: int
    batch: int
    base_lr: float
    decoder: dict[str, int]
    image_size: int
    patch_size: int

    @classmethod
    def of_recipe(cls, recipe: str, samples: int) -> "Scale":
        """Derives the scale from a recipe, a name or a file.

        Raises:
            FileNotFoundError: there is no such recipe.
            ValueError: it has options that do not exist, or values out of range.
        """
        from flip_hf.training.models import make_config  # here, since it imports torch, which the options do not need

        arguments = parse_arguments([recipe])
        tower: Any = make_config(arguments.model).vision_config
        width = tower.hidden_size // 2
        decoder = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 1}
        decoder["num_attention_heads"] = max(1, tower.num_attention_heads // 2)
        optimization = arguments.optimization
        sizes = (tower.image_size, tower.patch_size)
        return cls(samples, optimization.batch_size, optimization.base_lr, decoder, *sizes)


@dataclass(frozen=True)
class Experiment:
    """A point of a table or a figure, for every seed.

    Attributes:
        name: `mask75-half-batch512`.
        options: options of `flip-hf pretrain`, over the recipe's; of `flip-hf evaluate` for `kind="inference"`.
        start: name of the run whose model it starts from, or evaluates.
        kind: `"training"`; `"inference"` of a trained model in the ways of Table 1d; or `"interpolation"` between a
            trained model and the one that it started from.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    kind: str = "training"

    @property
    def samples(self) -> int:
        """Pairs seen in training; 0 where nothing is trained."""
        stages = self.options.get("stages", [])
        return self.options.get("train_samples", 0) + sum(stage["samples"] for stage in stages)

    @property
    def cost(self) -> float:
        """Approximate relative duration: images encoded in training, in whole images of the model's size."""
        return self.samples * (1 - self.options.get("mask_ratio", 0))


def _training(name: str, samples: float, mask: int, batch: int, **options: Any) -> Experiment:
    steps = max(1, round(samples / batch))
    return Experiment(
        name, {"mask_ratio": MASKS[mask], "batch_size": batch, **lengths(steps, batch, 1 / 16), **options}
    )


def lengths(steps: int, batch: int, warm_up: float) -> dict[str, int]:
    """Returns options that count samples, with 20 log lines per run, as its speed is their median."""
    return {
        "train_samples": steps * batch,
        "warmup_samples": max(1, round(warm_up * steps)) * batch,
        "log_samples": max(1, steps // 20) * batch,
    }


def _tuned(run: Experiment, scale: Scale) -> Experiment:
    """Plans the tuning of the same model on whole images, as a separate run, so that its time is known."""
    steps = max(4, round(TUNING * run.samples / scale.batch))
    options = {"mask_ratio": 0.0, "batch_size": scale.batch, **lengths(steps, scale.batch, 0.2)}
    return Experiment(f"{run.name}-tuned", {**options, "base_lr": TUNING_LR * scale.base_lr}, start=run.name)


def planned_runs(scale: Scale, which: str = "paper") -> list[Experiment]:
    """Lists the runs of one of `SETS`, those that others start from first."""
    return [*_over_time(scale), *(_table(scale) if which == "paper" else _labelled(scale))]


def _over_time(scale: Scale) -> Iterator[Experiment]:
    """Plans Figure 1: each mask ratio at the lengths that encode no more than the longest unmasked run.

    Each masked run is followed by Table 1e's tuning on whole images.
    """
    for length, factor in LENGTHS.items():
        samples = scale.samples * factor
        runs = [_training(f"mask{mask}-{length}", samples, mask, scale.batch) for mask in MASKS]
        strategy = {"mask_strategy": BEST_STRATEGY}
        runs.append(_training(f"mask75-{length}-{BEST_STRATEGY}", samples, 75, scale.batch, **strategy))
        for run in runs:
            if factor * (1 - run.options["mask_ratio"]) > 1:
                continue
            yield run
            if run.options["mask_ratio"]:
                yield _tuned(run, scale)


def _table(scale: Scale) -> Iterator[Experiment]:
    """Plans Tables 1b, 1c, 1d, 1f, and other masks, at the main length."""
    samples = scale.samples * LENGTHS[MAIN]
    batch = scale.batch
    for mask, times in ((0, 0.5), (50, 0.5), (50, 2), (75, 0.5), (75, 2)):
        # The learning rate scales with the root of the batch: linear scaling, as in the paper, is too much here.
        base_lr = scale.base_lr / math.sqrt(times)
        name = f"mask{mask}-{MAIN}-batch{times:g}x"
        yield _training(name, samples, mask, round(times * batch), base_lr=base_lr)
    for mask in (50, 75):
        name = f"mask{mask}-{MAIN}"
        yield Experiment(f"{name}-inference", {"mask_ratio": MASKS[mask]}, start=name, kind="inference")
        reconstruction = {"objective": "both", "decoder_config": scale.decoder, "grid_samples": 0}
        yield _training(f"{name}-reconstruction", samples, mask, batch, **reconstruction)
    for strategy in ("random", "prioritized", "block", "frequency"):
        text = {"text_mask_ratio": 0.5, "text_mask_strategy": strategy}
        yield _training(f"mask75-{MAIN}-text-{strategy}", samples, 75, batch, **text)
    for strategy in ("prioritized", "block", "frequency"):  # those that differ where nearly all texts are cut
        text = {"text_mask_ratio": 0.75, "text_mask_strategy": strategy}
        yield _training(f"mask75-{MAIN}-text75-{strategy}", samples, 75, batch, **text)
    for strategy in STRATEGIES:
        yield _training(f"mask75-{MAIN}-{strategy}", samples, 75, batch, mask_strategy=strategy)


def _staged(scale: Scale) -> Experiment:
    """Plans the longest unmasked run with small images first, and as many pairs of each size."""
    steps = round(scale.samples / scale.batch)
    options = {name: value for name, value in lengths(steps, scale.batch, 1 / 16).items() if name != "train_samples"}
    ends = [round(steps * (index + 1) / len(SIDES)) for index in range(len(SIDES))]
    patches = scale.image_size // scale.patch_size
    stages = [
        {"samples": (end - start) * scale.batch, "image_size": max(1, round(side * patches)) * scale.patch_size}
        for start, end, side in zip((0, *ends), ends, SIDES, strict=False)
    ]
    return Experiment(
        f"mask0-full-{STAGES}", {"mask_ratio": 0.0, "batch_size": scale.batch, **options, "stages": stages}
    )


def _labelled(scale: Scale) -> Iterator[Experiment]:
    """Plans stages, and at the main length other masks and runs without equal captions as positives."""
    yield _staged(scale)
    samples = scale.samples * LENGTHS[MAIN]
    for strategy in STRATEGIES:
        yield _training(f"mask75-{MAIN}-{strategy}", samples, 75, scale.batch, mask_strategy=strategy)
    for mask in MASKS:
        yield _training(f"mask{mask}-{MAIN}-{PAIRS}", samples, mask, scale.batch, positives="pair")


def chosen(runs: list[Experiment], parts: list[str], skipped: list[str]) -> list[Experiment]:
    """Selects the runs with one of the parts in their name, and those that they start from; all where no part is given.

    Args:
        runs: all runs of a set.
        parts: parts of names to select.
        skipped: parts of names to leave out, of runs that no selected one starts from.

    Raises:
        ValueError: a part is in no name.
    """
    for part in (*parts, *skipped):
        if not any(part in run.name for run in runs):
            raise ValueError(f"no run has {part!r} in its name: {', '.join(run.name for run in runs)}")
    names = {run.name for run in runs if not parts or any(part in run.name for part in parts)}
    names = {name for name in names if not any(part in name for part in skipped)}
    for run in reversed(runs):
        if run.name in names and run.start is not None:
            names.add(run.start)
    return [run for run in runs if run.name in names]


def words_of(options: dict[str, Any]) -> list[str]:
    """Returns options as words of a command line; a tuple is several words."""
    found: list[str] = []
    for name, value in options.items():
        found.append(f"--{name}")
        if isinstance(value, tuple):
            found += map(str, value)
        else:
            found.append(json.dumps(value) if isinstance(value, (dict, list)) else str(value))
    return found
