"""Transformers' expectations of saving, loading, pipelines and processors, for FLIP's and CLIP's shapes.

In the spirit of Transformers' own mixins, which are not shipped. What is FLIP's own is in test_flip_model.py.
"""

import copy
import inspect

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.initialization import no_init_weights

from flip_hf import (
    FlipForImageClassification,
    FlipModel,
    FlipTextModel,
    FlipTextModelWithProjection,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)
from tests.helpers.conformance import (
    ALL,
    ARCHITECTURES,
    EACH,
    LAYER,
    MODELS,
    assert_same,
    build,
    fields_of,
    make_inputs,
    part_for,
    training_loss,
)
from tests.helpers.models import IMAGE_SIZE, tiny_config

# -- saving and loading -----------------------------------------------------------------------------------------------


def load(model_class, folder, **kwargs):
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    return model, {key: set(value) for key, value in report.items() if isinstance(value, (set, list, dict)) and value}


@ALL
def test_a_saved_model_loads_without_a_word_and_is_the_same(model_class, architecture, tmp_path, warnings_logged):
    model = build(model_class, architecture)
    inputs = make_inputs(model_class)
    model.save_pretrained(tmp_path)
    loaded, report = load(model_class, tmp_path)
    assert report == {} and warnings_logged == []
    assert fields_of(loaded.config) == fields_of(model.config)
    ours = model.state_dict()
    theirs = loaded.state_dict()
    assert set(ours) == set(theirs) == set(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_same(model(**inputs), loaded(**inputs))
    again = model_class.from_pretrained(None, config=model.config, state_dict=ours).eval()
    assert_same(model(**inputs), again(**inputs))


def test_shards_are_read_like_one_file(tmp_path):
    model = build(FlipModel)
    inputs = make_inputs(FlipModel)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded, report = load(FlipModel, tmp_path)
    assert report == {}
    assert_same(model(**inputs), loaded(**inputs))


TOWER = {
    FlipTextModel: ("text_model", set()),
    FlipTextModelWithProjection: ("text_model", set()),
    FlipVisionModel: ("vision_model", set()),
    FlipVisionModelWithProjection: ("vision_model", set()),
    FlipForImageClassification: ("vision_model", {"classifier.weight", "classifier.bias"}),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("model_class", TOWER)
def test_a_part_loads_from_the_whole_checkpoint(model_class, architecture, tmp_path):
    whole = build(FlipModel, architecture)
    whole.save_pretrained(tmp_path)
    part, report = load(model_class, tmp_path)
    prefix, missing = TOWER[model_class]
    assert report == ({"missing_keys": missing} if missing else {})  # and nothing unexpected
    ours = part.state_dict()
    for name, tensor in whole.state_dict().items():
        short = name.removeprefix(prefix + ".")
        if name in ours or (name.startswith(prefix) and short in ours):
            assert torch.equal(tensor, ours.pop(name, None) if name in ours else ours.pop(short)), name
    assert set(ours) == missing


@pytest.mark.parametrize("model_class", [c for c in MODELS if c not in (FlipTextModel, FlipVisionModel)])
def test_weights_that_a_model_has_no_place_for_are_reported(model_class, tmp_path):
    """A deeper checkpoint, or one with biases, must not load into a smaller model without a word."""
    deeper = {"num_hidden_layers": 3}
    build(FlipModel, text=deeper, vision=deeper, projection_bias=True).save_pretrained(tmp_path)
    _, report = load(model_class, tmp_path, config=build(model_class).config)
    parts = dict(build(model_class).named_children())
    third = [name.replace("layers.0", "layers.2") for name in LAYER]
    blocks = {f"{part}.encoder.{name}" for part in parts if part.endswith("_model") for name in third}
    assert report["unexpected_keys"] == blocks | {f"{part}.bias" for part in parts if part.endswith("_projection")}


@pytest.mark.parametrize(
    ("tower_class", "model_class", "missing"),
    [
        (FlipTextModel, FlipTextModelWithProjection, "text_projection.weight"),
        (FlipVisionModel, FlipVisionModelWithProjection, "visual_projection.weight"),
    ],
)
def test_a_bare_tower_and_its_projection_read_each_other(tower_class, model_class, missing, tmp_path):
    tower = build(tower_class)
    tower.save_pretrained(tmp_path / "tower")
    model, report = load(model_class, tmp_path / "tower")
    assert report == {"missing_keys": {missing}}
    inputs = make_inputs(tower_class)
    assert torch.equal(model(**inputs).last_hidden_state, tower(**inputs).last_hidden_state)
    model.save_pretrained(tmp_path / "model")
    again, report = load(tower_class, tmp_path / "model")
    assert report == {}
    assert_same(again(**inputs), tower(**inputs))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_classifier_begins_with_a_bare_tower(architecture, tmp_path, warnings_logged):
    tower = build(FlipVisionModel, architecture)
    tower.save_pretrained(tmp_path / "tower")
    model, report = load(FlipForImageClassification, tmp_path / "tower", num_labels=5, mask_ratio=0.25)
    assert report == {"missing_keys": {"classifier.weight", "classifier.bias"}}
    assert [message for message in warnings_logged if "LOAD REPORT" not in message] == []
    assert model.classifier.out_features == 5 and model.config.mask_ratio == 0.25
    inputs = make_inputs(FlipVisionModel)
    ours = model.vision_model(**inputs).to_tuple()
    expected = tower(**inputs).to_tuple()
    compared = 1 if architecture == "siglip" else len(expected)  # a classifier leaves its pooling out
    assert_same(ours[:compared], expected[:compared])
    model.save_pretrained(tmp_path / "again")
    again, report = load(FlipForImageClassification, tmp_path / "again")
    assert report == {} and fields_of(again.config) == fields_of(model.config)
    assert_same(again(**inputs), model(**inputs))


def test_a_classifier_that_begins_with_a_tower_has_its_dtype(tmp_path):
    build(FlipVisionModel).bfloat16().save_pretrained(tmp_path)
    model = FlipForImageClassification.from_pretrained(tmp_path)
    assert model.dtype == model.config.dtype == torch.bfloat16


@pytest.mark.parametrize("tower_class", [FlipTextModel, FlipVisionModel])
def test_a_bare_tower_reads_a_classifiers_or_refuses_by_name(tower_class, tmp_path):
    classifier = build(FlipForImageClassification)
    classifier.save_pretrained(tmp_path)
    tower, report = load(tower_class, tmp_path)
    if tower_class is FlipVisionModel:
        assert report == {}
        inputs = make_inputs(tower_class)
        assert_same(tower(**inputs), classifier.vision_model(**inputs))
    else:
        assert report["missing_keys"] == set(tower.state_dict())  # there is no text tower in it


CONSTANT = ("bias", "norm1.weight", "norm2.weight", "layernorm.weight", "layer_norm.weight", "logit_scale")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_single_tensor_may_be_missing(architecture, tmp_path):
    """It is reported and initialised as in a new model, and no other tensor is touched."""
    model = build(FlipModel, architecture)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    fresh = FlipModel(model.config).state_dict()
    for name in saved:
        save_file({k: v for k, v in saved.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
        loaded, report = load(FlipModel, tmp_path)
        assert report == {"missing_keys": {name}}
        tensors = loaded.state_dict()
        changed = [k for k in saved if not torch.equal(saved[k], tensors[k])]
        is_table = name == "vision_model.embeddings.position_embedding.weight" and architecture == "flip"
        assert changed == ([] if is_table else [name])
        if is_table or name.endswith(CONSTANT):
            assert torch.equal(tensors[name], fresh[name]), name
        else:
            ratio = tensors[name].std() / fresh[name].std()
            assert 0.6 < ratio < 1.6, (name, ratio)


@ALL
def test_a_model_built_without_memory_is_initialised_whole(model_class, architecture):
    """Parameters and buffers, also those that are not saved: after to_empty they hold anything."""
    config = part_for(model_class, tiny_config(**ARCHITECTURES[architecture], num_labels=3))
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for tensor in (*model.parameters(), *buffers.values()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    expected = dict(model_class(config).named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert model.eval()(**make_inputs(model_class))[0].isfinite().all()


@ALL
def test_a_model_built_without_initialisation_has_its_fixed_tables(model_class, architecture):
    """Values that are not random are right even without `init_weights`, which other ways of loading may skip."""
    config = part_for(model_class, tiny_config(**ARCHITECTURES[architecture], num_labels=3))
    expected = dict(model_class(config).named_buffers())
    with no_init_weights():
        model = model_class(config)
    assert {name for name, _ in model.named_buffers()} == expected.keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


def test_another_number_of_labels_is_refused_unless_it_may_differ(tmp_path):
    model = build(FlipForImageClassification)
    model.save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match="size"):
        FlipForImageClassification.from_pretrained(tmp_path, num_labels=7)
    loaded, report = load(FlipForImageClassification, tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert {entry[0] for entry in report["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    inputs = make_inputs(FlipForImageClassification)
    logits = loaded(**inputs).logits
    assert logits.shape == (3, 7) and logits.isfinite().all()
    assert_same(loaded.vision_model(**inputs), model.vision_model(**inputs))
    assert len(loaded.config.id2label) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto", None])
@EACH
def test_a_dtype_can_be_chosen_in_loading(model_class, dtype, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, **({} if dtype is None else {"dtype": dtype}))
    expected = {"bfloat16": torch.bfloat16, "auto": torch.float32, None: torch.float32}.get(dtype, dtype)
    assert loaded.dtype == loaded.config.dtype == expected
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(expected)), name
    output = loaded(**make_inputs(model_class, expected))[0]
    assert output.isfinite().all()
    assert output.dtype == (torch.float32 if model_class is FlipModel else expected)  # logits stay float32
    loaded.save_pretrained(tmp_path / "again")
    assert model_class.from_pretrained(tmp_path / "again").dtype == expected  # as saved


@pytest.mark.parametrize("mode", ["eval", "train"])
@EACH
def test_a_low_precision_model_takes_float32_images(model_class, mode):
    """As image processors make them; CLIP casts them too."""
    model = getattr(build(model_class).bfloat16(), mode)()
    loss = training_loss(model, make_inputs(model_class))
    assert loss.isfinite()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_is_followed(device_map, tmp_path):
    if device_map == "auto":
        pytest.importorskip("accelerate")
    model = build(FlipModel)
    inputs = make_inputs(FlipModel)
    expected = model(**inputs).logits_per_image
    model.save_pretrained(tmp_path)
    loaded = FlipModel.from_pretrained(tmp_path, device_map=device_map)
    inputs = {name: value.to(loaded.device) for name, value in inputs.items()}  # "auto" finds an accelerator
    assert torch.allclose(loaded(**inputs).logits_per_image.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_a_tower_may_lie_on_disk(tmp_path):
    """accelerate then brings each module's own weights when its forward is called, and only then."""
    pytest.importorskip("accelerate")
    model = build(FlipModel)
    inputs = make_inputs(FlipModel)
    model.save_pretrained(tmp_path)
    device_map = {"text_model": "cpu", "text_projection": "cpu", "logit_scale": "cpu"}
    device_map |= {"vision_model": "disk", "visual_projection": "disk"}
    loaded = FlipModel.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.vision_model.embeddings.class_embedding.device.type == "meta"
    with torch.no_grad():
        assert_same(model(**inputs), loaded(**inputs))


@pytest.mark.parametrize("model_class", [FlipModel, FlipTextModel, FlipVisionModel])
def test_auto_model_builds_from_each_config(model_class):
    config = build(model_class).config
    model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    assert type(model) is model_class
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    layers = [module for module in model.modules() if type(module).__name__ == "FlipAttention"]
    assert {layer.config._attn_implementation for layer in layers} == {"eager"}


@EACH
def test_a_copied_or_rearranged_model_gives_the_same_output(model_class, tmp_path):
    """Averages of weights are deep copies; channels_last changes the strides of images and of the patch weights."""
    model = build(model_class)
    inputs = make_inputs(model_class)
    expected = model(**inputs)
    assert_same(copy.deepcopy(model)(**inputs), expected)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    assert_same(model(**inputs), expected, lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6))
    model.save_pretrained(tmp_path)
    assert_same(model_class.from_pretrained(tmp_path)(**inputs), model(**inputs))


def test_fully_sharded_training_takes_the_model():
    """One process: what FSDP2 asks of parameters and modules, not its arithmetic."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_available() or not dist.is_gloo_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed with gloo, not yet initialised")
    model = build(FlipModel).eval()
    inputs = make_inputs(FlipModel)
    expected = training_loss(model, inputs).item()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for tower in (model.text_model, model.vision_model):
            for layer in tower.encoder.layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = training_loss(model, inputs)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


# -- pipelines and processor ------------------------------------------------------------------------------------------


def test_the_text_tower_answers_the_feature_pipeline(tokenizer, tmp_path):
    model = build(FlipTextModel)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["a red circle", "a star"]
    features = pipeline("feature-extraction", model=str(tmp_path))(texts, batch_size=2)
    for text, feature in zip(texts, features, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        assert torch.allclose(torch.tensor(feature)[:, : expected.shape[1]], expected, atol=1e-5)


def test_zero_shot_answers_do_not_depend_on_the_batch(saved):
    classify = pipeline("zero-shot-image-classification", model=str(saved))
    images = [Image.fromarray(p.numpy()) for p in torch.randint(0, 256, (3, 40, 56, 3), dtype=torch.uint8)]
    labels = ["red circle", "large striped blue star"]

    def scores(answer):
        return {entry["label"]: entry["score"] for entry in answer}

    batched = [scores(answer) for answer in classify(images, candidate_labels=labels, batch_size=2)]
    for image, answer in zip(images, batched, strict=True):
        assert answer == pytest.approx(scores(classify(image, candidate_labels=labels)), abs=1e-6)


def test_a_processor_has_the_usual_parts_and_names(processor, tmp_path):
    assert processor.get_attributes() == ["image_processor", "tokenizer"]
    assert set(processor.model_input_names) == {"pixel_values", "input_ids", "attention_mask"}
    accepted = inspect.signature(FlipModel.forward).parameters
    assert set(processor.model_input_names) <= set(accepted)
    processor.save_pretrained(tmp_path)
    assert str(tmp_path) not in (tmp_path / "processor_config.json").read_text()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    for name in ("size", "crop_size", "image_mean", "image_std", "resample", "do_center_crop"):
        ours = getattr(processor.image_processor, name)
        theirs = getattr(loaded.image_processor, name)
        assert dict(ours) == dict(theirs) if hasattr(ours, "keys") else list_of(ours) == list_of(theirs), name
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.tokenizer.model_max_length == processor.tokenizer.model_max_length


def list_of(value):
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


@pytest.fixture
def picture():
    return torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8).permute(1, 2, 0).numpy()


def test_options_reach_the_part_they_are_meant_for_flat_or_nested(processor, picture):
    texts = ["a red circle", "a star"]
    for options in (
        {"padding": "max_length", "max_length": 9, "size": {"shortest_edge": 16}, "do_center_crop": False},
        {
            "text_kwargs": {"padding": "max_length", "max_length": 9},
            "images_kwargs": {"size": {"shortest_edge": 16}, "do_center_crop": False},
        },
    ):
        inputs = processor(images=picture, text=texts, return_tensors="pt", **options)
        assert inputs.input_ids.shape == (2, 9)
        assert inputs.pixel_values.shape[0] == 1 and min(inputs.pixel_values.shape[2:]) == 16
    assert [len(ids) for ids in processor(text=texts, padding=False).input_ids] == [3, 2]  # a default, overridden


def test_a_processor_batches_converts_and_decodes(processor, picture):
    inputs = processor(images=[picture, picture], text=["a red circle", "a star"], return_tensors="np")
    assert inputs.pixel_values.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert processor.batch_decode(inputs.input_ids, skip_special_tokens=True) == ["a red circle", "a star"]
    positional = processor(picture, "a star", return_tensors="pt").to("cpu", torch.float16)
    assert positional.pixel_values.dtype == torch.float16 and positional.input_ids.dtype == torch.int64
    with pytest.raises(ValueError):
        processor()
