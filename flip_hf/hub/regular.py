"""Files of a folder, read without following a link: what is published is what lies there, and nothing else."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
# Windows opens nothing relative to an open folder: there the way is looked at, and then gone.
_IN_FOLDERS = os.open in os.supports_dir_fd
_BUFFER = 2**20


class NotRegularError(OSError):
    """A name leads over a link, or to something that is no regular file, or to a file that is too large."""


class RegularFiles:
    """The regular files of a folder; the way below it may have no link, neither at its end nor before.

    A file is opened once, folder by folder, and what was opened is what is looked at and read: nobody can put a link
    in its place between the two. A hard link cannot be told from the file itself; whoever can make one of a file may
    read it, too.

    Args:
        root: the folder; it may be a link itself, for the user named it.
    """

    def __init__(self, root: Path):
        self.root = root

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Opens a file.

        Args:
            name: of the file, relative to the root, with forward slashes.

        Raises:
            FileNotFoundError: there is none.
            NotRegularError: it is a link or lies behind one, or is a folder, FIFO, socket or device.
            OSError: it cannot be read.
        """
        handle = self._descend(name, _FILE)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise NotRegularError(f"{self.root / name} is no regular file.")
            file = os.fdopen(handle, "rb")
        except OSError:
            os.close(handle)
            raise
        with file:
            yield file

    def has(self, name: str) -> bool:
        """Tells whether there is such a file."""
        try:
            with self.open(name):
                return True
        except (FileNotFoundError, NotRegularError):
            return False

    def read(self, name: str, limit: int) -> bytes:
        """The content of a file; see [`RegularFiles.open`].

        Raises:
            NotRegularError: it has more than `limit` bytes.
        """
        with self.open(name) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise NotRegularError(f"{self.root / name} is larger than {limit:,} bytes.")
        return data

    def names(self, folder: str) -> list[str]:
        """The names in a folder below the root, in order; none where it is no folder, or behind a link."""
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
        """Puts a file of any size at `target`, which does not exist.

        Args:
            name: see [`RegularFiles.open`].
            target: where to.
            link: make a hard link where the file system can, else a copy. The file must then not be written to.

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
        target.unlink()  # somebody has put another file in its place
        return False

    def _descend(self, name: str, flags: int) -> int:
        """The handle of what a name leads to, opened with these flags."""
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
            # A link to a folder is ENOTDIR where only a folder is asked for; so is a file in a folder's place.
            if error.errno in (errno.ELOOP, errno.ENOTDIR, getattr(errno, "EMLINK", errno.ELOOP)):
                raise NotRegularError(f"{self.root / name} is a link, or lies behind one.") from error
            if error.errno == errno.ENXIO:  # a socket
                raise NotRegularError(f"{self.root / name} is no regular file.") from error
            raise

    def _is_behind_link(self, name: str) -> bool:
        way = [self.root / name, *(self.root / parent for parent in PurePosixPath(name).parents)][:-1]
        return any(path.is_symlink() for path in way)
