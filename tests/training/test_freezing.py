"""Frozen towers and blocks: what is refused, the gradient of the rest, whole runs, and what they resume from."""

import json

import pytest
import torch
from safetensors.torch import load_file

from flip_hf.console.fields import OptionError
from flip_hf.hub.card import write_card
from flip_hf.training.build import build_trainer
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.freezing import freeze, read_frozen
from flip_hf.training.models import make_config
from flip_hf.training.models import make_model as make_model_of_run
from tests.helpers.arguments import parse
from tests.helpers.contrast import PAIRS, assert_same, backward, make_batch, make_model, take
from tests.helpers.pretraining import SHORT, TINY
from tests.helpers.trainers import DECODER

SAVED = ("--model_name_or_path", "saved")
PARTS = (["image"], ["text"], ["image:1"], ["text:2", "image"], ["image:2", "text:1"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [*SAVED, "--freeze", "vision"],
            "^--freeze takes image, text, or their first blocks as image:8, got 'vision'.$",
        ),
        ([*SAVED, "--freeze", "image:0"], "^--freeze image:0: the number of blocks must be between 1 .*, got 0: leave"),
        ([*SAVED, "--freeze", "text:-2"], "^--freeze text:-2: the number of blocks must be between 1"),
        ([*SAVED, "--freeze", "text:x"], "^--freeze text:x: the number of blocks must be an integer"),
        ([*SAVED, "--freeze", "image", "image:8"], "^--freeze names the image tower twice"),
        ([*SAVED, "--freeze", "image", "text"], "^--freeze image text leaves nothing to train but the temperature"),
        (["--freeze", "image"], "^--freeze image would keep the random weights .* or --init_vision_from, or leave"),
        (["--init_vision_from", "mae", "--freeze", "text"], "^--freeze text would keep the random weights"),
        ([*SAVED, "--freeze", "text", "--objective", "reconstruction"], "^--freeze text and --text_lr_scale are about"),
        ([*SAVED, "--freeze", "image", "--objective", "both"], "^With --freeze image, --objective both would train"),
        ([*SAVED, "--freeze", "text", "--text_lr_scale", "0.1"], "^--text_lr_scale 0.1 is the learning rate of what"),
        ([*SAVED, "--text_lr_scale", "0"], "^--text_lr_scale must be above 0 .*, got 0.0: --freeze keeps a tower"),
    ],
)
def test_what_cannot_be_frozen_is_refused(argv, message):
    with pytest.raises(OptionError, match=message):
        parse("--train_data", "x", "--unmasked_samples", "0", *argv)


@pytest.mark.parametrize("part", ["image:3", "text:3"])
def test_more_blocks_than_there_are_are_refused_before_data_are_opened(part, saved):
    arguments = parse("--train_data", "none", "--model_name_or_path", str(saved), "--freeze", part)
    with pytest.raises(OptionError, match=f"^--freeze {part}: the (image|text) tower has 2 blocks. Give at most so"):
        make_config(arguments.model, arguments.objective)


def frozen_names(parts: list[str]) -> set[str]:
    """The parameters that these parts freeze, of the tiny model, from a list of prefixes."""
    tower = {"image": "vision_model.", "text": "text_model."}
    prefixes = []
    for part in parts:
        name, _, blocks = part.partition(":")
        if blocks:
            prefixes += [f"{tower[name]}embeddings."]
            prefixes += [f"{tower[name]}encoder.layers.{i}." for i in range(int(blocks))]
        else:
            prefixes += [tower[name], "visual_projection." if name == "image" else "text_projection."]
    return {name for name, _ in make_model().named_parameters() if name.startswith(tuple(prefixes))}


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_the_rest_has_the_gradient_that_it_has_with_nothing_frozen(parts, pieces):
    size = PAIRS // pieces
    batches = [take(make_batch(), slice(i * size, (i + 1) * size)) for i in range(pieces)]
    expected_loss, expected = backward(make_model(), batches)
    model = make_model()
    freeze(model, read_frozen(parts))
    loss, gradients = backward(model, batches)
    assert loss == expected_loss
    assert {name for name, gradient in gradients.items() if gradient is None} == frozen_names(parts)
    for name, gradient in gradients.items():
        if gradient is not None:
            assert_same(gradient, expected[name], name)


def kept_numbers(encoder: PairEncoder) -> int:
    """Numbers that the image tower keeps for its backward pass, the weights excepted."""
    weights = {parameter.data_ptr() for parameter in encoder.parameters()}
    kept = []
    pack = kept.append
    batch = make_batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: pack(value) or value, lambda value: value):
        encoder.get_image_features(pixel_values=batch["pixel_values"], ids_keep=batch["ids_keep"])
    return sum(value.numel() for value in kept if value.data_ptr() not in weights)


def test_frozen_parts_keep_no_activations():
    def kept(*parts: str) -> int:
        model = make_model()
        freeze(model, read_frozen(parts))
        return kept_numbers(PairEncoder(model))

    assert kept("image") == 0
    assert 0 < kept("image:2") < kept("image:1") < kept("text")


@pytest.mark.parametrize("objective", ["contrastive", "both"])
def test_frozen_parts_keep_none_where_others_are_recomputed(objective, saved):
    def made(*argv: str) -> PairEncoder:
        options = ["--model_name_or_path", str(saved), "--objective", objective, "--unmasked_samples", "0", *argv]
        arguments = parse("--train_data", "x", "--decoder_config", json.dumps(DECODER), *options)
        config = make_config(arguments.model, arguments.objective)
        return PairEncoder(make_model_of_run(arguments, config, None).double())

    recomputed = "--gradient_checkpointing"
    assert kept_numbers(made(recomputed, "--freeze", "image:2")) == kept_numbers(made("--freeze", "image:2"))
    assert kept_numbers(made(recomputed, "--freeze", "image:1")) < kept_numbers(made(recomputed))
    encoder = made(recomputed, "--freeze", "image:1")
    gradients = {}
    for name, twin in (("recomputed", encoder), ("kept", made("--freeze", "image:1"))):
        batch = make_batch()
        twin.get_image_features(pixel_values=batch["pixel_values"], ids_keep=batch["ids_keep"])[1].sum().backward()
        gradients[name] = twin.flip.vision_model.encoder.layers[1].mlp.fc1.weight.grad
    assert_same(gradients["recomputed"], gradients["kept"], "fc1")


def test_frozen_blocks_have_no_dropout():
    model = make_model(dropout=0.5)
    texts = {name: make_batch()[name] for name in ("input_ids", "attention_mask")}

    def differs(encoder: PairEncoder) -> bool:
        first, second = (encoder.get_text_features(**texts).pooler_output for _ in range(2))
        return not torch.equal(first, second)

    assert differs(PairEncoder(model))
    freeze(model, read_frozen(["text"]))
    encoder = PairEncoder(model)
    assert not differs(encoder)
    encoder.eval()
    encoder.train()  # as after an evaluation
    assert not differs(encoder) and model.vision_model.encoder.layers[0].training


# -- runs --------------------------------------------------------------------------------------------------------------


def run_options(model, data, out, *argv: str) -> list[str]:
    options = [*SHORT, "--unmasked_samples", "0", "--num_workers", "0", "--output_dir", str(out)]
    return ["--train_data", str(data), "--model_name_or_path", str(model), *options, *argv]


@pytest.mark.parametrize(
    ("parts", "argv"),
    [
        (["image"], ["--micro_batch_size", "8", "--ema_half_life", "64"]),
        (["text"], ["--optimizer", "muon", "--layer_decay", "0.8"]),
        (["image:1", "text:2"], ["--gradient_checkpointing"]),
        (["image", "text:2"], ["--optimizer", "muon"]),  # without a matrix for Muon
    ],
)
def test_a_run_leaves_what_is_frozen_as_it_was_and_trains_the_rest(parts, argv, saved, tar_folder, tmp_path, capsys):
    build_trainer(parse(*run_options(saved, tar_folder, tmp_path / "run", "--freeze", *parts, *argv))).run()
    before = load_file(saved / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    parameters = {name for name, _ in make_model().named_parameters()}
    assert {name for name in parameters if torch.equal(before[name], after[name])} == frozen_names(parts)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    moments = {name.split("/")[0] for name in load_file(checkpoint / "optimizer.safetensors")}
    assert moments == parameters - frozen_names(parts)
    assert "Frozen: the " in capsys.readouterr().out
    write_card(tmp_path / "run")
    assert "| not trained | the " in (tmp_path / "run" / "README.md").read_text()


def test_a_run_with_frozen_parts_resumes_to_the_same_bits_and_with_no_others(saved, tar_folder, tmp_path):
    options = ["--freeze", "image:1", "text", "--checkpoint_samples", "64", "--keep_checkpoints", "9"]
    argv = run_options(saved, tar_folder, tmp_path / "run", *options)
    build_trainer(parse(*argv)).run()
    whole = load_file(tmp_path / "run" / "model.safetensors")
    first = str(min((tmp_path / "run").glob("checkpoint-*")))
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "again")
    place = argv.index("image:1")
    argv[place : place + 2] = ["text", "image:1"]  # in any order
    build_trainer(parse(*argv, "--resume_from_checkpoint", first)).run()
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "other")
    argv.remove("text")
    with pytest.raises(ValueError, match="was trained with --freeze image:1 text, not image:1: it has no moments"):
        build_trainer(parse(*argv, "--resume_from_checkpoint", first))


def test_a_new_projection_beside_a_loaded_tower_is_trained(saved, tar_folder, tmp_path, capsys):
    """LiT's setting: a frozen image tower, and a new text tower that learns to read for it."""
    argv = ["--init_vision_from", str(saved), *TINY[2:], *SHORT, "--unmasked_samples", "0", "--num_workers", "0"]
    argv += ["--train_data", str(tar_folder), "--output_dir", str(tmp_path / "run"), "--freeze", "image"]
    trainer = build_trainer(parse(*argv))
    trained = {name.split(".")[0] for name, p in trainer.flip.named_parameters() if p.requires_grad}
    assert trained == {"visual_projection", "text_model", "text_projection", "logit_scale"}
    assert "Frozen: the image tower without its new projection; " in capsys.readouterr().out
    start = trainer.flip.visual_projection.weight.detach().clone()
    trainer.run()
    assert not torch.equal(trainer.flip.visual_projection.weight, start)
    before = load_file(saved / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("vision_model."))


def test_first_blocks_are_frozen_beside_a_reconstruction(saved, tar_folder, tmp_path):
    options = ["--objective", "both", "--decoder_config", json.dumps(DECODER), "--freeze", "image:1"]
    trainer = build_trainer(parse(*run_options(saved, tar_folder, tmp_path / "run", *options, "--grid_samples", "64")))
    block, trained_block = trainer.flip.vision_model.encoder.layers
    trainer.run()
    fixed = "vision_model.encoder.layers.0.mlp.fc1.weight"
    before = load_file(saved / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert torch.equal(before[fixed], after[fixed]) and not block.training
    assert not torch.equal(before[fixed.replace(".0.", ".1.")], after[fixed.replace(".0.", ".1.")])
