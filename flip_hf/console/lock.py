"""A lock for one run per folder, which ends with its process, however that ends, and names its holder."""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "run.lock"
# Locks of this process, kept open until it ends: closing or garbage-collecting one would release it.
_held: dict[Path, IO[str]] = {}


class FolderInUse(ValueError):
    """Another run writes to the folder; the message says which process, and where."""


def lock_folder(folder: Path) -> None:
    """Locks a folder for this process until it ends; the same process may lock it again.

    The kernel releases the lock when the process ends, even by `kill -9`, so nothing is left to clean up. It is a POSIX
    record lock: forked loader workers do not inherit it, and NFS supports it. Where the operating system has none,
    nothing is locked.

    Raises:
        FolderInUse: another process holds it.
        ValueError: the lock's file is a link, which would be followed to empty another file.
    """
    path = folder.resolve() / LOCK
    if path.is_symlink():
        raise ValueError(f"{folder / LOCK} is a link: remove it, or name another folder.")
    if fcntl is None or path in _held:
        return
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise FolderInUse(
                f"{folder} is in use by another run ({holder}). Wait for it or end it, or name another folder."
            ) from None
        except OSError:  # a file system without locks
            return file.close()
        if _is_at(file, path):
            break
        file.close()  # its holder removed it meanwhile
    file.truncate(0)
    me = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    file.write(json.dumps(me) + "\n")
    file.flush()
    _held[path] = file


def unlock_folder(folder: Path) -> None:
    """Releases a folder, if this process holds it."""
    path = folder.resolve() / LOCK
    file = _held.pop(path, None)
    if file is None:
        return
    with suppress(OSError):  # the folder may be gone
        path.unlink()  # before another process can lock it
    file.close()


def _is_at(file: IO[str], path: Path) -> bool:
    """Returns whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        return ", ".join(f"{name} {value}" for name, value in json.loads(file.read(4096)).items())
    except (OSError, ValueError, AttributeError):
        return "it does not say which"
