"""Fine-tuning: MAE's recipe part by part, and a tower that learns digits."""

import copy
import importlib.util
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, BertConfig

pytest.importorskip("torchvision")

from flip_hf import FlipForImageClassification, FlipVisionModel
from flip_hf.evaluation.finetuning import recipe as finetune_recipe
from flip_hf.evaluation.finetuning.images import eval_transform, make_mixing, train_transform
from flip_hf.evaluation.finetuning.model import HEAD_STD, make_classifier
from flip_hf.evaluation.finetuning.recipe import RECIPES, FineTuneOptions, drop_path, layer_groups
from tests.helpers.finetuning import PLAIN, SHORT, STATISTICS, Stream, data, digits, tune
from tests.helpers.models import randomize, tiny_clip, tiny_config
from tests.helpers.programs import ROOT, run_program


@pytest.fixture
def small() -> FlipForImageClassification:
    """Of 10 classes and images of 16 x 16 pixels in 4 patches."""
    config = tiny_config(vision={"image_size": 16, "patch_size": 8})
    config.num_labels = 10
    config.mask_ratio = 0
    return FlipForImageClassification(config)


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def test_a_tower_learns_digits_and_better_than_its_head_alone(small, tmp_path):
    train = digits(0, 512)
    test = digits(768, 1024)
    options = replace(PLAIN, epochs=4, batch_size=16, base_lr=0.05, crop_area=(0.8, 1), drop_path=0.1, mixup=0.1)
    frozen = copy.deepcopy(small)
    frozen.vision_model.requires_grad_(False)
    tower = copy.deepcopy(frozen.vision_model.state_dict())
    head_alone = tune(frozen, train, test, options)
    assert all(torch.equal(tensor, tower[name]) for name, tensor in frozen.vision_model.state_dict().items())

    result = tune(small, train, test, options)
    assert len(result.accuracies) == 4 and result.top1 == result.accuracies[-1]
    assert result.top1 > 0.6 and result.top1 > head_alone.top1 + 0.2

    # What is left is a stock model: nothing hangs on it, and its folder gives the same accuracy.
    assert not any(module._forward_hooks for module in small.modules()) and "forward" not in vars(small)
    assert not small.training
    small.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    transform = eval_transform(16, options, *STATISTICS.values())
    pixels = torch.stack([transform(image.convert("RGB")) for image, _ in test])
    predicted = loaded(pixel_values=pixels).logits.argmax(dim=1)
    assert (predicted == torch.tensor([label for _, label in test])).float().mean().item() == pytest.approx(result.top1)


def test_two_processes_train_as_one(tmp_path):
    # A CLIP's last LayerNorm has no part in the classifier and gets no gradient.
    tiny_clip(99).save_pretrained(tmp_path / "clip")
    script = f"""
import sys
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
from tests.helpers.finetuning import tune_one_of_two

tune_one_of_two(Path({str(tmp_path)!r}))
"""
    (tmp_path / "run.py").write_text(script)
    done = run_program(tmp_path / "run.py", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    model = make_classifier(tmp_path / "clip", 10)
    start = copy.deepcopy(model.state_dict())
    expected = [tune(model, train, test, SHORT).top1 for train, test in data()]
    moved = torch.cat([(tensor - start[name]).flatten() for name, tensor in model.state_dict().items()])
    expected_labels = [label for _, label in digits(100, 131)]
    for process in range(2):
        found, labels = json.loads((tmp_path / f"found{process}.json").read_text())
        assert labels == [expected_labels[process::2]] * 2  # each once
        assert found == pytest.approx(expected, abs=1 / 31 + 1e-6)
        tuned = load_file(tmp_path / f"tuned{process}.safetensors")
        apart = torch.cat([(tensor - tuned[name]).flatten() for name, tensor in model.state_dict().items()])
        assert apart.norm() < 0.02 * moved.norm()


# ---------------------------------------------------------------------------------------------------------------------
# The recipe
# ---------------------------------------------------------------------------------------------------------------------


def groups_by_name(model, options) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_groups(model, options)
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


def test_every_layer_has_its_learning_rate_and_weight_decay():
    config = tiny_config(
        vision={"num_hidden_layers": 3, "position_embedding_type": "learned", "use_pre_layernorm": True}
    )
    config.num_labels = 10
    model = FlipForImageClassification(config)
    groups = groups_by_name(model, FineTuneOptions(layer_decay=0.5, weight_decay=0.3))
    assert groups.keys() == dict(model.named_parameters()).keys()
    expected = {"vision_model.embeddings": 1 / 16, "vision_model.pre_layernorm": 1 / 16, "classifier": 1}
    expected |= {f"vision_model.encoder.layers.{i}": 0.5 ** (3 - i) for i in range(3)}
    expected |= {"vision_model.post_layernorm": 1}
    for name, group in groups.items():
        (scale,) = (scale for prefix, scale in expected.items() if name.startswith(f"{prefix}."))
        is_matrix = name.endswith("weight") and "norm" not in name and "position" not in name
        assert (group["lr_scale"], group["weight_decay"]) == (scale, 0.3 if is_matrix else 0), name


def test_a_step_moves_each_layer_by_its_own_rate(small):
    before = copy.deepcopy(small)
    options = replace(PLAIN, epochs=1, warmup_epochs=1, base_lr=0.08, layer_decay=0.1, weight_decay=0)
    tune(small, digits(0, 32), digits(32, 64), options)
    old = dict(before.named_parameters())
    moved = {name: (parameter - old[name]).abs().max().item() for name, parameter in small.named_parameters()}
    expected = {"vision_model.embeddings.patch_embedding.weight": 1e-5, "classifier.weight": 1e-2}
    expected |= {f"vision_model.encoder.layers.{i}.mlp.fc1.weight": rate for i, rate in enumerate((1e-4, 1e-3))}
    # AdamW's first step is the learning rate in every direction.
    assert {name: moved[name] for name in expected} == pytest.approx(expected, rel=0.02)


def test_a_seed_repeats_a_run(small):
    options = FineTuneOptions(epochs=1, batch_size=16, warmup_epochs=0, drop_path=0.5, mask_ratio=0.25, num_workers=0)
    runs = []
    for seed in (1, 1, 2):
        model = copy.deepcopy(small)
        tune(model, digits(0, 32), digits(32, 36), replace(options, seed=seed))
        runs.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_layers_are_timms():
    timm_models = pytest.importorskip("timm.models")
    timm_optim = pytest.importorskip("timm.optim")
    config = tiny_config(vision={"num_hidden_layers": 4, "position_embedding_type": "learned"})
    config.num_labels = 10
    ours = groups_by_name(FlipForImageClassification(config), FineTuneOptions(layer_decay=0.7, weight_decay=0.05))
    vit = timm_models.VisionTransformer(32, 8, depth=4, embed_dim=32, num_heads=4, num_classes=10, global_pool="avg")
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    groups = timm_optim.param_groups_layer_decay(vit, 0.05, vit.no_weight_decay(), layer_decay=0.7)
    theirs = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    pairs = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
        **{f"encoder.layers.{i}.self_attn.q_proj.weight": f"blocks.{i}.attn.qkv.weight" for i in range(4)},
        **{f"encoder.layers.{i}.layer_norm2.bias": f"blocks.{i}.norm2.bias" for i in range(4)},
    }
    pairs = {f"vision_model.{name}": theirs for name, theirs in pairs.items()} | {"classifier.weight": "head.weight"}
    for name, their_name in pairs.items():
        for key in ("lr_scale", "weight_decay"):
            assert ours[name][key] == pytest.approx(theirs[their_name][key]), (name, key)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    options = FineTuneOptions(epochs=25, batch_size=512, base_lr=1e-3, warmup_epochs=5, min_lr=1e-6)
    rates = [options.learning_rate(epoch) for epoch in (0, 1, 2.5, 5, 10, 15, 25)]
    cosine = [1e-6 + (2e-3 - 1e-6) * x for x in (1, 0.5 + 0.5**1.5, 0.5, 0)]
    assert rates == pytest.approx([0, 4e-4, 1e-3, *cosine], abs=1e-12)


def test_recipes_are_the_papers():
    paper = {"weight_decay": 0.05, "betas": (0.9, 0.999), "layer_decay": 0.75, "batch_size": 1024, "warmup_epochs": 5}
    paper |= {"rand_augment": 9, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0}
    table = {"mae_b": (1e-3, 100, 0.1), "mae_l": (1e-3, 50, 0.1), "mae_h": (1e-3, 50, 0.2), "flip": (5e-5, 50, 0.2)}
    for name, (base_lr, epochs, rate) in table.items():
        expected = {**paper, "base_lr": base_lr, "epochs": epochs, "drop_path": rate}
        assert {key: getattr(RECIPES[name], key) for key in expected} == expected


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation(config, images):
    config.num_labels = 10
    config.mask_ratio = 0
    model = randomize(FlipForImageClassification(config))
    whole = model.eval()(pixel_values=images).logits
    last = model.vision_model.encoder.layers[-1]
    with drop_path(model, 0.4), torch.no_grad():
        assert torch.equal(model(pixel_values=images).logits, whole)
        assert not torch.allclose(model.train()(pixel_values=images).logits, whole)
        hidden = torch.randn(1, 3, 32)
        added = last.mlp.eval()(hidden)
        many = last.mlp.train()(hidden.expand(4000, -1, -1))
        kept = many.flatten(1).any(dim=1)
        assert torch.allclose(many[kept], added / 0.6, atol=1e-6)
        assert kept.float().mean().item() == pytest.approx(0.6, abs=0.04)  # five standard deviations
        assert torch.allclose(many.mean(dim=0), added[0], atol=0.07 * added.abs().max())
        # Attention has its own; the first block has none.
        attended, _ = last.self_attn.train()(hidden.expand(100, -1, -1))
        assert 0 < attended.flatten(1).any(dim=1).sum() < 100
        first = model.vision_model.encoder.layers[0].train()
        assert torch.equal(first(hidden), first.eval()(hidden))
    assert torch.equal(model.train()(pixel_values=images).logits, whole)


def test_mixed_targets_sum_to_one_and_follow_the_pixels():
    images = torch.eye(4)[:, :, None, None].expand(-1, -1, 8, 8)  # sample i is 1 in channel i
    labels = torch.arange(4)
    seen = set()
    for options in (FineTuneOptions(), FineTuneOptions(mixup=0), FineTuneOptions(cutmix=0)):
        mix = make_mixing(options, num_classes=4)
        for _ in range(10):
            mixed, targets = mix(images, labels)
            assert torch.allclose(targets.sum(dim=1), torch.ones(4))
            assert torch.allclose(mixed.mean(dim=(2, 3)), targets, atol=1e-6)
            is_cut = bool(((mixed == 0) | (mixed == 1)).all())
            seen.add((options.mixup > 0, options.cutmix > 0, is_cut))
    assert seen >= {(True, True, True), (True, True, False), (False, True, True), (True, False, False)}
    assert (True, False, True) not in seen and (False, True, False) not in seen
    unmixed = make_mixing(FineTuneOptions(mixup=0, cutmix=0), 4)(images, labels)
    assert unmixed[0] is images and unmixed[1] is labels


def test_images_are_cut_and_normalised():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    mean = (0.4, 0.5, 0.6)
    std = (0.2, 0.25, 0.3)
    found = eval_transform(224, FineTuneOptions(), mean, std)(image)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 282, 240))
    expected = (np.asarray(resized, dtype=np.float32) / 255 - mean) / std
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < 1e-5
    transform = train_transform(32, FineTuneOptions(), mean, std)
    found = torch.stack([transform(image) for _ in range(40)])
    assert found.shape == (40, 3, 32, 32) and found.dtype == torch.float32
    assert len({tuple(pixels[:, 0, 0].tolist()) for pixels in found}) > 30
    # Grey at the mean stays at nought whatever the crop, except in the noise of random erasing.
    grey = Image.new("RGB", (50, 50), tuple(round(255 * value) for value in mean))
    erase = train_transform(32, replace(PLAIN, random_erasing=0.5), mean, std)
    shares = [(erase(grey).abs() > 0.02).float().mean().item() for _ in range(40)]
    assert 8 < sum(share > 0 for share in shares) < 32 and max(shares) < 0.4


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def test_towers_of_every_folder_arrive(model, images, tmp_path):
    clip = tiny_clip(99)
    clip.save_pretrained(tmp_path / "clip")
    classifier = make_classifier(tmp_path / "clip", 7).eval()
    pixels = torch.randn(2, 3, 48, 48)
    expected = clip.vision_model(pixel_values=pixels).last_hidden_state
    found = classifier.vision_model(pixel_values=pixels).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5) and found.dtype == torch.float32
    weight = classifier.classifier.weight
    assert weight.shape[0] == 7 and 0 < weight.abs().max() < 6 * HEAD_STD and not classifier.classifier.bias.any()
    assert classifier.train().config.mask_ratio == 0 and classifier.config.num_labels == 7

    model.half().save_pretrained(tmp_path / "flip")
    FlipVisionModel.from_pretrained(tmp_path / "flip").save_pretrained(tmp_path / "tower")
    make_classifier(tmp_path / "flip", 3).save_pretrained(tmp_path / "classifier")
    expected = model.float().vision_model(pixel_values=images).last_hidden_state
    for name in ("flip", "tower", "classifier"):
        classifier = make_classifier(tmp_path / name, 10).eval()
        assert torch.allclose(classifier.vision_model(pixel_values=images).last_hidden_state, expected, atol=1e-5)
        assert classifier.classifier.weight.shape == (10, 32)


def test_other_checkpoints_are_refused(model, tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="of type 'bert'. Fine-tuning takes FLIP models and CLIPModels"):
        make_classifier(tmp_path / "bert", 10)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.fc1" not in name}
    model.save_pretrained(tmp_path / "flip", state_dict=weights)
    with pytest.raises(ValueError, match="no complete vision tower: missing .*fc1"):
        make_classifier(tmp_path / "flip", 10)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_it(small):
    small.classifier.bias.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="The loss is nan in step 1 of epoch 1.*Lower base_lr"):
        tune(small, digits(0, 64), digits(64, 96))
    assert not any(module._forward_hooks for module in small.modules())


def test_bad_data_are_named(small):
    good = digits(0, 32)
    file = io.BytesIO()
    good[0][0].save(file, "PNG")
    one = replace(PLAIN, epochs=1, samples_per_epoch=32)
    tune(small, [(file.getvalue(), 3), *good[1:]], good[:5], one)
    with pytest.raises(ValueError, match="Sample 4 has the label 10; the model's are 0 to 9"):
        tune(small, [*good[:4], (good[4][0], 10), *good[5:]], good, one)
    with pytest.raises(ValueError, match="The image of sample 7 cannot be used .not an image."):
        tune(small, Stream([*good[:7], (b"no image", 1), *good[8:]]), good, one)
    with pytest.raises(ValueError, match="31 training samples do not fill a batch of 32"):
        tune(small, good[:31], good)
    with pytest.raises(ValueError, match="no length. Give samples_per_epoch"):
        tune(small, Stream(good), good)
    with pytest.raises(ValueError, match="no test data"):
        tune(small, good, Stream([]), one)


def test_arguments_that_do_not_fit_are_refused(small):
    good = digits(0, 32)
    with pytest.raises(ValueError, match="The weights are torch.bfloat16"):
        tune(copy.deepcopy(small).bfloat16(), good, good)
    small.num_labels = 0
    with pytest.raises(ValueError, match="num_labels=0"):
        tune(small, good, good)
    for options in (
        {"layer_decay": 0},
        {"drop_path": 1},
        {"rand_augment": 11},
        {"batch_size": 0},
        {"flip": float("nan")},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            FineTuneOptions(**options)
    with pytest.raises(ValueError, match="crop_area must be"):
        FineTuneOptions(crop_area=(1, 0.08))


def test_without_torchvision_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    spec = importlib.util.spec_from_file_location("without_torchvision", finetune_recipe.__file__)
    with pytest.raises(ImportError, match=r"pip install flip_hf\[finetune\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
