"""A checkpoint from somebody else: whatever its files are replaced with, nothing of it runs.

Every file of every kind of checkpoint, and every name that a library would read by itself, becomes a pickle that acts
when it is loaded, in each of the forms that torch and pickle know; the manifest is written anew, as an attacker would.
"""

import itertools
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from flip_hf.console.lock import unlock_folder
from flip_hf.training.build import MISTAKES, build_trainer
from flip_hf.training.checkpoint import find_checkpoints
from flip_hf.training.manifest import write_manifest
from flip_hf.training.recipes import parse_arguments
from tests.helpers.pairs import write_tar
from tests.helpers.pretraining import PRETRAIN, SHORT, TINY, pretrain
from tests.helpers.programs import ROOT, run_program

# Names that Accelerate, torch, Transformers or DeepSpeed look for beside ours.
FOREIGN = [
    *("custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "scaler.pt", "sampler.bin"),
    *("pytorch_model.bin", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"),
    *("adapter_model.bin", "modeling_evil.py", "training_args.bin", "dl_state_dict.bin"),
]
OPTIONS = ["--num_workers", "0", "--unmasked_samples", "0", "--checkpoint_samples", "96"]


class Acts:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def hostile_forms(mark: Path) -> dict[str, bytes]:
    """The same pickle plain, as torch saves it, and as torch saved it before."""
    forms = {"pickle": pickle.dumps({"state": Acts(mark)})}
    for name, new in (("torch", True), ("legacy", False)):
        path = mark.with_suffix(f".{name}")
        torch.save({"state": Acts(mark)}, path, _use_new_zipfile_serialization=new)
        forms[name] = path.read_bytes()
    return forms


def options_of(kind: str) -> list[str]:
    extra = {
        "plain": [],
        "ddp": [],
        "average": ["--ema_half_life", "64"],
        "decoder": ["--objective", "both", "--decoder_config", json.dumps({"hidden_size": 16, "num_hidden_layers": 1})],
    }
    return [*TINY, *SHORT, *OPTIONS, *extra[kind]]


@pytest.fixture(scope="module")
def tars(samples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    write_tar(folder / "0.tar", samples[:64])
    write_tar(folder / "1.tar", samples[64:128])
    return folder


@pytest.fixture(scope="module")
def written(tars, tmp_path_factory):
    """A function that gives a checkpoint of a kind, which two processes or one have written."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("written") / kind
            words = ["--train_data", str(tars), "--output_dir", str(folder), *options_of(kind)]
            run = pretrain(*words, processes=2 if kind == "ddp" else 1)
            assert run.returncode == 0, run.stderr[-3000:]
            made[kind] = find_checkpoints(folder)[0]
        return made[kind]

    return make


@pytest.mark.parametrize("kind", ["plain", "average", "decoder", "ddp"])
def test_no_file_of_a_checkpoint_can_run_code(kind, written, tars, tmp_path):
    checkpoint = written(kind)
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    assert not [name for name in names if name.endswith((".pkl", ".bin", ".pt", ".pth"))]
    mark = tmp_path / "acted"
    forms = hostile_forms(mark)
    planted = dict.fromkeys(FOREIGN, forms["torch"])  # all at once: nobody should look at them
    for files in (planted, *({name: forms[form]} for name, form in zip(names, itertools.cycle(forms)))):
        shared = tmp_path / f"shared-{'-'.join(list(files)[:1]).replace('/', '-')}"
        shutil.copytree(checkpoint, shared)
        for name, data in files.items():
            (shared / name).parent.mkdir(exist_ok=True)
            (shared / name).write_bytes(data)
        if "manifest.json" not in files:
            write_manifest(shared)
        outcome = resume(shared, kind, tars, tmp_path / f"mine-{shared.name}")
        assert outcome is None or (files is not planted and str(shared) in outcome and "\n" not in outcome), outcome
        assert not mark.exists(), f"one of {list(files)} ran code"


def resume(shared: Path, kind: str, tars: Path, folder: Path) -> str | None:
    """Builds the run that resumes from a checkpoint, all of which is read then; what it says where it cannot."""
    words = ["--train_data", str(tars), *options_of(kind), "--output_dir", str(folder)]
    arguments = parse_arguments(
        [*words, "--resume_from_checkpoint", str(shared)], ROOT / "flip_hf" / "recipes", "shapes"
    )
    try:
        build_trainer(arguments)
    except MISTAKES as error:
        return str(error)
    finally:
        unlock_folder(folder)
    return None


def test_a_shared_configuration_cannot_bring_its_own_code(written, tars, tmp_path):
    """`auto_map` names a class of the folder's own; Transformers would ask, and import it where the answer is yes."""
    shared = tmp_path / "shared"
    shutil.copytree(written("plain"), shared)
    mark = tmp_path / "acted"
    (shared / "configuration_evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for name, classes in {
        "config.json": ["AutoConfig", "AutoModel"],
        "tokenizer_config.json": ["AutoTokenizer"],
        "processor_config.json": ["AutoProcessor", "AutoImageProcessor"],
    }.items():
        values = json.loads((shared / name).read_text())
        values["auto_map"] = dict.fromkeys(classes, "configuration_evil.Evil")
        values["auto_map"] |= {"AutoTokenizer": ["configuration_evil.Evil", None]} if "AutoTokenizer" in classes else {}
        values |= {"model_type": "evil"} if name == "config.json" else {"tokenizer_class": "Evil"}
        (shared / name).write_text(json.dumps(values))
    write_manifest(shared)
    run = run_program(
        *(PRETRAIN, "--train_data", tars, "--output_dir", tmp_path / "mine", *options_of("plain")),
        *("--resume_from_checkpoint", shared),
    )
    assert not mark.exists() and "y/N" not in run.stdout


def test_the_checkpoint_of_the_attack_in_the_wild(written, tars, tmp_path):
    """The recipe that lies in a checkpoint, with that checkpoint: what a user types who was sent a folder."""
    shared = tmp_path / "shared"
    shutil.copytree(written("average"), shared)
    mark = tmp_path / "acted"
    torch.save({"x": Acts(mark)}, shared / "custom_checkpoint_0.pkl")
    write_manifest(shared)
    run = run_program(
        *(PRETRAIN, shared / "recipe.yaml", "--output_dir", tmp_path / "mine", "--resume_from_checkpoint", shared)
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert not mark.exists()


def test_the_attack_itself_works(tmp_path):
    """The attacks of the tests above do act where a file is trusted."""
    for number, (name, data) in enumerate(hostile_forms(tmp_path / "acted").items()):
        mark = tmp_path / "acted"
        path = tmp_path / f"evil-{number}"
        path.write_bytes(data)
        pickle.loads(data) if name == "pickle" else torch.load(path, weights_only=False)
        assert mark.exists(), name
        mark.unlink()
    assert zipfile.is_zipfile(tmp_path / "evil-1")
