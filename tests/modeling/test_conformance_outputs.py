"""Transformers' expectations of outputs and training, for each public class, for FLIP's and CLIP's shapes.

In the spirit of Transformers' own mixins, which are not shipped. What is FLIP's own is in test_flip_model.py.
"""

import pytest
import torch
from transformers.utils.generic import ModelOutput

from flip_hf import (
    FlipForImageClassification,
    FlipModel,
    FlipTextModel,
    FlipVisionModel,
)
from flip_hf.training.encoder import recompute_activations
from tests.helpers.conformance import (
    ALL,
    ARCHITECTURES,
    EACH,
    MODELS,
    TEXT_MODELS,
    assert_same,
    build,
    close,
    make_inputs,
    training_loss,
)
from tests.helpers.models import NUM_PATCHES, randomize, tiny_config

# -- outputs ----------------------------------------------------------------------------------------------------------


@ALL
def test_a_tuple_holds_the_fields_of_the_output(model_class, architecture):
    model = build(model_class, architecture)
    inputs = make_inputs(model_class)
    model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    if model_class is FlipModel:
        wanted["return_loss"] = True
    outputs = model(**inputs, **wanted)
    assert isinstance(outputs, ModelOutput)
    as_tuple = model(**inputs, **wanted, return_dict=False)
    assert type(as_tuple) is tuple
    assert_same(outputs.to_tuple(), as_tuple)
    model.config.return_dict = False
    assert_same(outputs.to_tuple(), model(**inputs, **wanted))


@pytest.mark.parametrize("method", ["get_text_features", "get_image_features"])
def test_features_come_as_a_tuple_when_asked(method):
    model = build(FlipModel)
    inputs = make_inputs(FlipModel)
    inputs = {k: v for k, v in inputs.items() if ("pixel" in k) == ("image" in method)}
    outputs = getattr(model, method)(**inputs)
    assert_same(outputs.to_tuple(), getattr(model, method)(**inputs, return_dict=False))
    with_states = getattr(model, method)(**inputs, output_hidden_states=True)
    assert len(with_states.hidden_states) == 3
    assert torch.equal(with_states.pooler_output, outputs.pooler_output)


@pytest.mark.parametrize(
    ("model_class", "mask_ratio"), [(c, None) for c in MODELS] + [(c, 0.75) for c in MODELS if c not in TEXT_MODELS]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_and_attentions_have_their_shapes(model_class, architecture, mask_ratio):
    model = build(model_class, architecture)
    inputs = make_inputs(model_class)
    model.set_attn_implementation("eager")
    masked = {} if mask_ratio is None else {"mask_ratio": mask_ratio}
    outputs = model(**inputs, **masked, output_hidden_states=True, output_attentions=True)
    patches = NUM_PATCHES if mask_ratio is None else NUM_PATCHES // 4
    image_tokens = patches if architecture == "siglip" else 1 + patches
    text_tokens = 16 if architecture in ("siglip", "clipa") else 7  # padded to the context
    towers = [(outputs, text_tokens if model_class in TEXT_MODELS else image_tokens)]
    if model_class is FlipModel:
        towers = [(outputs.text_model_output, text_tokens), (outputs.vision_model_output, image_tokens)]
    for tower, tokens in towers:
        assert [h.shape for h in tower.hidden_states] == [(3, tokens, 32)] * 3
        assert [a.shape for a in tower.attentions] == [(3, 4, tokens, tokens)] * 2
        for attention in tower.attentions:
            assert torch.allclose(attention.sum(-1), torch.ones(()))
    plain = model(**inputs)
    for name in ("hidden_states", "attentions"):
        assert all(tower.get(name) is None for tower in (plain, plain.get("text_model_output") or plain))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("model_class", [FlipTextModel, FlipVisionModel])
def test_the_last_hidden_state_is_the_last_blocks_as_in_clip(model_class, architecture):
    """Before the last LayerNorm, which Transformers would otherwise put in its place."""
    model = build(model_class, architecture)
    inputs = make_inputs(model_class)
    outputs = model(**inputs, output_hidden_states=True)
    last = outputs.hidden_states[-1]
    if model_class is FlipTextModel:
        assert torch.equal(model.final_layer_norm(last), outputs.last_hidden_state)
    elif architecture in ("flip", "siglip"):
        assert torch.equal(model.post_layernorm(last), outputs.last_hidden_state)
    else:
        assert torch.equal(last, outputs.last_hidden_state)
        pooled = last[:, 0] if architecture == "clip" else last[:, 1:].mean(dim=1)
        assert torch.equal(model.post_layernorm(pooled), outputs.pooler_output)


@pytest.mark.parametrize("model_class", [FlipTextModel, FlipVisionModel])
def test_a_tower_reports_hidden_states_if_configured(model_class):
    model = build(model_class)
    inputs = make_inputs(model_class)
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 3
    assert model(**inputs, output_hidden_states=False).hidden_states is None


@ALL
def test_recorded_states_are_part_of_the_graph(model_class, architecture):
    model = build(model_class, architecture)
    inputs = make_inputs(model_class)
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    towers = [outputs.text_model_output, outputs.vision_model_output] if model_class is FlipModel else [outputs]
    recorded = [tensor for tower in towers for tensor in (tower.hidden_states[0], tower.attentions[0])]
    for tensor in recorded:
        tensor.retain_grad()
    outputs[0].pow(2).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in recorded)


@ALL
def test_evaluation_is_deterministic_and_padding_may_be_left_out(model_class, architecture):
    model = build(model_class, architecture)
    inputs = make_inputs(model_class)
    outputs = model(**inputs)
    assert_same(outputs, model(**inputs))
    if "attention_mask" in inputs:
        inputs.pop("attention_mask")
        without = model(**inputs)
        name = "pooler_output" if model_class is FlipTextModel else "text_embeds"
        assert torch.allclose(without[name], outputs[name], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_any_type_is_understood(dtype):
    model = build(FlipTextModel)
    inputs = make_inputs(FlipTextModel)
    expected = model(**inputs).pooler_output
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    inputs["input_ids"] = inputs["input_ids"].int()
    assert torch.equal(model(**inputs).pooler_output, expected)


def test_without_a_padding_id_nothing_counts_as_padding():
    model = build(FlipTextModel, text={"pad_token_id": None})
    inputs = make_inputs(FlipTextModel)
    whole = torch.ones_like(inputs["input_ids"])
    alone = model(input_ids=inputs["input_ids"]).pooler_output
    assert torch.equal(alone, model(input_ids=inputs["input_ids"], attention_mask=whole).pooler_output)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@ALL
def test_a_batch_equals_its_single_rows(model_class, architecture, attention):
    """In float64, where a batch of another size rounds no differently that one could see."""
    model = build(model_class, architecture).double()
    model.set_attn_implementation(attention)
    inputs = make_inputs(model_class, torch.float64)
    ids_keep = {} if model_class in TEXT_MODELS else {"ids_keep": torch.tensor([[1, 5, 6], [0, 2, 15], [7, 8, 9]])}
    names = ("pooler_output", "text_embeds", "image_embeds", "logits")
    for masked in [{}, ids_keep] if ids_keep else [{}]:
        whole = model(**inputs, **masked)
        for row in range(3):
            single = {name: value[row : row + 1] for name, value in {**inputs, **masked}.items()}
            if "input_ids" in single:  # without its padding
                length = int(single["attention_mask"].sum())
                single |= {name: single[name][:, :length] for name in ("input_ids", "attention_mask")}
            alone = model(**single)
            compared = [name for name in names if whole.get(name) is not None]
            assert compared
            for name in compared:
                assert close(alone[name][0], whole[name][row]), (name, row)


@ALL
def test_attention_implementations_agree(model_class, architecture):
    model = build(model_class, architecture).double()
    inputs = make_inputs(model_class, torch.float64)
    results = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        results[implementation] = model(**inputs)[0 if model_class is not FlipTextModel else "pooler_output"]
    # Eager attention takes its softmax in float32, as Transformers' does.
    assert torch.allclose(results["eager"], results["sdpa"], rtol=1e-5, atol=1e-6)


def test_the_attention_implementation_reaches_both_towers(tmp_path):
    model = build(FlipModel)

    def implementations(model):
        return [
            {layer.self_attn.config._attn_implementation for layer in tower.encoder.layers}
            for tower in (model.text_model, model.vision_model)
        ]

    assert implementations(model) == [{"sdpa"}, {"sdpa"}]
    model.set_attn_implementation("eager")
    assert implementations(model) == [{"eager"}, {"eager"}]
    model.set_attn_implementation({"text_config": "sdpa"})
    assert implementations(model) == [{"sdpa"}, {"eager"}]
    model.save_pretrained(tmp_path)
    for asked, expected in (
        ("eager", ["eager", "eager"]),
        ("sdpa", ["sdpa", "sdpa"]),
        ({"vision_config": "eager"}, ["sdpa", "eager"]),
    ):
        loaded = FlipModel.from_pretrained(tmp_path, attn_implementation=asked)
        assert implementations(loaded) == [{name} for name in expected]
    with pytest.raises(ValueError, match="nonsense"):
        FlipModel.from_pretrained(tmp_path, attn_implementation="nonsense")


@EACH
def test_arguments_that_transformers_may_pass_are_tolerated(model_class):
    model = build(model_class)
    inputs = make_inputs(model_class)
    outputs = model(**inputs)
    if "input_ids" in inputs:
        typed = model(**inputs, token_type_ids=torch.ones_like(inputs["input_ids"]))
        assert_same(outputs, typed)
    assert_same(outputs, model(**inputs, output_attentions=False, num_items_in_batch=3, use_cache=False))


# -- training ---------------------------------------------------------------------------------------------------------


@ALL
def test_a_training_step_reaches_every_parameter(model_class, architecture):
    model = build(model_class, architecture).train()
    training_loss(model, make_inputs(model_class)).backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # CLIP's classifier reads the patch tokens, which with CLIP's and CLIPA's pooling no last LayerNorm touches.
    allowed = {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}
    leaves_norm = model_class is FlipForImageClassification and architecture in ("clip", "clipa")
    # A bias of the keys shifts all scores alike: its gradient is zero up to rounding, or exactly.
    assert {n for n in untouched if not n.endswith("k_proj.bias")} == (allowed if leaves_norm else set())


@pytest.mark.parametrize("reentrant", [True, False])
@ALL
def test_checkpointing_changes_no_gradient(model_class, architecture, reentrant):
    """With dropout and drawn masks: both passes must draw the same."""
    dropout = {"attention_dropout": 0.2}
    model = build(model_class, architecture, text=dropout, vision=dropout).double().train()
    model.set_attn_implementation("eager")
    inputs = make_inputs(model_class, torch.float64)

    def step():
        model.zero_grad()
        torch.manual_seed(1)
        loss = training_loss(model, inputs)
        loss.backward()
        return [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]

    plain = step()
    recompute_activations(model, {"use_reentrant": reentrant})
    calls = []
    for layer in (module for module in model.modules() if type(module).__name__ == "FlipEncoderLayer"):
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(plain, step(), close)
    assert len(calls) == (8 if model_class is FlipModel else 4)  # every block ran twice
    for tensor in plain[1:]:
        assert tensor.isfinite().all()


@pytest.mark.parametrize(
    ("num_labels", "labels", "expected"),
    [
        (3, torch.tensor([0, 2, 1]), "single_label_classification"),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]), "multi_label_classification"),
        (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (2, torch.tensor([[0.5, -1.0], [2.0, 0.0], [1.0, 1.0]]), "regression"),
    ],
)
def test_each_problem_type_has_its_loss(num_labels, labels, expected):
    config = tiny_config(num_labels=num_labels)
    if num_labels == 2:
        config.problem_type = "regression"  # else several floats are several labels
    model = randomize(FlipForImageClassification(config)).eval()
    inputs = make_inputs(FlipForImageClassification)
    outputs = model(**inputs, labels=labels)
    functional = torch.nn.functional
    by_hand = {
        "single_label_classification": lambda: functional.cross_entropy(outputs.logits, labels),
        "multi_label_classification": lambda: functional.binary_cross_entropy_with_logits(outputs.logits, labels),
        "regression": lambda: functional.mse_loss(outputs.logits, labels.view(3, num_labels)),
    }[expected]()
    assert torch.allclose(outputs.loss, by_hand, atol=1e-6)
    assert model.config.problem_type == expected
    assert model(**inputs).loss is None


def test_a_classifier_without_labels_returns_the_mean_patch():
    model = FlipForImageClassification(tiny_config(num_labels=0)).eval()
    inputs = make_inputs(FlipForImageClassification)
    tokens = model.vision_model(**inputs).last_hidden_state
    assert torch.allclose(model(**inputs).logits, tokens[:, 1:].mean(1), atol=1e-6)
