"""Models as compiled, exported and ONNX programs: the same numbers, no graph break, batches of other sizes."""

import os
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from flip_hf import (
    FlipForImageClassification,
    FlipModel,
    FlipTextModel,
    FlipTextModelWithProjection,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)
from flip_hf.training.encoder import recompute_activations
from tests.helpers.conformance import ARCHITECTURES, assert_same, build, make_inputs

ONE = {"text": {"num_hidden_layers": 1}, "vision": {"num_hidden_layers": 1}}  # compilers are slow
IDS_KEEP = torch.tensor([[1, 5, 6], [0, 2, 15], [7, 8, 9]])
PROJECTED = [FlipTextModelWithProjection, FlipVisionModelWithProjection]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def compiled(model, backend: str = "aot_eager"):
    """Compiled for the shapes met; a graph break is an error."""
    return torch.compile(model, fullgraph=True, dynamic=False, backend=backend)


def near(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-5, atol=1e-5)


def five_rows(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The three samples, and the first two again."""
    return {name: torch.cat([value, value[:2]]) for name, value in inputs.items()}


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [FlipModel, FlipForImageClassification])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_compiled_model_gives_the_same_output(model_class, architecture):
    model = build(model_class, architecture, **ONE)
    inputs = make_inputs(model_class)
    program = compiled(model)
    with torch.no_grad():
        assert_same(model(**inputs), program(**inputs), near)
        program(**inputs)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_compiled_masked_step_has_the_same_gradients(architecture):
    model = build(FlipModel, architecture, **ONE).train()
    inputs = make_inputs(FlipModel)

    def step(call):
        model.zero_grad()
        loss = call(**inputs, ids_keep=IDS_KEEP, return_loss=True).loss
        loss.backward()
        return [loss.detach(), *[p.grad.clone() for p in model.parameters()]]

    assert_same(step(model), step(compiled(model)), near)


def test_compiled_training_draws_new_masks_without_compiling_again():
    model = build(FlipModel, **ONE).train()
    inputs = make_inputs(FlipModel)
    program = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    masks = []
    for _ in range(3):
        outputs = program(**inputs, return_loss=True)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append(outputs.ids_keep)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert all(mask.shape == (3, 8) and (mask.diff(dim=1) > 0).all() for mask in masks)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    again = model(**inputs, ids_keep=masks[0])
    assert again.vision_model_output.last_hidden_state.shape == outputs.vision_model_output.last_hidden_state.shape


@pytest.mark.long
def test_compiled_training_takes_batches_of_other_sizes():
    """The default setting: the second size makes the program dynamic, the third is new to nobody."""
    model = build(FlipModel, **ONE).train()
    inputs = make_inputs(FlipModel)
    program = torch.compile(model, fullgraph=True, backend="aot_eager")
    for case in (inputs, {name: value[:2] for name, value in inputs.items()}, five_rows(inputs)):
        outputs = program(**case, return_loss=True)
        expected = model(**case, ids_keep=outputs.ids_keep, return_loss=True)
        assert near(outputs.loss, expected.loss)
        outputs.loss.backward()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_checkpointing_compiles():
    model = build(FlipVisionModelWithProjection).train()
    inputs = make_inputs(FlipVisionModelWithProjection)

    def step(call):
        model.zero_grad()
        loss = call(**inputs, ids_keep=IDS_KEEP).image_embeds.pow(2).sum()
        loss.backward()
        return [loss.detach(), *[p.grad.clone() for p in model.parameters()]]

    plain = step(model)
    recompute_activations(model, {"use_reentrant": False})
    assert_same(plain, step(compiled(model)), near)


@pytest.mark.long
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_generated_kernels_give_the_same_output():
    """The default backend, once: it is slow to build, so one block and one tower."""
    model = build(FlipVisionModel, **ONE)
    inputs = make_inputs(FlipVisionModel)
    with torch.no_grad():
        expected = model(**inputs, ids_keep=IDS_KEEP)
        assert_same(expected, compiled(model, "inductor")(**inputs, ids_keep=IDS_KEEP), near)


# -- torch.export -----------------------------------------------------------------------------------------------------


def dynamic_shapes(inputs: dict[str, torch.Tensor]) -> dict:
    """Any number of samples, and texts of any length up to the context."""
    batch = {name: torch.export.Dim("images" if name == "pixel_values" else "texts") for name in inputs}
    tokens = torch.export.Dim("tokens", max=16)
    return {name: {0: batch[name]} if name == "pixel_values" else {0: batch[name], 1: tokens} for name in inputs}


@pytest.mark.parametrize("model_class", [FlipModel, FlipTextModel, FlipVisionModel, *PROJECTED])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exported_model_takes_other_sizes(model_class, architecture):
    model = build(model_class, architecture, **ONE)
    inputs = make_inputs(model_class)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes(inputs)).module()
    shorter = {name: value if name == "pixel_values" else value[:1, :6] for name, value in inputs.items()}
    with torch.no_grad():
        for case in (inputs, five_rows(inputs), shorter):
            assert_same(model(**case), program(**case), near)


def test_a_text_tower_exports_without_an_attention_mask():
    """The padding is then found inside the program."""
    model = build(FlipTextModelWithProjection)
    inputs = {"input_ids": make_inputs(FlipTextModelWithProjection)["input_ids"]}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes(inputs)).module()
    for case in (inputs, five_rows(inputs)):
        assert_same(model(**case), program(**case), near)


def test_a_masked_tower_exports_with_the_mask_as_an_input():
    model = build(FlipVisionModelWithProjection)
    inputs = {**make_inputs(FlipVisionModelWithProjection), "ids_keep": IDS_KEEP}
    batch = torch.export.Dim("images")
    kept = torch.export.Dim("kept", max=16)
    shapes = {"pixel_values": {0: batch}, "ids_keep": {0: batch, 1: kept}}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for case in (inputs, five_rows(inputs), {**inputs, "ids_keep": IDS_KEEP[:, :2]}):
        assert_same(model(**case), program(**case), near)


# -- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "architecture", "text"),
    [
        (FlipTextModelWithProjection, "clip", {}),
        (FlipVisionModelWithProjection, "flip", {}),
        # Each takes the exporter ten seconds; torch.export alone is tested of every class and architecture above.
        pytest.param(FlipTextModelWithProjection, "flip", {}, marks=pytest.mark.long),
        pytest.param(FlipVisionModelWithProjection, "clip", {}, marks=pytest.mark.long),
        # The position of the largest id does not depend on the attention mask: both differences in one program.
        *[
            pytest.param(FlipTextModelWithProjection, "flip", text, marks=pytest.mark.long)
            for text in ({"pooling_type": "argmax", "attend_to_padding": True}, {"pooling_type": "mean"})
        ],
    ],
)
def test_an_onnx_tower_gives_the_same_output(model_class, architecture, text, tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    one = {**ONE, "text": {**ONE["text"], **text}}
    model = build(model_class, architecture, **one)
    inputs = make_inputs(model_class)
    path = tmp_path / "tower.onnx"
    torch.onnx.export(model, (), kwargs=inputs, dynamo=True, dynamic_shapes=dynamic_shapes(inputs), verbose=False).save(
        path
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {entry.name for entry in session.get_inputs()} == set(inputs)
    shorter = {name: value if name == "pixel_values" else value[:1, :6] for name, value in inputs.items()}
    for case in (inputs, five_rows(inputs), shorter):
        embeds = session.run(None, {name: value.numpy() for name, value in case.items()})[0]
        with torch.no_grad():
            assert near(model(**case)[0], torch.from_numpy(embeds))
