"""Reads the files of a folder without following links, so that only what is in the folder is published."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
# Windows cannot open a file relative to an open folder: there the path is checked first and then opened.
_IN_FOLDERS = os.open in os.supports_dir_fd
_BUFFER = 2**20


class NotRegularError(OSError):
    """A name leads through a link, to something other than a regular file, or to a file that is too large."""


class RegularFiles:
    """The regular files of a folder; no part of a path below it may be a link.

    A file is opened once, folder by folder, and the opened file is what is checked and read, so that nobody can replace
    it by a link in between. A hard link cannot be distinguished from the file itself, but anyone who can make a hard
    link to a file may read it, too.

    Args:
        root: the folder; it may itself be a link, because the user named it.
    """

    def __init__(self, root: Path):
        self.root = root

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Opens a file.

        Args:
            name: path of the file, relative to the root, with forward slashes.

        Raises:
            FileNotFoundError: there is no such file.
            NotRegularError: it is or lies behind a link, or is a folder, FIFO, socket or device.
            OSError: it cannot be read.
        """
        handle = self._descend(name, _FILE)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise NotRegularError(f"{self.root / name} is not a regular file.")
            file = os.fdopen(handle, "rb")
        except OSError:
            os.close(handle)
            raise
        with file:
            yield file

    def has(self, name: str) -> bool:
        """Returns whether there is such a file."""
        try:
            with self.open(name):
                return True
        except (FileNotFoundError, NotRegularError):
            return False

    def read(self, name: str, limit: int) -> bytes:
        """Reads a file; see [`RegularFiles.open`].

        Raises:
            NotRegularError: it has more than `limit` bytes.
        """
        with self.open(name) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise NotRegularError(f"{self.root / name} is larger than {limit:,} bytes.")
        return data

    def names(self, folder: str) -> list[str]:
        """Lists the names in a folder below the root in order; empty if it is not a folder, or behind a link."""
        if not _IN_FOLDERS:
            place = self.root / folder
            return sorted(os.listdir(place)) if place.is_dir() and not self._is_behind_link(folder) else []
        try:
            handle = self._descend(folder, _FOLDER | getattr(os, "O_NOFOLLOW", 0))
        except OSError:
            return []
        try:
            return sorted(os.listdir(handle))
        finally:
            os.close(handle)

    def place(self, name: str, target: Path, *, link: bool) -> None:
        """Puts a file of any size at `target`, which must not exist.

        Args:
            name: see [`RegularFiles.open`].
            target: path of the result.
            link: make a hard link if the file system supports it, else a copy. The file must then not be modified.

        Raises the errors of [`RegularFiles.open`].
        """
        with self.open(name) as file:
            if link and self._hard_link(name, target, os.fstat(file.fileno())):
                return
            with target.open("xb") as copy:
                while data := file.read(_BUFFER):
                    copy.write(data)

    def _hard_link(self, name: str, target: Path, opened: os.stat_result) -> bool:
        try:
            os.link(self.root / name, target, follow_symlinks=False)
        except (OSError, NotImplementedError):
            return False  # another file system, or one without links
        made = os.lstat(target)
        if (made.st_dev, made.st_ino) == (opened.st_dev, opened.st_ino):
            return True
        target.unlink()  # the file has been replaced since it was opened
        return False

    def _descend(self, name: str, flags: int) -> int:
        """Opens a path with these flags, and returns its handle."""
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
            raise NotRegularError(f"{name!r} does not name a file below {self.root}.")
        try:
            if not _IN_FOLDERS:
                if self._is_behind_link(name):
                    raise OSError(errno.ELOOP, "a link")
                return os.open(self.root / name, flags)
            handle = os.open(self.root, _FOLDER)
            for number, part in enumerate(parts, start=1):
                above = handle
                inner = _FOLDER | getattr(os, "O_NOFOLLOW", 0)
                try:
                    handle = os.open(part, flags if number == len(parts) else inner, dir_fd=above)
                finally:
                    os.close(above)
            return handle
        except OSError as error:
            # Opening a link to a folder, or a file, as a folder gives ENOTDIR.
            if error.errno in (errno.ELOOP, errno.ENOTDIR, getattr(errno, "EMLINK", errno.ELOOP)):
                raise NotRegularError(f"{self.root / name} is a link, or lies behind one.") from error
            if error.errno == errno.ENXIO:  # a socket
                raise NotRegularError(f"{self.root / name} is not a regular file.") from error
            raise

    def _is_behind_link(self, name: str) -> bool:
        way = [self.root / name, *(self.root / parent for parent in PurePosixPath(name).parents)][:-1]
        return any(path.is_symlink() for path in way)
