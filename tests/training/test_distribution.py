"""A step on two processes, plain and sharded, is the step of one; averages, clipping and what is saved, too."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.helpers.contrast import make_model
from tests.helpers.programs import run_program
from tests.helpers.two_steps import RUN, one_process

ROOT = Path(__file__).parents[2]


def run_two(
    kind: str,
    pieces: int,
    folder: Path,
    max_norm: float = 0.0,
    optimizer: str = "adamw",
    loss: str = "softmax",
    parts: Sequence[str] = (),
    **environment: str,
) -> dict[str, torch.Tensor]:
    (folder / "run.py").write_text(RUN)
    arguments = (kind, pieces, folder / "out.pt", max_norm, optimizer, loss, *parts)
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    run = run_program(folder / "run.py", *arguments, processes=2, environment=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize(
    ("kind", "pieces", "max_norm", "loss"),
    [
        *[("ddp", 3, 0.5, "softmax"), ("compiled", 3, 0.5, "softmax")],
        *[("fsdp2", 1, 0.0, "softmax"), ("fsdp2", 3, 0.5, "softmax")],
        *[("compiled", 3, 0.5, "sigmoid"), ("fsdp2", 1, 0.0, "sigmoid"), ("fsdp2", 3, 0.5, "sigmoid")],
    ],
)
def test_two_processes_take_the_step_of_one(kind, pieces, max_norm, loss, tmp_path):
    ours = run_two(kind, pieces, tmp_path, max_norm, loss=loss)
    expected = one_process(max_norm or None, loss=loss)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name].double() - value.double()).abs().max() < 1e-8, name


@pytest.mark.parametrize(
    ("kind", "pieces", "frozen"), [("ddp", 1, ["image"]), ("ddp", 3, ["image:1", "text"]), ("fsdp2", 3, ["image"])]
)
def test_two_processes_take_the_step_of_one_with_frozen_parts(kind, pieces, frozen, tmp_path):
    ours = run_two(kind, pieces, tmp_path, parts=frozen)
    expected = one_process(parts=frozen)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name].double() - value.double()).abs().max() < 1e-8, name
    for name, value in make_model().state_dict().items():
        if name.startswith(("vision_model.embeddings", "vision_model.encoder.layers.0")):
            assert torch.equal(ours[name], value), name


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
@pytest.mark.parametrize(
    ("kind", "pieces", "parts"),
    [
        ("ddp", 3, ["lora=image:4", "text"]),
        ("ddp", 1, ["lora=text:4"]),
        ("compiled", 3, ["lora=image:4", "lora=text:2"]),
    ],
)
def test_two_processes_take_the_step_of_one_with_adapters(kind, pieces, parts, tmp_path):
    ours = run_two(kind, pieces, tmp_path, parts=parts)
    expected = one_process(parts=parts)
    assert ours.keys() == expected.keys()
    assert any(".lora_B." in name and value.any() for name, value in ours.items())
    for name, value in expected.items():
        assert (ours[name].double() - value.double()).abs().max() < 1e-8, name


def test_two_processes_take_the_step_of_one_with_fused_projections_of_shards(tmp_path):
    ours = run_two("fsdp2", 3, tmp_path, parts=["speed_up=fused_qkv"])
    expected = one_process()
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name].double() - value.double()).abs().max() < 1e-8, name


@pytest.mark.parametrize(("kind", "pieces"), [("ddp", 1), ("compiled", 3), ("fsdp2", 3)])
def test_two_processes_take_the_step_of_one_on_smaller_images(kind, pieces, tmp_path):
    """Of a stage: masked, at interpolated positions, which learn."""
    ours = run_two(kind, pieces, tmp_path, SMALLER="1")
    expected = one_process(smaller=True)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name].double() - value.double()).abs().max() < 1e-8, name
    positions = "vision_model.embeddings.position_embedding.weight"
    assert not torch.equal(expected[positions], make_model(positions="learned").state_dict()[positions])


@pytest.mark.parametrize(("kind", "pieces"), [("ddp", 1), ("fsdp2", 3)])
def test_two_processes_take_muons_step_of_one(kind, pieces, tmp_path):
    """To the precision of float32, in which matrices are orthogonalised."""
    ours = run_two(kind, pieces, tmp_path, optimizer="muon")
    expected = one_process(optimizer_name="muon")
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name].double() - value.double()).abs().max() < 1e-6 * max(1, value.abs().max()), name


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero2_refuses_muon(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    environment = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "false"}
    arguments = ("zero2", 1, tmp_path / "out.pt", 0.0, "muon", "softmax")
    run = run_program(tmp_path / "run.py", *arguments, processes=2, environment=environment)
    assert run.returncode != 0 and "muon needs whole matrices, and DeepSpeed flattens them" in run.stderr


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize(("pieces", "max_norm"), [(1, 0.0), (3, 0.5)])
def test_zero2_takes_the_step_of_one(pieces, max_norm, tmp_path):
    """In float32, which DeepSpeed's master weights are."""
    ours = run_two("zero2", pieces, tmp_path, max_norm)
    expected = one_process(max_norm or None)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if "k_proj.bias" not in name:  # its gradient is zero but for rounding, which Adam makes a whole step of
            assert (ours[name].double() - value.double()).abs().max() < 1e-4 * max(1, value.abs().max()), name
