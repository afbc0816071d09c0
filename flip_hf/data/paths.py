"""Decides which files the paths in a data set may name.

A path in a table is untrusted text: it may name a private file of this machine, or a server that only this machine can
reach. So no path is opened unless the user named a folder of files, and then only files inside it.
"""

import os
import re
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

from flip_hf.data.files import StoredFile, is_remote
from flip_hf.data.refusals import RefusedSample

# A file in an archive, as `datasets` names those of an image folder: `zip://PATH::ARCHIVE`.
_IN_ARCHIVE = re.compile(r"zip://([^:]*)::(.+)", re.DOTALL)


class FilePolicy(Protocol):
    """A policy on the files that paths may name."""

    def allow(self, path: str) -> StoredFile:
        """Returns the file at a path.

        Raises:
            RefusedSample: the file may not be opened.
        """
        ...


@dataclass(frozen=True)
class FilesBelow:
    """The files below a folder.

    Attributes:
        root: the folder, a path or URL; other paths are relative to it.
    """

    root: str

    def allow(self, path: str) -> StoredFile:
        """Returns the file at a path, with links resolved.

        Raises:
            RefusedSample: the file is not below the folder.
        """
        archived = _IN_ARCHIVE.fullmatch(path)
        if archived is not None:
            return StoredFile(f"zip://{archived[1]}::{self._inside(archived[2])}")
        return StoredFile(self._inside(path))

    def _inside(self, path: str) -> str:
        if "::" in path or "\0" in path:
            raise RefusedSample("path outside the data folder")
        if is_remote(self.root):
            return self._below_url(path)
        root = os.path.realpath(self.root)
        found = os.path.realpath(os.path.join(root, path))
        if "://" in path or os.path.commonpath([root, found]) != root or found == root:
            raise RefusedSample("path outside the data folder")
        return found

    def _below_url(self, path: str) -> str:
        prefix = self.root.rstrip("/") + "/"
        rest = path.removeprefix(prefix)
        parts = unquote(rest).replace("\\", "/").split("/")
        if "://" in rest or rest.startswith("/") or ".." in parts or any(sign in rest for sign in "?#"):
            raise RefusedSample("path outside the data folder")
        return prefix + rest


def permitted(value: Any, files: FilePolicy | None) -> Any:
    """Replaces the path in an image column's value, if it has no bytes, by the file that it may name.

    Args:
        value: bytes, `{"bytes", "path"}`, or a path.
        files: the files that paths may name; None if images are bytes.

    Raises:
        RefusedSample: the path may not be opened.
    """
    path = value
    if isinstance(value, dict):
        path = None if value.get("bytes") else value.get("path")
    if not isinstance(path, str) or not path:
        return value
    if files is None:
        raise RefusedSample("image is a path, not bytes")
    return files.allow(path)
