"""The bias that the sigmoid loss needs and the softmax loss does not: given to a model, or taken from it.

A model with a bias is trained by the sigmoid loss, one without by the softmax loss, wherever its loss is computed.
"""

import math
from typing import Literal

import torch
from torch import nn

from flip_hf.modeling import FlipConfig, FlipModel

Loss = Literal["softmax", "sigmoid"]

# SigLIP's start (Zhai et al. 2023, Section 3.2): almost all decisions are negative, and training shall not
# begin with a large correction.
LOGIT_BIAS_INIT = -10.0
SIGMOID_LOGIT_SCALE_INIT = math.log(10)


def loss_of(config: FlipConfig) -> Loss:
    """Returns the loss of a model with this configuration."""
    return "softmax" if config.logit_bias_init_value is None else "sigmoid"


def set_loss(config: FlipConfig, loss: Loss | None) -> None:
    """Makes a configuration that of a model with this loss; with None, it stays as it is."""
    if loss not in (None, loss_of(config)):
        config.logit_bias_init_value = LOGIT_BIAS_INIT if loss == "sigmoid" else None


def fit_bias(flip: FlipModel, config: FlipConfig) -> None:
    """Gives a loaded model the bias that the run's configuration has, or takes away what it lacks."""
    value = config.logit_bias_init_value
    if loss_of(config) == loss_of(flip.config):
        return
    flip.config.logit_bias_init_value = value
    flip.logit_bias = None if value is None else nn.Parameter(torch.full_like(flip.logit_scale, float(value)))


def change_in_words(name: str | None, saved: FlipConfig | None, loss: Loss | None) -> str | None:
    """Describes what a run's loss changes in the model that it starts with; None if nothing.

    Args:
        name: the folder or Hub id of the starting model; None for a new one.
        saved: its configuration.
        loss: the loss asked for, if any.
    """
    if saved is None:
        said = f"a bias of {LOGIT_BIAS_INIT:g}, as SigLIP's"
        return f"The new model is trained with the sigmoid loss and starts with {said}" if loss == "sigmoid" else None
    if loss in (None, loss_of(saved)):
        return None
    if loss == "sigmoid":
        return (
            f"{name} has no bias for the sigmoid loss: it gets one of {LOGIT_BIAS_INIT:g}, as SigLIP's, and keeps its "
            "temperature"
        )
    return f"{name} was trained with the sigmoid loss; the softmax loss has no use for its bias, which is left out"
