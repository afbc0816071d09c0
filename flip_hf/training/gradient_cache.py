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

Embeds = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
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
    """All embeddings, (n, E) each, and the scale; the sizes of the micro-batches, and the generators before each."""
    states, pieces = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(_generator_state(device))
            pieces.append(encode(micro_batch))
    images, texts, scales = zip(*pieces, strict=True)
    return (torch.cat(images), torch.cat(texts), scales[0]), [image.shape[0] for image in images], states


def _differentiate(embeds: Embeds) -> tuple[torch.Tensor, torch.Tensor, Embeds]:
    """Loss, accuracy, and the loss's gradients of the embeddings and of the scale."""
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the gradient of the whole batch's loss to the parameters.

    Args:
        encode: micro-batch to normalised image_embeds and text_embeds (B, E) and the factor on cosine similarities
            (1,). Called twice on each of several micro-batches; what it draws from torch's generators, masks and
            dropout, is the same both times.
        micro_batches: the batch in pieces; one piece costs no second pass.
        backward: takes a scalar to call backward on.
        no_sync: context in which processes do not average gradients.
        device: where the model lies.

    Returns:
        The loss and the accuracy of the batch, detached.
    """
    if len(micro_batches) == 1:
        loss, accuracy = contrastive_loss(*encode(micro_batches[0]))
        backward(loss)
        return loss.detach(), accuracy

    embeds, sizes, states = _embed(encode, micro_batches, device)
    loss, accuracy, (image_grads, text_grads, scale_grad) = _differentiate(embeds)
    del embeds

    last = len(micro_batches) - 1
    pieces = zip(micro_batches, states, image_grads.split(sizes), text_grads.split(sizes), strict=True)
    for i, (micro_batch, state, image_grad, text_grad) in enumerate(pieces):
        with nullcontext() if i == last else no_sync():
            with _generators(state, device):
                images, texts, scale = encode(micro_batch)
            # The gradient of this sum is the gradient of the loss through this micro-batch.
            surrogate = (images * image_grad).sum() + (texts * text_grad).sum()
            if i == last:  # the temperature's gradient travels with the one synchronised backward
                surrogate = surrogate + (scale * scale_grad).sum()
            backward(surrogate)
    return loss, accuracy
