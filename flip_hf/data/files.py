"""Names of files, here or anywhere that fsspec reaches (`hf://`, `https://`, `s3://` ...), and their opening."""

import glob
import itertools
import os
import re
from typing import IO, Any

import fsspec

from flip_hf.redaction import REMOVED, redact, remember, shown

# A larger image file or member of an archive is refused unread: nothing that a model is trained on has this size.
MAX_FILE_BYTES = 64 * 2**20

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


def find_file_system(name: str) -> tuple[Any, str]:
    """The file system for a name, as fsspec knows it, and the path in it.

    Raises:
        ValueError: nothing that is installed reads such names.
    """
    try:
        return fsspec.core.url_to_fs(name)
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


def open_at(name: str, offset: int = 0, *, in_one_go: bool = False) -> IO[bytes]:
    """Opens a file for reading from a byte on.

    Args:
        name: path or URL.
        offset: bytes before the first one wanted.
        in_one_go: ask a web server for the whole file instead of for ranges of it, which some cannot give; what lies
            before `offset` is then read and thrown away.
    """
    system, path = find_file_system(name)
    if in_one_go:
        file = system.open(path, "rb", block_size=0)
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
