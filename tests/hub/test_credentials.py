"""Data behind a login: it is read with the credentials, and nothing that is said or written has them."""

import base64
import json
import re
import threading
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from flip_hf.hub.folder import prepare
from tests.helpers.pretraining import PRETRAIN, SHORT, TINY
from tests.helpers.programs import run_program
from tests.helpers.web_server import Handler, Server

USER = "somebody"
PASSWORD = "hunter%40-22"
TOKEN = "Tok-9876543"
SECRETS = [PASSWORD, "hunter@-22", TOKEN]
SECRETS += [base64.b64encode(f"{USER}:{password}".encode()).decode() for password in SECRETS[:2]]


class Guarded(Handler):
    """Answers who has the password or the token."""

    def answer(self, body: bool):
        url = urlsplit(self.path)
        login = base64.b64encode(f"{USER}:hunter@-22".encode()).decode()
        known = self.headers.get("Authorization") == f"Basic {login}" or parse_qs(url.query).get("token") == [TOKEN]
        if not known:
            return self.send_error(401)
        self.path = url.path
        super().answer(body)


@pytest.fixture
def guarded(tar_folder):
    server = Server(tar_folder)
    server.RequestHandlerClass = Guarded
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pretrain(tmp_path):
    """Trains in a process of its own, with a tracker."""

    def pretrain(*words: str, recipe: str | None = None, **environment: str):
        argv = [
            *([recipe] if recipe else []),
            *words,
            *TINY,
            *SHORT,
            "--report_to",
            "tensorboard",
            "--num_workers",
            "1",
        ]
        return run_program(PRETRAIN, *argv, environment=environment, cwd=tmp_path)

    return pretrain


def urls(server: Server) -> dict[str, str]:
    place = f"127.0.0.1:{server.server_port}"
    shards = "shard-{0000..0004}.tar"
    return {
        "password": f"http://{USER}:{PASSWORD}@{place}/{shards}",
        "token": f"http://{place}/{shards}?token={TOKEN}",
    }


def leaks(run, *folders) -> list[str]:
    """Returns the places where a secret can be read."""
    texts = {"stdout": run.stdout.encode(), "stderr": run.stderr.encode()}
    texts |= {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    return [name for name, data in texts.items() for secret in SECRETS if secret.encode() in data or secret in name]


@pytest.mark.parametrize("kind", ["password", "token"])
def test_a_run_writes_no_credentials_and_resumes_with_them(guarded, pretrain, tmp_path, kind):
    out = tmp_path / "out"
    words = ["--train_data", urls(guarded)[kind], "--output_dir", str(out), "--checkpoint_samples", "64"]
    run = pretrain(*words)
    assert run.returncode == 0, run.stderr[-3000:]
    names = {path.name for path in out.rglob("*")}
    assert {"recipe.yaml", "results.json", "data_0.json", "hparams.yml"} <= names
    assert any("tfevents" in name for name in names)
    shown = {
        "password": urls(guarded)[kind].replace(f"{USER}:{PASSWORD}", "[removed]"),
        "token": urls(guarded)[kind].replace(TOKEN, "[removed]"),
    }[kind]
    assert yaml.safe_load((out / "recipe.yaml").read_text())["train_data"] == [shown]
    assert list(json.loads((out / "results.json").read_text())["sources"]) == [shown]
    assert leaks(run, out) == []

    again = pretrain(*words, "--resume_from_checkpoint", "latest")
    assert again.returncode == 0, again.stderr[-3000:]
    assert not re.search("not among|differs from the one|read from the beginning", again.stderr), again.stderr
    assert leaks(again, out) == []

    prepare(out, tmp_path / "ready", repo_id="you/flip")
    published = [path for path in (tmp_path / "ready").rglob("*") if path.is_file()]
    for path in published:  # what a run writes is left as it is, but for the folder that it wrote to
        same = out / path.relative_to(tmp_path / "ready")
        if path.name == "recipe.yaml":
            assert yaml.safe_load(path.read_text()) == {**yaml.safe_load(same.read_text()), "output_dir": out.name}
            continue
        assert path.name in ("README.md",) or "tfevents" in path.name or path.read_bytes() == same.read_bytes(), path
    assert sum("tfevents" in path.name for path in published) == sum("tfevents" in p.name for p in out.rglob("*"))
    assert leaks(again, tmp_path / "ready") == [] and shown in (tmp_path / "ready" / "README.md").read_text()


def test_an_error_names_the_data_without_their_credentials(guarded, pretrain, tmp_path):
    for kind, url in urls(guarded).items():
        wrong = url.replace("22@", "23@").replace("543", "544").replace("0000..0004", "0000..0001")
        run = pretrain("--train_data", wrong, "--output_dir", str(tmp_path / kind))
        assert run.returncode == 1 and "[removed]" in run.stderr, run.stderr
        assert "shard-{0000..0001}.tar" in run.stderr
        for secret in (*SECRETS, "hunter%40-23", "hunter@-23", "Tok-9876544"):
            assert secret not in run.stdout + run.stderr, run.stderr
    run = pretrain(
        "--train_data", urls(guarded)["token"].replace("shard-", "none-"), "--output_dir", str(tmp_path / "no")
    )
    assert run.returncode == 1 and "none-" in run.stderr and leaks(run) == []
    run = pretrain("--train_data", f"s5://{USER}:{PASSWORD}@place/a.tar", "--output_dir", str(tmp_path / "no"))
    assert run.returncode == 1 and "cannot be opened" in run.stderr and leaks(run) == []


def test_a_recipe_that_names_variables_runs_again_as_it_is(guarded, pretrain, tmp_path):
    url = urls(guarded)["password"].replace(PASSWORD, "${DATA_PASSWORD}")
    words = ["--train_data", url, "--output_dir", str(tmp_path / "one")]
    run = pretrain(*words, DATA_PASSWORD=PASSWORD)
    assert run.returncode == 0, run.stderr[-3000:]
    recipe = tmp_path / "one" / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["train_data"] == [url]
    assert list(json.loads((tmp_path / "one" / "results.json").read_text())["sources"]) == [url]
    again = pretrain("--output_dir", str(tmp_path / "two"), recipe=str(recipe), DATA_PASSWORD=PASSWORD)
    assert again.returncode == 0, again.stderr[-3000:]
    assert leaks(run, tmp_path / "one") == leaks(again, tmp_path / "two") == []
    losses = [(tmp_path / name / "results.json").read_text() for name in ("one", "two")]
    assert json.loads(losses[0])["sources"] == json.loads(losses[1])["sources"]
    (tmp_path / "removed.yaml").write_text(recipe.read_text().replace(f"{USER}:${{DATA_PASSWORD}}", "[removed]"))
    removed = pretrain("--output_dir", str(tmp_path / "three"), recipe=str(tmp_path / "removed.yaml"))
    assert removed.returncode == 1 and "which keeps no credentials. Give the whole URL again" in removed.stderr
    without = pretrain("--output_dir", str(tmp_path / "three"), recipe=str(recipe))
    assert without.returncode == 1 and "${DATA_PASSWORD}, but this environment variable is not set" in without.stderr
