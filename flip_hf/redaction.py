"""Keeps credentials out of everything that is shown, written or published.

Token formats are facts that their issuers publish and that secret scanners collect. `source` in the table says where
each can be looked up: an issuer's page, a rule of gitleaks (https://github.com/gitleaks/gitleaks) or a plugin of
detect-secrets (https://github.com/Yelp/detect-secrets). The patterns are our own, and looser than a scanner's: a false
positive costs a word, a false negative costs an account.
"""

import base64
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TextIO
from urllib.parse import quote, unquote

from huggingface_hub import get_token

REMOVED = "[removed]"
# Environment variables whose values are secret: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY ...
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST = 8  # a shorter value is a switch such as `TOKENIZERS_PARALLELISM=false`
_SHORTEST_GIVEN = 6  # a shorter password would also match parts of innocent words
_COMMON = re.compile(r"^\d+$|\.[a-z]{2,7}$")  # numbers and file names recur where they are not secret


@dataclass(frozen=True)
class Form:
    """A format of secrets.

    Attributes:
        name: a description in words.
        source: where the format can be looked up.
        hints: a text that contains none of them in lower case has no such secret; they make the search fast.
        pattern: matches the secret; whatever its group `keep` matches is kept.
        accept: decides whether a match is a secret, where the pattern alone cannot.
    """

    name: str
    source: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    accept: Callable[[re.Match[str]], bool] | None = None

    def remove(self, text: str) -> str:
        """Replaces each such secret in the text by `[removed]`."""
        return self.pattern.sub(self._replace, text)

    def may_be_in(self, lowered: str) -> bool:
        return any(hint in lowered for hint in self.hints)

    def _replace(self, match: re.Match[str]) -> str:
        if self.accept is not None and not self.accept(match):
            return match.group()
        return (match.groupdict().get("keep") or "") + REMOVED


# ---------------------------------------------------------------------------------------------------------------------
# Tokens that can be recognised by themselves
# ---------------------------------------------------------------------------------------------------------------------

_BEGIN = r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
_END = _BEGIN.replace("BEGIN", "END")


def _form(name: str, pattern: str, source: str, *hints: str) -> Form:
    return Form(name, source, hints, re.compile(pattern))


# In binary data any byte may precede a token, so only patterns that also match parts of common words look at it.
TOKENS = (
    _form("Hugging Face token", r"(?:hf|api_org)_[A-Za-z0-9]{20,}", "gitleaks huggingface-*", "hf_", "api_org_"),
    _form("GitHub token", r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}", "gitleaks github", "gh", "_pat_"),
    _form("GitLab token", r"gl(?:pat|rt|cbt|agent|[a-z]{1,6}t|oas)-[\w-]{18,}", "gitleaks gitlab-*", "gl"),
    _form("Slack token", r"xox[abeoprs][.-][\w.-]{10,}|xapp-\d-[\w-]{10,}", "gitleaks slack-*", "xox", "xapp-"),
    _form(
        "webhook",
        r"(?P<keep>hooks\.slack\.com/(?:services|workflows)/|discord(?:app)?\.com/api/webhooks/)[\w/+-]{16,}",
        "gitleaks slack-webhook-url; detect-secrets discord",
        *("hooks.slack.com", "api/webhooks"),
    ),
    _form(
        "AWS access key",
        r"(?<![A-Z0-9])(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Z0-9])",
        "AWS, IAM identifiers; gitleaks aws-access-token",
        *("akia", "asia", "abia", "acca"),
    ),
    _form(
        "Google key",
        r"AIza[\w-]{30,}|GOCSPX-[\w-]{20,}|ya29\.[\w-]{20,}",
        "gitleaks gcp-api-key",
        *("aiza", "gocspx", "ya29."),
    ),
    _form(
        "API key",
        r"(?<![A-Za-z])(?:sk-(?:proj|ant|svcacct|admin|or)-[\w-]{16,}|[spr]k-[\w-]*[A-Za-z0-9_]{16,}[\w-]*)",
        "gitleaks openai-api-key, anthropic-*; detect-secrets openai",
        *("sk-", "pk-", "rk-"),
    ),
    _form(
        "Stripe key",
        r"(?<![A-Za-z])(?:[rs]k_(?:live|test|prod)|whsec)_[A-Za-z0-9]{16,}",
        "gitleaks stripe-*",
        *("k_", "whsec_"),
    ),
    _form("PyPI token", r"pypi-AgE[\w-]{16,}", "gitleaks pypi-upload-token", "pypi-age"),
    _form("npm token", r"npm_[A-Za-z0-9]{30,}", "gitleaks npm-access-token", "npm_"),
    _form("Docker token", r"dckr_(?:pat|oat)_[\w-]{20,}", "Docker, access tokens", "dckr_"),
    _form("W&B key", r"wandb_v1_\w{20,}", "Weights & Biases, API keys", "wandb_v1_"),
    _form(
        "W&B key",
        r"(?i)(?P<keep>wandb[\w.]*(?:\W{1,8}(?:login|key|api|token|cloud|--\w+)){0,4}\W{1,8})[0-9a-f]{40}(?![0-9a-f])",
        "Weights & Biases, API keys: 40 hexadecimal digits",
        "wandb",
    ),
    _form("NVIDIA key", r"nvapi-[\w-]{30,}", "NVIDIA, NGC keys", "nvapi-"),
    _form(
        "API key",
        r"(?:gsk_|r8_)[A-Za-z0-9]{30,}|xai-[A-Za-z0-9]{40,}|pplx-[A-Za-z0-9]{30,}",
        "gitleaks",
        *("gsk_", "r8_", "xai-", "pplx-"),
    ),
    _form("Vault token", r"hv[sb]\.[\w-]{20,}", "gitleaks vault-*-token", "hvs.", "hvb."),
    _form(
        "cloud token",
        r"do[opr]_v1_[a-f0-9]{40,}|(?<![a-z])dapi[a-f0-9]{32}",
        "gitleaks digitalocean-*, databricks-*",
        *("_v1_", "dapi"),
    ),
    _form("SendGrid key", r"SG\.[\w-]{16,}\.[\w-]{16,}", "gitleaks sendgrid-api-token", "sg."),
    _form("Telegram token", r"(?<!\d)\d{8,10}:AA[\w-]{32,}", "detect-secrets telegram", ":aa"),
    # A Neptune token is nothing but the Base64 of a JSON object.
    _form("JSON web token", r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|eyJ[\w+/-]{60,}={0,2}", "RFC 7519; gitleaks jwt", "eyj"),
    _form("age key", r"AGE-SECRET-KEY-1[A-Z0-9]{40,}", "gitleaks age-secret-key", "age-secret-key-"),
    _form(
        "private key",
        rf"{_BEGIN}(?s:.){{0,16384}}?{_END}|{_BEGIN}[A-Za-z0-9+/=\s\\]*",
        "RFC 7468; detect-secrets private_key",
        "private key",
    ),
    _form(
        "private key",
        r"PuTTY-User-Key-File-\d(?s:.){0,16384}?Private-MAC: ?[0-9a-f]+",
        "PuTTY, appendix C",
        "putty-user-key",
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# Secrets recognised by their context: URLs, headers, assignments
# ---------------------------------------------------------------------------------------------------------------------

# Not secret: a variable to be filled in, what was removed before, switches, markers such as [PAD], and masks.
_VARIABLE = r"(?:\$\{\w+\}|\$\w+|\[removed\])"
_SWITCH = r"(?i:null|none|true|false|yes|no)"
_HARMLESS = rf"(?:(?i:bearer|basic)\s+)?(?:{_VARIABLE}|{_SWITCH}|\[[\w ]*\]|<[^<>\s]*>|\*+|\.\.\.)"
_NO_HARMLESS = rf"(?!{_HARMLESS}(?:[\s'\"\\,;&#)}}\]]|$))"
# Endings of names whose values are secret: `db_password`, `HF_TOKEN`, `secretAccessKey`.
_ENDS = (
    r"pass(?:word|wd|phrase|code)s?|pwd|secrets?|credentials?|auth(?:orization)?|jwt|token"
    r"|(?:api|access|account|private|secret|encryption|signing|storage|master|auth|ssh|app|application|wandb|client|sas)"
    r"[_-]?key(?:[_-]?(?:id|value))?|connection[_-]?string|cookie"
)
# `pad_token` and the like are words of a vocabulary.
_VOCABULARY = (
    r"(?!(?:[\w.-]{0,64}[._-])?(?i:additional_special|audio|bo[ist]|class|cls|decoder_start|end?|eo[cdimstu]"
    r"|im(?:age|g)(?:_\w{1,16})?|mask|newline|pad|placeholder|prefix|sep|sot|start|stop|suffix|text|unk|video|vision|word)"
    r"_token\b)"
)
_NAME = rf"{_VOCABULARY}[\w.-]{{0,64}}?(?i:{_ENDS})"
_WORD = rf"(?<![\w.-]){_NAME}"
_NAMES = ("pass", "pwd", "secret", "credential", "auth", "jwt", "token", "key", "cookie", "connection")
_SPACE = r"[ \t]*"
# A value runs to the quote that it began with or, if that is missing, to the end of the line.
_QUOTE = r"(?P<quote>\\?[\"'])"
_QUOTED = rf"{_NO_HARMLESS}(?:(?:(?!(?P=quote))(?:\\.|[^\\])){{1,4096}}(?=(?P=quote))|[^\n]+)"
_BARE = rf"{_NO_HARMLESS}(?:[^\s'\"\\;&]|\\[^'\"\s])+"
# URL parameters that hold a secret, and those that may have long values that are not secret.
_PARAMETERS = (
    r"[\w.~\[\]-]{0,64}(?:signature|token(?!iz)|secret|passw|passphrase|credential|key|auth|pwd|session|jwt)"
    r"[\w.~\[\]-]{0,64}|sig|pass|pw|code|hmac|hdn\w{1,3}|policy|st|sid|otp|ticket"
)
_OPEN_PARAMETERS = r"(?:rev|revision|commit|sha\d*|md5|id|uuid|ref|v|version|etag|checksum|hash|blob|file|name|path)="

_SCHEME = r"(?P<keep>(?<![A-Za-z0-9])(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,31})://)"
# In these schemes a user name alone only says whose files, or which container, is meant.
_USER_IN_NAME = ("abfs", "abfss", "ftp", "git+ssh", "scp", "sftp", "ssh", "wasb", "wasbs")


def _is_login(match: re.Match[str]) -> bool:
    """Returns whether the text before the @ of a URL is more than the name of a place."""
    login = match.group("login")
    if re.fullmatch(rf"(?:[^:]*:)?{_VARIABLE}", login):
        return False
    return ":" in login or match.group("scheme").lower() not in _USER_IN_NAME


def _is_basic(match: re.Match[str]) -> bool:
    """Returns whether the match is the Base64 of `user:password`."""
    code = match.group("code").rstrip("=")
    try:
        decoded = base64.urlsafe_b64decode(code.replace("+", "-").replace("/", "_") + "=" * (-len(code) % 4))
    except ValueError:
        return False
    return b":" in decoded


CONTEXTS = (
    # https://user:p@ss@host: up to the last @ of the authority.
    Form(
        "login in a URL",
        "RFC 3986, 3.2.1; detect-secrets basic_auth",
        ("://",),
        re.compile(rf"{_SCHEME}(?P<login>[^/\s'\"?#<>]+)(?=@)"),
        _is_login,
    ),
    # A password with a slash in it: no port follows the colon, and an @ comes later.
    Form(
        "login in a URL",
        "RFC 3986, 3.2.1, which this violates",
        ("://",),
        re.compile(
            rf"{_SCHEME}(?P<login>[^/\s@:'\"]+:(?!\d{{1,5}}(?:[/?#\s'\"]|$)|//)(?:(?!://)[^\s@\"]|@(?=[^\s\"]*@))+)(?=@)"
        ),
        _is_login,
    ),
    Form(
        "signed URL",
        "the signed URLs of AWS (SigV4), Azure (SAS), Google Cloud, CloudFront and Akamai",
        ("=",),
        re.compile(rf"(?P<keep>(?<=[?&])(?:amp;)?(?i:{_PARAMETERS})=){_NO_HARMLESS}[^&\s'\"#<>]+"),
    ),
    Form(
        "signed URL",
        "signed URLs of others: a long value under any name",
        ("=",),
        re.compile(
            rf"(?P<keep>(?<=[?&])(?:amp;)?(?!{_OPEN_PARAMETERS})[\w.~-]{{1,64}}=)"
            r"(?=[^&\s'\"]{0,512}\d)(?=[^&\s'\"]{0,512}[A-Za-z])[\w+/=%.~*-]{32,}"
        ),
    ),
    Form(
        "Basic login",
        "RFC 7617; gitleaks curl-auth-header",
        ("basic",),
        re.compile(r"(?P<keep>(?i:\bbasic)\s+)(?P<code>[A-Za-z0-9+/_-]{6,}={0,2})"),
        _is_basic,
    ),
    Form(
        "Bearer token",
        "RFC 6750; gitleaks curl-auth-header",
        ("bearer",),
        re.compile(r"(?P<keep>(?i:\bbearer)\s+)(?:(?=[\w.~+/-]*(?:\d|[a-z][A-Z]))[\w.~+/=-]{6,}|[\w.~+/=-]{16,})"),
    ),
    Form(
        "header",
        "RFC 9110, 11.6.2",
        ("authorization",),
        re.compile(
            r"(?P<keep>(?i:\bauthorization)\\?[\"']?\s*[:=]\s*\\?[\"']?(?:(?i:bearer|basic|token|digest)\s+)?)"
            rf"{_NO_HARMLESS}(?!(?i:bearer|basic|token|digest)\b)[^\s'\"\\]+"
        ),
    ),
    # -H "X-Api-Key: X"
    Form(
        "header",
        "gitleaks curl-auth-header",
        _NAMES,
        re.compile(rf"(?P<keep>{_QUOTE}{_NAME}:[ \t]+){_NO_HARMLESS}[^\n'\"]+(?=(?P=quote))"),
    ),
    Form(
        "login in a .netrc",
        "the format of .netrc",
        ("machine",),
        re.compile(rf"(?P<keep>\bmachine\s+\S+\s+(?:(?:login|account)\s+\S+\s+){{0,2}}password\s+){_NO_HARMLESS}\S+"),
    ),
    Form(
        "login of curl",
        "gitleaks curl-auth-user",
        ("curl",),
        re.compile(r"(?P<keep>\bcurl\b[^\n]{0,512}?\s(?:-u|--user|--proxy-user)[ =]*[\"']?)[^\s:'\"]+:[^\s'\"]+"),
    ),
    # --password X, --password=X, "--password", "X"
    Form(
        "option",
        "detect-secrets keyword",
        ("--",),
        re.compile(
            rf"(?P<keep>(?<![\w-])--{_NAME}(?:=|\s+|\\?[\"'],?\s+)(?:{_QUOTE})?)(?!-)(?(quote){_QUOTED}|{_BARE})"
        ),
    ),
    # "password": "X", password = 'X', token: "X"
    Form(
        "assignment",
        "detect-secrets keyword; gitleaks generic-api-key",
        _NAMES,
        re.compile(rf"(?P<keep>{_WORD}(?:\\?[\"']\]?)?{_SPACE}(?::=|=>|[:=]){_SPACE}[bru]?{_QUOTE}){_QUOTED}"),
    ),
    # In a shell: `PASSWORD=X`; in a connection string: `Server=a;Password=X;Database=b`
    Form(
        "assignment",
        "detect-secrets keyword",
        (*_NAMES, "signature"),
        re.compile(rf"(?P<keep>(?:{_WORD}|(?i:(?<![\w.-])[\w.-]{{0,64}}signature))=){_BARE}"),
    ),
    # password: X and password = X, on a line of their own or in {password: X}
    Form(
        "assignment",
        "detect-secrets keyword",
        _NAMES,
        re.compile(
            rf"(?m)(?P<keep>^{_SPACE}(?:[-#>|]{_SPACE})?(?:export[ \t]+|set[ \t]+)?{_NAME}{_SPACE}[:=][ \t]*)"
            rf"(?![\"'|>{{\[\s]){_NO_HARMLESS}[^\n]+"
        ),
    ),
    Form(
        "assignment",
        "YAML 1.2, 7.4.2",
        _NAMES,
        re.compile(rf"(?P<keep>[{{,]{_SPACE}{_NAME}:[ \t]+)(?![\"'{{\[\s]){_NO_HARMLESS}[^\s,}}]+"),
    ),
    # password: | and the lines below it
    Form(
        "assignment",
        "YAML 1.2, 8.1",
        _NAMES,
        re.compile(
            rf"(?m)(?P<keep>^(?P<indent>{_SPACE})(?:-[ \t]+)?{_NAME}:[ \t]*[|>][+\d-]*[ \t]*\n(?P=indent)[ \t]+)"
            rf"{_NO_HARMLESS}\S.*(?:\n(?:(?P=indent)[ \t]+\S.*|[ \t]*(?=\n)))*"
        ),
    ),
)
_NAME_ALONE = re.compile(rf"{_NAME}")


# ---------------------------------------------------------------------------------------------------------------------
# Taking them out
# ---------------------------------------------------------------------------------------------------------------------

# Secrets in names that were shown: they may reappear in another form, in a message of the library that opens the name.
_remembered: set[str] = set()


def redact(text: str) -> str:
    """Replaces every secret in the text, known or recognised by its format, by `[removed]`.

    Known secrets are this process's Hub token, the values of variables named like a secret (`WANDB_API_KEY`), and the
    logins and signatures of URLs passed to [`remember`]. The function is idempotent.
    """
    for secret in sorted(_known_secrets(), key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    lowered = text.lower()
    for form in (*TOKENS, *CONTEXTS):
        if form.may_be_in(lowered):
            text = form.remove(text)
    return text


def found_tokens(text: str) -> list[str]:
    """Names the [`TOKENS`] in a text whose words must not change, such as a vocabulary; known values and contexts are
    not searched for.
    """
    lowered = text.lower()
    return sorted({form.name for form in TOKENS if form.may_be_in(lowered) and form.remove(text) != text})


def redacted(value: Any) -> Any:
    """Applies [`redact`] to all strings, keys included, of a JSON-like or YAML-like value.

    A string under a key such as `password` is removed entirely.
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(name): _redacted_under(name, entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(entry) for entry in value]
    return value


def _redacted_under(name: Any, value: Any) -> Any:
    if isinstance(name, str) and isinstance(value, str) and _NAME_ALONE.fullmatch(name):
        return REMOVED if value and not re.fullmatch(_HARMLESS, value) else value
    return redacted(value)


@lru_cache(maxsize=1024)
def shown(name: str) -> str:
    """Redacts the name of a data set, a path or a URL, and remembers its secrets; see [`redact`]."""
    remember(name)
    return redact(name)


def shown_apart(names: Iterable[str]) -> list[str]:
    """Applies [`shown`] to several names, and numbers those that differ only in their secrets."""
    first: dict[str, str] = {}
    counts: dict[str, int] = {}
    result = []
    for name in names:
        clean = shown(name)
        if first.setdefault(clean, name) != name:
            counts[clean] = counts.get(clean, 1) + 1
            clean = f"{clean} ({counts[clean]})"
        result.append(clean)
    return result


def remember(text: str) -> None:
    """Remembers logins and signatures of URLs in a text, so that [`redact`] knows them quoted or without the URL."""
    lowered = text.lower()
    for form in CONTEXTS:
        if not form.may_be_in(lowered) or form.name not in ("login in a URL", "signed URL"):
            continue
        for match in form.pattern.finditer(text):
            if form.accept is None or form.accept(match):
                _remember(match.group()[len(match.group("keep")) :], "login" in match.groupdict())


def _remember(secret: str, is_login: bool) -> None:
    parts = {secret}
    if is_login:
        _, _, password = secret.partition(":")
        parts |= {password, base64.b64encode(unquote(secret).encode()).decode()}
    for part in parts:
        forms = {part, unquote(part), quote(part), quote(part, safe="")}
        _remembered.update(form for form in forms if len(form) >= _SHORTEST_GIVEN and not _COMMON.search(form))


def _known_secrets() -> set[str]:
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and _looks_secret(value)}
    token = get_token()
    return values | _remembered | ({token} if token else set())


def _looks_secret(value: str) -> bool:
    """Returns whether a variable's value is itself a secret, not a switch or the path of a file that holds one."""
    return len(value) >= _SHORTEST and not os.path.exists(value)


# ---------------------------------------------------------------------------------------------------------------------
# In a whole process
# ---------------------------------------------------------------------------------------------------------------------


class RedactedStream:
    """A wrapper around a text stream that redacts what is written; all else is passed through."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def install() -> None:
    """Redacts everything that this process prints and logs from now on; every script calls it first.

    The streams cover prints, tracebacks and the message of `sys.exit`; log records cover handlers that write elsewhere.
    Secrets on the command line are remembered, and forks inherit all of this. Output written by C code is not covered.
    """
    for word in sys.argv:
        remember(word)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, RedactedStream):
            setattr(sys, name, RedactedStream(stream))
    make_record = logging.getLogRecordFactory()
    if not getattr(make_record, "redacts", False):
        logging.setLogRecordFactory(_redacting(make_record))


def _redacting(make_record: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        try:
            message = record.getMessage()
        except Exception:  # a wrong number of arguments: `logging` itself reports it
            return record
        clean = redact(message)
        if clean != message:
            record.msg = clean
            record.args = None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return record

    make.redacts = True  # pyright: ignore[reportFunctionMemberAccess]
    return make
