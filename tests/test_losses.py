"""The loss and its gradient: against the plain formula, and over processes and micro-batches."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from flip_hf import FlipModel
from flip_hf.losses import contrastive_loss
from flip_hf.modeling.masking_flip import random_masking
from flip_hf.training.gradient_cache import cached_backward
from tests.conftest import tiny_config

PAIRS = 12


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


def make_model(dropout: float = 0.0) -> FlipModel:
    torch.manual_seed(0)
    return FlipModel(tiny_config(text={"attention_dropout": dropout})).double().train()


def take(batch: dict, rows: slice) -> dict:
    return {name: value[rows] for name, value in batch.items()}


def backward(model: FlipModel, micro_batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and all gradients of one step."""

    def encode(batch):
        outputs = model(**batch)
        return outputs.image_embeds, outputs.text_embeds, model.get_logit_scale()

    loss, _ = cached_backward(encode, micro_batches, torch.Tensor.backward, nullcontext, torch.device("cpu"))
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal in float64, where rounding hides no error."""
    assert ours.dtype == expected.dtype == torch.float64
    assert (ours - expected).abs().max() < 1e-10, name


def test_loss_is_that_of_the_model():
    model, batch = make_model(), make_batch()
    loss, gradients = backward(model, [batch])
    other = make_model()
    outputs = other(**batch, return_loss=True)
    outputs.loss.backward()
    assert loss == pytest.approx(outputs.loss.item(), abs=1e-6)
    for name, parameter in other.named_parameters():
        # The model's own loss is in float32, whatever its dtype.
        allowed = 1e-6 * max(1.0, parameter.grad.abs().max().item())
        assert (gradients[name] - parameter.grad).abs().max() < allowed, name


def test_accuracy_counts_images_that_find_their_text():
    texts = torch.eye(4)
    images = torch.eye(4)[[0, 1, 3, 2]]
    assert contrastive_loss(images, texts, torch.tensor([10.0]))[1].item() == 0.5


@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_micro_batches_give_the_gradient_of_the_whole_batch(pieces):
    batch = make_batch()
    loss, whole = backward(make_model(), [batch])
    size = PAIRS // pieces
    split = [take(batch, slice(i * size, (i + 1) * size)) for i in range(pieces)]
    cached_loss, cached = backward(make_model(), split)
    assert cached_loss == pytest.approx(loss, abs=1e-6)
    for name, gradient in whole.items():
        assert_same(cached[name], gradient, name)


def test_both_passes_of_a_micro_batch_see_the_same_dropout():
    """With dropout the cached gradient is that of one pass whose random numbers are the first pass's."""
    batch = make_batch()
    halves = [take(batch, slice(0, 6)), take(batch, slice(6, 12))]
    model = make_model(dropout=0.5)
    torch.manual_seed(3)
    loss, cached = backward(model, halves)

    plain = make_model(dropout=0.5)
    torch.manual_seed(3)
    parts = [plain(**half) for half in halves]
    images, texts = (torch.cat([part[name] for part in parts]) for name in ("image_embeds", "text_embeds"))
    expected, _ = contrastive_loss(images, texts, plain.get_logit_scale())
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in plain.named_parameters():
        assert_same(cached[name], parameter.grad, name)


def test_bfloat16_embeddings_give_a_float32_loss():
    embeds = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    loss, _ = contrastive_loss(embeds.bfloat16(), embeds.bfloat16(), torch.tensor([100.0]))
    assert loss.dtype == torch.float32


DISTRIBUTED = """
import json, sys, torch
from accelerate import Accelerator
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.gradient_cache import cached_backward
from tests.test_losses import make_batch, make_model, take, PAIRS

accelerator = Accelerator(cpu=True)
model = accelerator.prepare(PairEncoder(make_model()))
flip = accelerator.unwrap_model(model).flip
local = PAIRS // accelerator.num_processes
rank, pieces = accelerator.process_index, int(sys.argv[1])
size = local // pieces
batches = [take(make_batch(), slice(rank * local + i * size, rank * local + (i + 1) * size)) for i in range(pieces)]

loss, _ = cached_backward(
    lambda batch: model(**batch), batches, accelerator.backward, lambda: accelerator.no_sync(model), accelerator.device
)
loss = accelerator.reduce(loss, "mean")
if accelerator.is_main_process:
    torch.save({"loss": loss, **{name: p.grad for name, p in flip.named_parameters()}}, sys.argv[2])
accelerator.end_training()
"""


@pytest.mark.parametrize(("processes", "pieces"), [(2, 1), (2, 3), (4, 1)])
def test_processes_give_the_gradient_of_one_with_all_pairs(processes, pieces, tmp_path):
    (tmp_path / "run.py").write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(pieces), str(tmp_path / "grads.pt")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = torch.load(tmp_path / "grads.pt", weights_only=True)
    loss, whole = backward(make_model(), [make_batch()])
    assert result.pop("loss").item() == pytest.approx(loss, abs=1e-6)
    assert result.keys() == whole.keys()
    for name, gradient in whole.items():
        assert_same(result[name], gradient, name)
