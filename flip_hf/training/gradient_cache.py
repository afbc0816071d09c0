"""Gradient caching: the exact gradient of one contrastive batch, with the memory of a micro-batch.

Embeddings of all micro-batches are computed first, without a graph; the loss gives its gradient with respect to them;
then each micro-batch is encoded again and that gradient is propagated through it (GradCache, Gao et al. 2021). Both
passes must see the same masks and dropout, so torch's generators are restored before a micro-batch is encoded again.
Between the passes only embeddings and their gradients are held. Plain accumulation would contrast each micro-batch
with itself alone, which is another objective; for a reconstruction loss, a mean over images, it is exact.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from flip_hf.losses import at_least_float32, contrastive_loss
from flip_hf.training.encoder import Encoded

Embeds = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Encode = Callable[[dict[str, Any]], Encoded]


@dataclass(frozen=True)
class StepLoss:
    """The losses of a step, as detached scalars.

    Attributes:
        total: the loss whose gradient was taken.
        accuracy: fraction of images whose own text is the most similar; None where nothing is contrasted.
        contrastive, reconstruction: the two terms of `total`, unweighted; None unless there are both.
    """

    total: torch.Tensor
    accuracy: torch.Tensor | None = None
    contrastive: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """Returns the values that are present, under the names of a log line."""
        names = {"loss": self.total, "accuracy": self.accuracy}
        names |= {"contrastive_loss": self.contrastive, "reconstruction_loss": self.reconstruction}
        return {name: value for name, value in names.items() if value is not None}


def _generator_state(device: torch.device) -> list[torch.Tensor]:
    """Returns the state of torch's generators on the CPU and on `device`."""
    if device.type == "cpu":
        return [torch.get_rng_state()]
    which = () if device.type == "mps" else (device,)  # torch.mps knows one device
    return [torch.get_rng_state(), torch.get_device_module(device).get_rng_state(*which)]


def _set_generator_state(state: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        which = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(state[1], *which)


@contextmanager
def _generators(state: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Sets torch's generators to `state`, and restores them at the end."""
    before = _generator_state(device)
    _set_generator_state(state, device)
    try:
        yield
    finally:
        _set_generator_state(before, device)


def _embed(
    encode: Encode, micro_batches: list[dict[str, Any]], device: torch.device
) -> tuple[Embeds, list[int], list[list[torch.Tensor]]]:
    """Returns all embeddings, (n, E) each, and the scale; each micro-batch's size and the generators before it."""
    states = []
    pieces = []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(_generator_state(device))
            pieces.append(encode(micro_batch)[:3])
    images, texts, scales = zip(*pieces, strict=True)
    return (torch.cat(images), torch.cat(texts), scales[0]), [image.shape[0] for image in images], states


def _differentiate(embeds: Embeds) -> tuple[torch.Tensor, torch.Tensor, Embeds]:
    """Returns loss, accuracy, and the gradients of the loss with respect to the embeddings and the scale."""
    inputs = [at_least_float32(value).detach().requires_grad_() for value in embeds]
    loss, accuracy = contrastive_loss(*inputs)
    image_grads, text_grads, scale_grad = torch.autograd.grad(loss, inputs)
    return loss.detach(), accuracy, (image_grads, text_grads, scale_grad)


def cached_backward(
    encode: Encode,
    micro_batches: list[dict[str, Any]],
    backward: Callable[[torch.Tensor], None],
    no_sync: Callable[[], AbstractContextManager],
    device: torch.device,
    *,
    embed: Encode | None = None,
    reconstruction_weight: float = 1.0,
) -> StepLoss:
    """Adds the gradient of the whole batch's loss to the parameters.

    Args:
        encode: encodes a micro-batch of B pairs; called once on each, with a graph.
        micro_batches: the batch in pieces; a single piece costs no second pass.
        backward: takes a scalar to call backward on.
        no_sync: context in which processes do not average gradients.
        device: the model's device.
        embed: `encode` without a reconstruction, for the pass without a graph; `encode` itself if not given. Both must
            draw the same masks and dropout from torch's generators up to the embeddings.
        reconstruction_weight: weight of the reconstruction loss, where there is one beside the contrastive one.
    """
    if len(micro_batches) == 1:
        encoded: Any = encode(micro_batches[0])
        contrastive, accuracy = contrastive_loss(*encoded[:3])
        reconstruction = encoded.reconstruction_loss
        total = contrastive if reconstruction is None else contrastive + reconstruction_weight * reconstruction
        backward(total)
        return _step_loss(contrastive, accuracy, reconstruction, reconstruction_weight)

    embeds, sizes, states = _embed(embed or encode, micro_batches, device)
    contrastive, accuracy, (image_grads, text_grads, scale_grad) = _differentiate(embeds)
    del embeds

    last = len(micro_batches) - 1
    reconstructions = []
    pieces = zip(micro_batches, states, image_grads.split(sizes), text_grads.split(sizes), strict=True)
    for i, (micro_batch, state, image_grad, text_grad) in enumerate(pieces):
        with nullcontext() if i == last else no_sync():
            with _generators(state, device):
                encoded = encode(micro_batch)
            # The gradient of this sum is the gradient of the loss through this micro-batch.
            surrogate = (encoded.image_embeds * image_grad).sum() + (encoded.text_embeds * text_grad).sum()
            if i == last:  # the temperature's gradient travels with the one synchronised backward
                surrogate = surrogate + (encoded.logit_scale * scale_grad).sum()
            if encoded.reconstruction_loss is not None:  # a mean over images: all pieces weigh the same
                surrogate = surrogate + reconstruction_weight * encoded.reconstruction_loss / len(micro_batches)
                reconstructions.append(encoded.reconstruction_loss.detach())
            backward(surrogate)
    mean = torch.stack(reconstructions).mean() if reconstructions else None
    return _step_loss(contrastive, accuracy, mean, reconstruction_weight)


def _step_loss(
    contrastive: torch.Tensor, accuracy: torch.Tensor, reconstruction: torch.Tensor | None, weight: float
) -> StepLoss:
    contrastive = contrastive.detach()
    if reconstruction is None:
        return StepLoss(contrastive, accuracy)
    reconstruction = reconstruction.detach()
    return StepLoss(contrastive + weight * reconstruction, accuracy, contrastive, reconstruction)


def accumulated_backward(
    encode: Encode,
    micro_batches: list[dict[str, Any]],
    backward: Callable[[torch.Tensor], None],
    no_sync: Callable[[], AbstractContextManager],
) -> StepLoss:
    """Adds the gradient of the batch's reconstruction loss alone; takes the arguments of [`cached_backward`]."""
    losses = []
    for i, micro_batch in enumerate(micro_batches):
        with nullcontext() if i == len(micro_batches) - 1 else no_sync():
            loss: Any = encode(micro_batch).reconstruction_loss
            backward(loss / len(micro_batches))
        losses.append(loss.detach())
    return StepLoss(torch.stack(losses).mean())
