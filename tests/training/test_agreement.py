"""The agreement of all processes before a step."""

import ast

from tests.helpers.programs import run_program

# Each process in turn has a wish. The device is one that holds no values, so that none can be read from it.
AGREE = """
import os
from types import SimpleNamespace
import torch
from flip_hf.data.processes import make_accelerator
from flip_hf.training.agreement import agree
accelerator = make_accelerator()
rank = accelerator.process_index
busy = SimpleNamespace(num_processes=2, device=torch.device("meta"))
for each in (accelerator, busy, busy):
    found = [agree(each, stop=rank == 0 and wish == 0, failed=rank == 1 and wish == 1, overdue=wish == 2)
             for wish in range(4)]
    os.write(1, (repr([(a.stop, a.failed, a.overdue) for a in found]) + "\\n").encode())
os.write(1, f"{len(torch.distributed.distributed_c10d._world.pg_map)}\\n".encode())
accelerator.end_training()
"""


def test_processes_agree_in_host_memory_whatever_their_device(tmp_path):
    script = tmp_path / "agree.py"
    script.write_text(AGREE)
    run = run_program(script, processes=2, environment={"CUDA_VISIBLE_DEVICES": ""})
    *agreed, first, second = sorted(run.stdout.splitlines(), reverse=True)
    wishes = [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]
    assert [ast.literal_eval(line) for line in agreed] == [wishes] * 6, run.stderr[-2000:]
    assert first == second == "2"  # the default group and one of the hosts, however often they agree
