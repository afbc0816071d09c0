"""Phases of a run: what is masked and how fast is learned at each sample; all counted in samples.

Masked training with tuning on whole images after it is a run of two stages, under options of its own.
"""

import math
from dataclasses import dataclass
from itertools import accumulate

from flip_hf.training.arguments import Arguments, ModelArguments
from flip_hf.training.stages import Stage, read_stages


@dataclass(frozen=True)
class Curve:
    """A learning rate over the samples of a run: linear warm-up from 0, half cosine to 0.

    Attributes:
        start, end: samples seen when it begins and ends.
        peak_lr: learning rate after the warm-up.
        warmup_samples: length of the warm-up.
    """

    start: int
    end: int
    peak_lr: float
    warmup_samples: int

    def at(self, samples: int) -> float:
        """Returns the learning rate at this many samples of the whole run."""
        done = samples - self.start
        warmup = min(self.warmup_samples, self.end - self.start)
        if done < warmup:
            return self.peak_lr * done / warmup
        progress = (done - warmup) / max(1, self.end - self.start - warmup)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def in_words(self) -> str:
        """Describes the curve in a line: its peak and its warm-up, or that the warm-up takes all of it."""
        peak = f"peak learning rate {self.peak_lr:.3g} after {self.warmup_samples:,} samples of warm-up"
        if self.warmup_samples < self.end - self.start:
            return peak
        return f"{peak}, so never: give fewer --warmup_samples, a twentieth of the run's, or more --train_samples"


@dataclass(frozen=True)
class Phase:
    """A phase of training, in which nothing changes but the learning rate and, in steps, the mask ratio.

    Attributes:
        name: `masked` or `unmasked`; of a run with stages, `stage 1` and so on.
        start, end: samples seen when it begins and ends.
        mask_ratios: fractions of the patches dropped, in turn, each for an equal part of the phase.
        curve: the learning rate, which may have begun in an earlier phase and end in a later one.
        text_mask_ratio: fraction of the text's context dropped.
        image_size: side of the images, in pixels; the model's own if None.
        text_length: tokens that texts are cut to; the model's context if None.
        edge_strengths: the strength of `edges` at the start and at the end of the phase, linear between.
    """

    name: str
    start: int
    end: int
    mask_ratios: tuple[float, ...]
    curve: Curve
    text_mask_ratio: float = 0.0
    image_size: int | None = None
    text_length: int | None = None
    edge_strengths: tuple[float, float] = (0.0, 0.0)

    @property
    def mask_ratio(self) -> float:
        """The mask ratio at the start of the phase."""
        return self.mask_ratios[0]

    @property
    def begins_curve(self) -> bool:
        """True if the learning rate begins anew with this phase."""
        return self.start == self.curve.start

    def mask_ratio_at(self, samples: int) -> float:
        """Returns the mask ratio at this many samples of the whole run."""
        part = (samples - self.start) * len(self.mask_ratios) // (self.end - self.start)
        return self.mask_ratios[min(part, len(self.mask_ratios) - 1)]

    def edge_strength_at(self, samples: int) -> float:
        """Returns the strength of `edges` at this many samples of the whole run; beyond the end, that of the end."""
        done = min(1.0, (samples - self.start) / (self.end - self.start))
        start, end = self.edge_strengths
        return start * (1 - done) + end * done

    def masks_in_words(self) -> str:
        """Describes the masks of images: `mask ratio 0.75, 0.5`, with the strength of `edges` where that is not 0."""
        ratios = ", ".join(f"{ratio:.3g}" for ratio in self.mask_ratios)
        strengths = " to ".join(f"{strength:.3g}" for strength in dict.fromkeys(self.edge_strengths))
        return f"mask ratio {ratios}" + (f", edge strength {strengths}" if any(self.edge_strengths) else "")

    def in_words(self) -> str:
        """Describes the phase in a line, without a full stop."""
        rate = self.curve.in_words() if self.begins_curve else "learning rate as before"
        images = f"images of {self.image_size} pixels, " if self.image_size is not None else ""
        texts = f"texts of {self.text_length} tokens, " if self.text_length is not None else ""
        return f"{self.name}: {self.end - self.start:,} samples, {images}{texts}{self.masks_in_words()}, {rate}"


def plan_mask_ratios(model: ModelArguments) -> tuple[float, ...]:
    """Plans the mask ratios of the masked phase: few, since `torch.compile` compiles each shape of tensors."""
    start = model.mask_ratio
    end = model.mask_ratio_end
    steps = model.mask_ratio_steps
    if end is None or end == start:
        return (start,)
    done = [step / (steps - 1) for step in range(steps)]  # from 0 to 1
    if model.mask_ratio_schedule == "cosine":
        done = [0.5 - 0.5 * math.cos(math.pi * x) for x in done]
    return tuple(start * (1 - x) + end * x for x in done)


def plan_edge_strengths(model: ModelArguments) -> tuple[float, float]:
    """Plans the strengths of `edges` at the start and at the end of masked training; 0 for other strategies."""
    if model.mask_strategy != "edges":
        return 0.0, 0.0
    start = model.mask_edge_strength
    end = model.mask_edge_strength_end
    return start, start if end is None else end


def name_stages(arguments: Arguments) -> dict[str, Stage]:
    """Returns the run's stages by name; without `--stages`, masked training and, if configured, tuning after it."""
    options = arguments.optimization
    if options.stages is not None:
        return {f"stage {number}": stage for number, stage in enumerate(read_stages(options.stages), start=1)}
    tuning = Stage(
        options.unmasked_samples,
        mask_ratio=0.0,
        text_mask_ratio=0.0,
        base_lr=options.unmasked_base_lr,
        warmup_samples=options.unmasked_warmup_samples,
    )
    named = {"masked": Stage(options.train_samples), "unmasked": tuning}
    return {name: stage for name, stage in named.items() if stage.samples > 0}


def plan_phases(arguments: Arguments) -> list[Phase]:
    """Plans the phases of a run, one for each of its stages; learning rates scale by batch / 256."""
    model = arguments.model
    options = arguments.optimization
    stages = name_stages(arguments)
    ends = list(accumulate(stage.samples for stage in stages.values()))
    starts = [0, *ends[:-1]]
    curve_starts = [
        start for start, stage in zip(starts, stages.values(), strict=True) if start == 0 or stage.base_lr is not None
    ]
    phases: list[Phase] = []
    for (name, stage), start, end in zip(stages.items(), starts, ends, strict=True):
        if start in curve_starts:
            until = min((other for other in curve_starts if other > start), default=ends[-1])
            base_lr = options.base_lr if stage.base_lr is None else stage.base_lr
            warmup = options.warmup_samples if stage.warmup_samples is None else stage.warmup_samples
            curve = Curve(start, until, base_lr * (options.batch_size / 256), warmup)
        else:
            curve = phases[-1].curve
        ratios = plan_mask_ratios(model) if stage.mask_ratio is None else (stage.mask_ratio,)
        text_ratio = model.text_mask_ratio if stage.text_mask_ratio is None else stage.text_mask_ratio
        strengths = plan_edge_strengths(model) if any(ratios) else (0.0, 0.0)
        sizes = (stage.image_size, stage.text_length)
        phases.append(Phase(name, start, end, ratios, curve, text_ratio, *sizes, strengths))
    return phases


def phase_at(phases: list[Phase], samples: int) -> Phase:
    """Returns the phase of the step that begins after this many samples; the last one beyond the run's end."""
    return next((phase for phase in phases if samples < phase.end), phases[-1])
