"""FlipModel's own promises: masking, padding, positions, errors, names. Parity with others is in test_parity.py."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flip_hf import (
    FlipForImageClassification,
    FlipModel,
    FlipTextModel,
    FlipTextModelWithProjection,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)
from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.modeling.resizing_flip import sincos_positions
from flip_hf.training.encoder import recompute_activations
from tests.helpers.conformance import LAYER
from tests.helpers.models import IMAGE_SIZE, NUM_PATCHES, randomize, tiny_config


def embed(model, images, **kwargs):
    return model.get_image_features(images, **kwargs).pooler_output


# -- masking ----------------------------------------------------------------------------------------------------------


def test_training_drops_patches_and_evaluation_does_not(model, images, texts):
    outputs = model(pixel_values=images, **texts)
    assert outputs.ids_keep is None
    assert outputs.vision_model_output.last_hidden_state.shape[1] == 1 + NUM_PATCHES
    model.train()
    outputs = model(pixel_values=images, **texts)
    assert outputs.ids_keep.shape == (3, NUM_PATCHES // 2)
    assert outputs.vision_model_output.last_hidden_state.shape[1] == 1 + NUM_PATCHES // 2


def test_a_call_may_mask_in_evaluation_and_may_not_mask_in_training(model, images):
    assert model.get_image_features(images, mask_ratio=0.75).ids_keep.shape == (3, 4)
    model.train()
    assert model.get_image_features(images, mask_ratio=0).ids_keep is None


def test_every_step_and_sample_has_its_own_mask(model, images):
    model.train()
    first, second = (model.vision_model(images).ids_keep for _ in range(2))
    assert not torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_positions_travel_with_their_patches(model, images):
    """The masked tower equals the whole embedding with the other tokens cut out."""
    ids_keep = torch.tensor([[1, 5, 6], [0, 2, 15], [7, 8, 9]])
    tower = model.vision_model
    whole = tower.embeddings(cut_patches(images, 8))  # (3, 1 + L, D)
    rows = torch.arange(3)[:, None]
    visible = torch.cat([whole[:, :1], whole[rows, 1 + ids_keep]], dim=1)
    expected = tower.post_layernorm(tower.encoder(visible)).mean(dim=1)
    assert torch.allclose(tower(images, ids_keep=ids_keep).pooler_output, expected, atol=1e-6)


def test_all_patches_in_any_order_give_the_unmasked_result(model, images):
    ids_keep = torch.stack([torch.randperm(NUM_PATCHES) for _ in range(3)])
    assert torch.allclose(embed(model, images, ids_keep=ids_keep), embed(model, images), atol=1e-6)


def test_the_callers_mask_is_used_and_returned(model, images, texts):
    ids_keep = torch.tensor([[1, 5, 6], [0, 2, 15], [7, 8, 9]])
    outputs = model.train()(pixel_values=images, ids_keep=ids_keep, **texts)
    assert torch.equal(outputs.ids_keep, ids_keep)
    changed = images.clone()
    changed[0, :, 8:, :8] += 1  # patches 4, 8 and 12 of the first image: not visible
    assert torch.equal(embed(model, changed, ids_keep=ids_keep), embed(model, images, ids_keep=ids_keep))
    changed[0, :, :8, 8:16] += 1  # patch 1: visible
    assert not torch.allclose(embed(model, changed, ids_keep=ids_keep)[0], embed(model, images, ids_keep=ids_keep)[0])


def test_dropped_patches_are_never_projected(model, images):
    """Their pixels may be anything, not-a-number included."""
    ids_keep = torch.tensor([[0, 1]] * 3)
    images[:, :, 8:] = float("nan")
    assert embed(model, images, ids_keep=ids_keep).isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask_ratio": 1.0}, r"in \[0, 1\)"),
        ({"mask_ratio": 0.99}, "keeps none of the 16 patches"),
        ({"ids_keep": torch.zeros(2, 4, dtype=torch.long)}, r"shape \(3, K\)"),
        ({"ids_keep": torch.zeros(3, 4)}, "integer tensor"),
        ({"ids_keep": torch.zeros(3, 17, dtype=torch.long)}, "K <= 16"),
        ({"ids_keep": torch.zeros(3, 4, dtype=torch.long), "mask_ratio": 0.5}, "not both"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(model, images, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.get_image_features(images, **kwargs)


# -- text -------------------------------------------------------------------------------------------------------------

BIDIRECTIONAL = {"pooling_type": "first"}
MEAN = {"pooling_type": "mean"}
CLIP_TEXT = {"causal": True, "pooling_type": "eos", "eos_token_id": 599, "pad_token_id": 599}
OFFICIAL = {"attend_to_padding": True}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("text", [BIDIRECTIONAL, MEAN, CLIP_TEXT, OFFICIAL])
def test_padding_never_changes_a_result(text, attention):
    config = tiny_config(text=text)
    config._attn_implementation = attention
    model = randomize(FlipTextModel._from_config(config.text_config)).eval()
    pad = config.text_config.pad_token_id
    ids = torch.randint(1, 599, (1, 6))
    ids[0, 5] = 599  # the end token, where there is one
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output
    padded = torch.nn.functional.pad(ids, (0, 10), value=pad)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 10))
    assert torch.allclose(model(input_ids=padded, attention_mask=mask).pooler_output, alone, atol=1e-6)
    assert torch.allclose(model(input_ids=padded).pooler_output, alone, atol=1e-6)  # the mask follows from the ids


def test_an_empty_text_has_a_finite_embedding_that_padding_does_not_change(model):
    ids = torch.zeros(1, 3, dtype=torch.long)
    short = model.get_text_features(ids, torch.zeros_like(ids)).pooler_output
    ids = torch.zeros(1, 9, dtype=torch.long)
    assert short.isfinite().all()
    assert torch.allclose(model.get_text_features(ids, torch.zeros_like(ids)).pooler_output, short, atol=1e-6)


def test_bidirectional_text_sees_later_tokens_and_causal_text_does_not():
    ids = torch.tensor([[5, 6, 7]])
    other = torch.tensor([[5, 6, 8]])
    bidirectional = randomize(FlipTextModel(tiny_config().text_config)).eval()
    causal = randomize(FlipTextModel(tiny_config(text={"causal": True}).text_config)).eval()
    assert not torch.allclose(bidirectional(ids).pooler_output, bidirectional(other).pooler_output)
    assert torch.equal(causal(ids).pooler_output, causal(other).pooler_output)  # feature at the first token


@pytest.mark.parametrize("text", [BIDIRECTIONAL, OFFICIAL])
def test_a_text_that_is_too_long_is_refused_with_the_fix(text):
    model = FlipTextModel(tiny_config(text=text).text_config)
    with pytest.raises(ValueError, match="17 tokens, but the model's context is 16 .*truncation=True"):
        model(input_ids=torch.ones(1, 17, dtype=torch.long))


def test_token_type_ids_are_tolerated(model, images, texts):
    plain = model(pixel_values=images, **texts)
    typed = model(pixel_values=images, token_type_ids=torch.zeros_like(texts["input_ids"]), **texts)
    assert torch.equal(plain.logits_per_image, typed.logits_per_image)


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_of_both_directions(model, images, texts):
    outputs = model(pixel_values=images, return_loss=True, **texts)
    cosines = torch.nn.functional.cosine_similarity(outputs.image_embeds[:, None], outputs.text_embeds[None], dim=-1)
    logits = cosines * model.logit_scale.exp()
    by_hand = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    assert torch.allclose(outputs.loss, by_hand, atol=1e-5)
    assert torch.equal(outputs.logits_per_image, outputs.logits_per_text.T)


def test_images_and_texts_may_differ_in_number(model, images, texts):
    assert model(pixel_values=images[:1], **texts).logits_per_image.shape == (1, 3)


def test_features_are_projected_and_unnormalised_pooler_outputs(model, images, texts):
    outputs = model(pixel_values=images, **texts)
    for features, embeds in (
        (model.get_image_features(images), outputs.image_embeds),
        (model.get_text_features(**texts), outputs.text_embeds),
    ):
        assert torch.allclose(torch.nn.functional.normalize(features.pooler_output, dim=-1), embeds, atol=1e-6)
    assert isinstance(model.get_image_features(images, return_dict=False), tuple)


def test_logits_are_float32_under_autocast(model, images, texts):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(pixel_values=images, return_loss=True, **texts)
    assert outputs.logits_per_image.dtype == torch.float32 and outputs.loss.dtype == torch.float32
    whole = model(pixel_values=images, **texts)
    assert torch.allclose(outputs.logits_per_image, whole.logits_per_image, atol=0.3)  # 2e-2 of a scale of 14


def test_temperature_is_clipped_in_the_forward_pass(model, images, texts):
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    assert torch.allclose(model.get_logit_scale(), torch.tensor([100.0]))
    model(pixel_values=images, return_loss=True, **texts).loss.backward()
    assert model.logit_scale.grad.item() == 0 and model.logit_scale.item() == 6.0
    model.config.max_logit_scale = None
    assert torch.allclose(model.get_logit_scale(), torch.tensor([6.0]).exp())


def test_hidden_states_and_attentions_are_recorded(model, images, texts):
    model.set_attn_implementation("eager")
    outputs = model(pixel_values=images, output_hidden_states=True, output_attentions=True, mask_ratio=0.5, **texts)
    vision = outputs.vision_model_output
    text = outputs.text_model_output
    assert [h.shape for h in vision.hidden_states] == [(3, 9, 32)] * 3
    assert [a.shape for a in vision.attentions] == [(3, 4, 9, 9)] * 2
    assert [h.shape for h in text.hidden_states] == [(3, 7, 32)] * 3
    assert torch.allclose(text.attentions[0].sum(-1), torch.ones(3, 4, 7))
    assert (text.attentions[0][0, :, :, 3:] == 0).all()  # the first text has three tokens


@pytest.mark.parametrize("other", ["eager", "flex_attention"])
def test_attention_backends_agree(model, images, texts, other):
    with torch.no_grad():  # on a CPU, flex attention has no backward
        expected = model(pixel_values=images, **texts).logits_per_image
        model.set_attn_implementation(other)
        assert torch.allclose(model(pixel_values=images, **texts).logits_per_image, expected, atol=1e-5)


def test_a_registered_attention_is_reached_from_both_towers(model, images, texts):
    calls = []

    def counting(module, *args, **kwargs):
        calls.append(type(module.config).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("counting", counting)
    model.set_attn_implementation("counting")
    model(pixel_values=images, input_ids=texts["input_ids"])
    assert calls.count("FlipVisionConfig") == calls.count("FlipTextConfig") == 2


def test_gradient_checkpointing_gives_the_same_gradients(model, images, texts):
    ids_keep = torch.tensor([[1, 5, 6], [0, 2, 15], [7, 8, 9]])

    def gradients():
        model.zero_grad()
        model(pixel_values=images, ids_keep=ids_keep, return_loss=True, **texts).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    model.train()
    plain = gradients()
    recompute_activations(model)
    assert model.vision_model.encoder.gradient_checkpointing and model.text_model.encoder.gradient_checkpointing
    for name, gradient in gradients().items():
        assert torch.allclose(gradient, plain[name], atol=1e-6), name


def test_larger_images_need_interpolated_positions(model):
    images = torch.randn(2, 3, 48, 40)
    with pytest.raises(ValueError, match=r"48\*40.*interpolate_pos_encoding=True"):
        model.vision_model(images)
    outputs = model.vision_model(images, interpolate_pos_encoding=True)
    assert outputs.last_hidden_state.shape[1] == 1 + 6 * 5
    same = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    plain = model.vision_model(same).pooler_output
    assert torch.equal(model.vision_model(same, interpolate_pos_encoding=True).pooler_output, plain)


@pytest.mark.parametrize("model_class", [FlipModel, FlipVisionModel, FlipVisionModelWithProjection])
@pytest.mark.parametrize("positions", ["sincos2d", "learned"])
def test_positions_can_be_resized_for_larger_images(model_class, positions, tmp_path):
    config = tiny_config(vision={"position_embedding_type": positions})
    model = randomize(model_class(config if model_class is FlipModel else config.vision_config)).eval()
    tower = getattr(model, "vision_model", model)
    images = torch.randn(2, 3, 48, 48)
    interpolated = tower(images, interpolate_pos_encoding=True).pooler_output
    model.resize_position_embeddings(6 * 6 + 1)
    resized = tower(images).pooler_output
    if positions == "learned":
        assert torch.equal(resized, interpolated)
    else:
        assert torch.equal(model.get_position_embeddings().weight, sincos_positions(6, 32))
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert torch.equal(getattr(again, "vision_model", again)(images).pooler_output, resized)
    assert tower.config.image_size == 48 and tower(images, mask_ratio=0.5).ids_keep.shape == (2, 18)


def test_positions_that_are_no_square_are_refused(model):
    with pytest.raises(ValueError, match="36 is not the number of positions"):
        model.resize_position_embeddings(36)
    with pytest.raises(NotImplementedError, match="FlipTextModel has no vision tower"):
        model.text_model.resize_position_embeddings(37)


def test_images_of_a_wrong_shape_are_refused(model):
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\)"):
        model.get_image_features(torch.randn(2, 1, IMAGE_SIZE, IMAGE_SIZE))


# -- parameters -------------------------------------------------------------------------------------------------------


def test_the_sincos_table_is_not_trained_and_all_else_is(model, images, texts):
    model.train()(pixel_values=images, return_loss=True, **texts).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    trained = {name for name, _ in model.named_parameters()}
    assert set(model.state_dict()) - trained == {"vision_model.embeddings.position_embedding.weight"}


def test_everything_is_initialised_when_weights_are_missing(tmp_path, config):
    """Built on the meta device, a parameter that nobody initialises would hold whatever memory held."""
    FlipVisionModel(config.vision_config).save_pretrained(tmp_path)
    model = FlipModel.from_pretrained(tmp_path, config=config)
    fresh = FlipModel(config)
    assert model.logit_scale.item() == pytest.approx(config.logit_scale_init_value)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.numel() > 1:
            assert parameter.std().item() == pytest.approx(fresh.get_parameter(name).std().item(), abs=0.05), name


def test_initial_bounds_are_the_official_ones():
    config = tiny_config(vision={"hidden_size": 64, "intermediate_size": 256})
    model = FlipModel(config)
    assert model.visual_projection.weight.abs().max().item() == pytest.approx((6 / 88) ** 0.5, rel=0.02)
    assert model.text_model.embeddings.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    layer = model.vision_model.encoder.layers[0]
    assert layer.self_attn.q_proj.weight.abs().max().item() == pytest.approx((1.5 / 64) ** 0.5, rel=0.01)
    assert layer.self_attn.out_proj.weight.abs().max().item() == pytest.approx((3 / 64) ** 0.5, rel=0.01)
    assert layer.mlp.fc1.weight.abs().max().item() == pytest.approx((6 / 320) ** 0.5, rel=0.01)
    assert all((layer.get_parameter(name) == 0).all() for name in ("mlp.fc1.bias", "self_attn.k_proj.bias"))


def golden_names(pre_layernorm: bool) -> set[str]:
    """Parameter names are for ever: they are what a published checkpoint is read by."""
    text = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    text += [f"encoder.{name}" for name in LAYER] + ["final_layer_norm.weight", "final_layer_norm.bias"]
    vision = ["embeddings.class_embedding", "embeddings.patch_embedding.weight"]
    vision += ["embeddings.position_embedding.weight", "post_layernorm.weight", "post_layernorm.bias"]
    vision += [f"encoder.{name}" for name in LAYER]
    vision += ["pre_layernorm.weight", "pre_layernorm.bias"] if pre_layernorm else ["embeddings.patch_embedding.bias"]
    names = {f"text_model.{name}" for name in text} | {f"vision_model.{name}" for name in vision}
    return names | {"text_projection.weight", "visual_projection.weight", "logit_scale"}


@pytest.mark.parametrize("clip", [False, True])
def test_parameter_names_are_the_golden_ones(clip):
    one = {"num_hidden_layers": 1}
    vision = {**one, "use_pre_layernorm": clip, "patch_embedding_bias": not clip}
    assert set(FlipModel(tiny_config(text=one, vision=vision)).state_dict()) == golden_names(clip)


def test_no_parameter_is_without_dimensions(model):
    assert all(parameter.ndim > 0 for parameter in model.parameters())  # FSDP2 refuses them


# -- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_class",
    [FlipTextModel, FlipVisionModel, FlipTextModelWithProjection, FlipVisionModelWithProjection],
)
def test_a_tower_loads_from_a_full_checkpoint(model_class, model, images, texts, tmp_path):
    model.save_pretrained(tmp_path)
    tower, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    is_text = "Text" in model_class.__name__
    outputs = tower(**texts) if is_text else tower(pixel_values=images)
    whole = model(pixel_values=images, **texts)
    expected = whole.text_model_output if is_text else whole.vision_model_output
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    if "Projection" in model_class.__name__:
        embeds = outputs.text_embeds if is_text else outputs.image_embeds
        assert torch.equal(embeds, expected.pooler_output)


@pytest.mark.parametrize("model_class", [FlipModel, FlipForImageClassification])
def test_a_model_is_the_same_after_saving(model_class, images, texts, tmp_path):
    model = randomize(model_class(tiny_config())).eval()
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert not loaded.training
    inputs = {"pixel_values": images, **(texts if model_class is FlipModel else {})}
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}


def test_mask_ratio_can_be_chosen_in_loading(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = FlipModel.from_pretrained(tmp_path, mask_ratio=0.75).train()
    assert loaded.get_image_features(images).ids_keep.shape == (3, 4)


def test_classification_masks_in_training_and_learns(images):
    model = FlipForImageClassification(tiny_config(num_labels=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(pixel_values=images, labels=torch.tensor([0, 1, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
