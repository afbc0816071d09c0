"""The loss and its gradient: against the plain formula, and over processes and micro-batches."""

import weakref

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from flip_hf.losses import contrastive_loss
from flip_hf.training.encoder import Encoded
from flip_hf.training.step import OneProcess, accumulate_gradients
from tests.helpers.contrast import (
    CAPTION_IDS,
    CASES,
    PAIRS,
    PIECES,
    assert_same,
    backward,
    dense_backward,
    dense_loss,
    differentiate,
    make_batch,
    make_embeds,
    make_model,
    take,
)
from tests.helpers.programs import run_program


def test_loss_is_that_of_the_model():
    model = make_model()
    batch = make_batch()
    loss, gradients = backward(model, [batch])
    other = make_model()
    outputs = other(**batch, return_loss=True)
    outputs.loss.backward()
    assert loss == pytest.approx(outputs.loss.item(), abs=1e-6)
    for name, parameter in other.named_parameters():
        # The model's own loss is in float32, whatever its dtype.
        allowed = 1e-6 * max(1.0, parameter.grad.abs().max().item())
        assert (gradients[name] - parameter.grad).abs().max() < allowed, name


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("pairs", "tile_size"), [(1, 4), (12, 12), (12, 5), (12, 1), (13, 4), (12, 100)])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_tiles_give_the_dense_loss(pairs, tile_size, scale, dtype, allowed):
    inputs = make_embeds(pairs, scale, dtype)
    expected = differentiate(dense_loss, [x.detach().double().requires_grad_() for x in inputs])
    ours = differentiate(contrastive_loss, inputs, tile_size=tile_size)
    for value, reference, size in zip(ours, expected, (1, scale, scale, 1), strict=True):
        assert value.dtype == dtype
        assert (value - reference).abs().max() <= allowed * size, (value, reference)
    accuracy = contrastive_loss(*inputs, tile_size=tile_size)[1]
    assert accuracy == dense_loss(*inputs)[1]


@pytest.mark.parametrize("captions", [1, 3, 12])
@pytest.mark.parametrize("tile_size", [1, 5, 100])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equal_captions_share_the_target(captions, tile_size, scale):
    inputs = make_embeds(13, scale)
    caption_ids = torch.arange(13) * 7 % captions
    expected = differentiate(dense_loss, inputs, caption_ids=caption_ids)
    ours = differentiate(contrastive_loss, inputs, caption_ids=caption_ids, tile_size=tile_size)
    for value, reference, size in zip(ours, expected, (1, scale, scale, 1), strict=True):
        assert (value - reference).abs().max() <= 1e-10 * size, (value, reference)
    accuracy = contrastive_loss(*inputs, caption_ids=caption_ids, tile_size=tile_size)[1]
    assert accuracy == dense_loss(*inputs, caption_ids)[1]


@pytest.mark.parametrize("tile_size", [4, 13])
def test_distinct_captions_give_the_loss_of_pairs_to_the_bit(tile_size):
    inputs = make_embeds(13, 50.0, torch.float32)
    pairs = differentiate(contrastive_loss, inputs, tile_size=tile_size)
    caption_ids = torch.randperm(13) * 2**55
    ours = differentiate(contrastive_loss, inputs, caption_ids=caption_ids, tile_size=tile_size)
    assert all(torch.equal(value, reference) for value, reference in zip(ours, pairs, strict=True))


def test_caption_ids_must_match_the_pairs():
    with pytest.raises(ValueError, match=r"each of the 3 pairs.*\(2,\)"):
        contrastive_loss(torch.ones(3, 8), torch.ones(3, 8), torch.ones(1), caption_ids=torch.ones(2))


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_extreme_similarities_stay_finite(scale):
    """Cosines of exactly 1 and -1: every exponential that is not shifted overflows or vanishes in float32."""
    alike = torch.eye(4)[[0, 0, 1, 1, 2, 3]]
    for images, texts in [(alike, alike), (alike, -alike), (alike, alike.flip(0))]:
        inputs = [x.clone().requires_grad_() for x in (images, texts, torch.tensor([scale]))]
        for tile_size in (1, 4, 6):
            ours = differentiate(contrastive_loss, inputs, tile_size=tile_size)
            expected = differentiate(dense_loss, inputs)
            for value, reference in zip(ours, expected, strict=True):
                assert value.isfinite().all()
                torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-6 * scale)


def test_accuracy_counts_images_that_find_their_text():
    texts = torch.eye(4)
    images = torch.eye(4)[[0, 1, 3, 2]]
    for tile_size in (1, 3, 4):
        assert contrastive_loss(images, texts, torch.tensor([10.0]), tile_size=tile_size)[1].item() == 0.5


def test_a_collapsed_model_is_not_right():
    """Among texts that are alike the first counts, as argmax has it."""
    images = torch.eye(2)[[0, 1, 1]]
    texts = torch.eye(2)[[0, 1, 0]]
    same = torch.ones(6, 4) / 2
    for tile_size in (1, 4, 6):
        accuracy = contrastive_loss(images, texts, torch.tensor([10.0]), tile_size=tile_size)[1]
        assert accuracy.item() == pytest.approx(2 / 3)
        assert contrastive_loss(same, same, torch.tensor([10.0]), tile_size=tile_size)[1].item() == pytest.approx(1 / 6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation has made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_the_matrix_of_similarities_is_never_held():
    inputs = make_embeds(64, 10.0)  # (64, 8)
    largest = {}
    for name, function in {"tiled": lambda *x: contrastive_loss(*x, tile_size=16), "dense": dense_loss}.items():
        with LargestTensor() as mode:
            differentiate(function, inputs)
        largest[name] = mode.elements
    assert largest == {"tiled": 64 * 8, "dense": 64 * 64}


def test_images_and_texts_must_pair_up():
    with pytest.raises(ValueError, match=r"\(3, 8\) and \(2, 8\)"):
        contrastive_loss(torch.ones(3, 8), torch.ones(2, 8), torch.ones(1))


def test_autocast_does_not_reach_the_loss():
    inputs = make_embeds(12, 100.0, torch.float32)
    expected = differentiate(contrastive_loss, inputs, tile_size=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = differentiate(contrastive_loss, inputs, tile_size=5)
    assert all(torch.equal(value, reference) for value, reference in zip(ours, expected, strict=True))


def test_bfloat16_embeddings_are_off_by_their_own_rounding():
    inputs = make_embeds(12, 100.0, torch.bfloat16)
    ours = differentiate(contrastive_loss, inputs, tile_size=5)
    expected = differentiate(dense_loss, [x.detach().double().requires_grad_() for x in inputs])
    assert [x.dtype for x in ours] == [torch.float32, *[torch.bfloat16] * 3]
    assert ours[0] == pytest.approx(expected[0].item(), rel=1e-5)
    for value, reference in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2**-8, atol=1e-6)


def test_a_compiled_caller_gets_the_same_loss():
    def both(images, texts, scale):
        return contrastive_loss(functional.normalize(images, dim=1), functional.normalize(texts, dim=1), scale)

    inputs = make_embeds(6, 10.0)
    compiled = differentiate(torch.compile(both, backend="eager"), inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, differentiate(both, inputs), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tile_size", [100, 2048])
def test_tiles_give_the_dense_loss_on_a_gpu(tile_size):
    inputs = make_embeds(500, 100.0, torch.float32, "cuda")
    expected = differentiate(dense_loss, [x.detach().double().requires_grad_() for x in inputs])
    for value, reference in zip(differentiate(contrastive_loss, inputs, tile_size=tile_size), expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)
    # Nothing waits for the device on the way.
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(contrastive_loss, inputs, tile_size=tile_size)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


@pytest.mark.parametrize("pieces", [1, 3])
def test_equal_captions_of_different_micro_batches_are_positives(pieces):
    batch = make_batch()
    expected_loss, expected = dense_backward(make_model(), batch, CAPTION_IDS)
    labelled = {**batch, "caption_ids": CAPTION_IDS}
    size = PAIRS // pieces
    loss, ours = backward(make_model(), [take(labelled, slice(i * size, (i + 1) * size)) for i in range(pieces)])
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    for name, gradient in expected.items():
        assert_same(ours[name], gradient, name)


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


def test_both_passes_draw_the_same_masks():
    """Masks that the model draws itself are the same in both passes, and the generator's state is that after one."""
    batch = {name: value for name, value in make_batch().items() if name != "ids_keep"}
    torch.manual_seed(3)
    _, whole = backward(make_model(mask_ratio=0.5), [batch])
    state = torch.get_rng_state()
    torch.manual_seed(3)
    # The model draws its noise row after row: two halves draw what one whole batch draws.
    _, cached = backward(make_model(mask_ratio=0.5), [take(batch, slice(0, 6)), take(batch, slice(6, 12))])
    assert torch.equal(torch.get_rng_state(), state)
    for name, gradient in whole.items():
        assert_same(cached[name], gradient, name)


def test_a_frozen_temperature_gets_no_gradient():
    model = make_model()
    batch = make_batch()
    _, whole = backward(model, [batch])
    frozen = make_model()
    frozen.logit_scale.requires_grad_(False)
    _, cached = backward(frozen, [take(batch, slice(0, 6)), take(batch, slice(6, 12))])
    assert cached.pop("logit_scale") is None
    for name, gradient in cached.items():
        assert_same(gradient, whole[name], name)


def test_a_caller_may_hold_autocast_over_both_passes():
    """The first pass casts weights without a graph; the second must not be given those."""
    batch = {name: value.float() if value.is_floating_point() else value for name, value in make_batch().items()}
    halves = [take(batch, slice(0, 6)), take(batch, slice(6, 12))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, whole = backward(make_model().float(), [batch])
        _, cached = backward(make_model().float(), halves)
    for name, gradient in whole.items():
        assert (cached[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-6, name


def test_one_micro_batch_is_held_at_a_time():
    weight = torch.eye(4, requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    held: list[weakref.ref] = []

    def prepare(batch):
        assert not any(reference() is not None for reference in held)
        prepared = batch["rows"].clone()  # what a trainer moves to its device
        held.append(weakref.ref(prepared))
        return {"rows": prepared}

    def encode(rows, target_patches=None):
        activation = (rows @ weight).relu()
        held.append(weakref.ref(activation))
        embeds = functional.normalize(activation @ weight, dim=1)
        return Encoded(embeds, embeds, scale)

    batches = [{"rows": torch.rand(2, 4), "input_ids": torch.zeros(2)} for _ in range(3)]
    accumulate_gradients(OneProcess(encode), batches, prepare)
    assert len(held) == 12


DISTRIBUTED = """
import sys, torch
from accelerate import Accelerator
from flip_hf.losses import contrastive_loss
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.distribution import Distribution
from flip_hf.training.optimization import make_optimizer
from flip_hf.training.step import accumulate_gradients
from tests.helpers.contrast import CAPTION_IDS, CASES, PIECES, differentiate, make_embeds
from tests.helpers.contrast import PAIRS, make_batch, make_model, take

accelerator = Accelerator(cpu=True)
encoder = PairEncoder(make_model())
flip = encoder.flip
make = lambda module: make_optimizer(module, OptimizationArguments())
distribution = Distribution(accelerator, encoder, make, max_grad_norm=None)
local = PAIRS // accelerator.num_processes
rank, results = accelerator.process_index, {}

for name, ids in {"": {}, "captions, ": {"caption_ids": CAPTION_IDS}}.items():
    for pieces in PIECES:
        size = local // pieces
        starts = [rank * local + i * size for i in range(pieces)]
        batch = {**make_batch(), **ids}
        loss = accumulate_gradients(distribution, [take(batch, slice(start, start + size)) for start in starts])
        gradients = {name: p.grad.clone() for name, p in flip.named_parameters()}
        results[f"{name}pieces {pieces}"] = {"loss": accelerator.reduce(loss.loss, "mean"), **gradients}
        flip.zero_grad()

for count, tile_size in CASES:
    images, texts, scale = make_embeds(count * accelerator.num_processes, 50.0)
    own = slice(rank * count, (rank + 1) * count)
    inputs = [x.detach().requires_grad_() for x in (images[own], texts[own], scale)]
    # Each process weighs its loss with another factor: nothing but a sum over processes is assumed.
    weigh = lambda *x: ((rank + 1) * contrastive_loss(*x, tile_size=tile_size)[0], None)
    loss, image_grad, text_grad, scale_grad = differentiate(weigh, inputs)
    results[f"case {count} {tile_size}"] = {
        "image": accelerator.gather(image_grad), "text": accelerator.gather(text_grad),
        "scale": accelerator.reduce(scale_grad), "loss": accelerator.reduce(loss),
    }
if accelerator.is_main_process:
    torch.save(results, sys.argv[1])
distribution.end()
"""


def weighted_dense_loss(images, texts, scale, processes: int) -> tuple[torch.Tensor, None]:
    """The sum of each process's loss of its pairs, times its number from 1."""
    logits = scale * images @ texts.T
    labels = torch.arange(len(images))
    losses = [functional.cross_entropy(x, labels, reduction="none").view(processes, -1) for x in (logits, logits.T)]
    return ((losses[0] + losses[1]).mean(dim=1) / 2 * torch.arange(1, processes + 1)).sum(), None


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_gradient_of_one_with_all_pairs(processes, tmp_path):
    (tmp_path / "run.py").write_text(DISTRIBUTED)
    run = run_program(tmp_path / "run.py", tmp_path / "grads.pt", processes=processes)
    assert run.returncode == 0, run.stderr[-3000:]
    results = torch.load(tmp_path / "grads.pt", weights_only=True)
    for kind, (loss, whole) in {
        "": backward(make_model(), [make_batch()]),
        "captions, ": dense_backward(make_model(), make_batch(), CAPTION_IDS),
    }.items():
        for pieces in PIECES:
            result = results[f"{kind}pieces {pieces}"]
            assert result.pop("loss").item() == pytest.approx(loss, abs=1e-6)
            assert result.keys() == whole.keys()
            for name, gradient in whole.items():
                assert_same(result[name], gradient, f"{name} in {kind}{pieces} pieces")
    for count, tile_size in CASES:
        result = results[f"case {count} {tile_size}"]
        inputs = make_embeds(count * processes, 50.0)
        expected = differentiate(weighted_dense_loss, inputs, processes=processes)
        for name, reference in zip(("loss", "image", "text", "scale"), expected, strict=True):
            assert_same(result[name], reference, f"{name} of {count} pairs in tiles of {tile_size}")
