"""LARS, SGD whose steps scale with the norm of the weights; torch has none."""

from collections.abc import Iterable

import torch
from torch import nn


class Lars(torch.optim.Optimizer):
    r"""Layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv 1708.03888), as in MAE's linear probe.

    The gradient $g$ of a matrix $w$ becomes $\eta \lVert w \rVert / \lVert g \rVert \cdot g$ before it enters the
    momentum, so that each step moves $w$ by a fraction of its own norm; where a norm is 0, $g$ stays. Biases and other
    vectors take plain steps. The learning rate is applied after the momentum, as in torch's SGD, not inside it as in
    the paper. There is no weight decay, as the recipe has none.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: momentum factor.
        trust_coefficient: $\eta$.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.9, trust_coefficient: float = 1e-3
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if parameter.ndim > 1:
                    ratio = group["trust_coefficient"] * parameter.norm() / gradient.norm()
                    gradient = gradient * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(gradient)
                parameter.add_(state["momentum"], alpha=-group["lr"])
