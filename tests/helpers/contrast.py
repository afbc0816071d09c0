"""A batch of pairs in float64, a model for it, and the gradient of one step."""

import torch
from torch.nn import functional

from flip_hf import FlipModel
from flip_hf.modeling.masking_flip import cut_patches, random_masking
from flip_hf.training.encoder import Encoded
from flip_hf.training.step import OneProcess, accumulate_gradients
from tests.helpers.models import tiny_config

PAIRS = 12
PIECES = (1, 3)
BIASES = {"softmax": None, "sigmoid": -3.0}  # of the logits, by loss
CAPTION_IDS = torch.arange(PAIRS) * 5 % 4  # equal ones lie in different processes and micro-batches
CASES = ((1, 2048), (1, 1), (3, 2), (5, 2048))  # pairs a process, tile size


def make_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    lengths = torch.randint(2, 8, (PAIRS,))
    attention_mask = (torch.arange(8) < lengths[:, None]).long()
    return {
        "pixel_values": torch.randn(PAIRS, 3, 32, 32, dtype=torch.float64),
        "ids_keep": random_masking(PAIRS, 16, 0.5, "cpu"),
        "input_ids": torch.randint(1, 600, (PAIRS, 8)) * attention_mask,
        "attention_mask": attention_mask,
    }


def make_smaller_batch() -> dict[str, torch.Tensor]:
    """The same with four patches of each image's corner of 24 pixels, which have a grid of their own."""
    batch = make_batch()
    ids_keep = batch["ids_keep"][:, :4] % 9
    corners = batch.pop("pixel_values")[:, :, :24, :24]
    return {**batch, "patches": cut_patches(corners, 8, ids_keep), "ids_keep": ids_keep}


def with_grid(batch: dict) -> dict:
    """The model's arguments for a batch: the grid of smaller images is not a tensor of it."""
    return {**batch, "grid": (3, 3)} if "patches" in batch else batch


def make_model(
    dropout: float = 0.0, mask_ratio: float = 0.0, bias: float | None = None, positions: str = "sincos2d"
) -> FlipModel:
    """The generator's state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        of_images = {"mask_ratio": mask_ratio, "position_embedding_type": positions}
        of_towers = {"text": {"attention_dropout": dropout}, "vision": of_images}
        model = FlipModel(tiny_config(**of_towers, logit_bias_init_value=bias))
    return model.double().train()


def take(batch: dict, rows: slice) -> dict:
    return {name: value[rows] for name, value in batch.items()}


def backward(model: FlipModel, micro_batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and all gradients of one step."""

    def encode(target_patches=None, **batch):
        outputs = model(**with_grid(batch))
        return Encoded(outputs.image_embeds, outputs.text_embeds, model.get_logit_scale(), model.logit_bias)

    loss = accumulate_gradients(OneProcess(encode), micro_batches)
    return loss.loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal in float64, where rounding hides no error."""
    assert ours.dtype == expected.dtype == torch.float64
    assert (ours - expected).abs().max() < 1e-10, name


def make_embeds(
    pairs: int, scale: float, dtype=torch.float64, device="cpu", bias: float | None = None
) -> list[torch.Tensor]:
    """Images, texts that resemble them, the scale and, if given, the bias."""
    torch.manual_seed(pairs)
    images = torch.randn(pairs, 8, dtype=torch.float64)
    texts = images + torch.randn(pairs, 8, dtype=torch.float64)
    embeds = [functional.normalize(rows, dim=1).to(device, dtype) for rows in (images, texts)]
    of_logits = [torch.tensor([x], dtype=embeds[0].dtype, device=device) for x in (scale, bias) if x is not None]
    return [x.requires_grad_() for x in (*embeds, *of_logits)]


def differentiate(loss_function, inputs: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """The loss and its gradients."""
    loss, _ = loss_function(*inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def dense_loss(images, texts, scale, caption_ids=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, with the whole matrix; pairs of equal captions share the target."""
    logits = scale * images @ texts.T
    ids = torch.arange(len(images), device=images.device) if caption_ids is None else caption_ids
    equal = ids[:, None] == ids
    targets = equal / equal.sum(dim=1, keepdim=True).to(logits.dtype)
    loss = (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2
    best = logits.argmax(dim=1)
    return loss, equal[torch.arange(len(best)), best].float().mean()


def dense_sigmoid_loss(images, texts, scale, bias, caption_ids=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, with the whole matrix; each pair of equal captions is a yes."""
    logits = scale * images @ texts.T + bias
    ids = torch.arange(len(images), device=images.device) if caption_ids is None else caption_ids
    yes = ids[:, None] == ids
    loss = functional.binary_cross_entropy_with_logits(logits, yes.to(logits.dtype), reduction="sum") / len(images)
    best = logits.argmax(dim=1)
    return loss, yes[torch.arange(len(best)), best].float().mean()


def dense_backward(
    model: FlipModel, batch: dict[str, torch.Tensor], caption_ids: torch.Tensor | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and all gradients of one step by the formula."""
    outputs = model(**batch)
    embeds = (outputs.image_embeds, outputs.text_embeds, model.get_logit_scale())
    if model.logit_bias is None:
        loss, _ = dense_loss(*embeds, caption_ids)
    else:
        loss, _ = dense_sigmoid_loss(*embeds, model.logit_bias, caption_ids)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}
