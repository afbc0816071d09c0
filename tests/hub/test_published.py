"""The script as a user runs it, and what it published as others load it."""

import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from flip_hf.commands.push import main
from flip_hf.console.names import without_paths
from flip_hf.training.build import MISTAKES, build_trainer
from flip_hf.training.recipes import parse_arguments
from tests.helpers.documents.prepared import HUB, use_local_hub
from tests.helpers.hub_server import WRITER
from tests.helpers.pretraining import PRETRAIN, SHORT, TINY
from tests.helpers.programs import ROOT, run_program

REPO = "you/flip"
SCRIPT = str(ROOT / "scripts" / "push_to_hub.py")
PUSH = """
import os, runpy, sys
from transformers import GenerationMixin  # with Transformers 5.17, that imports scikit-learn where it is installed
theirs = set(sys.modules)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
print("extras:", sorted({"datasets", "evaluate", "sklearn", "matplotlib"} & (set(sys.modules) - theirs)))
"""
WITHOUT_PACKAGE = """
import json, sys
sys.modules["flip_hf"] = None  # any import of it fails
"""


@pytest.fixture
def run(hub, tmp_path):
    """Runs Python in a process of its own, at the local server, with a cache of its own."""

    def run(*argv: str, **more: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": WRITER, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_DEBUG": "1", **more}
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert WRITER not in done.stdout + done.stderr
        return done

    return run


@pytest.mark.long
def test_the_script_publishes_a_model_that_loads_elsewhere(hub, run, run_folder, tmp_path, model, texts, images):
    hub.drops += [r"PUT /lfs", r"POST .*/commit"]
    done = run("-c", PUSH, SCRIPT, str(run_folder), REPO, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "extras: []"  # who has no more than this package's own needs can push
    assert done.stdout.startswith(f"{hub.endpoint}/{REPO} (private): ") and "added (README.md, " in done.stdout
    assert not hub.drops and "Retrying in 2 s" in done.stderr

    # Without flip_hf: the card's code, as printed.
    card = hub.repositories[REPO].files["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert len(blocks) == 2 and all(REPO in block for block in blocks)
    done = run("-c", "\n".join([WITHOUT_PACKAGE, *blocks, "print(type(model).__module__)"]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'label': 'red'" in done.stdout and "tensor([[" in done.stdout
    assert done.stdout.strip().endswith("modeling_flip") and "transformers_modules.you.flip" in done.stdout

    # With it: without trust_remote_code.
    code = (
        "import flip_hf; from transformers import AutoModel, AutoProcessor; from safetensors.torch import save_file;"
        f"model = AutoModel.from_pretrained({REPO!r}); AutoProcessor.from_pretrained({REPO!r});"
        "assert type(model) is flip_hf.FlipModel; save_file(model.state_dict(), 'loaded.safetensors')"
    )
    done = run("-c", code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = load_file(tmp_path / "loaded.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())

    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [name for name, data in {**written, **hub.repositories[REPO].files}.items() if WRITER.encode() in data]


@pytest.fixture
def script(capsys):
    """Runs the command in this process."""
    libraries = (hub_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]

    def script(*argv):
        try:
            main([str(word) for word in argv])
        except SystemExit as stop:
            return str(stop)
        return capsys.readouterr().out

    yield script
    transformers_logging.enable_progress_bar()
    for library, level in zip(libraries, levels, strict=True):
        library.set_verbosity(level)


def test_without_a_network_there_is_a_folder_to_upload(script, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    said = script(run_folder, REPO, "--dry_run", out, "--license", "mit")
    assert said.startswith(f"{out}: complete, ") and said.endswith(f"`hf upload {REPO} {out}`\n")
    assert "license: mit" in (out / "README.md").read_text() and (out / "modeling_flip.py").is_file()
    assert script(run_folder, REPO, "--dry_run", out).endswith("is not empty. Choose another name or remove it.")
    assert script(run_folder, REPO).startswith("error: You are not logged in to the Hub. Run `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    said = script(run_folder, REPO)
    assert said.startswith("error: HF_HUB_OFFLINE is set") and said.endswith("makes the folder without the network.")


def log_requests_at_the_local_hub() -> None:
    """Does in a fork what HF_DEBUG does before its import: what is sent is logged, with the headers."""
    use_local_hub()
    constants.HF_DEBUG = True
    hub_logging.set_verbosity_debug()


def test_a_run_is_pushed_while_it_trains_and_at_its_end(hub, tar_folder, tmp_path):
    """The connection breaks in the middle, and ends nothing."""
    hub.drops += [r"POST .*/commit"]
    done = run_program(
        PRETRAIN,
        *("--train_data", tar_folder, *TINY, *SHORT, "--num_workers", "0", "--output_dir", "runs/mine"),
        *("--push_to_hub", "--hub_push_samples", "64", "--hub_private_repo", "False"),
        environment={HUB: hub.endpoint, "HF_TOKEN": WRITER},
        cwd=tmp_path,
        prepare=log_requests_at_the_local_hub,
    )
    assert done.returncode == 0 and "Request" in done.stderr, done.stderr[-3000:]
    assert WRITER not in done.stdout + done.stderr
    assert not hub.drops and "Retrying in 2 s" in done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(f"Pushed    {hub.endpoint}/you/mine (public): ")
    published = hub.repositories["you/mine"]
    folder = tmp_path / "runs" / "mine"
    assert len(published.commits) == 3 and not published.private  # its creation, the first push, and the last
    for name in ("model.safetensors", "log.jsonl", "training_curves.png"):
        assert published.files[name] == (folder / name).read_bytes(), name
    for name in ("recipe.yaml", "results.json"):  # as they are, but for the folders of this machine
        assert yaml.safe_load(published.files[name]) == without_paths(yaml.safe_load((folder / name).read_bytes())), (
            name
        )
        assert str(tar_folder.parent) not in published.files[name].decode()
    card = published.files["README.md"].decode()
    assert 'model="you/mine"' in card and "| pairs seen | 256," in card and "minutes of training on 1 x " in card
    assert not list(folder.glob("partial-*"))
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [name for name, data in {**written, **published.files}.items() if WRITER.encode() in data]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--export_clip", "--push_to_hub"], "A CLIPModel cannot compute what this FlipModel does: "),
        (["--hub_model_id", "you/mine"], "--hub_model_id needs --push_to_hub"),
        (["--push_to_hub"], "You are not logged in to the Hub"),
    ],
)
def test_unpublishable_runs_are_refused_before_training(argv, message, tar_folder, tmp_path):
    words = ["--train_data", str(tar_folder), *TINY, *SHORT, "--output_dir", str(tmp_path / "mine"), *argv]
    with pytest.raises(MISTAKES, match=message):
        build_trainer(parse_arguments(words, ROOT / "flip_hf" / "recipes", "shapes"))
    assert not list((tmp_path / "mine").glob("*"))
