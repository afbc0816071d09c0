"""Runs with the sigmoid loss: the models that they start with, what they learn and log, and how they resume."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flip_hf import FlipForPreTraining, FlipModel
from flip_hf.console.fields import OptionError
from flip_hf.hub.card import write_card
from flip_hf.planning.plan import make_run
from flip_hf.training.build import build_trainer
from flip_hf.training.models import make_config, make_model
from tests.helpers.arguments import parse
from tests.helpers.clip_folder import make_clip_folder
from tests.helpers.logs import logged
from tests.helpers.models import tiny_config
from tests.helpers.pairs import write_tar
from tests.helpers.pretraining import SHORT, TINY, pretrain
from tests.helpers.trainers import DECODER

SIGMOID = ("--loss", "sigmoid")
RUN = [*SHORT, "--num_workers", "0", "--unmasked_samples", "0", "--holdout", "0.2"]


def start(*argv: object) -> FlipModel | FlipForPreTraining:
    arguments = parse("--train_data", "x", *map(str, argv))
    return make_model(arguments, make_config(arguments.model, arguments.objective), None)


@pytest.fixture(scope="module")
def sigmoid_run(samples, tmp_path_factory) -> tuple[list[str], Path, str]:
    """A run with the sigmoid loss: its arguments, its folder, what it printed. Tests only read it."""
    folder = tmp_path_factory.mktemp("sigmoid") / "run"
    write_tar(folder.parent / "data.tar", samples)
    argv = ["--train_data", str(folder.parent / "data.tar"), *TINY, *RUN, *SIGMOID, "--micro_batch_size", "16"]
    argv += ["--checkpoint_samples", "96", "--keep_checkpoints", "3"]
    run = pretrain(*argv, "--output_dir", str(folder))
    assert run.returncode == 0, run.stderr[-3000:]
    return argv, folder, run.stdout


# -- the model ---------------------------------------------------------------------------------------------------------


def test_a_new_model_starts_as_siglip_does():
    model = start(*TINY, *SIGMOID)
    assert model.logit_bias.item() == -10 and model.config.logit_bias_init_value == -10
    assert model.get_logit_scale().item() == pytest.approx(10)
    assert start(*TINY, *SIGMOID, "--logit_scale_init_value", "3").logit_scale.item() == 3
    plain = start(*TINY)
    assert plain.logit_bias is None and plain.get_logit_scale().item() == pytest.approx(1 / 0.07)


def test_a_starting_model_gets_a_bias_and_keeps_its_temperature(saved):
    plain = start("--model_name_or_path", saved)
    model = start("--model_name_or_path", saved, *SIGMOID)
    assert model.logit_bias.item() == -10 and torch.equal(model.logit_scale, plain.logit_scale)
    assert set(model.state_dict()) == set(plain.state_dict()) | {"logit_bias"}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(("loss", "kept"), [(None, True), ("sigmoid", True), ("softmax", False)])
def test_the_loss_of_a_starting_model_is_its_own_unless_configured(loss, kept, tmp_path):
    model = FlipModel(tiny_config(logit_bias_init_value=-10))
    torch.nn.init.constant_(model.logit_bias, -6.5)
    model.save_pretrained(tmp_path)
    loaded = start("--model_name_or_path", tmp_path, *(() if loss is None else ("--loss", loss)))
    assert (loaded.logit_bias is not None) == kept == ("logit_bias" in dict(loaded.named_parameters()))
    assert not kept or loaded.logit_bias.item() == -6.5
    assert (loaded.config.logit_bias_init_value is not None) == kept


def test_a_model_with_a_decoder_gets_a_bias_that_is_saved(tmp_path):
    decoder = ["--objective", "both", "--decoder_config", json.dumps(DECODER)]
    start(*TINY, *decoder).save_pretrained(tmp_path / "plain")
    start("--model_name_or_path", tmp_path / "plain", *decoder[:2], *SIGMOID).save_pretrained(tmp_path / "biased")
    loaded, report = FlipForPreTraining.from_pretrained(tmp_path / "biased", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and loaded.flip.logit_bias.item() == -10
    loaded = start("--model_name_or_path", tmp_path / "biased", "--objective", "reconstruction")
    assert not loaded.flip.logit_bias.requires_grad  # nothing trains it, and a wrapper would wait for its gradient


def test_a_loss_without_texts_is_refused():
    with pytest.raises(OptionError, match="^--loss sigmoid is about texts, and --objective reconstruction reads none"):
        parse("--train_data", "x", *SIGMOID, "--objective", "reconstruction")


def test_a_clip_cannot_be_exported_from_a_run_with_a_bias(tar_folder, tmp_path):
    """Which is said before anything is trained."""
    make_clip_folder(tmp_path / "clip")
    argv = ["--train_data", str(tar_folder), "--model_name_or_path", str(tmp_path / "clip"), *RUN, *SIGMOID]
    argv += ["--push_to_hub", "true", "--hub_model_id", "somebody/something", "--export_clip", "true"]
    with pytest.raises(ValueError, match="logit_bias_init_value is -10.0, CLIP's is None"):
        build_trainer(parse(*argv, "--output_dir", str(tmp_path / "run")))


def test_a_plan_is_of_the_runs_loss():
    assert make_run(parse("--train_data", "x", *TINY, *SIGMOID), None).config.logit_bias_init_value == -10
    assert make_run(parse("--train_data", "x", *TINY), None).config.logit_bias_init_value is None


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_logs_the_bias(sigmoid_run):
    _, folder, printed = sigmoid_run
    losses = list(logged(folder, "loss").values())
    assert losses[0] > 5 and losses[-1] < 0.7 * losses[0]  # a softmax loss begins at log(32) = 3.5
    biases = logged(folder, "logit_bias")
    assert biases[32] == -10 and list(biases) == list(logged(folder, "logit_scale"))
    model = FlipModel.from_pretrained(folder)
    assert model.config.logit_bias_init_value == -10 and -10.5 < model.logit_bias.item() != -10
    assert "The new model is trained with the sigmoid loss and starts with a bias of -10, as SigLIP's" in printed


def test_the_card_names_the_loss(sigmoid_run, tmp_path):
    shutil.copytree(sigmoid_run[1], tmp_path / "run")
    write_card(tmp_path / "run")
    assert "| loss | sigmoid, as SigLIP's |" in (tmp_path / "run" / "README.md").read_text()


def test_a_resumed_run_ends_in_the_same_bits(sigmoid_run, tmp_path):
    argv, straight, _ = sigmoid_run
    resumed = tmp_path / "resumed"
    for name in ("checkpoint-000000000096", "validation"):
        shutil.copytree(straight / name, resumed / name)
    run = pretrain(*argv, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest")
    assert run.returncode == 0, run.stderr[-3000:]
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert ours.keys() == theirs.keys() and "logit_bias" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert logged(resumed, "logit_bias") == {s: b for s, b in logged(straight, "logit_bias").items() if s > 96}
    assert logged(resumed, "validation_loss") == logged(straight, "validation_loss")


def test_a_clip_is_trained_on_with_the_sigmoid_loss(tar_folder, tmp_path):
    """At a learning rate of zero: what it starts with, and that training and validation measure the same loss."""
    make_clip_folder(tmp_path / "clip")
    argv = ["--train_data", str(tar_folder), "--model_name_or_path", str(tmp_path / "clip"), *RUN, *SIGMOID]
    run = pretrain(*argv, "--base_lr", "0", "--output_dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr[-3000:]
    said = (
        f"{tmp_path / 'clip'} has no bias for the sigmoid loss: it gets one of -10, as SigLIP's, and keeps its temper"
    )
    assert said in run.stdout
    model = FlipModel.from_pretrained(tmp_path / "run")
    before = FlipModel.from_clip(str(tmp_path / "clip"))
    assert model.logit_bias.item() == -10 and torch.equal(model.logit_scale, before.logit_scale)
    at_start, validated = logged(tmp_path / "run", "validation_loss").values()
    trained = logged(tmp_path / "run", "loss").values()
    assert at_start == validated > math.log(32) and validated == pytest.approx(sum(trained) / len(trained), rel=0.2)


def test_a_model_with_a_bias_is_trained_on_with_the_softmax_loss(sigmoid_run, tar_folder, tmp_path):
    """In two processes, of which each would wait for the gradient of a bias."""
    argv = ["--train_data", str(tar_folder), "--model_name_or_path", str(sigmoid_run[1]), *RUN, "--loss", "softmax"]
    run = pretrain(*argv, "--output_dir", str(tmp_path / "run"), processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    said = "was trained with the sigmoid loss; the softmax loss has no use for its bias, which is left out"
    assert f"{sigmoid_run[1]} {said}" in run.stdout
    assert logged(tmp_path / "run", "loss")[32] < math.log(32) + 1 and not logged(tmp_path / "run", "logit_bias")
    model, report = FlipModel.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert model.logit_bias is None and not report["unexpected_keys"]
