"""Muon beside AdamW: which parameters it gets, torch's own steps, the mathematics, and saved states."""

import copy

import torch
from torch import nn

from flip_hf import FlipForPreTraining, FlipPreTrainingConfig
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.muon import MuonWithAdamW
from flip_hf.training.optimization import is_decayed, make_optimizer
from tests.helpers.contrast import backward, make_batch, make_model
from tests.helpers.models import tiny_config

DECODER = {"hidden_size": 32, "num_attention_heads": 2}
LEARNING_RATE = 0.01
WEIGHT_DECAY = 0.3
OPTIONS = OptimizationArguments(optimizer="muon", weight_decay=WEIGHT_DECAY)


def set_learning_rate(*optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_muon_gets_the_matrices_of_blocks_alone():
    config = FlipPreTrainingConfig(flip_config=tiny_config(), decoder_config=DECODER)
    model = FlipForPreTraining(config)
    model.flip.vision_model.encoder.layers[0].mlp.fc1.weight.requires_grad_(False)
    matrices, decayed, others = (group["params"] for group in make_optimizer(model, OPTIONS).param_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = {names[id(parameter)].split(".")[-2] for parameter in matrices}
    assert kinds == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    towers = {names[id(parameter)].split(".layers.")[0] for parameter in matrices}
    assert towers == {"flip.text_model.encoder", "flip.vision_model.encoder", "decoder"}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(matrices) + len(decayed) + len(others) == len(trained)
    assert all(is_decayed(names[id(p)]) for p in decayed) and not any(is_decayed(names[id(p)]) for p in others)


def test_the_steps_are_those_of_torchs_two_optimizers():
    """Muon's to 2 %, since torch's iterations are in bfloat16; AdamW's to the bit."""
    ours = make_model()
    start = copy.deepcopy(dict(ours.named_parameters()))
    theirs = copy.deepcopy(ours)
    one = make_optimizer(ours, OPTIONS)
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    twins = dict(theirs.named_parameters())
    matrices, *groups = ([twins[names[id(p)]] for p in group["params"]] for group in one.param_groups)
    muon = torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    decays = zip(groups, (WEIGHT_DECAY, 0.0), strict=True)
    adamw = torch.optim.AdamW([{"params": p, "weight_decay": d} for p, d in decays], betas=(0.9, 0.95), fused=True)
    set_learning_rate(one, muon, adamw)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one.step()
        muon.step()
        adamw.step()
    of_muon = {id(parameter) for parameter in matrices}
    for name, parameter in ours.named_parameters():
        bound = 0.02 if id(twins[name]) in of_muon else 0
        assert (twins[name] - parameter).norm() <= bound * (start[name] - parameter).norm(), name


def test_an_update_is_the_nearest_orthogonal_matrix_of_adamws_size():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(48, 16))
    optimizer = MuonWithAdamW([{"params": [weight]}], [{"params": [nn.Parameter(torch.zeros(1))]}])
    set_learning_rate(optimizer)
    weight.grad = torch.randn(48, 16)
    optimizer.step()
    u, _, v = torch.linalg.svd(weight.grad.double(), full_matrices=False)
    update = -weight.detach().double()
    # torch's five iterations leave the singular values within about 0.7 and 1.2 of an orthogonal matrix's.
    assert nn.functional.cosine_similarity(update.flatten(), (u @ v).flatten(), dim=0) > 0.98
    values = torch.linalg.svdvals(update) / (0.2 * LEARNING_RATE * 48**0.5)
    assert 0.6 < values.min() and values.max() < 1.3
    assert 0.15 < update.square().mean().sqrt() / LEARNING_RATE < 0.25


def test_a_loaded_optimizer_continues_to_the_same_bits(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model, OPTIONS)
    set_learning_rate(optimizer)
    backward(model, [make_batch()])
    optimizer.step()
    copied = copy.deepcopy(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = make_optimizer(copied, OPTIONS)
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for trained, its_optimizer in ((model, optimizer), (copied, loaded)):
        give_gradients(trained, 1)
        its_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert len(optimizer.state) == len(list(model.parameters()))


def test_a_closure_is_called_once_and_its_loss_returned():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = MuonWithAdamW([{"params": [weight]}], [{"params": [nn.Parameter(torch.zeros(1))]}])
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        return 3.0

    assert optimizer.step(closure) == 3.0 and calls == [True]
