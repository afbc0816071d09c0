"""The real client against a local server that speaks the Hub's API, and breaks in the middle."""

import logging
import socket

import pytest
from huggingface_hub import HfApi, constants

from flip_hf.hub.folder import prepare
from flip_hf.hub.push import HubOffline, HubRefused, HubUnreachable, create, push
from tests.helpers.hub_server import READER, WRITER

REPO = "you/flip"


@pytest.fixture
def ready(run_folder, tmp_path):
    return prepare(run_folder, tmp_path / "ready", repo_id=REPO)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("xet", [False, True])  # the client has another way of uploading where it is installed
def test_a_push_creates_a_private_repository_and_another_changes_nothing(hub, api, ready, xet, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.large = not xet
    first = push(ready, REPO, api=api)
    assert hub.repositories[REPO].private and hub.repositories[REPO].files == contents(ready)
    assert set(first.added) == set(contents(ready)) and not first.changed and "private" in str(first)
    again = push(ready, REPO, api=api)
    assert str(again) == f"{hub.endpoint}/{REPO} (private): nothing changed"
    assert len(hub.repositories[REPO].commits) == 2  # that of the creation, and one
    (ready / "log.jsonl").write_text("{}\n")
    assert push(ready, REPO, api=api).changed == ("log.jsonl",)
    assert len(hub.repositories[REPO].commits) == 3


def test_a_name_alone_is_one_of_your_own(hub, api):
    assert create("flip", api=api) == REPO and create("flip", api=api) == REPO


def test_weights_in_other_shards_leave_no_old_ones_behind(hub, api, ready):
    push(ready, REPO, api=api)
    weights = (ready / "model.safetensors").read_bytes()
    (ready / "model.safetensors").unlink()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (ready / name).write_bytes(weights + name.encode())
    hub.repositories[REPO].files["figures/mine.png"] = b"of somebody else"
    pushed = push(ready, REPO, api=api)
    assert pushed.removed == ("model.safetensors",) and len(pushed.added) == 2
    assert "figures/mine.png" in hub.repositories[REPO].files


# -- broken connections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        {"drops": [r"PUT /lfs"]},  # in the middle of the weights
        {"drops": [r"POST .*/commit"]},
        {"late": [r"POST .*/commit"]},  # done, but nobody hears of it
        {"drops": [r"POST /api/repos/create"], "busy": [r"GET /api/models/you/flip$"]},
    ],
    ids=["weights", "commit", "answer", "beginning"],
)
def test_a_broken_connection_is_taken_up_again(hub, api, ready, broken, caplog):
    for name, patterns in broken.items():
        getattr(hub, name).extend(patterns)
    pushed = push(ready, REPO, api=api, waits=(0.01, 0.02))
    assert not any(getattr(hub, name) for name in broken)  # it did break
    assert hub.repositories[REPO].files == contents(ready) and len(hub.repositories[REPO].commits) == 2
    assert set(pushed.added) == set(contents(ready))
    assert hub.count("PUT /lfs") == 1 + ("PUT /lfs" in broken.get("drops", ()))  # uploaded weights are not sent twice
    assert WRITER not in caplog.text


def test_a_failed_push_resumes(hub, api, ready):
    hub.drops += [r"POST .*/commit"]
    with pytest.raises(HubUnreachable):
        push(ready, REPO, api=api, waits=())
    assert not hub.repositories[REPO].files and hub.count("PUT /lfs") == 1
    assert len(push(ready, REPO, api=api, waits=()).added) == len(contents(ready))
    assert hub.count("PUT /lfs") == 1


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, REPO, "not logged in"),
        ("hf_" + "expired" * 5, REPO, "does not accept your token"),
        (READER, REPO, "may not write to you/flip"),
        (WRITER, "somebody/flip", "may not write to somebody/flip"),
        (WRITER, "you/flip/16", "not a valid name for a repository"),
    ],
)
def test_a_refused_push_names_the_fix_and_is_not_retried(hub, ready, token, repo_id, message):
    with pytest.raises(HubRefused, match=message) as refused:
        push(ready, repo_id, api=HfApi(endpoint=hub.endpoint, token=token))
    assert not token or token not in str(refused.value)
    assert hub.count("POST /api/repos/create") <= 1 and not hub.count("POST .*/commit")


def test_a_read_only_token_does_not_write_to_an_existing_repository(hub, api, ready, monkeypatch):
    push(ready, REPO, api=api)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)  # the client asks it for the names of what is there
    (ready / "log.jsonl").write_text("{}\n")
    with pytest.raises(HubRefused, match=r"may not write to you/flip \(You don't have the rights"):
        push(ready, REPO, api=HfApi(endpoint=hub.endpoint, token=READER))
    assert len(hub.repositories[REPO].commits) == 2


def test_a_public_repository_is_not_pushed_to_without_the_option(hub, api, ready):
    push(ready, REPO, api=api)
    assert "(public): nothing changed" in str(push(ready, REPO, api=api, private=False))
    assert not hub.repositories[REPO].private
    with pytest.raises(HubRefused, match="is already public"):
        push(ready, REPO, api=api)


def test_no_network_is_said(ready, monkeypatch, caplog):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        api = HfApi(endpoint=f"http://127.0.0.1:{nobody.getsockname()[1]}", token=WRITER)
        with pytest.raises(HubUnreachable, match="cannot be reached at http://127.0.0.1"):
            push(ready, REPO, api=api, waits=(0.01,))
    assert "Retrying in 0.01 s" in caplog.text
    caplog.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubOffline, match="Unset it"):
        push(ready, REPO, api=api, waits=(0.01,))
    assert "Retrying" not in caplog.text


def test_no_token_is_ever_logged_or_written(hub, api, ready, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        hub.drops += [r"PUT /lfs", r"POST .*/commit"]
        push(ready, REPO, api=api, waits=(0.01,))
    assert caplog.text and WRITER not in caplog.text
    everything = b"".join([*contents(tmp_path).values(), *hub.repositories[REPO].files.values()])
    assert WRITER.encode() not in everything
