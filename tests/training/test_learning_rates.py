"""Learning rates by tower and layer: the groups, and their steps beside optimizers of one parameter each."""

import copy

import pytest
import torch
from torch import nn

from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.muon import Muon
from flip_hf.training.optimization import is_decayed, make_optimizer
from tests.helpers.contrast import make_model

WEIGHT_DECAY = 0.3
LEARNING_RATE = 0.01
# Of the tiny model's two blocks a tower, from the projection down.
LAYERS = {
    "_projection.": 0,
    "post_layernorm.": 0,
    "final_layer_norm.": 0,
    "layers.1.": 1,
    "layers.0.": 2,
    "embeddings.": 3,
}


def expected_scale(name: str, image: float, text: float, decay: float) -> float:
    """The factor on the learning rate of a parameter, by hand."""
    if name == "logit_scale":
        return 1.0
    tower = image if name.startswith("vis") else text
    (below,) = (count for part, count in LAYERS.items() if part in name)
    return tower * decay**below


def give_gradients(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("image", "text", "decay"), [(0.1, 1.0, 1.0), (1.0, 1.0, 0.7), (0.5, 2.0, 0.65)])
def test_each_parameter_takes_the_step_of_its_own_learning_rate(image, text, decay, optimizer):
    options = OptimizationArguments(
        **{"optimizer": optimizer, "muon_lr_scale": 3.0, "weight_decay": WEIGHT_DECAY},
        **{"image_lr_scale": image, "text_lr_scale": text, "layer_decay": decay},
    )
    model = make_model()
    twins = dict(copy.deepcopy(model).named_parameters())
    made = make_optimizer(model, options)
    give_gradients(model)
    for group in made.param_groups:
        group["lr"] = LEARNING_RATE * group["lr_scale"]
    made.step()
    for name, parameter in model.named_parameters():
        rate = LEARNING_RATE * expected_scale(name, image, text, decay)
        twin = twins[name]
        twin.grad = parameter.grad
        if optimizer == "muon" and ".layers." in name and parameter.ndim == 2:
            Muon([twin], lr=3.0 * rate, weight_decay=WEIGHT_DECAY).step()
        else:
            weight_decay = WEIGHT_DECAY if is_decayed(name) else 0.0
            torch.optim.AdamW([twin], lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay).step()
        assert (parameter - twin).abs().max() < 1e-12, name


@pytest.mark.parametrize(("optimizer", "scales"), [("adamw", [1.0, 1.0]), ("muon", [3.0, 1.0, 1.0])])
def test_without_such_options_the_groups_are_those_of_one_learning_rate(optimizer, scales):
    """Checkpoints of older versions then resume to the same bits."""
    model = make_model()
    made = make_optimizer(model, OptimizationArguments(optimizer=optimizer, muon_lr_scale=3.0))
    assert [group["lr_scale"] for group in made.param_groups] == scales
    decayed, others = made.param_groups[-2:]
    of_muon = {id(p) for group in made.param_groups[:-2] for p in group["params"]}
    named = [(name, p) for name, p in model.named_parameters() if id(p) not in of_muon]
    assert list(map(id, decayed["params"])) == [id(p) for name, p in named if is_decayed(name)]
    assert list(map(id, others["params"])) == [id(p) for name, p in named if not is_decayed(name)]
