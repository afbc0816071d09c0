"""Uploads a folder to the Hub: creates the repository, retries after a broken connection, reports what changed."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from flip_hf.redaction import redact

logger = logging.getLogger(__name__)

# Seconds before each new attempt. Files already uploaded are recognised by their hash and not uploaded again.
WAITS = (2.0, 10.0, 30.0)
# Weights left over from another number of shards would be loaded instead of the new ones.
STALE = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
BUSY = {408, 429, 500, 502, 503, 504}
# httpx's, or httpx2's from huggingface_hub 2.0 on.
_HTTP_ERROR = HfHubHTTPError.__bases__[0]
T = TypeVar("T")


class HubError(RuntimeError):
    """Nothing was published; the message says why and what to do, and contains no token."""


class HubRefused(HubError):
    """The Hub refuses, or there is no login: trying again would not help."""


class HubUnreachable(HubError):
    """The network or the Hub is down: the same push may succeed later."""


class HubOffline(HubUnreachable):
    """HF_HUB_OFFLINE is set."""


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        url: URL of the repository.
        private: whether only its owners can see it.
        added, changed, removed: paths of files.
    """

    url: str
    private: bool
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]

    def __str__(self) -> str:
        lists = {"added": self.added, "changed": self.changed, "removed": self.removed}
        what = ", ".join(f"{len(paths)} {name} ({_few(paths)})" for name, paths in lists.items() if paths)
        return f"{self.url} ({'private' if self.private else 'public'}): {what or 'nothing changed'}"


def _few(paths: Sequence[str], most: int = 3) -> str:
    return ", ".join(paths[:most]) + (" ..." if len(paths) > most else "")


def create(repo_id: str, *, private: bool = True, api: HfApi | None = None, waits: Sequence[float] = WAITS) -> str:
    """Ensures that the repository exists and may be written to.

    Args:
        repo_id: `owner/name`, or only a name for a repository of your own.
        private: whether a new repository is private; an existing public one is then refused.
        api: the client; by default with the environment's endpoint and login.
        waits: seconds before each new attempt after a broken connection.

    Returns:
        The repository's full id.

    Raises:
        HubRefused: no login, no write access, an invalid name, or a repository that is already public.
        HubUnreachable: there is no network.
    """
    api = api or HfApi()
    if not (api.token or get_token()):
        raise HubRefused(_NOT_LOGGED_IN)

    def make() -> str:
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(full_id).private:
            raise HubRefused(
                f"{full_id} is already public, but this push is to be private. Give --public, make the repository "
                "private in its settings, or choose another name."
            )
        return full_id

    return _patiently(make, repo_id, api, waits)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    message: str = "Upload the model",
    api: HfApi | None = None,
    waits: Sequence[float] = WAITS,
) -> Pushed:
    """Uploads a folder made by [`prepare`] in one commit, and removes left-over files of older weights.

    Args:
        folder: all changed files in it are uploaded. It must not contain links, which the client follows.
        repo_id: see [`create`], as for `private`, `api` and `waits`. `private=False` makes a private repository public
            once everything is uploaded.
        message: the commit message.

    Raises:
        HubRefused, HubUnreachable: see [`create`].
    """
    api = api or HfApi()
    links = sorted(str(path) for path in Path(folder).rglob("*") if path.is_symlink())
    if links:
        raise HubRefused(f"Links would publish their targets, and {_few(links)} is one: put a copy in its place.")
    before: dict[str, str] | None = None

    def attempt() -> Pushed:
        nonlocal before
        full_id = create(repo_id, private=private, api=api, waits=())
        if before is None:  # a broken attempt may have changed something
            before = _files(api, full_id)
        api.upload_folder(repo_id=full_id, folder_path=folder, commit_message=message, delete_patterns=list(STALE))
        after = _files(api, full_id)
        if not private and api.model_info(full_id).private:
            api.update_repo_settings(full_id, private=False)
        return Pushed(
            url=f"{api.endpoint}/{full_id}",
            private=private,
            added=tuple(sorted(after.keys() - before.keys())),
            changed=tuple(sorted(path for path in after.keys() & before.keys() if after[path] != before[path])),
            removed=tuple(sorted(before.keys() - after.keys())),
        )

    return _patiently(attempt, repo_id, api, waits)


def _files(api: HfApi, repo_id: str) -> dict[str, str]:
    """Returns the hashes of the repository's files by path."""
    tree = api.list_repo_tree(repo_id, recursive=True)
    return {entry.path: entry.blob_id for entry in tree if isinstance(entry, RepoFile)}


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

_NOT_LOGGED_IN = "You are not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN to a token that may write."


def _patiently(function: Callable[[], T], repo_id: str, api: HfApi, waits: Sequence[float]) -> T:
    """Calls the function, and retries after each of the waits if the network fails."""
    for wait in waits:
        try:
            return _translated(function, repo_id, api)
        except HubOffline:
            raise
        except HubUnreachable as error:
            logger.warning("%s Retrying in %g s.", error, wait)
            time.sleep(wait)
    return _translated(function, repo_id, api)


def _translated(function: Callable[[], T], repo_id: str, api: HfApi) -> T:
    """Calls the function, and turns exceptions of the client into sentences without anything like a token."""
    try:
        return function()
    except HubError:
        raise
    except Exception as error:
        # The client wraps exceptions of its threads.
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        for each in chain:
            found = _explain(each, repo_id, api)
            if found is not None:
                raise type(found)(redact(str(found))) from None
        raise


def _explain(error: Any, repo_id: str, api: HfApi) -> HubError | None:
    if isinstance(error, LocalTokenNotFoundError):
        return HubRefused(_NOT_LOGGED_IN)
    if isinstance(error, HFValidationError):
        return HubRefused(f"{repo_id!r} is not a valid name for a repository: {error}")
    if isinstance(error, OfflineModeIsEnabled):
        return HubOffline("HF_HUB_OFFLINE is set, so nothing is sent to the Hub. Unset it to push.")
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, repo_id)
    if isinstance(error, (_HTTP_ERROR, ConnectionError, TimeoutError)):
        reason = str(error) or type(error).__name__
        return HubUnreachable(f"The Hub cannot be reached at {api.endpoint} ({reason}).")
    if isinstance(error, ValueError) and "README.md" in str(error):
        return HubRefused(f"The Hub does not accept the card: {error}")
    if type(error).__module__ == "hf_xet" or type(error) is RuntimeError and error.__cause__ is None:
        return HubUnreachable(f"The upload failed ({error}).")  # hf_xet says no more
    return None


def _explain_status(error: HfHubHTTPError, repo_id: str) -> HubError:
    status = error.response.status_code
    said = error.server_message or str(error)
    if status in BUSY:
        return HubUnreachable(f"The Hub is busy or down (status {status}).")
    if status == 401:
        return HubRefused(
            "The Hub does not accept your token: it may have expired. Run `hf auth login` again, or set HF_TOKEN to a "
            "token that may write."
        )
    if status == 403:
        return HubRefused(
            f"Your token may not write to {repo_id} ({said}). Use one that may (its type is shown by `hf auth whoami` "
            "and on https://huggingface.co/settings/tokens), or a repository of your own."
        )
    return HubRefused(f"The Hub refuses to take {repo_id} (status {status}): {said}")
