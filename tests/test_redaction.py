"""Credentials go, and what only looks like one stays."""

import base64
import json
import logging
import sys

import pytest

from flip_hf.redaction import REMOVED, found_tokens, install, redact, redacted, remember, shown, shown_apart
from tests.helpers.programs import ROOT, run_program

SECRET = "S3cr-t_wOrd"
MIXED = "Ab1" * 28

# Of the form of tokens; none of them is anybody's.
TOKENS = [
    *("hf_" + MIXED[:34], "api_org_" + MIXED[:34]),
    *(f"gh{kind}_{MIXED[:36]}" for kind in "pousr"),
    *(f"github_pat_{MIXED[:22]}_{MIXED[:59]}", "glpat-Ab1_-Ab1_-Ab1_-Ab1_-"),
    *("xoxb-123456789012-abcdefABCDEF", "xoxp-1-2-3-abcdef", "xoxa-2-abcdefgh", "xoxr-abcdefghij", "xoxs-abcdefghij"),
    *("AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE", "AIza" + "Ab1_-" * 7),
    *("sk-" + MIXED[:48], "sk-proj-" + "Ab1_-" * 9, "sk-ant-api03-" + MIXED, "sk_live_" + MIXED[:24]),
    *("pypi-AgEIcHlwaS5vcmc" + MIXED, "npm_" + MIXED[:36], "dckr_pat_" + MIXED[:27]),
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1r\nZXktdjEA\n-----END OPENSSH PRIVATE KEY-----",
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIE\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN EC PRIVATE KEY-----\nMIIEcut",
]

# § stands for the secret.
CONTEXTS = [
    # URLs
    *("https://me:§@host/x", "https://me:p@§@host/x", "https://me:p/§@host/x", "https://me:p'§@host", "https://§@host"),
    *("postgresql://u:§@localhost/db", "mongodb+srv://u:§@c/db", "zip://a.jpg::https://u:§@h/x.zip"),
    *("https://h/a?pwd=§&b=1", "https://h/a?x=1&auth=§", "https://h/a?x=1&amp;sig=§", "https://h/?code=§", "?pass=§"),
    *("https://h/a?X-Amz-Credential=§%2Fs3&X-Amz-Signature=§", "https://h/a?X-Goog-Signature=§&Policy=§"),
    *("https://h/a?se=2030&sp=r&sig=§", "https://h/a?AWSAccessKeyId=§&Signature=§", "https://h/a?api_key=§"),
    # headers
    *("Authorization: Bearer §", "Bearer abcdefgh1§", 'curl -H "Authorization: Bearer §" u', "{'Authorization': '§'}"),
    *('curl -H "X-Api-Key: §" u', "curl -u me:§ https://x", "AWS4-HMAC-SHA256 Credential=§, Signature=§"),
    # command lines
    *("--password § --x 1", "--password=§", "--hf_token '§ b'", '["--password", "§", "--a"]', "PASSWORD=§ python x.py"),
    '{"command": "x --password \\"§ y\\" z"}',
    # YAML, JSON, INI, .env, .netrc
    *("password: §", "password: x § two", "  token = §", "db_password: '§ x'", '{"api_key": "§"}', "- secret: §"),
    *("{password: §, user: me}", "export WANDB_KEY=§", "passphrase: §", "aws_secret_access_key = §"),
    *("password: |\n  §\n  §2\nnext: 1", "password='it\\'s §'", "client(token='§', x=1)", "[http]\nauth = §"),
    *("machine api.wandb.ai\n  login user\n  password §\n", "machine h login u password §"),
    # connection strings
    *("Server=tcp:h,1433;Password=§;Database=d", "AccountName=a;AccountKey=§+/==;EndpointSuffix=core"),
]

HARMLESS = [
    *("learning_rate: 1e-4", "pad_token: '[PAD]'", '"pad_token": "x"', '"unk_token": "!"', "eos_token_id: 3"),
    *('"password": 20786,', '  "token": 19204,\n  "tokens": 3', '"bearer": 20905,', "token: null", '"auth": {}'),
    *("tokenizer: bert", "special_tokens: false", "--tokenizer bert --special_tokens True", "unk_token: <|endoftext|>"),
    *("hf://datasets/u/d@refs/convert/x", "https://h:8080/a@b", "https://host/a?page=2&part=1", "model@main"),
    *("d41d8cd98f00b204e9800998ecf8427e", f"blake2b: {'0a' * 64}", "me@host.org", "git@github.com:u/r.git"),
    *("Bearer authentication is", "Basic authentication, basic CLIPModel", "author: me", "tokens = {'a': 1}"),
    *("risk-averse-portfolio-management-systems", "task-12345678901234567890", "hf_hub_download", "hf_transfer"),
    *("ssh://git@github.com/u/r", "abfs://container@account.dfs.core.windows.net/x", "--hub_private_repo False"),
    *(
        "https://${USER}:${PASSWORD}@host/x?token=${TOKEN}",
        "https://me:${PASSWORD}@host/x",
        "password: ${PASSWORD}",
        '"Authorization": "Bearer ${TOKEN}"',
        "a photo of a {}.",
    ),
    f"https://huggingface.co/u/m/resolve/{'0a' * 20}/x?download=true",
    "100%|███| 1.02k/1.02k [00:03<00:00, 312 samples/s, loss=3.55, acc=0.0469, scale=19.9, lr=0.001]",
]


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token[:16])
def test_a_token_goes_wherever_it_stands(token):
    assert redact(token) == REMOVED
    for text in (f"before {token} after", f'{{"x": "{token}"}}', f"https://h/{token}/x", json.dumps({"x": token})):
        assert not any(line in redact(text) for line in token.split("\n")[-2:]), redact(text)
    assert found_tokens(f"two words {token}")


@pytest.mark.parametrize("text", CONTEXTS)
def test_a_secret_goes_by_what_stands_around_it(text):
    text = text.replace("§", SECRET)
    clean = redact(text)
    assert SECRET not in clean and REMOVED in clean, clean
    assert redact(clean) == clean
    if text.startswith(('{"', '["')):
        json.loads(clean)


@pytest.mark.parametrize("text", HARMLESS)
def test_plain_words_stay(text):
    assert redact(text) == text


def test_a_basic_login_is_known_by_what_it_says():
    code = base64.b64encode(b"me:password").decode()
    assert redact(f"Basic {code}") == "Basic [removed]"
    assert redact("Basic CLIPModelWithProjection") == "Basic CLIPModelWithProjection"


def test_a_key_of_wandb_goes_beside_its_name_and_a_hash_stays():
    digits = "0123456789abcdef0123456789abcdef01234567"
    for text in (f"wandb login {digits}", f"WANDB_API_KEY: {digits}", f"wandb_key={digits}", f'"wandb": "{digits}"'):
        assert digits not in redact(text)
    assert redact(f"commit {digits}") == f"commit {digits}"


def test_values_are_redacted_under_names_and_keys_too():
    value = {"password": "abc", "n": 3, "urls": ["https://u:abcdef@h/x"], "https://u:abcdef@h/x": {"samples": 2}}
    assert redacted(value) == {
        **{"password": REMOVED, "n": 3, "urls": ["https://[removed]@h/x"]},
        "https://[removed]@h/x": {"samples": 2},
    }
    assert redacted({"pad_token": "x", "special_tokens": False, "token": None}) == {
        **{"pad_token": "x", "special_tokens": False, "token": None}
    }


def test_sources_that_differ_in_their_secrets_alone_stay_apart():
    names = ["https://h/a?token=abcdefg1", "https://h/a?token=abcdefg2", "shapes", "shapes"]
    assert shown_apart(names) == ["https://h/a?token=[removed]", "https://h/a?token=[removed] (2)", "shapes", "shapes"]


def test_the_secrets_of_a_name_that_was_shown_are_known_in_every_form():
    assert shown("https://somebody:p%40ss-of-mine@host/{0..9}.tar") == "https://[removed]@host/{0..9}.tar"
    login = base64.b64encode(b"somebody:p@ss-of-mine").decode()
    for text in ("p@ss-of-mine", "p%40ss-of-mine", f"'{login}'"):
        assert redact(f"ClientError({text})") == f"ClientError({text.replace(text.strip(chr(39)), REMOVED)})"
    remember("https://host/x.tar?key=folder/x.tar")
    assert redact("folder/x.tar is damaged") == "folder/x.tar is damaged"  # the name of a file is no password


@pytest.mark.parametrize(
    "piece", ["x", "a://b:", "?a=1&", "--token", "password: '", "-----BEGIN RSA PRIVATE KEY-----", "eyJ"]
)
def test_a_long_text_without_an_end_is_read(piece):
    """A pattern that is quadratic in it would never come back."""
    redact(piece * (100_000 // len(piece)))


SAYS = """
import logging, sys, threading, warnings
from flip_hf.redaction import install
install(); install()
logging.basicConfig(level=logging.INFO, filename="log.txt")
URL = "https://me:hunter-22@host/a.tar?token=tok-1234"
print("printed", URL); print("error", URL, file=sys.stderr)
logging.info("logged %s after %d", URL, 3)
logging.info("nothing to hide: %s", 5)
try:
    raise ValueError(URL)
except ValueError:
    logging.exception("caught")
warnings.warn(URL)
thread = threading.Thread(target=lambda: 1 / 0 if not URL else int(URL)); thread.start(); thread.join()
print("isatty", sys.stdout.isatty(), sys.stdout.encoding)
if sys.argv[1] == "exit":
    sys.exit(f"error: {URL}")
raise RuntimeError(URL)
"""


@pytest.mark.parametrize("end", ["exit", "raise"])
def test_a_process_prints_and_logs_no_secret(end, tmp_path):
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    run = run_program(script, end, cwd=tmp_path)
    logged = (tmp_path / "log.txt").read_text()
    everything = run.stdout + run.stderr + logged
    assert run.returncode == 1 and "printed https://[removed]@host/a.tar?token=[removed]" in run.stdout
    assert "logged https://[removed]@host/a.tar?token=[removed] after 3" in logged and "nothing to hide: 5" in logged
    assert ("error: https://[removed]@host" in run.stderr) == (end == "exit")
    assert ("RuntimeError: https://[removed]@host" in run.stderr) == (end == "raise")
    # Source lines of a traceback are the program's own; what it opened is not in them.
    shown_lines = [line for line in everything.splitlines() if not line.startswith("    ")]
    assert not any(secret in line for line in shown_lines for secret in ("hunter-22", "tok-1234"))


def test_installing_leaves_other_records_alone(monkeypatch):
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    install()
    record = logging.getLogger("x").makeRecord("x", logging.INFO, "f", 1, "%s of %s", ("a", 2), None)
    assert record.args == ("a", 2) and record.getMessage() == "a of 2"


def test_our_own_output_is_left_unchanged():
    """Results, cards and documents: none of them has a secret, and none of them is changed."""
    paths = [*ROOT.glob("docs/*.md"), *ROOT.glob("model_cards/**/*.md"), ROOT / "LICENSE", ROOT / "README.md"]
    paths += [*ROOT.glob("scripts/**/*.json"), *ROOT.glob("flip_hf/recipes/*.yaml"), *ROOT.glob("modeling/*.py")]
    assert len(paths) > 40
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert redact(text) == text, path
