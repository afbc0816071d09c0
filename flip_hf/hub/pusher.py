"""Pushes during a run: in the background, one push at a time, and never in the way of training."""

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from flip_hf.hub.folder import prepare
from flip_hf.hub.push import WAITS, HubError, HubUnreachable, Pushed, create, push
from flip_hf.redaction import redact

logger = logging.getLogger(__name__)

SCRATCH = "partial-push-"
# Marks a folder made by a pusher, which another one may remove: the run that made it may have been killed.
_MARK = ".made-by-flip_hf"


class Pusher:
    """Pushes a run's model to the Hub, from one process of the run.

    A failed push is reported in a warning and dropped; the next one, or the one at the end, makes up for it.

    Args:
        output_dir: the run's folder, with recipe, logs, curves and results. Files being uploaded are in a
            `partial-push-...` folder below it.
        repo_id: `owner/name`, or only a name for a repository of your own.
        private: see [`push`].
        export_clip: push a stock CLIPModel, see [`prepare`].
        api: the client; by default with the environment's endpoint and login.
        waits: see [`push`].
    """

    def __init__(
        self,
        output_dir: str | Path,
        repo_id: str,
        *,
        private: bool = True,
        export_clip: bool = False,
        api: HfApi | None = None,
        waits: Sequence[float] = WAITS,
    ):
        self.output_dir = Path(output_dir)
        self.repo_id = repo_id
        self.private = private
        self._export_clip = export_clip
        self._api = api
        self._waits = waits
        self._scratch = self.output_dir  # until a push creates one
        self._thread: threading.Thread | None = None
        self._pushed: Pushed | None = None  # by the last push; if it failed, `_problem` has the reason
        self._problem = ""

    def begin(self) -> None:
        """Creates the repository, so that a missing login or permission shows before hours are spent.

        Raises:
            HubRefused: a problem that only the user can fix. A network that is down does not prevent training.
        """
        disable_progress_bars()  # the run has its own
        self._clear()
        try:
            self.repo_id = create(self.repo_id, private=self.private, api=self._api, waits=())
        except HubUnreachable as error:
            logger.warning("%s Training begins anyway, and pushes are attempted along the way.", error)

    def is_free(self) -> bool:
        """True if no push is in progress; while one is, the next is dropped."""
        return self._thread is None or not self._thread.is_alive()

    def push(self, save: Callable[[Path], object], samples: int) -> bool:
        """Starts a push of the current model, and returns as soon as it is written to disk.

        Args:
            save: writes model, processor, recipe and results to a given folder.
            samples: samples seen so far, for the commit message.

        Returns:
            Whether the push was started. Raises nothing: not even a full disk ends the run.
        """
        if not self.is_free():
            logger.warning("No push after %d samples: the previous one is still in progress.", samples)
            return False
        message = f"Model after {samples:,} samples"
        try:
            self._scratch = self._new_scratch()
            saved = self._scratch / "saved"
            saved.mkdir()
            save(saved)
            ready = self._prepare(saved, "ready")
        except Exception as error:
            logger.warning("No push after %d samples: %s", samples, redact(str(error)))
            return False
        self._start(ready, message)
        return True

    def finish(self, limit: float = 1800.0) -> str:
        """Pushes the finished folder of the run, and waits for the upload.

        Args:
            limit: seconds to wait for a push in progress, and again for this one.

        Returns:
            A sentence about the result. Raises nothing.
        """
        later = f"Push it with `flip-hf push {self.output_dir} {self.repo_id}`."
        if self._thread is not None:
            self._thread.join(limit)
        if not self.is_free():
            return f"not pushed: the previous push is still in progress. {later}"
        try:
            self._scratch = self._new_scratch()
            self._start(self._prepare(self.output_dir, "final"), "Model at the end of the run").join(limit)
        except Exception as error:  # the run itself is already saved
            return f"not pushed: {redact(str(error))}"
        if not self.is_free():
            return f"not pushed: the push took longer than {limit:g} s. {later}"
        self._clear()
        return f"not pushed: {self._problem} {later}" if self._pushed is None else str(self._pushed)

    def _clear(self) -> None:
        """Removes the folders made by this and earlier pushers, and nothing else of that name."""
        for folder in self.output_dir.glob(f"{SCRATCH}*"):
            if (folder / _MARK).is_file():
                shutil.rmtree(folder, ignore_errors=True)

    def _new_scratch(self) -> Path:
        self._clear()
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.output_dir))
        (scratch / _MARK).touch()
        return scratch

    def _prepare(self, folder: Path, name: str) -> Path:
        target = self._scratch / name
        asked: dict[str, Any] = {"repo_id": self.repo_id, "export_clip": self._export_clip}
        return prepare(folder, target, logs=self.output_dir, link=True, **asked)

    def _start(self, folder: Path, message: str) -> threading.Thread:
        # A daemon, unlike the client's own futures, so that a hung connection does not keep the process from exiting.
        self._thread = threading.Thread(target=self._upload, args=(folder, message), name="push-to-hub", daemon=True)
        self._thread.start()
        return self._thread

    def _upload(self, folder: Path, message: str) -> None:
        self._pushed = None
        options: dict[str, Any] = {"private": self.private, "api": self._api, "waits": self._waits}
        try:
            self._pushed = push(folder, self.repo_id, message=message, **options)
            return logger.info("%s: %s", message, self._pushed)
        except HubError as error:
            self._problem = str(error)
        except Exception as error:  # training continues after any failure
            self._problem = redact(f"{type(error).__name__}: {error}")
        logger.warning("Not pushed: %s (%s)", self._problem, message)
