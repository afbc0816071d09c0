"""Low-rank adapters on both towers, with PEFT."""

import pytest
import torch
import transformers
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from flip_hf import FlipForImageClassification, FlipModel
from flip_hf.training.encoder import recompute_activations
from tests.helpers.conformance import assert_same, build, make_inputs, training_loss

peft = pytest.importorskip("peft")

PROJECTIONS = ["visual_projection", "text_projection"]


def lora(**kwargs):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": PROJECTIONS}
    return peft.LoraConfig(**{**settings, **kwargs})


def train(model, inputs, steps: int = 15, **kwargs) -> tuple[float, float]:
    """Trains what may be trained, under masks; the loss on whole images before and after."""

    def measured() -> float:
        with torch.no_grad():
            return training_loss_of(model.eval(), inputs)

    before = measured()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        outputs = model.train()(**inputs, **kwargs)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, measured()


def training_loss_of(model, inputs) -> float:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return training_loss(base, inputs).item()


def stir(model: torch.nn.Module) -> None:
    """Moves the adapters off their start, where they add nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_only_adapters_and_projections_get_gradients():
    model = peft.get_peft_model(build(FlipModel), lora()).train()
    inputs = make_inputs(FlipModel)
    outputs = model(**inputs, return_loss=True)
    assert outputs.ids_keep.shape == (3, 8)  # masks are drawn through the wrapper too
    outputs.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "projection.modules_to_save" in name for name in trained)
    for tower in ("text_model", "vision_model"):
        adapters = [name for name in trained if f"{tower}.encoder" in name]
        assert len(adapters) == 2 * 2 * 2  # two blocks, two projections of attention, two matrices
    assert sum("modules_to_save" in name for name in trained) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_masked_step_learns(checkpointing):
    model = peft.get_peft_model(build(FlipModel), lora())
    inputs = make_inputs(FlipModel)
    if checkpointing:
        base = model.get_base_model()
        recompute_activations(base, {"use_reentrant": True})
        base.enable_input_require_grads()  # what PEFT's own guide asks for: the embeddings are frozen
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before, after = train(model, inputs, return_loss=True)
    assert after < 0.5 * before
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())


def test_reentrant_checkpointing_reaches_adapters_under_frozen_embeddings():
    model = peft.get_peft_model(build(FlipModel), lora()).train()
    inputs = make_inputs(FlipModel)
    ids_keep = torch.tensor([[1, 5, 6], [0, 2, 15], [7, 8, 9]])

    def gradients():
        model.zero_grad()
        model(**inputs, ids_keep=ids_keep, return_loss=True).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    stir(model)
    plain = gradients()
    base = model.get_base_model()
    base.enable_input_require_grads()
    recompute_activations(base, {"use_reentrant": True})
    assert_same(plain, gradients(), lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6))


def test_adapters_are_the_same_after_saving_and_after_merging(tmp_path):
    model = build(FlipModel)
    inputs = make_inputs(FlipModel)
    plain = model(**inputs).logits_per_image
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, lora())
    stir(adapted)
    expected = adapted.eval()(**inputs)
    assert not torch.allclose(expected.logits_per_image, plain, atol=1e-2)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(FlipModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert_same(loaded(**inputs), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is FlipModel
    assert torch.allclose(merged(**inputs).logits_per_image, expected.logits_per_image, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again, report = FlipModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same(again(**inputs), merged(**inputs))


def transformers_wants_another_peft() -> str | None:
    """Transformers' own words where it refuses the PEFT that is installed, which PEFT's own calls above do not mind."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        return f"Transformers {transformers.__version__} and PEFT {peft.__version__}: {error}"
    return None


@pytest.mark.skipif(transformers_wants_another_peft() is not None, reason=str(transformers_wants_another_peft()))
def test_transformers_own_adapter_calls(tmp_path):
    model = build(FlipModel)
    inputs = make_inputs(FlipModel)
    plain = model(**inputs).logits_per_image
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(lora(modules_to_save=None))
    stir(model)
    adapted = model.eval()(**inputs).logits_per_image
    model.disable_adapters()
    assert torch.equal(model(**inputs).logits_per_image, plain)
    model.enable_adapters()
    assert torch.equal(model(**inputs).logits_per_image, adapted) and not torch.equal(adapted, plain)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    loaded = FlipModel.from_pretrained(tmp_path / "base")
    loaded.load_adapter(tmp_path / "adapter")
    assert torch.equal(loaded.eval()(**inputs).logits_per_image, adapted)


def test_a_classifier_learns_its_head_and_adapters():
    model = peft.get_peft_model(
        build(FlipForImageClassification), lora(target_modules="all-linear", modules_to_save=["classifier"])
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("lora_" in name for name in trained) == 2 * 2 * 6  # two blocks, six linear layers, two matrices
    inputs = make_inputs(FlipForImageClassification)
    before, after = train(model, inputs, labels=torch.tensor([0, 1, 2]))
    assert after < 0.5 * before
