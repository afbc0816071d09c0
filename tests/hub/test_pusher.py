"""Pushes during a run, which never wait for the network."""

import shutil
import threading
import time

import pytest
from huggingface_hub import HfApi

from flip_hf import FlipModel
from flip_hf.hub.push import HubRefused
from flip_hf.hub.pusher import Pusher
from tests.helpers.hub_server import READER, WRITER


@pytest.fixture
def save(model, processor, run_folder):
    def save(folder):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for name in ("recipe.yaml", "results.json", "training_curves.png"):
            shutil.copy(run_folder / name, folder)

    return save


def waited(pusher):
    pusher._thread.join(30)
    assert pusher.is_free()


@pytest.fixture
def hanging(hub, api, run_folder, save):
    """A pusher whose first push the Hub keeps waiting."""
    pusher = Pusher(run_folder, "flip", api=api)
    pusher.begin()
    assert hub.repositories["you/flip"].private
    hub.gate.clear()
    assert pusher.push(save, 1024) and not pusher.is_free()
    return pusher


def test_a_push_does_not_wait_for_the_hub_and_the_next_is_dropped(hub, hanging, save, caplog):
    assert not hanging.push(save, 2048)
    assert "No push after 2048 samples: the previous one is still in progress." in caplog.text
    hub.gate.set()
    waited(hanging)


def test_a_push_has_the_files_of_its_beginning_and_the_end_pushes_the_others(hub, hanging, run_folder):
    (run_folder / "log.jsonl").write_text("of later steps\n")
    hub.gate.set()
    waited(hanging)
    files = hub.repositories["you/flip"].files
    assert {"model.safetensors", "modeling_flip.py", "recipe.yaml", "README.md"} <= set(files)
    assert b"1024" in files["log.jsonl"]  # as it was when the push began
    assert b'model="you/flip"' in files["README.md"]
    said = hanging.finish()
    assert said.startswith(f"{hub.endpoint}/you/flip (private)") and "changed (log.jsonl" in said
    assert files["log.jsonl"] == b"of later steps\n" and not list(run_folder.glob("partial-push*"))
    assert not any("partial" in path or "checkpoint" in path for path in files)


def test_a_network_that_is_down_ends_nothing(run_folder, save, caplog):
    api = HfApi(endpoint="http://127.0.0.1:9", token=WRITER)  # discard: nobody listens
    pusher = Pusher(run_folder, "you/flip", api=api, waits=())
    pusher.begin()
    assert "Training begins anyway" in caplog.text
    assert pusher.push(save, 1024)
    waited(pusher)
    assert "Not pushed: The Hub cannot be reached" in caplog.text
    said = pusher.finish()
    assert said.startswith("not pushed: The Hub cannot be reached") and f"`flip-hf push {run_folder} you/flip`" in said
    assert FlipModel.from_pretrained(run_folder) is not None and WRITER not in caplog.text + said


def test_errors_only_the_user_can_fix_are_reported_before_training(hub, run_folder):
    with pytest.raises(HubRefused, match="may not write"):
        Pusher(run_folder, "you/flip", api=HfApi(endpoint=hub.endpoint, token=READER)).begin()


def test_a_full_disk_or_a_broken_folder_is_a_warning(hub, api, run_folder, save, caplog):
    def full(folder):
        raise OSError(28, "No space left on device")

    pusher = Pusher(run_folder, "you/flip", api=api)
    pusher.begin()
    assert not pusher.push(full, 1024) and "No push after 1024 samples: [Errno 28]" in caplog.text
    assert not pusher.push(lambda folder: None, 2048) and "is not a model folder" in caplog.text
    assert pusher.push(save, 3072)
    waited(pusher)
    assert hub.repositories["you/flip"].files
    (run_folder / "recipe.yaml").write_text("- no recipe\n")  # nothing that anybody thought of
    assert pusher.finish().startswith("not pushed: 'list' object")
    (run_folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in pusher.finish()


def test_the_end_waits_but_not_for_ever(hub, api, run_folder):
    pusher = Pusher(run_folder, "you/flip", api=api)
    pusher.begin()
    hub.gate.clear()
    start = time.monotonic()
    assert "took longer than 0.2 s" in pusher.finish(limit=0.2)
    assert "the previous push is still in progress" in pusher.finish(limit=0.1)
    assert time.monotonic() - start < 20 and all(t.daemon for t in threading.enumerate() if t.name == "push-to-hub")
    hub.gate.set()
    waited(pusher)
    assert pusher.finish().endswith("nothing changed")


def test_only_a_pushers_own_files_are_removed(hub, api, run_folder, save):
    """Folders of such names that are the user's stay; what a killed run has left goes."""
    for name in ("partial-push", "partial-push-mine"):
        (run_folder / name).mkdir()
        (run_folder / name / "mine").write_text("mine")
    killed = Pusher(run_folder, "flip", api=api)._new_scratch()
    pusher = Pusher(run_folder, "flip", api=api)
    pusher.begin()
    assert not killed.exists()
    assert pusher.push(save, 1024)
    waited(pusher)
    pusher.finish()
    assert sorted(path.name for path in run_folder.glob("partial*")) == ["partial-push", "partial-push-mine"]
    assert all((run_folder / name / "mine").read_text() == "mine" for name in ("partial-push", "partial-push-mine"))
