"""Low-rank adapters on a tower: what is refused, gradients, whole runs, what they save and what they resume from."""

import json
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from flip_hf import FlipModel
from flip_hf.console.fields import OptionError
from flip_hf.conversion.siglip import convert_from_siglip
from flip_hf.hub.card import write_card
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.build import build_trainer
from flip_hf.training.freezing import freeze
from flip_hf.training.lora import add_adapters, check_processes, is_adapter, merged, own_tensors
from flip_hf.training.models import make_config
from flip_hf.training.muon import Muon
from flip_hf.training.optimization import make_optimizer
from tests.helpers.arguments import parse
from tests.helpers.clip_folder import make_clip_folder
from tests.helpers.conformance import ARCHITECTURES, build, make_inputs
from tests.helpers.contrast import PAIRS, assert_same, backward, make_batch, take
from tests.helpers.pretraining import SHORT, TINY
from tests.helpers.programs import run_program
from tests.helpers.siglip_folder import make_siglip_folder
from tests.helpers.trainers import DECODER

peft = pytest.importorskip("peft")

SAVED = ("--model_name_or_path", "saved")
PARTS = {"image": "vision_model.", "text": "text_model."}
PROJECTIONS = {"image": "visual_projection.", "text": "text_projection."}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*SAVED, "--lora", "vision:4"], "^--lora takes a tower, image or text, and the rank .* got 'vision:4'.$"),
        ([*SAVED, "--lora", "image"], "^--lora takes a tower, image or text, and the rank .* image:16, got 'image'.$"),
        (
            [*SAVED, "--lora", "image:0"],
            "^--lora image:0: the rank must be between 1 and 4,096, got 0: leave the tower",
        ),
        ([*SAVED, "--lora", "text:x"], "^--lora text:x: the rank must be an integer"),
        (
            [*SAVED, "--lora", "image:4", "image:8"],
            "^--lora names the image tower twice, image:4 image:8; name it once",
        ),
        ([*SAVED, "--lora", "image:4", "--freeze", "image"], "^--freeze image and --lora image:4 are about the same"),
        ([*SAVED, "--lora", "text:4", "--freeze", "image", "text:2"], "^--freeze text:2 and --lora text:4 are about"),
        (["--lora", "image:4"], "^--lora image:4 would keep the random weights .* or --init_vision_from, or leave it"),
        (
            ["--init_vision_from", "mae", "--lora", "text:4"],
            "^--lora text:4 would keep the random weights of a new text",
        ),
        ([*SAVED, "--lora", "text:4", "--objective", "reconstruction"], "^--lora text is about texts, and --objective"),
    ],
)
def test_what_cannot_have_adapters_is_refused(argv, message):
    with pytest.raises(OptionError, match=message):
        parse("--train_data", "x", "--unmasked_samples", "0", *argv)


def test_a_rank_above_the_layers_own_is_refused_before_data_are_opened(saved):
    arguments = parse("--train_data", "none", "--model_name_or_path", str(saved), "--lora", "text:33")
    with pytest.raises(OptionError, match="^--lora text:33: the layers of the text tower have 32 inputs or outputs"):
        make_config(arguments.model, arguments.objective)


def test_a_missing_peft_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as Python says that a module cannot be imported
    with pytest.raises(OptionError, match="^--lora needs PEFT, which is not installed: pip install 'peft>=0.20'.$"):
        parse("--train_data", "x", *SAVED, "--lora", "image:4")
    assert parse("--train_data", "x", *SAVED).model.lora is None


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_weights_are_refused(kind, monkeypatch):
    accelerator = Accelerator(cpu=True)
    check_processes({"image": 4}, accelerator)
    monkeypatch.setattr(accelerator.state, "distributed_type", kind)
    with pytest.raises(ValueError, match="^--lora needs whole weights on each process"):
        check_processes({"image": 4}, accelerator)


# -- gradients ---------------------------------------------------------------------------------------------------------


def adapted(architecture: str, **ranks: int) -> FlipModel:
    model = build(FlipModel, architecture).double().train()
    freeze(model, dict.fromkeys(ranks))
    add_adapters(model, ranks)
    return model


def assert_gradients_are_those_of_the_product(model: FlipModel, plain: FlipModel, pieces: int) -> None:
    """Those of the model without adapters, through `W + B A`: B^T G and G A^T, for the weight's gradient G."""
    size = PAIRS // pieces
    batches = [take(make_batch(), slice(i * size, (i + 1) * size)) for i in range(pieces)]
    weights = model.state_dict()
    plain.load_state_dict(merged(weights))
    expected_loss, expected = backward(plain, batches)
    loss, gradients = backward(model, batches)
    assert abs(loss - expected_loss) < 1e-12
    for name, gradient in gradients.items():
        layer = name.partition(".lora_")[0]
        if gradient is None:
            continue
        if ".lora_A." in name:
            assert_same(gradient, weights[f"{layer}.lora_B.default.weight"].T @ expected[f"{layer}.weight"], name)
        elif ".lora_B." in name:
            assert_same(gradient, expected[f"{layer}.weight"] @ weights[f"{layer}.lora_A.default.weight"].T, name)
        else:
            assert_same(gradient, expected[name], name)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_the_dense_product_at_the_start_and_after_a_step(architecture, pieces):
    model = adapted(architecture, image=4, text=2)
    plain = build(FlipModel, architecture).double().train()
    optimizer = make_optimizer(model, OptimizationArguments())
    for step in range(2):
        plain.zero_grad()
        assert_gradients_are_those_of_the_product(model, plain, pieces)
        with_b = [p for name, p in model.named_parameters() if ".lora_B." in name]
        assert all(bool(p.any()) == (step > 0) for p in with_b)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tower", PARTS)
def test_the_rest_of_the_model_is_trained_as_without_adapters(tower):
    model = adapted("siglip", **{tower: 4})
    assert_gradients_are_those_of_the_product(model, build(FlipModel, "siglip").double().train(), pieces=1)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    other = PARTS["text" if tower == "image" else "image"]
    assert {name for name in trained if name.startswith(PARTS[tower])} == set(filter(is_adapter, trained))
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, _ in model.named_parameters() if name.startswith(other)} < trained
    assert {"logit_scale", "logit_bias"} < trained
    assert any(name.startswith(PROJECTIONS["text"]) for name in trained) == (tower == "image")


def test_merged_weights_are_those_of_peft_to_the_bit():
    model = adapted("clip", image=4, text=2)
    backward(model, [make_batch()])
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10).step()
    ours = merged(model.state_dict())
    theirs = peft.PeftModel(build(FlipModel, "clip").double(), model.peft_config["default"])
    of_theirs = {f"base_model.model.{name}": value for name, value in model.state_dict().items()}
    theirs.load_state_dict(of_theirs)
    theirs = theirs.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_adapters_have_the_learning_rate_of_their_layer_and_adamw_with_weight_decay():
    model = adapted("flip", image=4)
    options = OptimizationArguments(optimizer="muon", image_lr_scale=0.5, layer_decay=0.1, weight_decay=0.3)
    optimizer = make_optimizer(model, options)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    found = {(group["lr_scale"], group["weight_decay"]) for name, group in groups.items() if is_adapter(name)}
    assert {(round(scale, 9), decay) for scale, decay in found} == {(0.005, 0.3), (0.05, 0.3)}  # below the projection
    of_muon = {name for name, group in groups.items() if "ns_steps" in group}
    assert of_muon and all(name.startswith("text_model.encoder.layers.") for name in of_muon)
    assert isinstance(optimizer._parts[0], Muon) and not any(map(is_adapter, of_muon))


@pytest.mark.long
def test_flex_attention_calls_the_adapted_layers():
    """Without gradients, which torch's flex attention does not have on a CPU."""
    model = build(FlipModel, "siglip").eval()
    inputs = make_inputs(FlipModel)
    add_adapters(model, {"image": 4, "text": 4})
    logits = []
    for attention, std in (("sdpa", 0.0), ("sdpa", 0.1), ("flex_attention", 0.1)):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=std)
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits.append(model(**inputs).logits_per_image)
    plain, expected, found = logits
    assert (found - expected).abs().max() < 1e-4 and (found - plain).abs().max() > 0.1


# -- runs --------------------------------------------------------------------------------------------------------------


def run_options(model, data, out, *argv: str) -> list[str]:
    options = [*SHORT, "--unmasked_samples", "0", "--num_workers", "0", "--output_dir", str(out)]
    return ["--train_data", str(data), "--model_name_or_path", str(model), *options, *argv]


def features(model) -> list[torch.Tensor]:
    """Features of three images and of three texts, which end as CLIP's pooling needs it."""
    torch.manual_seed(0)
    ids = torch.randint(4, 100, (3, 7))
    text = model.config.get_text_config()
    ids[:, -1] = text.eos_token_id if text.pooling_type == "eos" else 3
    with torch.no_grad():
        images = model.eval().get_image_features(pixel_values=torch.randn(3, 3, 32, 32)).pooler_output
        return [images, model.get_text_features(input_ids=ids).pooler_output]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) == 2
    assert all((one - other).abs().max() < 1e-5 for one, other in zip(ours, theirs, strict=True))


def trained_names(ranks: list[str], frozen: list[str]) -> set[str]:
    """The parameters of the tiny model that such a run changes in its folder."""
    towers = {rank.partition(":")[0] for rank in ranks}
    fixed = tuple(names[tower] for tower in (*towers, *frozen) for names in (PARTS, PROJECTIONS))
    layers = tuple(f"{PARTS[tower]}encoder.layers." for tower in towers)
    names = {name for name, _ in build(FlipModel).named_parameters()}
    matrices = ("proj.weight", "fc1.weight", "fc2.weight")
    return {n for n in names if not n.startswith(fixed) or (n.startswith(layers) and n.endswith(matrices))}


@pytest.mark.parametrize(
    ("ranks", "frozen", "argv"),
    [
        (["image:4"], ["text"], ["--micro_batch_size", "8", "--optimizer", "muon"]),
        (["text:2"], [], ["--optimizer", "muon", "--layer_decay", "0.8", "--text_lr_scale", "2"]),
        (["image:4", "text:2"], [], ["--gradient_checkpointing", "--positives", "caption"]),
        (["image:3", "text:5"], [], ["--ema_half_life", "64", "--mask_strategy", "resize", "--mask_ratio", "0.75"]),
    ],
)
def test_a_run_trains_adapters_and_what_has_none(ranks, frozen, argv, saved, tar_folder, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--lora", *ranks, *(["--freeze", *frozen] if frozen else []), *argv]
    build_trainer(parse(*run_options(saved, tar_folder, run, *options))).run()
    before = load_file(saved / "model.safetensors")
    after = load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == trained_names(ranks, frozen)
    (checkpoint,) = run.glob("checkpoint-*")
    moments = {name.split("/")[0] for name in load_file(checkpoint / "optimizer.safetensors")}
    assert {name for name in moments if not is_adapter(name)} == trained_names(ranks, frozen) - {
        name for name in before if name.startswith(tuple(PARTS[rank.partition(":")[0]] for rank in ranks))
    }
    assert len([name for name in moments if is_adapter(name)]) == 2 * 6 * 2 * len(ranks)  # blocks, layers, matrices
    assert "LoRA: adapters of rank " in capsys.readouterr().out
    write_card(run)
    assert "| learned by | LoRA of rank " in (run / "README.md").read_text()


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import torch
from flip_hf import FlipModel
model, report = FlipModel.from_pretrained(sys.argv[1], output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.fixture(params=["flip", "clip", "siglip"])
def start(request, tmp_path, saved):
    """A folder to start from, and the FlipModel that a run makes of it."""
    if request.param == "clip":
        make_clip_folder(tmp_path / "clip")
        return tmp_path / "clip", lambda: FlipModel.from_clip(tmp_path / "clip")
    if request.param == "siglip":
        make_siglip_folder(tmp_path / "siglip")
        return tmp_path / "siglip", lambda: convert_from_siglip(str(tmp_path / "siglip")).model
    return saved, lambda: FlipModel.from_pretrained(saved)


def test_the_merged_model_is_the_starting_one_with_its_adapters_as_peft_loads_them(start, tar_folder, tmp_path):
    folder, make_start = start
    run = tmp_path / "run"
    options = ["--lora", "image:4", "text:2", "--ema_half_life", "64", "--holdout", "0.3", "--eval_samples", "64"]
    trainer = build_trainer(parse(*run_options(folder, tar_folder, run, *options)))
    trainer.run()
    merged_model = FlipModel.from_pretrained(run)
    loaded = peft.PeftModel.from_pretrained(make_start(), run / "adapters")
    assert_close(features(merged_model), features(loaded.get_base_model()))
    assert_close(features(merged_model), features(trainer._encoder().flip))  # what the run's evaluations use
    assert (features(merged_model)[0] - features(make_start())[0]).abs().max() > 1e-3
    assert json.loads((run / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    best = peft.PeftModel.from_pretrained(make_start(), run / "best" / "adapters")
    assert_close(features(FlipModel.from_pretrained(run / "best")), features(best.get_base_model()))


def test_a_saved_folder_needs_no_peft(saved, tar_folder, tmp_path):
    build_trainer(parse(*run_options(saved, tar_folder, tmp_path / "run", "--lora", "image:4"))).run()
    (tmp_path / "load.py").write_text(WITHOUT_PEFT)
    loaded = run_program(tmp_path / "load.py", tmp_path / "run", tmp_path / "weights.pt")
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    saved_there = load_file(tmp_path / "run" / "model.safetensors")
    assert saved_there.keys() == load_file(saved / "model.safetensors").keys()
    assert all(torch.equal(found[name], value) for name, value in saved_there.items())


@pytest.mark.parametrize("argv", [["--ema_half_life", "64"], ["--optimizer", "muon", "--micro_batch_size", "8"]])
def test_a_run_with_adapters_resumes_to_the_same_bits_and_with_no_others(argv, saved, tar_folder, tmp_path):
    options = ["--lora", "image:4", "text:2", "--checkpoint_samples", "64", "--keep_checkpoints", "9", *argv]
    argv = run_options(saved, tar_folder, tmp_path / "run", *options)
    build_trainer(parse(*argv)).run()
    first = str(min((tmp_path / "run").glob("checkpoint-*")))
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "again")
    place = argv.index("image:4")
    argv[place : place + 2] = ["text:2", "image:4"]  # in any order
    build_trainer(parse(*argv, "--resume_from_checkpoint", first)).run()
    for file in ("model.safetensors", "adapters/adapter_model.safetensors"):
        whole, again = (load_file(tmp_path / name / file) for name in ("run", "again"))
        assert all(torch.equal(whole[name], again[name]) for name in whole) and whole.keys() == again.keys()
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "other")
    argv.remove("text:2")
    with pytest.raises(ValueError, match="was trained with --lora image:4 text:2, not image:4: its adapters are of no"):
        build_trainer(parse(*argv, "--resume_from_checkpoint", first))


def test_a_checkpoint_is_a_model_with_the_adapters_merged(saved, tar_folder, tmp_path):
    build_trainer(parse(*run_options(saved, tar_folder, tmp_path / "run", "--lora", "image:4"))).run()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    last, result = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "run"))
    assert last.keys() == result.keys() and all(torch.equal(last[name], result[name]) for name in last)
    before = load_file(saved / "model.safetensors")
    beside = own_tensors(load_file(checkpoint / "lora.safetensors"))
    assert len(beside) == 2 * 6 and all(torch.equal(value, before[name]) for name, value in beside.items())


def test_adapters_learn_from_a_reconstruction_too(saved, tar_folder, tmp_path):
    options = ["--objective", "both", "--decoder_config", json.dumps(DECODER), "--lora", "image:4"]
    build_trainer(parse(*run_options(saved, tar_folder, tmp_path / "run", *options))).run()
    before, after = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path / "run"))
    parameters = {name for name, _ in build(FlipModel).named_parameters()}
    assert {n for n in parameters if not torch.equal(before[n], after[n])} == trained_names(["image:4"], [])
    beside = load_file(tmp_path / "run" / "with_decoder" / "model.safetensors")
    assert all(torch.equal(beside[f"flip.{name}"], value) for name, value in after.items())
    loaded = peft.PeftModel.from_pretrained(FlipModel.from_pretrained(saved), tmp_path / "run" / "adapters")
    ours, theirs = (
        features(model)[0] for model in (FlipModel.from_pretrained(tmp_path / "run"), loaded.get_base_model())
    )
    assert (ours - theirs).abs().max() < 1e-5


def test_a_new_projection_beside_a_loaded_tower_is_trained(saved, tar_folder, tmp_path):
    argv = ["--init_vision_from", str(saved), *TINY[2:], *SHORT, "--unmasked_samples", "0", "--num_workers", "0"]
    argv += ["--train_data", str(tar_folder), "--output_dir", str(tmp_path / "run"), "--lora", "image:4"]
    trainer = build_trainer(parse(*argv))
    trained = {name for name, p in trainer.flip.named_parameters() if p.requires_grad and not is_adapter(name)}
    assert {name.split(".")[0] for name in trained} == {
        *("visual_projection", "text_model", "text_projection", "logit_scale")
    }
    trainer.run()
    before, after = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path / "run"))
    name = "vision_model.encoder.layers.0.mlp.fc1"
    assert torch.equal(before[f"{name}.bias"], after[f"{name}.bias"])
    assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
