"""Optimizers: groups of parameters, their weight decay and factors on the learning rate."""

from typing import Any

import torch
from torch import nn

from flip_hf.evaluation.finetuning.layers import layer_of
from flip_hf.modeling import FlipModel
from flip_hf.modeling.blocks_flip import FlipEncoderLayer
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.lora import is_adapter
from flip_hf.training.muon import MuonWithAdamW


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
