"""Big batches in small pieces: the exact gradient of one contrastive batch, with the memory of a micro-batch.

Embeddings of all micro-batches are computed first, without a graph; the loss gives its gradient with respect to them;
then each micro-batch is encoded again and that gradient is sent through it (GradCache, Gao et al. 2021). Both passes
must see the same masks and the same dropout: torch's generators are put back before a micro-batch is encoded again.
Between the passes only embeddings and their gradients are held. Plain accumulation would contrast each micro-batch
with itself alone, which is another objective.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from flip_hf.losses import at_least_float32, contrastive_loss

Embeds = tuple[torch.Tensor, torch.Tensor]
Encode = Callable[[dict[str, Any]], Embeds]


def _generator_state(device: torch.device) -> list[torch.Tensor]:
    """The state of torch's generators of the CPU and of `device`."""
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
    """Puts torch's generators back to `state`, and at the end to what they were."""
    before = _generator_state(device)
    _set_generator_state(state, device)
    try:
        yield
    finally:
        _set_generator_state(before, device)


def _embed(
    encode: Encode, micro_batches: list[dict[str, Any]], device: torch.device
) -> tuple[Embeds, list[int], list[list[torch.Tensor]]]:
    """All embeddings, (n, E) each, the sizes of the micro-batches, and the generators' state before each."""
    states, pieces = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(_generator_state(device))
            pieces.append(encode(micro_batch))
    images, texts = (at_least_float32(torch.cat(parts)) for parts in zip(*pieces, strict=True))
    return (images, texts), [image.shape[0] for image, _ in pieces], states


def _differentiate(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Embeds, torch.Tensor | None]:
    """Loss, accuracy, and the loss's gradients: of the embeddings, and of the scale, None where that is frozen."""
    scale = scale.detach().requires_grad_(scale.requires_grad)
    inputs = [images.requires_grad_(), texts.requires_grad_(), *([scale] if scale.requires_grad else [])]
    loss, accuracy = contrastive_loss(images, texts, scale)
    image_grads, text_grads, *scale_grads = torch.autograd.grad(loss, inputs)
    return loss.detach(), accuracy, (image_grads, text_grads), scale_grads[0] if scale_grads else None


def cached_backward(
    encode: Encode,
    micro_batches: list[dict[str, Any]],
    get_logit_scale: Callable[[], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
    no_sync: Callable[[], AbstractContextManager],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the gradient of the whole batch's loss to the parameters.

    Args:
        encode: micro-batch to normalised (image_embeds, text_embeds). Called twice on each of several micro-batches;
            what it draws from torch's generators, masks and dropout, is the same both times.
        micro_batches: the batch in pieces; one piece costs no second pass.
        get_logit_scale: the factor on cosine similarities, with its graph.
        backward: takes a scalar to call backward on.
        no_sync: context in which processes do not average gradients.
        device: where the model lies.

    Returns:
        The loss and the accuracy of the batch, detached.
    """
    if len(micro_batches) == 1:
        loss, accuracy = contrastive_loss(*encode(micro_batches[0]), get_logit_scale())
        backward(loss)
        return loss.detach(), accuracy

    embeds, sizes, states = _embed(encode, micro_batches, device)
    loss, accuracy, grads, scale_grad = _differentiate(*embeds, get_logit_scale())
    del embeds

    last = len(micro_batches) - 1
    pieces = zip(micro_batches, states, *(grad.split(sizes) for grad in grads), strict=True)
    for i, (micro_batch, state, image_grad, text_grad) in enumerate(pieces):
        with nullcontext() if i == last else no_sync():
            with _generators(state, device):
                image, text = encode(micro_batch)
            # The gradient of this sum is the gradient of the loss through this micro-batch.
            surrogate = (image * image_grad).sum() + (text * text_grad).sum()
            if i == last and scale_grad is not None:  # the temperature's travels with the one synchronised backward
                surrogate = surrogate + (get_logit_scale() * scale_grad).sum()
            backward(surrogate)
    return loss, accuracy
