"""The FLOP count against torch's own counter, on the real model."""

import json
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from flip_hf import FlipConfig, FlipModel
from flip_hf.training.accelerators import ACCELERATORS, find_accelerator, named_accelerator, peak_flops
from flip_hf.training.encoder import recompute_activations
from flip_hf.training.flops import sample_flops, step_flops, utilization
from flip_hf.training.freezing import Frozen, freeze
from flip_hf.training.lora import Ranks, add_adapters
from tests.helpers.models import tiny_config

ATEN = torch.ops.aten
# torch 2.11 has no formula for the CPU's kernel; torch 2.15 has these.
CPU_ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}
# ViT-B/16 of three blocks: torch counts what each of them does.
FULL_WIDTH = FlipConfig(text_config={"num_hidden_layers": 3}, vision_config={"num_hidden_layers": 3})
BATCH = 3
TOKENS = 7


def counted(
    config: FlipConfig,
    mask_ratio: float,
    attention: str,
    checkpointing: bool = False,
    frozen: Frozen | None = None,
    new_projection: bool = False,
    ranks: Ranks | None = None,
) -> tuple[int, int]:
    """FLOPs of a forward pass with its loss, and of that and its backward pass, on tensors without values."""
    mode = nullcontext() if ranks else FakeTensorMode()  # among whose tensors PEFT cannot move its own
    with mode, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model = FlipModel._from_config(config, attn_implementation=attention).train()
        freeze(model, {**(frozen or {}), **dict.fromkeys(ranks or {})}, new_projection)
        add_adapters(model, ranks or {})
        if checkpointing:
            recompute_activations(model)
        side = config.vision_config.image_size
        tokens = torch.ones(BATCH, TOKENS, dtype=torch.long)
        inputs = {"pixel_values": torch.randn(BATCH, 3, side, side), "input_ids": tokens, "attention_mask": tokens}
        loss = model(**inputs, mask_ratio=mask_ratio, return_loss=True).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "attention", "mask_ratio"),
    [(tiny_config(), attention, ratio) for attention in ("eager", "sdpa") for ratio in (0, 0.5, 0.75)]
    + [(FULL_WIDTH, "eager", 0.5), (FULL_WIDTH, "sdpa", 0.75)],
)
def test_flops_are_those_torch_counts(config, attention, mask_ratio):
    """Exactly; but the fused kernel computes the scores again in backward, which is none of the model's FLOPs."""
    flops = sample_flops(config, mask_ratio, TOKENS, BATCH)
    forward, both = counted(config, mask_ratio, attention)
    scores_again = flops.attention // 2 if attention == "sdpa" else 0
    assert forward == BATCH * flops.forward
    assert both == BATCH * (flops.training + scores_again)


@pytest.mark.parametrize(
    ("frozen", "new_projection"),
    [
        ({"image": None}, False),
        ({"image": None}, True),
        ({"image": 1}, False),
        ({"text": None}, False),
        ({"image": 2, "text": 1}, False),
    ],
)
def test_frozen_parts_have_no_flops_in_backward(frozen, new_projection):
    config = tiny_config()
    expected = step_flops(config, 8, TOKENS, BATCH, frozen, new_projection)
    assert counted(config, 0.5, "eager", frozen=frozen, new_projection=new_projection)[1] == BATCH * expected


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
@pytest.mark.parametrize(
    ("ranks", "frozen", "new_projection"),
    [
        ({"image": 4}, {}, False),
        ({"image": 4}, {"text": None}, True),
        ({"text": 3}, {"image": 1}, False),
        ({"image": 2, "text": 8}, {}, False),
    ],
)
def test_adapters_have_their_flops_and_spare_those_of_the_weights(ranks, frozen, new_projection):
    config = tiny_config()
    expected = step_flops(config, 8, TOKENS, BATCH, frozen, new_projection, ranks)
    assert counted(config, 0.5, "eager", False, frozen, new_projection, ranks)[1] == BATCH * expected


def test_text_that_is_always_padded_is_counted_in_full():
    config = tiny_config({"attend_to_padding": True})
    assert counted(config, 0.5, "eager")[0] == BATCH * sample_flops(config, 0.5, TOKENS, BATCH).forward


def test_recomputation_is_executed_but_not_the_models():
    flops = sample_flops(tiny_config(), 0.5, TOKENS, BATCH)
    assert flops.executed(cached=False, checkpointing=False) == flops.training
    assert flops.executed(cached=True, checkpointing=False) == flops.training + flops.encoders
    # torch stops recomputing a block once all that backward needs is there: before its last product, the MLP's.
    executed = counted(tiny_config(), 0.5, "eager", checkpointing=True)[1]
    last = BATCH * 2 * 32 * 48 * 2 * (9 + TOKENS)  # 2 D hidden a token, two blocks a tower
    assert executed == BATCH * flops.executed(cached=False, checkpointing=True) - last


@pytest.mark.parametrize(
    ("device_name", "name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB", 312),
        ("NVIDIA A100 80GB PCIe", "A100-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB", 312),
        ("NVIDIA H100 80GB HBM3", "H100-SXM", 989),
        ("NVIDIA H100 PCIe", "H100-PCIe", 756),
        ("NVIDIA H100 NVL", "H100-NVL", 835),
        ("NVIDIA H200", "H200", 989),
        ("NVIDIA A10G", "A10G", 70),
        ("NVIDIA A10", "A10", 125),
        ("NVIDIA L4", "L4", 121),
        ("NVIDIA L40S", "L40S", 362),
        ("Tesla V100-SXM2-16GB", "V100-16GB", None),
        ("NVIDIA GeForce RTX 4090", "RTX-4090", 165.2),
        ("AMD Instinct MI300X", "MI300X", 1307.4),
    ],
)
def test_accelerators_are_found_by_the_names_torch_gives_them(device_name, name, bf16):
    found = find_accelerator(device_name)
    assert found is not None and found.name == name and found.peak("bf16") == (bf16 and bf16 * 1e12)


def test_unknown_accelerators_have_no_peak_and_a_helpful_error():
    assert find_accelerator("NVIDIA GeForce GTX 1080") is None and peak_flops(torch.device("cpu"), "bf16") is None
    assert len({a.name.lower() for a in ACCELERATORS}) == len(ACCELERATORS)
    assert named_accelerator("h100-sxm").bf16 == 989e12
    with pytest.raises(ValueError, match="no GPU 'H100SXM'.*Did you mean H100-SXM.*A100-80GB"):
        named_accelerator("H100SXM")


def test_utilization_is_models_flops_over_all_devices_peak(monkeypatch):
    accelerator = Accelerator(cpu=True)
    assert utilization(1e9, 1000, accelerator, bf16=True) == {}
    monkeypatch.setattr("flip_hf.training.flops.peak_flops", lambda device, precision: 4e12)  # no GPU is here
    assert utilization(1e9, 1000, accelerator, bf16=True) == {"mfu": 0.25}


def test_a_run_reports_its_flops(trained):
    results = json.loads((trained[0] / "results.json").read_text())
    config = FlipConfig.from_pretrained(trained[0])
    flops = results["flops_per_sample"]
    counts = {sample_flops(config, 0.5, tokens, 64).training for tokens in range(1, 33)}
    assert flops["masked"] in counts and flops["unmasked"] > flops["masked"]
