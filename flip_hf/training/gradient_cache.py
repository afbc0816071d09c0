"""Big batches in small pieces: the exact gradient of one contrastive batch, with the memory of a micro-batch.

Embeddings of all micro-batches are computed first, without a graph; the loss gives its gradient with respect to them;
then each micro-batch is encoded again and that gradient is sent through it (GradCache, Gao et al. 2021). Both passes
must see the same masks: they are drawn once, before. Plain accumulation would contrast each micro-batch with itself
alone, which is another objective.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from flip_hf.losses import at_least_float32, contrastive_loss

Embeds = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Encode = Callable[[dict[str, Any]], Embeds]


def _with_generators(state: list[torch.Tensor], encode: Callable[[], Embeds], device: torch.device) -> Embeds:
    """Runs `encode` under the saved state of torch's generators: attention dropout repeats itself."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(state[0])
        if devices:
            torch.cuda.set_rng_state(state[1], device)
        return encode()


def _generator_state(device: torch.device) -> list[torch.Tensor]:
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


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
            (1,); must use only the masks given in the batch.
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

    states, pieces = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(_generator_state(device))
            pieces.append(encode(micro_batch))
    all_images, all_texts, scales = zip(*pieces, strict=True)
    leaves = [
        at_least_float32(value).requires_grad_() for value in (torch.cat(all_images), torch.cat(all_texts), scales[0])
    ]
    loss, accuracy = contrastive_loss(*leaves)
    image_grads, text_grads, scale_grad = torch.autograd.grad(loss, leaves)

    sizes = [images.shape[0] for images in all_images]
    last = len(micro_batches) - 1
    for i, (micro_batch, image_grad, text_grad) in enumerate(
        zip(micro_batches, image_grads.split(sizes), text_grads.split(sizes), strict=True)
    ):
        with nullcontext() if i == last else no_sync():
            images, texts, scale = _with_generators(states[i], lambda batch=micro_batch: encode(batch), device)
            # The gradient of this sum is the gradient of the loss through this micro-batch.
            surrogate = (images * image_grad).sum() + (texts * text_grad).sum()
            if i == last:  # the temperature's gradient travels with the one synchronised backward
                surrogate = surrogate + (scale * scale_grad).sum()
            backward(surrogate)
    return loss.detach(), accuracy
