"""Files and folders that an option names: read within bounds, and tried before anything is computed for them."""

import os
import stat
import tempfile
from pathlib import Path

# Of a list of names, a recipe, a table of settings: what people write or read.
MAX_TEXT_BYTES = 4 * 2**20


def read_text(path: str | Path, what: str, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a small file.

    A byte order mark, which some editors write, is no part of it.

    Args:
        path: of the file.
        what: what it is, for messages: "class names".
        limit: its bytes, at most.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, is no plain file (a folder, a pipe, a device), too large, or not UTF-8.
    """
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise ValueError(f"{path} is a folder; name the file with the {what} in it.")
        if not stat.S_ISREG(kind):
            raise ValueError(f"{path} is no plain file but a pipe, a socket or a device; write the {what} to a file.")
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
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start:,}): save the {what} as UTF-8.") from None
    if "\0" in text:
        raise ValueError(f"{path} is a binary file, and no text with {what}.")
    return text


def _is_there(path: str | Path) -> bool:
    """Tells whether there is something at a path; an `OSError` where no file can have such a name."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _try_to_write_below(folder: Path, path: str | Path, option: str) -> None:
    """Makes and removes a file in the folder, or in the nearest folder above it that exists."""
    while not _is_there(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path} cannot be written: {folder} is not a folder.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {path} cannot be written: {folder}: {error.strerror or error}. Name a folder that can be."
        ) from None


def try_folder(path: str | Path, option: str) -> None:
    """Checks that a folder can be written, which may not exist yet; nothing is left behind.

    Args:
        path: of the folder.
        option: the option that names it, for messages.

    Raises:
        ValueError: it cannot: it is a file, or the disk is full or read-only.
    """
    try:
        _try_to_write_below(Path(os.path.abspath(path)), path, option)
    except OSError as error:  # of the path itself: too long, a loop of links
        raise ValueError(f"{option} {path} cannot be written: {error.strerror or error}.") from None


def try_file(path: str | Path, option: str) -> None:
    """Checks that a file can be written, which may exist; nothing is left behind.

    Raises:
        ValueError: it cannot; see [`try_folder`].
    """
    try:
        if os.path.isdir(path):
            raise ValueError(f"{option} {path} is a folder; name a file.")
        if _is_there(path) and not (os.path.isfile(path) and os.access(path, os.W_OK)):
            raise ValueError(f"{option} {path} cannot be written over; name another file.")
        _try_to_write_below(Path(os.path.abspath(path)).parent, path, option)
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror or error}.") from None
