"""The options of every script: numbers have ranges, mistakes are one line and exit code 2, outputs are tried first."""

import argparse
import importlib
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import flip_hf
from flip_hf import FlipPreTrainingConfig
from flip_hf.commands import main
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.ranges import Range
from flip_hf.training.recipes import option_names, parse_arguments
from tests.helpers.models import tiny_config
from tests.helpers.programs import ROOT

COMMANDS = ["benchmark", "demo", "embed", "plan", "push", "reconstruct", "reproduce", "search", "zero_shot"]
FIRST = {
    "benchmark": ["step"],
    "demo": ["MODEL"],
    "embed": ["MODEL", "DATA", "OUT"],
    "plan": [],
    "push": ["FOLDER", "OWNER/NAME"],
    "reconstruct": ["MODEL", "IMAGE"],
    "reproduce": [],
    "search": ["FOLDER", "TEXT"],
    "zero_shot": ["MODEL", "IMAGE", "--labels", "x"],
}


@pytest.fixture(params=COMMANDS)
def command(request):
    if request.param == "demo":
        pytest.importorskip("gradio")
    return importlib.import_module(f"flip_hf.commands.{request.param}")


def first_words(command) -> list[str]:
    return FIRST[command.__name__.rpartition(".")[2]]


def test_every_number_of_a_command_has_a_range_and_refuses_all_else(command, capsys):
    parser = command.make_parser()
    assert isinstance(parser, ScriptParser)
    words = first_words(command)
    parser.parse_args(words)
    for action in parser._actions:
        # No bare int or float: they take NaN, infinity and what is out of range.
        assert action.type not in (int, float), action.dest
        if not isinstance(action.type, Range):
            continue
        within = action.type
        bounds = [within.low if within.open_low else within.low - 1]
        if within.high is not None:
            bounds.append(within.high if within.open_high else within.high + 1)
        for value in (*bounds, "nan", "inf", "-inf", "-1e300", "abc", "9" * 5000):
            for given in ([action.option_strings[0], str(value)], [f"{action.option_strings[0]}={value}"]):
                with pytest.raises(SystemExit) as end:
                    parser.parse_args([*words, *given])
                printed = capsys.readouterr().err
                assert end.value.code == 2 and printed.count("\n") == 1, (action.dest, value)
                assert printed.startswith(f"error: {action.option_strings[0]} ")


def test_unknown_options_get_the_nearest_known_one(command, capsys):
    if command.__name__.endswith("plan"):
        pytest.skip("hands them on to the parser of pretrain")
    parser = command.make_parser()
    words = first_words(command)
    known = next(
        name for action in parser._actions for name in action.option_strings if len(name) > 5 and name != "--help"
    )
    for given in (f"{known}x", known[:-1], f"{known.replace('_', '-')}s=3"):
        with pytest.raises(SystemExit) as end:
            parser.parse_args([*words, given])
        printed = capsys.readouterr().err
        assert end.value.code == 2 and printed.count("\n") == 1
        assert f"there is no option {given.split('=')[0]}. Did you mean {known!r}?" in printed


WHAT_WAS_IMPORTED = """
import sys
from flip_hf.commands.main import main
for words in {calls}:
    code = 0
    try:
        main(words)
    except SystemExit as end:
        code = end.code or 0
    heavy = [name for name in ("torch", "transformers", "datasets", "accelerate") if name in sys.modules]
    print("|", words, code, heavy, flush=True)
"""


def test_help_and_mistakes_come_before_the_imports_that_take_seconds():
    """In one process that has imported nothing else: what a command imports stays for those after it."""
    calls = [[name, word] for name in main.COMMANDS for word in ("--help", "--no_such_option")]
    calls = [["--help"], ["--version"], ["--no_such_option"], *calls]
    program = WHAT_WAS_IMPORTED.format(calls=calls)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("|")]
    expected = [f"| {words} {2 if words[-1] == '--no_such_option' else 0} []" for words in calls]
    assert said == expected, done.stderr[-2000:]


def test_pretrain_helps_with_the_recipe_and_names_each_option_once(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], ROOT / "flip_hf" / "recipes", "shapes")
    printed = capsys.readouterr().out
    assert "[RECIPE]" in printed and "vit_l16_mask75_text50" in printed
    for name in option_names():
        assert len(re.findall(rf"^  --{name} ", printed, re.MULTILINE)) == 1, name
    assert "mask-ratio" not in printed and "(default: 0.5)" in printed
    titles = re.findall(r"^([a-z ]+):$", printed, re.MULTILINE)
    assert titles == [
        "options",
        "most used",
        "model",
        "masks",
        "objective",
        "data",
        "optimization",
        "run",
        "hub",
        "retention",
    ]
    # The options that matter are on the first screen, with choices and defaults like all others.
    first = printed[printed.index("most used:") : printed.index("model:")]
    assert len(re.findall(r"^  --", first, re.MULTILINE)) == 10 and printed[: printed.index("model:")].count("\n") < 50
    assert "--mask_ratio_schedule {linear,cosine}" in printed and "(default: linear)" in printed


def run(monkeypatch, script: str, *words: object) -> tuple[str, int]:
    """The message of a script that must end, and its exit code; in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    return str(end.value), end.value.code


@pytest.mark.parametrize(
    ("script", "words", "said", "code"),
    [
        ("demo", ["MODEL", "--server_port", "70000"], "--server_port must be between 1 and 65,535, got 70000.", 2),
        ("benchmark", ["steps"], "question is one of end-to-end, .*, got 'steps'.", 2),
        ("benchmark", ["step", "--batch_size"], "--batch_size needs a value.", 2),
        ("benchmark", ["loss", "--device", "gpu"], "--device gpu is not a device of this machine: ", 2),
        ("benchmark", ["loss", "--device", "meta"], "--device is cpu or cuda, got meta; CUDA_VISIBLE_DEVICES", 2),
        ("zero_shot", ["MODEL", "IMAGE"], "the following arguments are required: --labels.", 2),
        ("reconstruct", ["MODEL"], "give image files or --data, one of the two.", 2),
        ("search", ["FOLDER"], "give texts, or pictures with --image.", 2),
        ("plan", ["vit_b16", "--mask-ration", "0.5"], "there is no option --mask-ration. Did you mean", 2),
        ("plan", ["vit_b16", "--nodez", "2"], "there is no option --nodez. Did you mean '--nodes'", 2),
        ("plan", ["vit_b16", "--gpu", "X100"], "--gpu There is no GPU 'X100' in the table.* Known: B200, ", 2),
        ("pretrain", ["--mask-ration", "0.5"], "there is no option --mask-ration. Did you mean '--mask_ratio'", 2),
        (
            "convert",
            ["clip", "a", "b", "--mask-ration", "0.5"],
            ".*option --mask-ration. Did you mean '--mask_ratio'",
            2,
        ),
        ("plan", ["vit_b16", "--base_lr", "-inf"], "--base_lr must be a number between 0 and 1,000, got -inf.", 2),
        ("plan", ["vit_b17"], "There is no recipe 'vit_b17'", 1),
        (
            *("plan", ["vit_b16", "--compile", "True", "--speed_ups", "cuda_graphs"]),
            *("--speed_ups cuda_graphs supports a single process and a batch in one piece: give --gpus 1", 2),
        ),
        ("plan", ["vit_b16", "--mfu", "nan"], "--mfu is a fraction", 2),
        ("evaluate", ["MODEL", "--batch_size", "abc"], "--batch_size must be an integer between 1 and", 2),
        ("evaluate", ["--tasks", "zero-shot", "--datasets", "cifar10"], "Name the model first", 2),
        ("evaluate", ["M", "--data", "x", "--target_column", "y"], "there is no option --target_column. Did you", 2),
        (
            "evaluate",
            ["M", "--data", "x", "--caption_column", "y"],
            "--caption_column is for other tasks; for zero-s",
            2,
        ),
        ("evaluate", ["M", "--data", "x", "--templates", "{} {}"], "--templates: The template .* 2 times; write it", 2),
        ("zero_shot", ["M", "I", "--labels", "a", ""], "Label 2 of 2 is empty", 2),
        ("zero_shot", ["M", "I", "--labels", "cat,dog"], '--labels .* is only one: give --labels "cat" "dog"', 2),
        ("zero_shot", ["M", "I", "--labels", "a", "b", "--template", "{a} {}"], ".* has {a}, which nothing fills", 2),
        ("pretrain", ["vit_b16", "--train_data", "x", "--templates", "{} {}"], "--templates: .* 2 times", 2),
        ("demo", ["/no/such/folder"], "The model /no/such/folder cannot be loaded: there is no such folder.", 1),
        ("evaluate", ["--list", "--card"], "--list stands alone", 2),
        ("benchmark", ["step", "--arch", "B/16"], "there is no option --arch. Did you mean '--architecture'", 2),
        ("reproduce", ["--only", "nothing", "--folder", "/tmp/none"], "no run has 'nothing' in its name: mask0-", 1),
        ("reproduce", ["--budget", "nan"], "--budget must be a number above 0 and at most 1e.09, got nan.", 2),
        ("zero_shot", ["no/such/model", ROOT / "docs" / "x.png", "--labels", "a", "b"], ".*x.png cannot be read", 1),
    ],
)
def test_mistakes_are_one_line_with_an_exit_code(script, words, said, code, monkeypatch, capsys):
    if script == "demo":
        pytest.importorskip("gradio")
    line, ended = run(monkeypatch, script, *words)
    assert ended == code and re.match(f"error: {said}", line), line
    assert "\n" not in line and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "words", "option"),
    [
        ("benchmark", ["step", "--output", "OUT/x"], "--output"),
        ("demo", ["MODEL", "--space", "OUT"], "--space"),
        ("plan", ["vit_b16", "--output", "OUT/x"], "--output"),
        ("plan", ["vit_b16", "--plot", "OUT/x.png"], "--plot"),
        ("plan", ["--check", "--output", "OUT/x"], "--output"),
        ("reconstruct", ["MODEL", "--data", "x", "--output", "OUT/x.png"], "--output"),
        ("reproduce", ["--folder", "OUT"], "--folder"),
        ("evaluate", ["MODEL", "--datasets", "cifar10", "--output_dir", "OUT"], "--output_dir"),
        ("embed", ["MODEL", "x", "OUT"], "out"),
    ],
)
def test_the_output_folder_is_checked_first(script, words, option, tmp_path, monkeypatch):
    """MODEL is none: what is said is about the output, so that it came first."""
    if script == "demo":
        pytest.importorskip("gradio")
    (tmp_path / "file").write_text("x")
    for where, why in ((tmp_path / "file" / "in", "is not a folder"), ("/proc/none", "cannot be written")):
        line, code = run(monkeypatch, script, *(word.replace("OUT", str(where)) for word in words))
        assert code == 1 and line.startswith(f"error: {option} ") and why in line, line
    assert os.listdir(tmp_path) == ["file"]


def test_a_picture_of_no_known_kind_is_refused_first(monkeypatch, tmp_path):
    line, _ = run(monkeypatch, "reconstruct", "MODEL", "--data", "x", "--output", tmp_path / "a.doc")
    assert "--output" in line and "pictures are written as" in line and "not doc." in line


def test_parsers_are_the_scripts_own():
    for name in COMMANDS:
        source = (ROOT / "flip_hf" / "commands" / f"{name}.py").read_text()
        assert "argparse.ArgumentParser(" not in source and "sys.exit(f" not in source, name
    assert issubclass(ScriptParser, argparse.ArgumentParser)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("zero_shot", ["MODEL", "IMAGE", "--labels", "a", "b"]),
        ("reconstruct", ["MODEL", "IMAGE", "--output", "OUT.png"]),
        ("evaluate", ["MODEL", "--data", "shapes", "--output_dir", "OUT"]),
        ("embed", ["MODEL", "shapes", "OUT"]),
        ("demo", ["MODEL"]),
        ("demo", ["MODEL", "--space", "OUT"]),
    ],
)
def test_damaged_weights_are_one_line_in_every_script(script, words, saved, tmp_path, monkeypatch, capsys):
    if script == "demo":
        pytest.importorskip("gradio")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-50])
    if script == "reconstruct":  # which asks for a model with a decoder first
        FlipPreTrainingConfig(flip_config=tiny_config()).save_pretrained(saved)
    names = {"MODEL": str(saved), "IMAGE": str(tmp_path / "a.png")}
    capsys.readouterr()
    words = [names.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in words]
    line, code = run(monkeypatch, script, *words)
    assert code == 1 and "model.safetensors is damaged" in line, line
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.glob("out*"))


def test_a_command_without_its_extra_names_the_install_command(monkeypatch, capsys):
    """As after `pip install flip_hf`: the module cannot be imported."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("gradio", "flip_hf.demo")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("flip_hf.demo.page", "flip_hf.demo.space"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as end:
        main.main(["demo", "MODEL"])
    assert end.value.code == 1
    said = "error: `flip-hf demo` needs gradio, which is not installed: pip install 'flip_hf[demo]'.\n"
    assert capsys.readouterr().err == said


def test_env_prints_versions_and_hardware_and_nothing_of_this_machine(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    main.main(["env"])
    printed = capsys.readouterr().out
    assert all(line.startswith("- ") and ": " in line for line in printed.splitlines())
    for name, value in {"flip_hf": flip_hf.__version__, "torch": torch.__version__}.items():
        assert f"- {name}: {value}\n" in printed
    assert "- python: CPython 3." in printed and "- processor: " in printed and "- deepspeed: " in printed
    private = (socket.gethostname(), str(ROOT), str(Path.home()), sys.prefix, "hf_x")
    assert not [each for each in private if len(each) > 1 and each in printed]


def test_the_command_names_its_subcommands_and_its_version(capsys):
    main.main([])
    listed = capsys.readouterr().out
    assert re.findall(r"^  ([a-z-]+)  +\w", listed, re.MULTILINE) == list(main.COMMANDS)
    modules = {path.stem.replace("_", "-") for path in (ROOT / "flip_hf" / "commands").glob("[a-z]*.py")} - {"main"}
    assert modules == set(main.COMMANDS)
    main.main(["--version"])
    assert capsys.readouterr().out == f"flip_hf {flip_hf.__version__}\n"
    with pytest.raises(SystemExit) as end:
        main.main(["zero_shott"])
    assert end.value.code == 2 and "Did you mean 'zero-shot'?" in capsys.readouterr().err
