"""The loss and its gradient: against the plain formula, and over processes and micro-batches."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SiglipConfig, SiglipModel

from flip_hf.losses import contrastive_loss, sigmoid_loss
from flip_hf.planning.memory import StorageMeter
from flip_hf.training.encoder import Encoded
from flip_hf.training.step import OneProcess, accumulate_gradients
from tests.helpers.contrast import (
    BIASES,
    CAPTION_IDS,
    CASES,
    PAIRS,
    PIECES,
    assert_same,
    backward,
    dense_backward,
    dense_loss,
    dense_sigmoid_loss,
    differentiate,
    make_batch,
    make_embeds,
    make_model,
    take,
)
from tests.helpers.programs import run_program

# The loss of this package, the formula, and the bias of the logits, if any.
LOSSES = [(contrastive_loss, dense_loss, None), (sigmoid_loss, dense_sigmoid_loss, -10.0)]
by_loss = pytest.mark.parametrize(("loss_function", "dense", "bias"), LOSSES, ids=list(BIASES))
by_bias = pytest.mark.parametrize("bias", BIASES.values(), ids=list(BIASES))


def sizes(values: list[torch.Tensor], scale: float) -> list[float]:
    """The sizes by which errors of a loss and its gradients are judged; the sigmoid loss is a sum of N decisions."""
    if len(values) == 4:
        return [1, scale, scale, 1]
    return [max(1.0, values[0].item()), scale, scale, 1, 1]


@by_bias
def test_loss_is_that_of_the_model(bias):
    model = make_model(bias=bias)
    batch = make_batch()
    loss, gradients = backward(model, [batch])
    other = make_model(bias=bias)
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
@by_loss
def test_tiles_give_the_dense_loss(loss_function, dense, bias, pairs, tile_size, scale, dtype, allowed):
    inputs = make_embeds(pairs, scale, dtype, bias=bias)
    expected = differentiate(dense, [x.detach().double().requires_grad_() for x in inputs])
    ours = differentiate(loss_function, inputs, tile_size=tile_size)
    for value, reference, size in zip(ours, expected, sizes(expected, scale), strict=True):
        assert value.dtype == dtype
        assert (value - reference).abs().max() <= allowed * size, (value, reference)
    accuracy = loss_function(*inputs, tile_size=tile_size)[1]
    assert accuracy == dense(*inputs)[1]


@pytest.mark.parametrize("captions", [1, 3, 12])
@pytest.mark.parametrize("tile_size", [1, 5, 100])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@by_loss
def test_equal_captions_are_positives(loss_function, dense, bias, captions, tile_size, scale):
    inputs = make_embeds(13, scale, bias=bias)
    caption_ids = torch.arange(13) * 7 % captions
    expected = differentiate(dense, inputs, caption_ids=caption_ids)
    ours = differentiate(loss_function, inputs, caption_ids=caption_ids, tile_size=tile_size)
    for value, reference, size in zip(ours, expected, sizes(expected, scale), strict=True):
        assert (value - reference).abs().max() <= 1e-10 * size, (value, reference)
    accuracy = loss_function(*inputs, caption_ids=caption_ids, tile_size=tile_size)[1]
    assert accuracy == dense(*inputs, caption_ids)[1]


@pytest.mark.parametrize("tile_size", [4, 13])
@by_loss
def test_distinct_captions_give_the_loss_of_pairs_to_the_bit(loss_function, dense, bias, tile_size):
    inputs = make_embeds(13, 50.0, torch.float32, bias=bias)
    pairs = differentiate(loss_function, inputs, tile_size=tile_size)
    caption_ids = torch.randperm(13) * 2**55
    ours = differentiate(loss_function, inputs, caption_ids=caption_ids, tile_size=tile_size)
    assert all(torch.equal(value, reference) for value, reference in zip(ours, pairs, strict=True))


def test_the_sigmoid_loss_is_siglips():
    """On the embeddings of a real SigLIP, with its own scale and bias."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(text_config={**size, "vocab_size": 50}, vision_config={**size, "image_size": 32})
    siglip = SiglipModel(config)
    inputs = {"input_ids": torch.randint(50, (6, 64)), "pixel_values": torch.randn(6, 3, 32, 32)}
    outputs = siglip(**inputs, return_loss=True)
    loss, _ = sigmoid_loss(outputs.image_embeds, outputs.text_embeds, siglip.logit_scale.exp(), siglip.logit_bias)
    assert loss.item() == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert 0.5 < loss.item() < 100
    parameters = [siglip.logit_scale, siglip.logit_bias, siglip.vision_model.post_layernorm.weight]
    expected = torch.autograd.grad(outputs.loss, parameters, retain_graph=True)
    for gradient, reference in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("loss_function", "of_logits"), [(contrastive_loss, 1), (sigmoid_loss, 2)])
def test_caption_ids_must_match_the_pairs(loss_function, of_logits):
    with pytest.raises(ValueError, match=rf"{loss_function.__name__} needs .* each of the 3 pairs.*\(2,\)"):
        loss_function(*[torch.ones(3, 8)] * 2, *[torch.ones(1)] * of_logits, caption_ids=torch.ones(2))


@pytest.mark.parametrize("scale", [100.0, 1000.0])
@by_loss
def test_extreme_similarities_stay_finite(loss_function, dense, bias, scale):
    """Cosines of exactly 1 and -1: every exponential that is not shifted overflows or vanishes in float32."""
    alike = torch.eye(4)[[0, 0, 1, 1, 2, 3]]
    for images, texts in [(alike, alike), (alike, -alike), (alike, alike.flip(0))]:
        of_logits = [torch.tensor([x]) for x in (scale, bias) if x is not None]
        inputs = [x.clone().requires_grad_() for x in (images, texts, *of_logits)]
        for tile_size in (1, 4, 6):
            ours = differentiate(loss_function, inputs, tile_size=tile_size)
            expected = differentiate(dense, inputs)
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


@by_loss
def test_the_matrix_of_similarities_is_never_held(loss_function, dense, bias):
    inputs = make_embeds(64, 10.0, bias=bias)  # (64, 8)
    largest = {}
    for name, function in {"tiled": lambda *x: loss_function(*x, tile_size=16), "dense": dense}.items():
        with LargestTensor() as mode:
            differentiate(function, inputs)
        largest[name] = mode.elements
    assert largest == {"tiled": 64 * 8, "dense": 64 * 64}


@by_loss
def test_tiles_take_an_eighth_of_the_dense_losss_memory(loss_function, dense, bias):
    """Of a batch of SigLIP's size, 32,768, traced: nothing is allocated."""
    peaks = {}
    for name, function in {"tiled": loss_function, "dense": dense}.items():
        with FakeTensorMode(), StorageMeter() as meter:
            embeds = [torch.zeros(32_768, 512, requires_grad=True) for _ in range(2)]
            of_logits = [torch.ones(1, requires_grad=True) for _ in range(1 if bias is None else 2)]
            function(*embeds, *of_logits)[0].backward()
        peaks[name] = meter.peak.total()
    assert peaks["tiled"] <= peaks["dense"] / 8, peaks


@pytest.mark.parametrize(("loss_function", "of_logits"), [(contrastive_loss, 1), (sigmoid_loss, 2)])
def test_images_and_texts_must_pair_up(loss_function, of_logits):
    with pytest.raises(ValueError, match=rf"{loss_function.__name__} needs .*\(3, 8\) and \(2, 8\)"):
        loss_function(torch.ones(3, 8), torch.ones(2, 8), *[torch.ones(1)] * of_logits)


@by_loss
def test_autocast_does_not_reach_the_loss(loss_function, dense, bias):
    inputs = make_embeds(12, 100.0, torch.float32, bias=bias)
    expected = differentiate(loss_function, inputs, tile_size=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = differentiate(loss_function, inputs, tile_size=5)
    assert all(torch.equal(value, reference) for value, reference in zip(ours, expected, strict=True))


@by_loss
def test_bfloat16_embeddings_are_off_by_their_own_rounding(loss_function, dense, bias):
    inputs = make_embeds(12, 100.0, torch.bfloat16, bias=bias)
    ours = differentiate(loss_function, inputs, tile_size=5)
    expected = differentiate(dense, [x.detach().double().requires_grad_() for x in inputs])
    assert [x.dtype for x in ours] == [torch.float32, *[torch.bfloat16] * len(inputs)]
    assert ours[0] == pytest.approx(expected[0].item(), rel=1e-5)
    for value, reference in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2**-8, atol=1e-6)


@by_loss
def test_a_compiled_caller_gets_the_same_loss(loss_function, dense, bias):
    def both(images, texts, *of_logits):
        return loss_function(functional.normalize(images, dim=1), functional.normalize(texts, dim=1), *of_logits)

    inputs = make_embeds(6, 10.0, bias=bias)
    compiled = differentiate(torch.compile(both, backend="eager"), inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, differentiate(both, inputs), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tile_size", [100, 2048])
@by_loss
def test_tiles_give_the_dense_loss_on_a_gpu(loss_function, dense, bias, tile_size):
    inputs = make_embeds(500, 100.0, torch.float32, "cuda", bias)
    expected = differentiate(dense, [x.detach().double().requires_grad_() for x in inputs])
    for value, reference in zip(differentiate(loss_function, inputs, tile_size=tile_size), expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)
    # Nothing waits for the device on the way.
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(loss_function, inputs, tile_size=tile_size)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pieces", [2, 3, 12])
@by_bias
def test_micro_batches_give_the_gradient_of_the_whole_batch(bias, pieces):
    batch = make_batch()
    loss, whole = dense_backward(make_model(bias=bias), batch)
    size = PAIRS // pieces
    split = [take(batch, slice(i * size, (i + 1) * size)) for i in range(pieces)]
    cached_loss, cached = backward(make_model(bias=bias), split)
    assert cached_loss == pytest.approx(loss, abs=1e-6)
    for name, gradient in whole.items():
        assert_same(cached[name], gradient, name)


@pytest.mark.parametrize("pieces", [1, 3])
@by_bias
def test_equal_captions_of_different_micro_batches_are_positives(bias, pieces):
    batch = make_batch()
    expected_loss, expected = dense_backward(make_model(bias=bias), batch, CAPTION_IDS)
    labelled = {**batch, "caption_ids": CAPTION_IDS}
    size = PAIRS // pieces
    split = [take(labelled, slice(i * size, (i + 1) * size)) for i in range(pieces)]
    loss, ours = backward(make_model(bias=bias), split)
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


@pytest.mark.parametrize(("bias", "name"), [(None, "logit_scale"), (-3.0, "logit_scale"), (-3.0, "logit_bias")])
def test_a_frozen_temperature_or_bias_gets_no_gradient(bias, name):
    model = make_model(bias=bias)
    batch = make_batch()
    _, whole = backward(model, [batch])
    frozen = make_model(bias=bias)
    frozen.get_parameter(name).requires_grad_(False)
    _, cached = backward(frozen, [take(batch, slice(0, 6)), take(batch, slice(6, 12))])
    assert cached.pop(name) is None
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
from flip_hf.losses import contrastive_loss, sigmoid_loss
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.distribution import Distribution
from flip_hf.training.optimization import make_optimizer
from flip_hf.training.step import accumulate_gradients
from tests.helpers.contrast import BIASES, CAPTION_IDS, CASES, PIECES, differentiate, make_embeds
from tests.helpers.contrast import PAIRS, make_batch, make_model, take

loss_function = {"softmax": contrastive_loss, "sigmoid": sigmoid_loss}[sys.argv[2]]
bias = BIASES[sys.argv[2]]
accelerator = Accelerator(cpu=True)
encoder = PairEncoder(make_model(bias=bias))
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
    images, texts, *of_logits = make_embeds(count * accelerator.num_processes, 50.0, bias=bias)
    own = slice(rank * count, (rank + 1) * count)
    inputs = [x.detach().requires_grad_() for x in (images[own], texts[own], *of_logits)]
    # Each process weighs its loss with another factor: nothing but a sum over processes is assumed.
    weigh = lambda *x: ((rank + 1) * loss_function(*x, tile_size=tile_size)[0], None)
    loss, image_grad, text_grad, *grads_of_logits = differentiate(weigh, inputs)
    results[f"case {count} {tile_size}"] = [
        accelerator.reduce(loss), accelerator.gather(image_grad), accelerator.gather(text_grad),
        *map(accelerator.reduce, grads_of_logits),
    ]
if accelerator.is_main_process:
    torch.save(results, sys.argv[1])
distribution.end()
"""


def weighted_dense_loss(images, texts, scale, bias=None, *, processes: int) -> tuple[torch.Tensor, None]:
    """The sum of each process's loss of its pairs, times its number from 1."""
    logits = scale * images @ texts.T
    if bias is not None:
        yes = torch.eye(len(images), dtype=logits.dtype)
        losses = functional.binary_cross_entropy_with_logits(logits + bias, yes, reduction="none").sum(dim=1)
        return (losses.view(processes, -1).mean(dim=1) * torch.arange(1, processes + 1)).sum(), None
    labels = torch.arange(len(images))
    losses = [functional.cross_entropy(x, labels, reduction="none").view(processes, -1) for x in (logits, logits.T)]
    return ((losses[0] + losses[1]).mean(dim=1) / 2 * torch.arange(1, processes + 1)).sum(), None


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("loss_name", BIASES)
def test_processes_give_the_gradient_of_one_with_all_pairs(loss_name, processes, tmp_path):
    bias = BIASES[loss_name]
    (tmp_path / "run.py").write_text(DISTRIBUTED)
    run = run_program(tmp_path / "run.py", tmp_path / "grads.pt", loss_name, processes=processes)
    assert run.returncode == 0, run.stderr[-3000:]
    results = torch.load(tmp_path / "grads.pt", weights_only=True)
    for kind, (loss, whole) in {
        "": dense_backward(make_model(bias=bias), make_batch()),
        "captions, ": dense_backward(make_model(bias=bias), make_batch(), CAPTION_IDS),
    }.items():
        for pieces in PIECES:
            result = results[f"{kind}pieces {pieces}"]
            assert result.pop("loss").item() == pytest.approx(loss, abs=1e-6)
            assert result.keys() == whole.keys()
            for name, gradient in whole.items():
                assert_same(result[name], gradient, f"{name} in {kind}{pieces} pieces")
    for count, tile_size in CASES:
        result = results[f"case {count} {tile_size}"]
        inputs = make_embeds(count * processes, 50.0, bias=bias)
        expected = differentiate(weighted_dense_loss, inputs, processes=processes)
        for i, (ours, reference) in enumerate(zip(result, expected, strict=True)):
            name = ("loss", "image", "text", "scale", "bias")[i]
            assert_same(ours, reference, f"{name} of {count} pairs in tiles of {tile_size}")
