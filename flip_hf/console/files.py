"""Files and folders that options name: read within bounds, tested for writing before anything is computed, replaced."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# For lists of names, recipes, tables of settings: what people write or read.
MAX_TEXT_BYTES = 4 * 2**20


def read_text(path: str | Path, what: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Reads the text of a small file.

    A byte order mark, which some editors write, is removed.

    Args:
        path: path of the file.
        what: its contents, for messages: "class names".
        limit: maximum size in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is not a regular file (a folder, a pipe, a device), is too large, or not UTF-8.
    """
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise ValueError(f"{path} is a folder; name the file with {what} in it.")
        if not stat.S_ISREG(kind):
            raise ValueError(f"{path} is not a regular file but a pipe, a socket or a device; write {what} to a file.")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path} with {what}.") from None
    except OSError as error:
        raise ValueError(f"{path} with {what} cannot be read: {error.strerror or error}.") from error
    if len(data) > limit:
        raise ValueError(f"{path} is too large for {what}: it has more than {limit:,} bytes.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start:,}): save {what} as UTF-8.") from None
    if "\0" in text:
        raise ValueError(f"{path} is a binary file, not a text file with {what}.")
    return text


def _is_there(path: str | Path) -> bool:
    """Returns whether something exists at a path; raises an `OSError` where no file can have such a name."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _try_to_write_below(folder: Path, path: str | Path, option: str) -> None:
    """Creates and removes a file in the folder, or in its nearest existing parent."""
    while not _is_there(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path} cannot be written: {folder} is not a folder.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {path} cannot be written: {folder}: {error.strerror or error}. Name a writable folder."
        ) from None


def try_folder(path: str | Path, option: str) -> None:
    """Checks that a folder, which may not exist yet, can be written; leaves nothing behind.

    Args:
        path: path of the folder.
        option: the option that names it, for messages.

    Raises:
        ValueError: it cannot be written: it is a file, or the disk is full or read-only.
    """
    try:
        _try_to_write_below(Path(os.path.abspath(path)), path, option)
    except OSError as error:  # of the path itself: too long, a loop of links
        raise ValueError(f"{option} {path} cannot be written: {error.strerror or error}.") from None


def try_file(path: str | Path, option: str) -> None:
    """Checks that a file, which may exist, can be written; leaves nothing behind.

    Raises:
        ValueError: it cannot be written; see [`try_folder`].
    """
    try:
        if os.path.isdir(path):
            raise ValueError(f"{option} {path} is a folder; name a file.")
        if _is_there(path) and not (os.path.isfile(path) and os.access(path, os.W_OK)):
            raise ValueError(f"{option} {path} cannot be overwritten; name another file.")
        _try_to_write_below(Path(os.path.abspath(path)).parent, path, option)
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror or error}.") from None


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def share_weights(folder: Path) -> None:
    """Gives the safetensors files in a folder the permissions that the umask gives to new files.

    safetensors 0.8 writes files that only their owner can read, also into a folder that others share.
    """
    umask = os.umask(0o077)  # can only be read by setting it; nothing becomes readable in between
    os.umask(umask)
    for path in folder.glob("*.safetensors"):
        if is_plain_file(path):  # a link may lead to a file of others
            path.chmod(0o666 & ~umask)


def sync(path: Path) -> None:
    """Syncs a file, or the names in a folder, to the disk, so that they survive a loss of power."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_plain_file(path: Path) -> bool:
    """Returns whether a path is a regular file itself: no link, which may lead anywhere, no pipe and no device."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def unfinished(path: Path) -> Path:
    """Returns the path of a file that [`replacing`] has not finished, as a killed process leaves it."""
    return path.with_name(f".{path.name}.part{path.suffix}")  # the suffix decides on the format of pictures


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a file to write, which takes the place of `path` when it is whole and on the disk."""
    part = unfinished(path)
    part.unlink(missing_ok=True)  # a link there would be followed
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
