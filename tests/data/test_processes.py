"""As many processes as were started train together, or none does."""

import json
import re

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from PIL import Image
from safetensors.torch import load_file

from flip_hf.data.drawing import encode
from flip_hf.data.processes import make_accelerator
from tests.helpers.pairs import write_tar
from tests.helpers.pretraining import PRETRAIN, SHORT, TINY, pretrain
from tests.helpers.programs import run_program

# As torchrun starts processes for a user, who has not configured Accelerate for the CPU.
UNTOLD = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
SAY = """
import os
import torch
from flip_hf.data.processes import make_accelerator
accelerator = make_accelerator()
total = accelerator.reduce(torch.ones(1)).item()
said = f"{accelerator.process_index} {accelerator.num_processes} {total} {accelerator.device.type}\\n"
os.write(1, said.encode())  # in one piece: both processes write into one file
accelerator.end_training()
"""


def test_torchrun_on_a_cpu_makes_one_run_of_two_processes(samples, tokenizer, tmp_path):
    """One process with the same batches comes to the same weights."""
    (tmp_path / "tars").mkdir()
    # A step sees all pairs, whoever reads which of them; and of one colour, a picture's crops are all the same.
    pictures = [encode(Image.new("RGB", (32, 32), (4 * i, 255 - 3 * i, 7 * i % 256))) for i in range(64)]
    pairs = [(key, picture, text) for (key, _, text), picture in zip(samples, pictures, strict=False)]
    for shard in range(4):
        write_tar(tmp_path / "tars" / f"{shard}.tar", pairs[16 * shard : 16 * (shard + 1)])
    argv = ["--train_data", str(tmp_path / "tars"), *TINY, *SHORT, "--num_workers", "0"]
    argv += ["--mask_ratio", "0", "--batch_size", "64", "--train_samples", "192"]
    argv += ["--unmasked_samples", "0", "--adam_epsilon", "0.001"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    argv += ["--tokenizer", str(tmp_path / "tokenizer"), "--output_dir"]
    one = pretrain(*argv, str(tmp_path / "one"))
    two = run_program(PRETRAIN, *argv, tmp_path / "two", processes=2, environment=UNTOLD)
    assert one.returncode == 0 and two.returncode == 0, one.stderr[-2000:] + two.stderr[-2000:]
    assert "on 1 process" in one.stdout and "on 2 processes" in two.stdout and two.stdout.count("Trained") == 1
    assert json.loads((tmp_path / "two" / "results.json").read_text())["hardware"]["processes"] == 2
    assert "is deprecated" not in two.stderr and not re.search(r"flip_hf/\S+ \w*Warning", two.stderr), two.stderr[
        -3000:
    ]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    far = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    assert max(far.values()) < 1e-5, far


def test_processes_that_find_no_group_do_not_start(tmp_path, monkeypatch):
    script = tmp_path / "say.py"
    script.write_text(SAY)
    run = run_program(script, processes=2, environment=UNTOLD)
    assert sorted(run.stdout.splitlines()) == ["0 2 2.0 cpu", "1 2 2.0 cpu"], run.stderr[-2000:]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # a device whose groups Accelerate cannot make
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(ValueError, match="2 processes were started .* `torchrun --standalone --nproc_per_node 2"):
        make_accelerator()


def test_the_one_process_of_a_launch_of_two_is_an_error(tmp_path):
    """The process gets the environment that Accelerate's own launcher would give it."""
    script = tmp_path / "say.py"
    script.write_text(SAY)
    for processes, code in ((2, 1), (1, 0)):
        asked = ["--cpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
        asked += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
        _, environment = prepare_simple_launcher_cmd_env(launch_command_parser().parse_args([*asked, str(script)]))
        run = run_program(script, environment=environment)
        assert run.returncode == code, run.stderr
        assert ("was asked for several processes but starts one" in run.stderr) == (processes == 2)
