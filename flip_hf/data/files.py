"""Finds and opens files on local disks or anywhere that fsspec reaches (`hf://`, `https://`, `s3://` ...)."""

import errno
import glob
import io
import itertools
import os
import re
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from flip_hf.redaction import REMOVED, redact, remember, shown

# Larger image files and archive members are refused unread: nothing that a model trains on has this size.
MAX_FILE_BYTES = 64 * 2**20
# Limits on a web server: seconds without a byte; seconds in which the response to one request must be complete; and
# bytes per second, over SILENT_SECONDS of waiting, below which a response of any length is abandoned.
SILENT_SECONDS = 60.0
REQUEST_SECONDS = 600.0
MIN_BYTES_PER_SECOND = 1000

_STREAM_BYTES = 2**18  # read at once from a file that is streamed

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WEB = ("http://", "https://")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def is_remote(name: str) -> bool:
    """Returns whether a name is a URL that points elsewhere than to this machine's disks."""
    return "://" in name and not name.startswith(("file://", "local://"))


def fill_in_variables(name: str) -> str:
    """Fills environment variables into a URL: `https://${USER}:${PASSWORD}@host/a.tar`.

    Recipes and logs thus hold the names of credentials instead of the credentials. Only for names that the user gave: a
    name from data could send a variable anywhere.

    Raises:
        ValueError: a variable is not set, or the name comes from a run's recipe and has lost its credentials.
    """
    if not is_remote(name):
        return name
    if REMOVED in name:
        raise ValueError(
            f"{name!r} comes from the recipe of a run, which keeps no credentials. Give the whole URL again, or name "
            "an environment variable in their place: ${PASSWORD}."
        )
    missing = [variable for variable in _VARIABLE.findall(name) if variable not in os.environ]
    if missing:
        raise ValueError(f"{shown(name)!r} names ${{{missing[0]}}}, but this environment variable is not set.")
    filled = _VARIABLE.sub(lambda match: os.environ[match.group(1)], name)
    remember(filled)
    return filled


def has_extension(name: str, extension: str | tuple[str, ...]) -> bool:
    """Returns whether a path or URL names a file with the extension, ignoring the parameters of a web address."""
    return (re.split("[?#]", name, maxsplit=1)[0] if name.startswith(_WEB) else name).endswith(extension)


def expand_braces(pattern: str) -> list[str]:
    """Expands `shard-{00000..00099}.tar`, the notation of WebDataset; other text is returned unchanged."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return list(itertools.chain.from_iterable(expand_braces(_BRACES.sub(n, pattern, count=1)) for n in numbers))


def find_file_system(name: str, *, in_one_go: bool = False) -> tuple[Any, str]:
    """Returns the fsspec file system for a name, and the path in it.

    Requests to web servers time out. aiohttp's own limit of five minutes for a response is too short for streaming a
    shard, and too long for a server that sends nothing. `hf://` and `s3://` have their own limits.

    Args:
        name: path or URL.
        in_one_go: responses are streamed, so their total time is not limited.

    Raises:
        ValueError: no installed file system handles such names.
    """
    options: dict[str, Any] = {}
    try:
        if name.startswith(_WEB):
            from aiohttp import ClientTimeout  # fsspec, too, imports it for web addresses only

            # The limit on silence does not run while nobody reads what has arrived.
            total = None if in_one_go else REQUEST_SECONDS
            options["timeout"] = ClientTimeout(total=total, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
        return fsspec.core.url_to_fs(name, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{shown(name)!r} cannot be opened: {redact(str(error))}.") from error


def list_files(pattern: str) -> list[str]:
    """Lists the files that a path, URL or pattern (`*`, `?`, `{0000..0099}`) names, in order, expanding patterns.

    Raises:
        FileNotFoundError: a pattern matches nothing.
        ValueError: no installed file system handles such names.
    """
    files: list[str] = []
    for name in expand_braces(os.path.expanduser(pattern)):
        if not glob.has_magic(name):
            files.append(name)
        elif is_remote(name):
            system, path = find_file_system(name)
            files += sorted(system.unstrip_protocol(found) for found in system.glob(path))
        else:
            files += sorted(glob.glob(name, recursive=True))
    if not files:
        raise FileNotFoundError(f"There is no file {shown(pattern)!r}.")
    return files


def files_below(folder: str, extension: str) -> list[str]:
    """Lists the files with an extension in a folder, which may be a URL, and its subfolders, in order."""
    if not is_remote(folder):
        return sorted(glob.glob(os.path.join(glob.escape(folder), "**", f"*{extension}"), recursive=True))
    system, path = find_file_system(folder)
    return sorted(system.unstrip_protocol(found) for found in system.find(path) if found.endswith(extension))


class OversizedFileError(ValueError):
    """A file exceeds its size limit."""


@dataclass(frozen=True)
class StoredFile:
    """A file that may be opened because the user named it or a [`FilePolicy`] allows it. A path in data is only a text.

    Attributes:
        path: path or URL.
    """

    path: str


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a regular local file for reading.

    A FIFO would block its reader forever, and a device may have no end; neither is opened.

    Raises:
        OSError: the file does not exist, is not readable, or is not a regular file.
    """
    _check_regular(os.stat(path), path)  # opening a device can have side effects
    # O_NONBLOCK: if it has become a FIFO since, opening it does not block.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(handle), path)
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def _check_regular(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def check_regular_files(folder: str, names: Sequence[str]) -> None:
    """Checks the files of these names, in a folder and its subfolders, that another library will open.

    Raises:
        OSError: one is a FIFO, a device or the like, on which the library would block forever.
    """
    for place, _, found in os.walk(folder):
        for name in set(names).intersection(found):
            path = os.path.join(place, name)
            if os.path.exists(path):
                _check_regular(os.stat(path), path)


def read_file(name: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> bytes:
    """Reads a whole file, given by path or URL, of at most `limit` bytes.

    Raises:
        OversizedFileError: the file is larger.
        ValueError: no installed file system handles such names.
        OSError: the file cannot be read; remote file systems raise other types, too.
    """
    path = os.fspath(name)
    if path.startswith("zip://"):  # seeking to the end of a member would unpack all of it, however large
        system, member = find_file_system(path)  # closes the archive when it is garbage-collected
        with system.open(member, "rb") as file:
            data = file.read(limit + 1)
        return _checked(data, path, limit)
    try:
        with open_at(path) as file:
            data = file.read(limit + 1)
    except ValueError:
        if not is_remote(path):
            raise
        with open_at(path, in_one_go=True) as file:  # a web server without range requests
            data = file.read(limit + 1)
    return _checked(data, path, limit)


def _checked(data: bytes, path: str, limit: int) -> bytes:
    if len(data) > limit:
        raise OversizedFileError(f"{path} is larger than {limit:,} bytes.")
    return data


def open_at(name: str, offset: int = 0, *, in_one_go: bool = False) -> IO[bytes]:
    """Opens a file for reading from a byte offset; local files must be regular.

    Args:
        name: path or URL.
        offset: offset of the first byte wanted.
        in_one_go: request the whole file from a web server instead of ranges, which some do not support; the bytes
            before `offset` are then read and discarded.

    Raises:
        ValueError: no installed file system handles such names.
        OSError: the file cannot be opened; remote file systems raise other types, too.
    """
    system, path = find_file_system(name, in_one_go=in_one_go)
    if isinstance(system, LocalFileSystem):
        file = open_regular(path)
        file.seek(offset)
        return file
    if in_one_go:
        file = io.BufferedReader(_Stream(system.open(path, "rb", block_size=0)), _STREAM_BYTES)
        while offset > 0:
            data = file.read(min(offset, 2**20))
            if not data:
                break
            offset -= len(data)
        return file
    file = system.open(path, "rb")
    # If a web server does not send a file's length, fsspec returns a stream whose reads may be short: an error here.
    file.seek(0, os.SEEK_END)
    file.seek(offset)
    return file


class _Stream(io.RawIOBase):
    """A streamed file; a sender that is too slow is abandoned."""

    def __init__(self, file: Any):
        self._file = file
        self._waited = 0.0
        self._received = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        began = time.monotonic()
        data = self._file.read(len(buffer))
        self._waited += time.monotonic() - began
        self._received += len(data)
        if data and self._waited > SILENT_SECONDS:
            if self._received < MIN_BYTES_PER_SECOND * self._waited:
                raise TimeoutError(f"only {self._received:,} bytes arrived in {self._waited:.0f} seconds")
            self._waited = 0.0
            self._received = 0
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
