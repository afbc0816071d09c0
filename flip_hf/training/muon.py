"""Muon for the matrices of Transformer blocks and AdamW for everything else, as one optimizer.

Muon replaces the gradient's momentum by the nearest orthogonal matrix, so that every direction of a layer moves alike
(Jordan et al., 2024, https://kellerjordan.github.io/posts/muon). It is meant for matrices between hidden layers;
tables, projections, the patch embedding, biases and LayerNorms stay with AdamW.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

# An update of Muon has the root mean square of AdamW's, about 0.2, so that one learning rate and one weight decay serve
# both (Liu et al., 2025, arXiv 2502.16982).
_UPDATE_SIZE = 0.2


def orthogonalized(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Approximates the nearest orthogonal matrix by Newton-Schulz iterations, which need matrix products alone.

    In bfloat16 on accelerators, as torch.optim.Muon computes them everywhere. In float32 on CPUs: without bfloat16
    instructions, theirs take 650 ms for the matrices of the recipe `shapes` instead of 36 ms.

    Args:
        matrix: (M, N); may be sharded.
        coefficients: of the iteration's polynomial.
        steps: number of iterations.
        eps: lower bound of the norm that the matrix is divided by.
    """
    first, third, fifth = coefficients
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix.to(torch.float32 if matrix.device.type == "cpu" else torch.bfloat16)
    x = x if wide else x.T
    x = x / x.norm().clamp(min=eps)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=third, alpha=fifth)
        x = torch.addmm(x, polynomial, x, beta=first)
    return x if wide else x.T


def skip_where(skipped: torch.Tensor | None, *optimizers: torch.optim.Optimizer) -> None:
    """Lets the next steps of optimizers leave everything as it is where `skipped` () is 1, decided on the device.

    This is what a gradient scaler does with torch's fused optimizers, and here with [`Muon`].
    """
    for optimizer in optimizers:
        vars(optimizer).update(found_inf=skipped, grad_scale=None)


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with updates of AdamW's size, and iterations that are fast on any CPU."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step with the gradients of its matrices, or none; see [`skip_where`]."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skipped = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, skipped)
        return loss

    def _update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], skipped: torch.Tensor | None
    ) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = orthogonalized(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        scale = _UPDATE_SIZE * math.sqrt(max(parameter.shape))
        moved = parameter * (1 - group["lr"] * group["weight_decay"])
        moved.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)
        for value, new in ((state["momentum_buffer"], momentum), (parameter, moved)):
            value.copy_(new if skipped is None else torch.where(skipped > 0, value, new))


class MuonWithAdamW(torch.optim.Optimizer):
    """Optimizer whose groups and states are shared by a [`Muon`] and a `torch.optim.AdamW`.

    To schedulers, wrappers and checkpoints it is one optimizer, whose first groups are Muon's.

    Args:
        muon_groups: Muon's parameter groups; each parameter has two dimensions.
        adamw_groups: AdamW's parameter groups.
        momentum: Muon's momentum.
        betas, eps: of AdamW.
        fused: use AdamW's fused kernel.

    Raises:
        ValueError: a parameter for Muon is not a matrix.
    """

    def __init__(
        self,
        muon_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = True,
    ):
        muon = Muon(muon_groups, lr=0.0, momentum=momentum)
        adamw = torch.optim.AdamW(adamw_groups, lr=0.0, betas=betas, eps=eps, fused=fused)
        self._parts = (muon, adamw)
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Makes the parts step on this optimizer's groups and states, whatever was assigned to it."""
        muon, adamw = self._parts
        first = len(muon.param_groups)
        muon.param_groups = self.param_groups[:first]
        adamw.param_groups = self.param_groups[first:]
        for part in self._parts:
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # `load_state_dict` replaces groups and states here
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step with the gradients of all parameters, or none; see [`skip_where`]."""
        muon, adamw = self._parts
        skip_where(getattr(self, "found_inf", None), *self._parts)
        loss = muon.step(closure)  # computes all gradients, before its own step
        adamw.step()
        return loss
