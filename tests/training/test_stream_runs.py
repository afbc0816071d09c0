"""Runs on data that are damaged, mixed, or read by another number of processes after a resume."""

import itertools
import json

import pytest

from flip_hf.data.reading import Reader, epoch_shards
from flip_hf.data.refusals import MAX_LOGGED
from tests.helpers.damaged import BAD_PER_SHARD, PER_SHARD, SHARDS, good, shard, write_damaged_shards
from tests.helpers.loading import make_train_loader, numbers
from tests.helpers.pretraining import TINY, pretrain

RUN = [
    *(*TINY, "--unmasked_samples", "0", "--batch_size", "50", "--report_to", "none", "--precision", "fp32"),
    *("--warmup_samples", "100", "--log_samples", "1000"),
    *("--tokenizer_samples", "500", "--tokenizer_vocab_size", "300"),
]


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_run_on_damaged_data_uses_every_good_sample_once_and_reports_every_bad_one(tmp_path):
    """One epoch of a launched run with two workers, and what it read.

    The run itself does not say which samples it saw. Its last checkpoint's data state, the position of both workers and
    their counts, is the very one that a loader of this process has after as many batches; of that one the samples are
    seen.
    """
    data = tmp_path / "data"
    out = tmp_path / "out"
    data.mkdir()
    usable, reasons = write_damaged_shards(data, SHARDS, PER_SHARD, BAD_PER_SHARD)
    run = pretrain(
        *("--train_data", str(data), "--output_dir", str(out), *RUN, "--num_workers", "2", "--seed", "5"),
        *("--train_samples", str(len(usable)), "--shuffle_block", "128"),
        *("--checkpoint_samples", str(len(usable) - 50)),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = results(out)
    assert report["refused"] == dict(reasons) and report["samples"] == len(usable)
    assert report["sources"] == {str(data): {"samples": len(usable), "refused": dict(reasons)}}
    assert f"{reasons['damaged image']} x damaged image" in run.stdout
    assert run.stderr.count("Skipped in") <= 2 * 20  # each worker's first ten, then one a minute

    loader = make_train_loader(data, workers=2, block=128, batch_size=50)
    batches = iter(loader)
    seen = numbers(itertools.islice(batches, len(usable) // 50 - 1))
    checkpoint, end = sorted(out.glob("checkpoint-*"))
    assert end.name == f"checkpoint-{len(usable):012d}"
    assert json.loads((checkpoint / "data_0.json").read_text()) == json.loads(json.dumps(loader.state_dict()))
    assert sorted(seen + numbers([next(batches)])) == usable


def test_a_run_resumes_with_other_processes_and_a_mixture(tmp_path):
    """Two processes of two workers, then one of none: of each source, whole epochs are seen whole."""
    for name, first, size in (("a", 0, 600), ("b", 600, 400)):
        (tmp_path / name).mkdir()
        for start in range(first, first + size, 50):
            rows = [(f"{n:05d}", good(n, side=16)) for n in range(start, start + 50)]
            (tmp_path / name / f"{start}.tar").write_bytes(shard(rows))
    folders = [str(tmp_path / name) for name in "ab"]
    out = tmp_path / "out"
    argv = ["--train_data", *folders, "--train_weights", "3", "1", *RUN, "--output_dir", str(out)]
    argv += ["--checkpoint_samples", "300", "--shuffle_block", "32"]
    run = pretrain(*argv, "--train_samples", "350", "--num_workers", "2", processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    run = pretrain(
        *(*argv, "--train_samples", "1000", "--num_workers", "0", "--resume_from_checkpoint", "latest"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr.count("written by 4 readers in 2 process(es), this run has 1 in 1") == 1
    drawn = {name: source["samples"] for name, source in results(out)["sources"].items()}
    assert sum(drawn.values()) == 1000 and drawn[folders[0]] == pytest.approx(750, abs=60)
    assert f"Read      {drawn[folders[0]]} of {folders[0]}" in run.stdout


def test_garbage_ends_a_run_in_one_line_and_leaves_its_checkpoint(tmp_path):
    order, _ = epoch_shards(4, Reader(0, 1), epoch=0, seed=0)
    for part in range(4):
        # The shard that is read first is sound but for as many samples as are logged one by one, of the others a tenth.
        bad = {*range(MAX_LOGGED)} if part == order[0] else {n for n in range(1500) if n % 10}
        rows = [(f"{n:05d}", [("txt", b"t")] if n in bad else good(n)) for n in range(1500)]
        (tmp_path / f"{part}.tar").write_bytes(shard(rows))
    run = pretrain(
        *("--train_data", str(tmp_path), "--output_dir", str(tmp_path / "out"), *RUN, "--num_workers", "1"),
        *("--train_samples", "1000", "--checkpoint_samples", "1000", "--shuffle_block", "1", "--seed", "0"),
        *("--unmasked_samples", "100000"),  # that this phase begins is the last that is said, with the bar below it
    )
    assert run.returncode == 1, run.stderr[-3000:]
    error = next(line for line in run.stderr.splitlines() if line.startswith("error: "))
    assert "could not be used, which is more than --max_bad_fraction 0.5" in error and "x missing image" in error
    assert list((tmp_path / "out").glob("checkpoint-*"))
