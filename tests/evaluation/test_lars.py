"""LARS against the formula, step by step, and against timm's where that is installed."""

import copy

import pytest
import torch

from flip_hf.evaluation.probes.lars import Lars


@pytest.fixture
def layer() -> torch.nn.Linear:
    return torch.nn.Linear(6, 4)


def gradients(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(4, 6), torch.randn(4)) for _ in range(steps)]


def descend(layer, optimizer, found) -> None:
    for weight, bias in found:
        layer.weight.grad = weight.clone()
        layer.bias.grad = bias.clone()
        optimizer.step()


def test_a_matrix_moves_by_a_share_of_its_size_and_a_vector_by_its_gradient(layer):
    found = gradients(3)
    weight = layer.weight.detach().clone()
    bias = layer.bias.detach().clone()
    descend(layer, Lars(layer.parameters(), lr=2.0, momentum=0.5, trust_coefficient=0.01), found)
    along_weight = torch.zeros(4, 6)
    along_bias = torch.zeros(4)
    for of_weight, of_bias in found:
        along_weight = 0.5 * along_weight + 0.01 * weight.norm() * of_weight / of_weight.norm()
        along_bias = 0.5 * along_bias + of_bias
        weight = weight - 2 * along_weight
        bias = bias - 2 * along_bias
    assert torch.allclose(layer.weight, weight, atol=1e-6) and torch.allclose(layer.bias, bias, atol=1e-6)


def test_without_a_size_the_gradient_stays(layer):
    """Zero weights could never move, and a zero gradient has no direction."""
    torch.nn.init.zeros_(layer.weight)
    (of_weight, of_bias), *_ = gradients(1)
    descend(layer, optimizer := Lars(layer.parameters(), lr=0.1, momentum=0), [(of_weight, of_bias)])
    assert torch.allclose(layer.weight, -0.1 * of_weight)
    before = layer.weight.detach().clone()
    descend(layer, optimizer, [(torch.zeros(4, 6), torch.zeros(4))])
    assert torch.equal(layer.weight, before) and layer.weight.isfinite().all()


def test_steps_are_timms(layer):
    timm_optim = pytest.importorskip("timm.optim")
    theirs = copy.deepcopy(layer)
    groups = [{"params": [theirs.weight], "always_adapt": True}, {"params": [theirs.bias]}]
    found = gradients(5)
    descend(theirs, timm_optim.Lars(groups, lr=3.0, momentum=0.9, trust_coeff=1e-3, eps=0), found)
    descend(layer, Lars(layer.parameters(), lr=3.0), found)
    assert torch.allclose(layer.weight, theirs.weight, atol=1e-6) and torch.allclose(layer.bias, theirs.bias, atol=1e-6)
