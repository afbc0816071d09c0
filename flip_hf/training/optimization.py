"""Optimizer groups, phases and learning rates, all counted in samples."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flip_hf.evaluation.finetuning.layers import layer_of
from flip_hf.modeling import FlipModel
from flip_hf.modeling.blocks_flip import FlipEncoderLayer
from flip_hf.training.arguments import Arguments, ModelArguments, OptimizationArguments
from flip_hf.training.lora import is_adapter
from flip_hf.training.muon import MuonWithAdamW


@dataclass(frozen=True)
class Phase:
    """A phase of training with one learning-rate curve.

    Attributes:
        name: `masked` or `unmasked`.
        start, end: samples seen when it begins and ends.
        mask_ratios: fractions of the patches dropped, in turn, each for an equal part of the phase.
        peak_lr: learning rate after the warm-up.
        warmup_samples: length of the linear warm-up.
        text_mask_ratio: fraction of the text's context dropped.
        edge_strengths: the strength of `edges` at the start and at the end of the phase, linear between.
    """

    name: str
    start: int
    end: int
    mask_ratios: tuple[float, ...]
    peak_lr: float
    warmup_samples: int
    text_mask_ratio: float = 0.0
    edge_strengths: tuple[float, float] = (0.0, 0.0)

    @property
    def mask_ratio(self) -> float:
        """The mask ratio at the start of the phase."""
        return self.mask_ratios[0]

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

    def learning_rate(self, samples: int) -> float:
        """Returns the learning rate at this many samples of the whole run: linear warm-up from 0, half cosine to 0."""
        done = samples - self.start
        warmup = min(self.warmup_samples, self.end - self.start)
        if done < warmup:
            return self.peak_lr * done / warmup
        progress = (done - warmup) / max(1, self.end - self.start - warmup)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


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
    """Plans the strengths of `edges` at the start and at the end of the masked phase; 0 for other strategies."""
    if model.mask_strategy != "edges":
        return 0.0, 0.0
    start = model.mask_edge_strength
    end = model.mask_edge_strength_end
    return start, start if end is None else end


def plan_phases(arguments: Arguments) -> list[Phase]:
    """Plans the masked phase and, if configured, the unmasked tuning after it; rates scale by batch / 256."""
    options = arguments.optimization
    scale = options.batch_size / 256
    ratios = plan_mask_ratios(arguments.model)
    text_ratio = arguments.model.text_mask_ratio
    strengths = plan_edge_strengths(arguments.model)
    middle = options.train_samples
    end = options.train_samples + options.unmasked_samples
    phases = [
        Phase("masked", 0, middle, ratios, options.base_lr * scale, options.warmup_samples, text_ratio, strengths),
        Phase("unmasked", middle, end, (0.0,), options.unmasked_base_lr * scale, options.unmasked_warmup_samples),
    ]
    return [phase for phase in phases if phase.end > phase.start]


def phase_at(phases: list[Phase], samples: int) -> Phase:
    """Returns the phase of the step that begins after this many samples; the last one beyond the run's end."""
    return next((phase for phase in phases if samples < phase.end), phases[-1])


def is_decayed(name: str) -> bool:
    """Returns whether weight decay applies to a parameter of this name.

    As in the official code: everything but biases, LayerNorms and position tables. Class token, token table and
    temperature are decayed. The bias of the logits is a bias: decay would pull it from its -10 to 0, where most
    decisions of the sigmoid loss are wrong.
    """
    return not (name.endswith("bias") or "norm" in name or "position_embedding" in name)


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Lists the weight matrices of the Transformer blocks that require a gradient.

    Adapters are not among them. A layer sees their product, whose update is not orthogonal where those of both factors
    are; LoRA is trained with AdamW, and its learning rates are known for that.
    """
    blocks = [module for module in model.modules() if isinstance(module, FlipEncoderLayer)]
    named = [each for block in blocks for each in block.named_parameters()]
    parameters = [parameter for name, parameter in named if not is_adapter(name)]
    return [parameter for parameter in parameters if parameter.ndim == 2 and parameter.requires_grad]


def _lr_scales(model: nn.Module, options: OptimizationArguments) -> dict[int, float]:
    """Returns the factors on the learning rate of the towers' parameters, with their projections, by `id`.

    The factor of a layer is its tower's, times `layer_decay` for each layer from the projection down (BEiT, Bao et al.
    2021, arXiv 2106.08254).
    """
    scales = {}
    for flip in (module for module in model.modules() if isinstance(module, FlipModel)):
        towers = {
            ("vision_model.", "visual_projection."): (flip.config.vision_config, options.image_lr_scale),
            ("text_model.", "text_projection."): (flip.config.text_config, options.text_lr_scale),
        }
        for parts, (config, scale) in towers.items():
            top = config.num_hidden_layers + 1
            for name, parameter in flip.named_parameters():
                if name.startswith(parts):
                    scales[id(parameter)] = scale * options.layer_decay ** (top - layer_of(name, top - 1))
    return scales


def _split(group: dict[str, Any], scales: dict[int, float]) -> list[dict[str, Any]]:
    """Divides a group by the parameters' factors on the learning rate; with one factor it stays one group."""
    by_scale: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        by_scale.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
    return [
        {**group, "params": params, "lr_scale": group["lr_scale"] * scale} for scale, params in by_scale.items()
    ] or [group]


def make_optimizer(model: nn.Module, options: OptimizationArguments) -> torch.optim.Optimizer:
    """Makes the optimizer of the parameters that require a gradient; each step sets the learning rate of its groups.

    AdamW has two groups, with and without weight decay; Muon's matrices are a group before them. Each is divided where
    towers or layers have learning rates of their own. A group's learning rate is that of the step times its `lr_scale`.
    """
    matrices = _matrices(model) if options.optimizer == "muon" else []
    of_muon = {id(parameter) for parameter in matrices}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in of_muon]
    decayed = [p for name, p in named if is_decayed(name)]
    others = [p for name, p in named if not is_decayed(name)]
    scales = _lr_scales(model, options)
    groups = [
        *_split({"params": decayed, "weight_decay": options.weight_decay, "lr_scale": 1.0}, scales),
        *_split({"params": others, "weight_decay": 0.0, "lr_scale": 1.0}, scales),
    ]
    betas = (options.adam_beta1, options.adam_beta2)
    if options.optimizer == "muon":
        group = {"params": matrices, "weight_decay": options.weight_decay, "lr_scale": options.muon_lr_scale}
        return MuonWithAdamW(_split(group, scales), groups, betas=betas, eps=options.adam_epsilon)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=options.adam_epsilon, fused=True)
