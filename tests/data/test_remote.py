"""Data behind URLs: a real web server, with and without ranges, that drops connections."""

import itertools
import os
import signal
import threading

import fsspec
import pytest

from flip_hf.data import files, reading
from flip_hf.data.refusals import BadDataError
from flip_hf.data.sources import open_source
from flip_hf.data.waits import WaitEnded, allow_waits, end_waits
from tests.helpers.loading import make_train_loader, numbers, saved
from tests.helpers.pairs import write_tar
from tests.helpers.watched import serve

KEYS = list(range(160))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranges", [True, False])
def test_tar_shards_of_a_web_server_are_read_and_resumed(server, tar_folder, ranges, workers):
    server.ranges = ranges
    url = server.url("tars/shard-{0000..0004}.tar")
    whole = numbers(itertools.islice(make_train_loader(url, workers=workers), 20))
    assert len(set(whole)) > 120 and (workers or sorted(whole) == KEYS)
    local = numbers(itertools.islice(make_train_loader(tar_folder / "shard-{0000..0004}.tar", workers=workers), 20))
    assert whole == local
    loader = make_train_loader(url, workers=workers)
    assert numbers(itertools.islice(loader, 7)) == whole[:56]
    rest = make_train_loader(url, workers=workers, states=saved([loader]))
    assert numbers(itertools.islice(rest, 13)) == whole[56:]


def test_parquet_of_a_web_server_is_read(server, parquet_folder):
    url = server.url("parquet/part-{0..3}.parquet")
    source = open_source(url, image_column="picture", target_column="words")
    assert sorted(int(source.target(row)[:5]) for row in source.rows()) == KEYS


@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection_is_resumed(server, tar_folder, ranges, caplog):
    loader = make_train_loader(server.url("tars/shard-{0000..0004}.tar"), batch_size=1)
    server.ranges = ranges
    server.drops = ["shard-0001.tar", "shard-0003.tar", "shard-0003.tar"]
    assert sorted(numbers(itertools.islice(loader, 160))) == KEYS
    assert server.drops == [] and loader.counts["refused"] == {}
    assert caplog.text.count("was interrupted") >= 3 and "ClientPayloadError" in caplog.text


@pytest.mark.parametrize("lengths", [True, False])
def test_large_files_come_in_one_go_where_there_are_no_ranges(server, samples, tmp_path, lengths):
    """Larger than what fsspec asks for at once (5 MiB)."""
    rows = [(key, image + bytes(400_000), caption) for key, image, caption in samples[:32]]
    write_tar(tmp_path / "large.tar", rows)
    server.ranges = False
    server.lengths = lengths
    loader = make_train_loader(server.url("large.tar"), batch_size=1)
    server.drops = ["large.tar"] if lengths else []
    assert sorted(numbers(itertools.islice(loader, 32))) == list(range(32))
    assert server.drops == [] and loader.counts["refused"] == {}


def test_a_shard_that_stays_away_is_counted_and_left(server, tar_folder, caplog):
    (tar_folder / "shard-0002.tar").unlink()
    url = server.url("tars/shard-{0000..0004}.tar")
    server.drops = ["shard-0003.tar"] * 99
    loader = make_train_loader(url, batch_size=1, block=1)
    got = numbers(itertools.islice(loader, 96 + 32))
    assert set(range(64)) | set(range(128, 160)) <= set(got)
    assert loader.counts["refused"][url]["unreadable shard"] in (2, 3, 4)
    assert "FileNotFoundError" in caplog.text and caplog.text.count("shard-0002.tar was interrupted") == 0


def test_a_server_that_is_gone_ends_the_run_in_words(server, tar_folder):
    source = server.url("tars/shard-{0000..0004}.tar")
    loader = make_train_loader(*[source], batch_size=1, block=1)
    server.down = True
    with pytest.raises(BadDataError, match="no usable sample.*unreadable shard"):
        next(iter(loader))


@pytest.mark.parametrize("kind", ["head", "body", "trickle"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_falls_silent_is_asked_again(server, tar_folder, monkeypatch, caplog, ranges, kind):
    monkeypatch.setattr(files, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(files, "REQUEST_SECONDS", 0.6)
    server.ranges = ranges
    loader = make_train_loader(server.url("tars/shard-{0000..0004}.tar"), batch_size=1)
    server.silent = [("shard-0001.tar", kind), ("shard-0003.tar", kind)]
    assert sorted(numbers(itertools.islice(loader, 160))) == KEYS
    assert server.silent == [] and loader.counts["refused"] == {}
    assert caplog.text.count("was interrupted") >= (
        0 if kind == "head" else 2
    )  # fsspec itself asks twice for the length


@pytest.mark.parametrize("kind", ["head", "body"])
def test_a_shard_that_never_comes_is_left_and_counted(server, tar_folder, monkeypatch, kind):
    monkeypatch.setattr(files, "SILENT_SECONDS", 0.3)
    url = server.url("tars/shard-{0000..0004}.tar")
    loader = make_train_loader(url, batch_size=1, block=1)
    server.silent = [("shard-0003.tar", kind)] * 99
    assert set(numbers(itertools.islice(loader, 128))) == {*range(96), *range(128, 160)}
    assert loader.counts["refused"][url] == {"unreadable shard": 1} and len(server.silent) < 99 - 3


def test_an_overloaded_server_is_asked_again(server, tar_folder, caplog):
    loader = make_train_loader(server.url("tars/shard-{0000..0004}.tar"), batch_size=1)
    server.busy = ["shard-0002.tar"] * 4  # fsspec itself asks twice
    assert sorted(numbers(itertools.islice(loader, 160))) == KEYS
    assert "was interrupted (FileNotFoundError" in caplog.text and loader.counts["refused"] == {}


def test_a_signal_ends_the_wait_for_a_silent_server(server, tar_folder):
    """Without workers the main process reads; what waits for a server must let go."""
    loader = make_train_loader(server.url("tars/shard-{0000..0004}.tar"), batch_size=1)
    server.silent = [(f"shard-{n:04d}.tar", "body") for n in range(5)]
    previous = signal.signal(signal.SIGUSR1, lambda *args: end_waits())
    asked = threading.Thread(target=lambda: server.asked.wait(20) and os.kill(os.getpid(), signal.SIGUSR1))
    asked.start()
    try:
        with pytest.raises(WaitEnded):
            next(iter(loader))
    finally:
        asked.join()
        signal.signal(signal.SIGUSR1, previous)
        allow_waits()


def test_no_redirect_leads_out_of_the_web(server, tar_folder):
    """To a file of this machine, above all."""
    server.redirect = f"file://{tar_folder}/shard-0000.tar"
    with pytest.raises(ValueError, match="no samples"):
        open_source(server.url("elsewhere.tar"))


def test_a_length_that_lies_costs_nothing(server, tar_folder):
    """A megabyte more is said to come than does: what comes is used."""
    server.extra_length = 2**20
    source = open_source(server.url("tars/shard-0000.tar"))
    assert [int(source.target(row)[:5]) for row in source.rows()] == KEYS[:32]


def test_any_file_system_of_fsspec_is_read_with_patterns_and_folders(tar_folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(tar_folder), "/bucket/tars", recursive=True)
    try:
        for name in (
            "memory://bucket/tars/*.tar",
            "memory://bucket/tars/shard-{0000..0004}.tar",
            "memory://bucket/tars",
        ):
            source = open_source(name)
            assert sorted(int(source.target(row)[:5]) for row in source.rows()) == KEYS, name
        with pytest.raises(FileNotFoundError, match="There are no .tar or .* files in 'memory://bucket/none'"):
            open_source("memory://bucket/none")
        with pytest.raises(FileNotFoundError, match=r"no file 'memory://bucket/none\*.tar'"):
            open_source("memory://bucket/none*.tar")
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_url_of_no_known_protocol_is_refused():
    with pytest.raises(ValueError, match="'nonsense://x/a.tar' .*nonsense"):
        open_source("nonsense://x/a.tar")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_silent_server_costs_its_shard(workers, tar_folder, monkeypatch):
    """The connection stands and no byte comes: after a while the shard is left and counted, and the others are read."""
    monkeypatch.setattr(files, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(reading, "RETRY_WAITS", (0,))
    with serve(tar_folder, lambda name: 8000 if name.endswith("3.tar") else None) as address:
        loader = make_train_loader(f"{address}/shard-{{0000..0004}}.tar", workers=workers, block=1, batch_size=32)
        seen = numbers(itertools.islice(loader, 4))
    assert len(set(seen)) == 128
    # Of the silent shard some samples came; nothing of it came twice.
    assert loader.counts["refused"] == {} or list(loader.counts["refused"].values()) == [{"unreadable shard": 1}]
