"""Names of files, here or anywhere that fsspec reaches (`hf://`, `https://`, `s3://` ...), and their opening."""

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

# A larger image file or member of an archive is refused unread: nothing that a model is trained on has this size.
MAX_FILE_BYTES = 64 * 2**20
# Of a web server: seconds that it may say nothing; in which an answer to one request must be complete; and bytes a
# second, over as many seconds of waiting as it may say nothing, below which an answer of any length is given up.
SILENT_SECONDS = 60.0
REQUEST_SECONDS = 600.0
MIN_BYTES_PER_SECOND = 1000

_STREAM_BYTES = 2**18  # asked for at once of a file that comes in one go

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WEB = ("http://", "https://")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def is_remote(name: str) -> bool:
    """Whether a name is a URL of another place than this machine's disks."""
    return "://" in name and not name.startswith(("file://", "local://"))


def fill_in_variables(name: str) -> str:
    """Fills variables of the environment into a URL: `https://${USER}:${PASSWORD}@host/a.tar`.

    So recipes and logs hold the names of credentials instead of credentials. It is for names that the user gave alone:
    a name out of data could send a variable anywhere.

    Raises:
        ValueError: a variable is not set; or the name has no credentials any more, out of a recipe that a run wrote.
    """
    if not is_remote(name):
        return name
    if REMOVED in name:
        raise ValueError(
            f"{name!r} is out of a recipe that a run wrote, without its credentials. Give the whole URL again, or name "
            "a variable of the environment in their place: ${PASSWORD}."
        )
    missing = [variable for variable in _VARIABLE.findall(name) if variable not in os.environ]
    if missing:
        raise ValueError(f"{shown(name)!r} names ${{{missing[0]}}}, and there is no such variable of the environment.")
    filled = _VARIABLE.sub(lambda match: os.environ[match.group(1)], name)
    remember(filled)
    return filled


def has_extension(name: str, extension: str | tuple[str, ...]) -> bool:
    """Whether a path or URL names a file with the extension; a web address may have parameters behind it."""
    return (re.split("[?#]", name, maxsplit=1)[0] if name.startswith(_WEB) else name).endswith(extension)


def expand_braces(pattern: str) -> list[str]:
    """Expands `shard-{00000..00099}.tar`, the notation of WebDataset users; other text is returned as it is."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return list(itertools.chain.from_iterable(expand_braces(_BRACES.sub(n, pattern, count=1)) for n in numbers))


def find_file_system(name: str, *, in_one_go: bool = False) -> tuple[Any, str]:
    """The file system for a name, as fsspec knows it, and the path in it.

    A web server is given up on after a while. aiohttp's own limit is five minutes for an answer: too few for a shard in
    one go, and too many for a server that says nothing. `hf://` and `s3://` have limits of their own.

    Args:
        name: path or URL.
        in_one_go: answers are read as they come, and not waited for until they are complete.

    Raises:
        ValueError: nothing that is installed reads such names.
    """
    options: dict[str, Any] = {}
    try:
        if name.startswith(_WEB):
            from aiohttp import ClientTimeout  # which fsspec imports for web addresses alone

            # The limit on silence does not run while nobody takes what has come.
            total = None if in_one_go else REQUEST_SECONDS
            options["timeout"] = ClientTimeout(total=total, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
        return fsspec.core.url_to_fs(name, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{shown(name)!r} cannot be opened: {redact(str(error))}.") from error


def list_files(pattern: str) -> list[str]:
    """The files that a path, URL or pattern (`*`, `?`, `{0000..0099}`) names, in order; patterns are looked up.

    Raises:
        FileNotFoundError: a pattern that fits nothing.
        ValueError: nothing that is installed reads such names.
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
    """The files of a folder and its subfolders with an extension, in order; the folder may be a URL."""
    if not is_remote(folder):
        return sorted(glob.glob(os.path.join(glob.escape(folder), "**", f"*{extension}"), recursive=True))
    system, path = find_file_system(folder)
    return sorted(system.unstrip_protocol(found) for found in system.find(path) if found.endswith(extension))


class OversizedFileError(ValueError):
    """A file that is larger than it may be."""


@dataclass(frozen=True)
class StoredFile:
    """A file that may be opened: the user named it, or a [`FilePolicy`] allows it. A path in data is only a text.

    Attributes:
        path: path or URL.
    """

    path: str


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a regular file of this machine for reading.

    A FIFO would keep its reader waiting for ever, and a device may have no end; neither is opened.

    Raises:
        OSError: it is not there, not readable, or no regular file.
    """
    _check_regular(os.stat(path), path)  # to open a device can have effects of its own
    # Should it have become a FIFO since, the opening does not wait.
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
    """Checks the files of these names in a folder and its subfolders, which another library is to open.

    Raises:
        OSError: one is a FIFO, a device or the like: the library would wait for ever.
    """
    for place, _, found in os.walk(folder):
        for name in set(names).intersection(found):
            path = os.path.join(place, name)
            if os.path.exists(path):
                _check_regular(os.stat(path), path)


def read_file(name: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> bytes:
    """Reads a whole file, given by path or URL, of at most `limit` bytes.

    Raises:
        OversizedFileError: it is larger.
        ValueError: nothing that is installed reads such names.
        OSError: it cannot be read; file systems of other places raise further kinds.
    """
    path = os.fspath(name)
    if path.startswith("zip://"):  # to look for the end of a member would unpack all of it, however large
        system, member = find_file_system(path)  # which closes the archive when it is dropped
        with system.open(member, "rb") as file:
            data = file.read(limit + 1)
        return _checked(data, path, limit)
    try:
        with open_at(path) as file:
            data = file.read(limit + 1)
    except ValueError:
        if not is_remote(path):
            raise
        with open_at(path, in_one_go=True) as file:  # a web server that gives no ranges
            data = file.read(limit + 1)
    return _checked(data, path, limit)


def _checked(data: bytes, path: str, limit: int) -> bytes:
    if len(data) > limit:
        raise OversizedFileError(f"{path} is larger than {limit:,} bytes.")
    return data


def open_at(name: str, offset: int = 0, *, in_one_go: bool = False) -> IO[bytes]:
    """Opens a file for reading from a byte on; on this machine's disks, a regular file alone.

    Args:
        name: path or URL.
        offset: bytes before the first one wanted.
        in_one_go: ask a web server for the whole file instead of for ranges of it, which some cannot give; what lies
            before `offset` is then read and thrown away.

    Raises:
        ValueError: nothing that is installed reads such names.
        OSError: it cannot be opened; file systems of other places raise further kinds.
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
    # Where a web server does not say how long a file is, fsspec gives a stream whose reads come short: an error here.
    file.seek(0, os.SEEK_END)
    file.seek(offset)
    return file


class _Stream(io.RawIOBase):
    """A file that comes in one go; a sender of next to nothing is given up."""

    def __init__(self, file: Any):
        self._file = file
        self._waited, self._received = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        began = time.monotonic()
        data = self._file.read(len(buffer))
        self._waited += time.monotonic() - began
        self._received += len(data)
        if data and self._waited > SILENT_SECONDS:
            if self._received < MIN_BYTES_PER_SECOND * self._waited:
                raise TimeoutError(f"only {self._received:,} bytes came in {self._waited:.0f} seconds")
            self._waited, self._received = 0.0, 0
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
