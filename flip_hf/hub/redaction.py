"""Tokens, passwords and signed URLs, taken out of what is published or logged."""

import os
import re

from huggingface_hub import get_token

REMOVED = "[removed]"
# Variables of the environment whose values are nobody's business: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY ...
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST = 8  # a shorter value is a switch such as `TOKENIZERS_PARALLELISM=false`
_PATTERNS = (
    # Tokens of the Hub.
    re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    # https://user:password@host, https://token@host
    re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"),
    # https://host/file?X-Amz-Signature=..., ?sig=..., &access_token=...
    re.compile(
        r"(?<=[?&])((?:[\w-]*(?:signature|token|secret|passw|credential|key)[\w-]*|sig)=)[^&\s'\"]+", re.IGNORECASE
    ),
)


def _own_secrets() -> set[str]:
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and _looks_secret(value)}
    token = get_token()
    return values | ({token} if token else set())


def _looks_secret(value: str) -> bool:
    """Whether a variable's value is a secret itself, not a switch nor the path of a file that holds one."""
    return len(value) >= _SHORTEST and not os.path.exists(value)


def redact(text: str) -> str:
    """The text with `[removed]` in place of every token, password and signature of a URL.

    What is taken for one: this process's Hub token, values of variables named like one (`WANDB_API_KEY`), anything of
    the form of a Hub token, what stands before the @ of a URL, and parameters of a URL named like a secret.
    """
    for secret in _own_secrets():
        text = text.replace(secret, REMOVED)
    for pattern in _PATTERNS:
        text = pattern.sub(lambda match: "".join(match.groups()) + REMOVED, text)
    return text
