"""Runs of a document's commands: their programs, the options that make them small, and those that are not run.

A command runs as printed. Where that would take a data set of the world or a GPU, options are added behind the printed
ones, which they win over: those are still parsed and checked, and, of the programs with options of their own making,
checked as printed first.
"""

import json
import re
import subprocess
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from flip_hf.commands.main import COMMANDS
from flip_hf.evaluation.options import parse_options
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.recipes import RECIPES, parse_arguments
from flip_hf.training.stages import read_stages
from tests.helpers.documents.prepared import serve_and_leave, small_benchmarks, use_local_hub, use_local_hub_to_push
from tests.helpers.pretraining import TINY
from tests.helpers.programs import ROOT

# The beginning of a command, and why it is not run. Scripts that it names must exist.
NOT_RUN = {
    "pip install": "tests install nothing; that extras exist is checked",
    "make": "it installs first; that its targets exist is checked",
    "git clone": "the repository is here",
    "cd flip_hf": "the tests run in a copy of it already",
    "source .venv/bin/activate": "the tests run in an environment already; that make fills this one is checked",
    "python -m flip_hf.evaluation.clip_benchmark": "runs where CLIP_benchmark is installed: test_clip_benchmark.py",
}
# Of the system, and run as they are.
SYSTEM = ("cp",)


@dataclass(frozen=True)
class Script:
    """The way that a script of this repository is run.

    Attributes:
        smaller: words to add, made from the printed ones and the folder that they are about; it may check those.
        outputs: options in front of what is written, and need not be there; `2`: the word at this place.
        prepare: called in the script's process before it starts.
    """

    smaller: Callable[[list[str], Path], list[str]] = lambda words, folder: []
    outputs: tuple[str | int, ...] = ("--output", "--output_dir")
    prepare: Callable[[], None] | None = None


def smaller_phases(printed: OptimizationArguments) -> list[Any]:
    """Two steps of training, and of tuning; of stages as many of each, on images as small as the towers'."""
    if printed.stages is None:
        samples = [("train", printed.train_samples), ("unmasked", printed.unmasked_samples)]
        return [word for name, count in samples for word in (f"--{name}_samples", min(count, 64))]
    stages = [dict(stage.to_recipe(), samples=min(stage.samples, 64)) for stage in read_stages(printed.stages)]
    for stage in stages:
        stage |= {name: most for name, most in (("image_size", 16), ("text_length", 8)) if name in stage}
    stages[-1].pop("image_size", None)
    return ["--stages", json.dumps(stages)]


def smaller_pretraining(words: list[str], folder: Path) -> list[str]:
    """Two steps of tiny towers; what the printed options say is checked first, all of it."""
    is_file = bool(words) and (folder / words[0]).is_file()
    printed = parse_arguments([str(folder / words[0]), *words[1:]] if is_file else words, RECIPES, "shapes")
    small = smaller_phases(printed.optimization)
    small += ["--batch_size", 32, "--warmup_samples", 32, "--log_samples", 32, "--shuffle_block", 8]
    small += ["--num_workers", 0, "--precision", "fp32", "--report_to", "none"]
    if printed.optimization.micro_batch_size:
        small += ["--micro_batch_size", 16]
    if printed.model.model_name_or_path is None:
        small += TINY
    if printed.model.freeze:  # of towers of two blocks
        small += ["--freeze", *(re.sub(r":\d+", ":1", part) for part in printed.model.freeze)]
    if printed.model.lora:
        small += ["--lora", *(re.sub(r":\d+", ":2", part) for part in printed.model.lora)]
    if printed.data.tokenizer:
        small += ["--tokenizer", printed.data.tokenizer]  # the recipe's: a name that needs a stand-in, too
    if printed.data.holdout:
        small += ["--holdout", 0.3]  # of a few dozen pairs
    if printed.model.image_size:
        small += ["--image_size", 64]
    if printed.objective.reconstructs:
        decoder = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        small += ["--decoder_config", json.dumps(decoder)]
    return [str(word) for word in small]


def smaller_evaluation(words: list[str], folder: Path) -> list[str]:
    """Local copies, one prompt a class, short probes."""
    if words == ["--list"]:
        return []
    printed = parse_options(words[1:])
    small = ["--num_workers", "0", "--shots", "1", "2", "--repeats", "1", "--templates", "clip_1"]
    if printed.datasets and printed.data_dir is None:
        small += ["--data_dir", "copies"]
    if "fine-tune" in printed.tasks or printed.probe != "clip":
        pytest.importorskip("torchvision", reason="an extra of its own, which goes with one build of torch alone")
        small += ["--epochs", "1", "--train_batch_size", "8"]
    return small


def smaller_conversion(words: list[str], folder: Path) -> list[str]:
    """The fixture's heads, which no released size tells."""
    return ["--vision_heads", "4", "--text_heads", "4"] if words[0] == "flip-official" else []


def smaller_benchmark(words: list[str], folder: Path) -> list[str]:
    """One repeat on the CPU."""
    small = ["--device", "cpu", "--precision", "fp32", "--repeats", "1", "--batch_size", "4"]
    of_question = {
        "loss": ["--pairs", "64", "--tile_sizes", "256"],
        "loader": ["--mask_ratios", "0.75", "--seconds", "0.01"],
        "end-to-end": ["--mask_ratios", "0.75", "--steps", "1", "--workers", "1", "--peers"],
    }
    return small + of_question.get(words[0], [])


def smaller_data(words: list[str], folder: Path) -> list[str]:
    """In one process, with a short measurement."""
    return ["--workers", "0", *(["--seconds", "0.01"] if words[0] == "check" else [])]


def smaller_interpolation(words: list[str], folder: Path) -> list[str]:
    """No loader workers."""
    return ["--num_workers", "0"] if "--data" in words else []


def smaller_plan(words: list[str], folder: Path) -> list[str]:
    """Of towers of one block: tracing takes seconds for each."""
    one_block = json.dumps({"num_hidden_layers": 1})
    return ["--masks", "0.5", "--vision_config", one_block, "--text_config", one_block]


def smaller_reproduction(words: list[str], folder: Path) -> list[str]:
    """Figures of the points that come with the repository; the runs are those of tests/reproduction."""
    return [] if "--figures_only" in words else ["--folder", "scripts/results/reproduce", "--figures_only"]


SCRIPTS = {
    "pretrain.py": Script(smaller_pretraining, prepare=use_local_hub_to_push),
    "evaluate.py": Script(smaller_evaluation),
    "convert.py": Script(smaller_conversion, outputs=(2,)),
    "data.py": Script(smaller_data, outputs=(2,)),
    "interpolate.py": Script(smaller_interpolation),
    "reconstruct.py": Script(lambda words, folder: ["--samples", "8"]),
    "zero_shot.py": Script(),
    "embed.py": Script(lambda words, folder: ["--workers", "0"], outputs=(2,)),
    "search.py": Script(),
    "push_to_hub.py": Script(outputs=(1, "--dry_run"), prepare=use_local_hub),
    "demo.py": Script(prepare=serve_and_leave),
    "benchmark.py": Script(smaller_benchmark, prepare=small_benchmarks),
    "plan.py": Script(smaller_plan),
    "reproduce.py": Script(smaller_reproduction, outputs=("--folder",)),
}


def reason_not_to_run(words: list[str]) -> str | None:
    """The entry of [`NOT_RUN`] for a command."""
    line = " ".join(words)
    return next((entry for entry in NOT_RUN if f"{line} ".startswith(f"{entry} ")), None)


def check_not_run(words: list[str]) -> None:
    """Checks what can be of a command that is not run.

    Raises:
        ValueError: it names a script, a module, a target or an extra that is not there.
    """
    missing = [word for word in words if word.startswith("scripts/") and not (ROOT / word).is_file()]
    if missing:
        raise ValueError(f"there is no {missing[0]}.")
    if words[:2] == ["python", "-m"] and find_spec(words[2]) is None:
        raise ValueError(f"there is no module {words[2]}.")
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(done.stderr.strip())
    if words[0] == "source" and "VENV ?= .venv\n" not in (ROOT / "Makefile").read_text(encoding="utf-8"):
        raise ValueError("the Makefile installs elsewhere.")
    if words[:2] == ["pip", "install"]:
        extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for name in re.findall(r"\w+", " ".join(re.findall(r"(?:flip_hf|\.)\[(.*?)\]", " ".join(words)))):
            if not re.search(rf"^{name} = \[", extras, flags=re.M):
                raise ValueError(f"pyproject.toml has no extra {name!r}.")


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """The script that a command runs, as `scripts/NAME`, and its words.

    A command of `flip-hf`, or of `-m flip_hf`, is run by the script that is the same: its process starts at once.

    Raises:
        ValueError: it is no command that is known here.
    """
    if words[0] == "flip-hf":
        script = _script_of(words[1])
        argv = words[2:]
    elif words[:3] == ["python", "-m", "flip_hf"]:
        script = _script_of(words[3])
        argv = words[4:]
    elif words[0] == "python":
        script = words[1]
        argv = words[2:]
    elif words[:2] == ["accelerate", "launch"]:
        script, argv = _program_that_starts(_launched(words[2:]))
    elif words[0] == "torchrun":  # run in one process; tests/data/test_processes.py runs two
        script, argv = _program_that_starts(get_args_parser().parse_args(words[1:]))
    else:
        raise ValueError(f"these tests do not know the command {words[0]!r}; see tests/helpers/documents/commands.py.")
    if Path(script).name not in SCRIPTS or Path(script).parent.as_posix() != "scripts":
        raise ValueError(f"these tests do not know the script {script!r}; see tests/helpers/documents/commands.py.")
    return script, argv


def _script_of(command: str) -> str:
    if command not in COMMANDS:
        raise ValueError(f"flip-hf has no command {command!r}.")
    return f"scripts/{'push_to_hub' if command == 'push' else command.replace('-', '_')}.py"


def _program_that_starts(launched: Namespace) -> tuple[str, list[str]]:
    """The script, or the module, that a launcher was asked for, and its words."""
    script = launched.training_script
    argv = launched.training_script_args
    if not launched.module:
        return script, argv
    if script != "flip_hf":
        raise ValueError(f"these tests do not know the module {script!r}; see tests/helpers/documents/commands.py.")
    return _script_of(argv[0]), argv[1:]


def _launched(words: list[str]) -> Namespace:
    """Parses as Accelerate does the words behind `accelerate launch`; its options are checked, and its file is read."""
    try:
        launched = launch_command_parser().parse_args(words)
    except SystemExit:
        raise ValueError(f"`accelerate launch` does not take {words}.") from None
    if launched.config_file:
        load_config_from_file(str(ROOT / launched.config_file))
    return launched


def inputs_of(script: Script, words: list[str]) -> list[str]:
    """The words that may name something that is read."""
    return [
        word
        for i, word in enumerate(words)
        if i not in script.outputs and (i == 0 or words[i - 1] not in script.outputs)
    ]
