"""A training step, in the order in which it happens: forward, loss, backward, optimizer.

A batch comes as micro-batches. A contrastive batch in one piece is encoded once. In several, its gradient is exact in
the memory of one of them, by gradient caching (GradCache, Gao et al. 2021): all are embedded without a graph; the loss
gives its gradient with respect to the embeddings; then each is encoded again, with a graph, and its part of that
gradient is propagated through it. Plain accumulation would contrast each micro-batch with itself alone, which is
another objective; for a reconstruction loss, a mean over images, it is exact.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from flip_hf.losses import at_least_float32, contrastive_loss, sigmoid_loss
from flip_hf.training.distribution import Distribution
from flip_hf.training.encoder import Embeddings, Encoded
from flip_hf.training.generators import generator_state, restored_generators
from flip_hf.training.health import is_spoilt
from flip_hf.training.packing import CAPTION_IDS

Batch = dict[str, torch.Tensor]
Inputs = dict[str, Any]  # tensors and flags
Prepare = Callable[[Batch], Inputs]


class Trained(Protocol):
    """The model of a step, and how its gradients are accumulated: a [`Distribution`] or [`OneProcess`]."""

    model: Callable[..., Encoded]
    device: torch.device

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradients of a scalar."""
        ...

    def no_sync(self) -> AbstractContextManager[None]:
        """Context in which processes do not average gradients."""
        ...


@dataclass
class OneProcess:
    """A model in one process, with nothing wrapped around it."""

    model: Callable[..., Encoded]
    device: torch.device = torch.device("cpu")

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class BatchLoss:
    """The losses of this process's part of a batch, detached, on the device.

    Each has memory of its own, since the next step may write its outputs where those of this one were.

    Attributes:
        loss: the loss whose gradient was taken.
        accuracy: fraction of images whose most similar text is a positive; None where nothing is contrasted.
        logit_scale: the factor on cosine similarities (1,); None where nothing is contrasted.
        logit_bias: added to the scaled similarities (1,); None where nothing is contrasted, or by a softmax.
        contrastive_loss, reconstruction_loss: the two terms of `loss`, unweighted; None unless there are both.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    logit_bias: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """The numbers of one optimizer step.

    Attributes:
        batch: the losses.
        learning_rate: the learning rate of this step.
        grad_norm: over all parameters and processes, before clipping (), on the device; not finite where the step was
            skipped.
        skipped: 1 where the step was skipped, else 0: (), float32, on the device.
    """

    batch: BatchLoss
    learning_rate: float
    grad_norm: torch.Tensor
    skipped: torch.Tensor

    def values(self, accelerator: Accelerator) -> dict[str, float]:
        """Waits for the values of a log line; losses are averaged over the processes, each of which must call it."""
        batch = self.batch
        losses = {"loss": batch.loss, "accuracy": batch.accuracy}
        losses |= {"contrastive_loss": batch.contrastive_loss, "reconstruction_loss": batch.reconstruction_loss}
        present = {name: value for name, value in losses.items() if value is not None}
        means = accelerator.reduce(torch.stack(list(present.values())), "mean")
        assert isinstance(means, torch.Tensor)
        of_logits = {"logit_scale": batch.logit_scale, "logit_bias": batch.logit_bias}
        return {
            **dict(zip(present, means.tolist(), strict=True)),
            **{name: value.item() for name, value in of_logits.items() if value is not None},
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm.item(),
        }


def train_step(
    distribution: Distribution,
    micro_batches: list[Batch],
    prepare: Prepare,
    *,
    learning_rate: float,
    reconstruction_weight: float,
    judge: Callable[[torch.Tensor], torch.Tensor] = is_spoilt,
) -> StepResult:
    """Takes one optimizer step on a batch, or skips it where a loss or gradient of any process is not finite.

    Nothing in it waits for the device, so that the host prepares the next step meanwhile.

    Args:
        distribution: the prepared model and optimizer.
        micro_batches: this process's part of the batch.
        prepare: moves a micro-batch to the device and makes the model's inputs of it.
        learning_rate: the learning rate of the step, which each group multiplies by its `lr_scale`.
        reconstruction_weight: weight of the reconstruction loss where there is one beside the contrastive one.
        judge: decides by the norm () of the gradient whether the step is skipped, and may count it.
    """
    optimizer = distribution.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
    distribution.begin_step()
    batch = accumulate_gradients(distribution, micro_batches, prepare, reconstruction_weight)
    grad_norm = distribution.clip_and_norm()
    skipped = judge(grad_norm)
    distribution.step(skipped)
    optimizer.zero_grad()
    return StepResult(batch, learning_rate, grad_norm, skipped)


def accumulate_gradients(
    trained: Trained, micro_batches: list[Batch], prepare: Prepare | None = None, reconstruction_weight: float = 1.0
) -> BatchLoss:
    """Computes the loss of a whole batch and adds its gradient to the parameters.

    Micro-batches are prepared one at a time, each time that they are encoded, so that only one is on the device.

    Args:
        trained: the model, and how its gradients are accumulated.
        micro_batches: this process's part of the batch; without `input_ids`, nothing is contrasted. With `caption_ids`
            (B,), pairs that have the same one are positives of each other.
        prepare: makes the model's inputs of a micro-batch; all but `caption_ids` of it if not given.
        reconstruction_weight: weight of the reconstruction loss where there is one beside the contrastive one.
    """
    prepare = prepare or without_caption_ids
    if "input_ids" not in micro_batches[0]:
        return _reconstruct(trained, micro_batches, prepare)
    if len(micro_batches) == 1:
        return _contrast(trained, micro_batches[0], prepare, reconstruction_weight)
    return _contrast_in_pieces(trained, micro_batches, prepare, reconstruction_weight)


def without_caption_ids(batch: Batch) -> Batch:
    """Returns a batch without what the loss alone reads."""
    return {name: value for name, value in batch.items() if name != CAPTION_IDS}


def _caption_ids(micro_batches: list[Batch], device: torch.device) -> torch.Tensor | None:
    if CAPTION_IDS not in micro_batches[0]:
        return None
    return torch.cat([batch[CAPTION_IDS] for batch in micro_batches]).to(device, non_blocking=True)


def _loss_of(embeddings: Embeddings, caption_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns loss and accuracy: those of the sigmoid loss for logits with a bias, else of the softmax loss."""
    images, texts, scale, bias = embeddings
    if bias is None:
        return contrastive_loss(images, texts, scale, caption_ids=caption_ids)
    return sigmoid_loss(images, texts, scale, bias, caption_ids=caption_ids)


def _contrast(trained: Trained, batch: Batch, prepare: Prepare, weight: float) -> BatchLoss:
    """Contrasts a batch in one piece."""
    encoded = trained.model(**prepare(batch))  # a name for the inputs would keep them through the backward pass
    caption_ids = _caption_ids([batch], trained.device)
    contrastive, accuracy = _loss_of(encoded.embeddings, caption_ids)
    reconstruction = encoded.reconstruction_loss
    trained.backward(contrastive if reconstruction is None else contrastive + weight * reconstruction)
    return _with_reconstruction(_batch_loss(contrastive, accuracy, encoded.embeddings), reconstruction, weight)


def _contrast_in_pieces(trained: Trained, micro_batches: list[Batch], prepare: Prepare, weight: float) -> BatchLoss:
    """Contrasts all micro-batches with each other; both passes draw the same masks and dropout."""
    embedded, sizes, states = _embed(trained, micro_batches, prepare)
    caption_ids = _caption_ids(micro_batches, trained.device)
    contrast, gradients = _differentiate(embedded, caption_ids)
    del embedded
    image_grads = gradients.images.split(sizes)
    text_grads = gradients.texts.split(sizes)
    pieces = len(micro_batches)
    reconstructions = []
    for i, (micro_batch, state) in enumerate(zip(micro_batches, states, strict=True)):
        is_last = i == pieces - 1
        with nullcontext() if is_last else trained.no_sync():
            with restored_generators(state, trained.device):
                encoded = trained.model(**prepare(micro_batch))
            # The gradient of this sum is the gradient of the loss through this micro-batch.
            images, texts, scale, bias = encoded.embeddings
            surrogate = (images * image_grads[i]).sum() + (texts * text_grads[i]).sum()
            if is_last:  # gradients of temperature and bias travel with the one synchronised backward
                surrogate = surrogate + (scale * gradients.logit_scale).sum()
            if is_last and bias is not None and gradients.logit_bias is not None:
                surrogate = surrogate + (bias * gradients.logit_bias).sum()
            if encoded.reconstruction_loss is not None:  # a mean over images: all pieces weigh the same
                surrogate = surrogate + weight * encoded.reconstruction_loss / pieces
                reconstructions.append(encoded.reconstruction_loss.detach())
            trained.backward(surrogate)
    reconstruction = torch.stack(reconstructions).mean() if reconstructions else None
    return _with_reconstruction(contrast, reconstruction, weight)


def _embed(
    trained: Trained, micro_batches: list[Batch], prepare: Prepare
) -> tuple[Embeddings, list[int], list[list[torch.Tensor]]]:
    """Embeds all micro-batches without a graph.

    Returns:
        All embeddings, (n, E) each, scale and bias; each micro-batch's size; the generators' state before each.
    """
    states = []
    pieces = []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(generator_state(trained.device))
            # Without targets the decoder is left out; it comes last, so that the same is drawn up to the embeddings.
            pieces.append(trained.model(**{**prepare(micro_batch), "target_patches": None}).embeddings)
    images, texts, scales, biases = zip(*pieces, strict=True)
    embedded = Embeddings(torch.cat(images), torch.cat(texts), scales[0], biases[0])
    return embedded, [len(image) for image in images], states


def _differentiate(embedded: Embeddings, caption_ids: torch.Tensor | None) -> tuple[BatchLoss, Embeddings]:
    """Returns the loss, and its gradients with respect to the embeddings, the scale and, if there is one, the bias."""
    inputs = [at_least_float32(value).detach().requires_grad_() for value in embedded if value is not None]
    loss, accuracy = _loss_of(Embeddings(*inputs), caption_ids)
    return _batch_loss(loss, accuracy, embedded), Embeddings(*torch.autograd.grad(loss, inputs))


def _batch_loss(contrastive: torch.Tensor, accuracy: torch.Tensor, embeddings: Embeddings) -> BatchLoss:
    bias = embeddings.logit_bias
    return BatchLoss(
        contrastive.detach(),
        accuracy,
        embeddings.logit_scale.detach().clone(),
        None if bias is None else bias.detach().clone(),
    )


def _with_reconstruction(contrast: BatchLoss, reconstruction: torch.Tensor | None, weight: float) -> BatchLoss:
    """Adds the reconstruction's loss, where there is one, to the contrastive one."""
    if reconstruction is None:
        return contrast
    reconstruction = reconstruction.detach().clone()
    return replace(
        contrast,
        loss=contrast.loss + weight * reconstruction,
        contrastive_loss=contrast.loss,
        reconstruction_loss=reconstruction,
    )


def _reconstruct(trained: Trained, micro_batches: list[Batch], prepare: Prepare) -> BatchLoss:
    """Reconstructs all micro-batches, of equal size; the loss is the mean of theirs."""
    pieces = len(micro_batches)
    losses = []
    for i, micro_batch in enumerate(micro_batches):
        with nullcontext() if i == pieces - 1 else trained.no_sync():
            loss = trained.model(**prepare(micro_batch)).reconstruction_loss
            assert loss is not None
            trained.backward(loss / pieces)
        losses.append(loss.detach())
    return BatchLoss(torch.stack(losses).mean())
