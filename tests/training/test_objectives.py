"""Reconstruction beside the contrast and alone: gradients, what the loader sends, whole runs and what they leave."""

import contextlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

from flip_hf import FlipForPreTraining, FlipModel, FlipPreTrainingConfig, FlipVisionModel
from flip_hf.data.refusals import BadDataError
from flip_hf.losses import contrastive_loss
from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.training.build import build_trainer
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.engine import Trainer
from flip_hf.training.flops import step_flops
from flip_hf.training.models import make_config, make_model
from flip_hf.training.patches import visible_and_target
from flip_hf.training.step import OneProcess, accumulate_gradients
from tests.helpers.arguments import parse
from tests.helpers.contrast import PAIRS, assert_same, make_batch, take
from tests.helpers.loading import by_edges, half_masked, make_train_loader
from tests.helpers.logs import records
from tests.helpers.models import PATCH_SIZE, randomize, tiny_config
from tests.helpers.pairs import write_tar
from tests.helpers.pretraining import SHORT, TINY
from tests.helpers.trainers import DECODER, trainer_of


@pytest.fixture(scope="module")
def pictures(samples, tmp_path_factory):
    """160 JPEG files without captions."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    for key, image, _ in samples:
        (folder / f"{key}.jpg").write_bytes(image)
    return folder


# -- gradients ---------------------------------------------------------------------------------------------------------


def make_pretraining(objective: str, dropout: float = 0.0, bias: float | None = None) -> FlipForPreTraining:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = FlipPreTrainingConfig(
            flip_config=tiny_config(
                text={"attention_dropout": dropout}, vision={"attention_dropout": dropout}, logit_bias_init_value=bias
            ),
            decoder_config={**DECODER, "attention_dropout": dropout},
            objective=objective,
            reconstruction_weight=0.3,
        )
        return randomize(FlipForPreTraining(config)).double().train()


def as_trained(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trainer's batch of images and a mask."""
    batch = dict(batch)
    patches = cut_patches(batch.pop("pixel_values"), PATCH_SIZE)
    return {**batch, **visible_and_target(patches, batch["ids_keep"])}


def gradients_of(model: FlipForPreTraining) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: FlipForPreTraining, batch: dict[str, torch.Tensor], pieces: int):
    """The loss of a step as the trainer takes it; gradients are left in the model."""
    encoder = PairEncoder(model)
    size = PAIRS // pieces
    split = [as_trained(take(batch, slice(i * size, (i + 1) * size))) for i in range(pieces)]
    if model.config.objective == "reconstruction":
        split = [{name: value for name, value in part.items() if "input" not in name} for part in split]
        split = [{name: value for name, value in part.items() if name != "attention_mask"} for part in split]
    return accumulate_gradients(OneProcess(encoder), split, reconstruction_weight=0.3)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(("objective", "bias"), [("reconstruction", None), ("both", None), ("both", -3.0)])
def test_a_step_has_the_gradient_of_the_published_models_loss(objective, bias, pieces):
    batch = make_batch()
    expected = make_pretraining(objective, bias=bias)
    outputs = expected(**batch)
    outputs.loss.backward()
    model = make_pretraining(objective, bias=bias)
    loss = step(model, batch, pieces)
    assert loss.loss.item() == pytest.approx(outputs.loss.item(), abs=1e-6)
    if objective == "both":
        assert loss.contrastive_loss.item() == pytest.approx(outputs.contrastive_loss.item(), abs=1e-6)
        assert loss.reconstruction_loss.item() == pytest.approx(outputs.reconstruction_loss.item(), abs=1e-9)
        assert loss.accuracy is not None
    else:
        assert loss.accuracy is None and loss.contrastive_loss is None and loss.reconstruction_loss is None
    ours = gradients_of(model)
    theirs = gradients_of(expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():  # its contrast is in float32
        assert (ours[name] - gradient).abs().max() < 1e-6 * max(1.0, gradient.abs().max().item()), name


def test_both_passes_see_the_same_dropout_though_one_has_no_decoder():
    """The gradient of the contrast is that of the pass without a decoder: it draws before the decoder does."""
    batch = make_batch()
    model = make_pretraining("both", 0.5)
    plain = make_pretraining("both", 0.5)
    torch.manual_seed(3)
    loss = step(model, batch, 2)
    torch.manual_seed(3)
    parts = [as_trained(take(batch, slice(i, i + 6))) for i in (0, 6)]
    encoder = PairEncoder(plain)
    embeds = [encoder(**{**part, "target_patches": None}) for part in parts]
    images, texts = (torch.cat([part[i] for part in embeds]) for i in (0, 1))
    expected, _ = contrastive_loss(images, texts, plain.flip.get_logit_scale())
    assert loss.contrastive_loss.item() == pytest.approx(expected.item(), abs=1e-6)
    expected.backward()
    for name in ("flip.text_projection.weight", "flip.logit_scale"):  # which the reconstruction does not reach
        assert_same(model.get_parameter(name).grad, plain.get_parameter(name).grad, name)


# -- the data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("view_at", "workers"), [(half_masked, 0), (half_masked, 2), (by_edges, 0)])
def test_all_patches_come_with_the_same_masks_and_crops(tar_folder, view_at, workers):
    masked = iter(make_train_loader(tar_folder, view_at=view_at, workers=workers))
    loader = make_train_loader(tar_folder, view_at=view_at, workers=workers)
    loader._stream.plan = replace(loader._stream.plan, whole=True)
    whole = iter(loader)
    for _ in range(3):
        seen = next(masked)
        all_of_it = next(whole)
        assert torch.equal(seen["ids_keep"], all_of_it["ids_keep"]) and all_of_it["patches"].shape[1] == 16
        parts = visible_and_target(all_of_it["patches"], all_of_it["ids_keep"])
        assert torch.equal(parts["patches"], seen["patches"])
        assert torch.equal(parts["target_patches"], all_of_it["patches"])
    assert half_masked(0).draw is not None


def test_images_alone_are_read_and_a_bad_caption_costs_no_image(tar_folder, tmp_path):
    loader = make_train_loader(tar_folder, kind="image")
    batch = next(iter(loader))
    assert set(batch) == {"patches", "ids_keep"}
    assert sum(loader.counts["drawn"].values()) == 8 and not loader.counts["refused"]


# -- whole runs --------------------------------------------------------------------------------------------------------


@dataclass
class MaeRun:
    """A finished run of reconstruction alone.

    Attributes:
        folder: its output.
        trainer: after the run.
        before: the weights that it began with.
        metrics: what it returned.
        printed: its standard output.
    """

    folder: Path
    trainer: Trainer
    before: dict[str, torch.Tensor]
    metrics: dict
    printed: str

    def records(self) -> list[dict]:
        return records(self.folder)


@pytest.fixture(scope="module")
def mae_run(pictures, tmp_path_factory) -> MaeRun:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "mae"
    evaluated = ["--eval_data", str(pictures), "--eval_split", "train"]
    tracked = [*evaluated, "--grid_samples", "96", "--report_to", "tensorboard", "--mask_ratio", "0.75"]
    trainer = trainer_of(folder, pictures, "reconstruction", *tracked)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        metrics = trainer.run()
    return MaeRun(folder, trainer, before, metrics, printed.getvalue())


def test_mae_alone_needs_no_captions_and_learns(mae_run):
    losses = [record["loss"] for record in mae_run.records() if "loss" in record]
    assert losses[-1] < losses[0]
    assert not any("accuracy" in record or "logit_scale" in record for record in mae_run.records())


def test_mae_is_evaluated_by_its_reconstruction_error(mae_run):
    found = next(record for record in mae_run.records() if "reconstruction_error" in record)
    assert mae_run.metrics["images"] == 160
    assert found["reconstruction_error"] == mae_run.metrics["reconstruction_error"]
    assert "Result    reconstruction error" in mae_run.printed and "--init_vision_from" in mae_run.printed


def test_mae_costs_the_flops_of_its_patches(mae_run):
    results = json.loads((mae_run.folder / "results.json").read_text())
    assert results["flops_per_sample"]["masked"] == step_flops(mae_run.trainer.model.config, 4, 0, 32)


def test_mae_draws_reconstructions_for_the_folder_and_the_tracker(mae_run):
    folder = mae_run.folder
    assert [p.name for p in sorted((folder / "reconstructions").iterdir())] == [f"{n:012d}.png" for n in (96, 192)]
    with Image.open(folder / "reconstructions" / f"{96:012d}.png") as picture:
        assert picture.size[0] > 300
    assert any(b"reconstructions" in path.read_bytes() for path in (folder / "logs").rglob("events*"))


def test_mae_trains_the_vision_tower_and_the_decoder_alone(mae_run):
    before = mae_run.before
    saved, report = FlipForPreTraining.from_pretrained(mae_run.folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
    moved = {name for name, p in saved.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in moved if not name.startswith(("flip.vision_model.", "decoder."))} == set()
    assert moved >= {n for n in before if n.startswith(("flip.vision_model.", "decoder.")) and "k_proj.bias" not in n}
    assert sum(p.numel() for p in saved.flip.text_model.parameters()) < 10_000  # there is a place for it, no more


def test_flip_starts_from_the_tower_that_mae_leaves(mae_run):
    """At once, and with a tower of its own size."""
    saved = FlipForPreTraining.from_pretrained(mae_run.folder)
    arguments = parse("--train_data", "x", *TINY[2:], "--init_vision_from", str(mae_run.folder))
    flip = make_model(arguments, make_config(arguments.model), None)
    for name, value in saved.flip.vision_model.state_dict().items():
        assert torch.equal(flip.vision_model.state_dict()[name], value), name
    assert isinstance(flip, FlipModel) and all(p.requires_grad for p in flip.parameters())


@pytest.fixture(scope="module")
def both_run(samples, tmp_path_factory) -> tuple[Path, Path]:
    """The folder of a finished run on both objectives, and its data."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    write_tar(folder / "data.tar", samples)
    options = ["--micro_batch_size", "16", "--reconstruction_weight", "0.5"]
    trainer_of(folder / "both", folder / "data.tar", "both", *options).run()
    return folder / "both", folder / "data.tar"


def test_the_loss_of_both_is_their_weighted_sum(both_run):
    last = [record for record in records(both_run[0]) if "loss" in record][-1]
    assert last["loss"] == pytest.approx(last["contrastive_loss"] + 0.5 * last["reconstruction_loss"], abs=1e-5)


def test_both_leave_a_plain_model_and_one_with_a_decoder(both_run):
    folder, _ = both_run
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "flip" and not (folder / "decoder_flip.py").exists()
    plain = load_file(folder / "model.safetensors")
    whole = load_file(folder / "with_decoder" / "model.safetensors")
    assert not any("decoder" in name for name in plain)
    assert plain.keys() == {name[5:] for name in whole if name.startswith("flip.")}
    assert all(torch.equal(value, whole[f"flip.{name}"]) for name, value in plain.items())
    saved = FlipPreTrainingConfig.from_pretrained(folder / "with_decoder")
    assert (saved.objective, saved.reconstruction_weight) == ("both", 0.5)


def test_the_decoder_is_trained_further_in_its_own_shape(both_run):
    folder, data = both_run
    whole = load_file(folder / "with_decoder" / "model.safetensors")
    arguments = parse(
        *("--train_data", str(data), "--model_name_or_path", str(folder / "with_decoder")),
        *("--objective", "reconstruction", "--mask_ratio", "0.75"),
    )
    model = make_model(arguments, make_config(arguments.model, arguments.objective), None)
    assert torch.equal(model.decoder.mask_token, whole["decoder.mask_token"]) and model.config.flip_config.mask_ratio
    assert model.flip.vision_model.config.mask_ratio == 0.75 and model.config.objective == "reconstruction"
    arguments.model.image_size = 64
    with pytest.raises(ValueError, match="has a decoder, made for its own images .* leave out --image_size"):
        make_model(arguments, make_config(arguments.model, arguments.objective), None)


def test_a_plain_model_gets_a_decoder_where_it_is_trained_on_both(both_run):
    arguments = parse("--train_data", "x", "--model_name_or_path", str(both_run[0]), "--objective", "both")
    assert isinstance(make_model(arguments, make_config(arguments.model), None), FlipForPreTraining)


@pytest.mark.parametrize(("objective", "strategy"), [("reconstruction", "random"), ("both", "edges")])
def test_a_resumed_run_ends_in_the_same_weights(objective, strategy, tar_folder, tmp_path):
    straight = tmp_path / "straight"
    every = [
        "--mask_strategy",
        strategy,
        "--checkpoint_samples",
        "96",
        "--keep_checkpoints",
        "9",
        "--ema_half_life",
        "64",
    ]
    trainer_of(straight, tar_folder, objective, *every).run()
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    checkpoint = straight / f"checkpoint-{96:012d}"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "flip_pretraining"
    trainer = trainer_of(resumed, tar_folder, objective, *every, "--resume_from_checkpoint", str(checkpoint))
    assert trainer.state.samples == 96
    trainer.run()
    expected, found = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    argv = ["--resume_from_checkpoint", str(checkpoint), "--objective", "contrastive"]
    message = "holds another model: decoder.* is .* there and absent here" if objective == "both" else "read no texts"
    with pytest.raises(ValueError, match=message):
        trainer_of(resumed, tar_folder, objective, *argv)


def test_an_empty_source_of_images_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    trainer = trainer_of(tmp_path / "run", tmp_path / "images", "reconstruction", "--batch_size", "2")
    with pytest.raises(BadDataError):
        trainer.run()


# -- a tower to start with ---------------------------------------------------------------------------------------------


@pytest.fixture
def vit_mae(tmp_path):
    """A ViTMAE as Transformers saves it, with statistics of its own."""
    config = ViTMAEConfig(
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6},
        **{"decoder_hidden_size": 16, "decoder_intermediate_size": 32},
        **{"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
    )
    model = randomize(ViTMAEForPreTraining(config)).eval()
    model.save_pretrained(tmp_path / "vit_mae")
    ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    ).save_pretrained(tmp_path / "vit_mae")
    return tmp_path / "vit_mae", model


def start_from(source, *argv: str) -> FlipModel:
    arguments = parse("shapes", *TINY[2:], "--vision_config", "{}", "--init_vision_from", str(source), *argv)
    return make_model(arguments, make_config(arguments.model), None)


def test_flip_starts_from_a_vit_mae(vit_mae, images, tar_folder, tmp_path):
    folder, mae = vit_mae
    flip = start_from(folder, "--mask_ratio", "0.75").eval()
    ids_keep = torch.tensor([[1, 5, 6, 9], [0, 2, 15, 3], [7, 8, 9, 10]]).sort(dim=1).values
    noise = torch.ones(3, 16).scatter(1, ids_keep, torch.arange(4.0).expand(3, -1) / 10)
    with torch.no_grad():
        expected = mae.vit(images, noise=noise).last_hidden_state
        tokens = flip.vision_model(images, ids_keep=ids_keep).last_hidden_state
    assert (tokens - expected).abs().max() < 1e-5 and flip.config.mask_ratio == 0.75
    # A whole run, with the statistics that the tower knows.
    vision = json.loads(TINY[1])
    argv = ["--train_data", str(tar_folder), *SHORT, "--unmasked_samples", "0", "--train_samples", "64", *TINY[2:]]
    trainer = build_trainer(
        parse(*argv, "--init_vision_from", str(folder), "--num_workers", "0", "--output_dir", str(tmp_path / "run"))
    )
    assert trainer.normalize.mean.flatten().tolist() == pytest.approx([25.5, 51.0, 76.5])
    trainer.run()
    assert FlipModel.from_pretrained(tmp_path / "run").config.vision_config.num_hidden_layers == 2
    assert vision["num_hidden_layers"] == 1


@pytest.mark.parametrize("kind", [FlipModel, FlipVisionModel])
def test_flip_starts_from_the_tower_of_another(kind, model, tmp_path):
    saved = model if kind is FlipModel else model.vision_model
    saved.save_pretrained(tmp_path)
    flip = start_from(tmp_path)
    for name, value in model.vision_model.state_dict().items():
        assert torch.equal(flip.vision_model.state_dict()[name], value), name
    larger = start_from(tmp_path, "--image_size", "48")
    assert larger.config.vision_config.image_size == 48 and larger.vision_model.config.num_patches == 36


def test_a_start_that_does_not_fit_is_named(model, vit_mae, tmp_path):
    model.save_pretrained(tmp_path)
    wide = json.dumps({"hidden_size": 64})
    with pytest.raises(ValueError, match=r"--vision_config does not fit .* \(32,\) there and \(64,\) here"):
        start_from(tmp_path, "--vision_config", wide)
    with pytest.raises(ValueError, match="--init_vision_from .*nowhere cannot be loaded: there is no such folder"):
        start_from(tmp_path / "nowhere")
    model.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="of type 'flip_text_model'; give a ViTMAE, a FlipModel"):
        start_from(tmp_path / "text")
