"""Reads the files of a checkpoint, in a folder or in a zip that is read in place.

No file is trusted: only regular files are opened, no link is followed out of the checkpoint's folder, and each file is
read only if its size is within a limit.
"""

import io
import json
import os
import stat
import zipfile
from pathlib import Path, PurePosixPath
from typing import NoReturn

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.errors import ConversionError, reason

# Far above any configuration or index: the largest index of weights on the Hub has some 10 MB.
MAX_JSON_BYTES = 32 * 2**20
MAX_JSON_DEPTH = 64
# The released checkpoints have about 5,000 files, including optimizer states.
MAX_FILES = 200_000
# A zip's table of contents, which Python reads into memory at once: MAX_FILES entries with names of usual length.
MAX_ZIP_DIRECTORY_BYTES = 32 * 2**20
# With other methods, zipfile cannot limit the decompressed size.
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def _places(root: Path) -> list[Path]:
    """Returns where links may lead to: into the folder itself and, from a snapshot of the Hub, to the cache's blobs."""
    real = root.resolve()
    return [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]


def regular_file(path: Path, *, root: Path | None = None) -> Path:
    """Returns the regular file at a path, with links resolved.

    Args:
        path: the file.
        root: a folder that links must not lead out of; None for a file that the user has named.

    Raises:
        ConversionError: there is no such file, it is a folder, a pipe or a device, or a link leads out of `root`.
    """
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle; ValueError: a NUL
        raise ConversionError(f"{path} cannot be opened: {reason(error)}.") from error
    if root is not None and not any(real.is_relative_to(place) for place in _places(root)):
        raise ConversionError(
            f"{path} is a link to {real}, outside the checkpoint's folder, and is not followed. Put a copy of the "
            "file in its place."
        )
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise ConversionError(f"{path} is {kind}, not a file.")
    return real


def check_file(path: Path, limit: int, *, root: Path | None = None) -> Path:
    """Returns the regular file at a path if it has at most `limit` bytes; see [`regular_file`].

    Raises:
        ConversionError: it is not a regular file, or larger.
    """
    real = regular_file(path, root=root)
    size = real.stat().st_size
    if size > limit:
        raise ConversionError(
            f"{path} has {size:,} bytes, more than the {limit:,} allowed for such a file. It is not what its name says."
        )
    return real


def read_file(path: Path, limit: int, *, root: Path | None = None) -> bytes:
    """Reads a regular file of at most `limit` bytes; see [`regular_file`].

    Raises:
        ConversionError: it is not a regular file, is larger, or cannot be read.
    """
    real = check_file(path, limit, root=root)
    try:
        with real.open("rb") as file:
            return file.read(real.stat().st_size)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {reason(error)}.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _depth(value: object) -> int:
    """Returns the nesting depth of objects and arrays."""
    depth = 0
    level = [value]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return depth


def parse_json(data: bytes, what: str) -> JsonObject:
    """Parses a small JSON file that holds an object.

    Raises:
        ConversionError: it is not JSON, not an object, or nested more deeply than a configuration.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{what} cannot be read as JSON: {reason(error)}.") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{what} holds {type(value).__name__} in JSON, not an object {{...}}.")
    if _depth(value) > MAX_JSON_DEPTH:
        raise ConversionError(f"{what} has more than {MAX_JSON_DEPTH} levels of JSON; a configuration has a few.")
    return value


def read_json(path: Path, *, root: Path | None = None) -> JsonObject:
    """Reads the object in a JSON file; see [`read_file`] and [`parse_json`]."""
    return parse_json(read_file(path, MAX_JSON_BYTES, root=root), str(path))


class Files:
    """Files below a folder; folders that are links are not entered.

    Attributes:
        sizes: bytes of each regular file, by its path relative to the root, with forward slashes.
        stored: bytes that each file takes as stored; less than `sizes` in a compressed archive.
        refused: the reason why an existing file is not read (a link out of the folder, a pipe), by its path.

    Raises:
        ConversionError: there are too many files for a checkpoint.
    """

    def __init__(self, root: Path):
        self.root = root
        self.sizes: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        for folder, folders, names in os.walk(root):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for name in (*names, *links):
                self._add(Path(folder) / name)
            if len(self.sizes) + len(self.refused) > MAX_FILES:
                raise ConversionError(f"{root} has more than {MAX_FILES:,} files. Give the checkpoint's own folder.")
        self.stored = self.sizes

    def _add(self, path: Path) -> None:
        name = path.relative_to(self.root).as_posix()
        try:
            self.sizes[name] = regular_file(path, root=self.root).stat().st_size
        except ConversionError as error:
            self.refused[name] = str(error)

    def read(self, name: str, limit: int) -> bytes:
        """Reads one file.

        Raises:
            ConversionError: it has more than `limit` bytes, or cannot be read.
        """
        return read_file(self.root / name, limit, root=self.root)


class _BoundedFile(io.FileIO):
    """A file that reads at most `limit` bytes at once, while there is a limit."""

    limit: int | None = MAX_ZIP_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if self.limit is not None and size is not None and size > self.limit:
            raise zipfile.BadZipFile(f"its table of contents has {size:,} bytes, more than any checkpoint's")
        return super().read(-1 if size is None else size)


class ZipFiles(Files):
    """Members of a zip, read in place.

    Raises:
        ConversionError: it is not a complete zip file, a member's name leads out of it, a member is not a file, or two
            members have the same name.
    """

    def __init__(self, path: Path):
        self.root = path
        self.refused = {}
        real = regular_file(path)
        try:
            file = _BoundedFile(str(real))
            self.archive = zipfile.ZipFile(file)
            file.limit = None
        except Exception as error:  # zipfile raises many types, all of which mean that the file is not a zip
            raise ConversionError(
                f"{path} is not a complete zip file ({reason(error)}). If it was downloaded, the download was cut "
                "short: fetch it again."
            ) from error
        self.members: dict[str, zipfile.ZipInfo] = {}
        for info in self.archive.infolist():
            self._check(info)
        self.sizes = {name: info.file_size for name, info in self.members.items()}
        self.stored = {name: info.compress_size for name, info in self.members.items()}

    def _check(self, info: zipfile.ZipInfo) -> None:
        parts = PurePosixPath(info.filename.replace("\\", "/")).parts
        if ".." in parts or info.filename.startswith(("/", "\\")) or (parts and parts[0].endswith(":")):
            raise ConversionError(
                f"{self.root} has a member whose name leads out of it: {info.filename!r}. Nothing was read."
            )
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ConversionError(
                f"{self.root} has a member that is a link or a device: {info.filename!r}. Nothing was read; zip the "
                "checkpoint again with the files themselves in it."
            )
        if info.is_dir():
            return
        name = PurePosixPath(info.filename).as_posix()
        if name in self.members:
            raise ConversionError(f"{self.root} has two members named {name!r}, and it is unclear which one is meant.")
        if len(self.members) >= MAX_FILES:
            raise ConversionError(f"{self.root} has more than {MAX_FILES:,} members, more than any checkpoint.")
        self.members[name] = info

    def read(self, name: str, limit: int) -> bytes:
        """Reads one member, and verifies its checksum.

        Raises:
            ConversionError: it has more than `limit` bytes, is damaged, or uses an unusual compression.
        """
        info = self.members[name]
        if info.file_size > limit:
            raise ConversionError(
                f"{self.root}: {name} inflates to {info.file_size:,} bytes, but at most {limit:,} are expected."
            )
        if info.compress_type not in _ZIP_METHODS:
            raise ConversionError(f"{self.root}: {name} is neither stored nor deflated. Zip the checkpoint again.")
        try:
            with self.archive.open(info) as file:
                data = file.read(info.file_size)
                # Reading past the end verifies the checksum.
                rest = file.read(1)
        except Exception as error:  # for a damaged member, zipfile, zlib and struct raise many types
            raise ConversionError(f"{self.root}: {name} cannot be read: {reason(error)}.") from error
        if len(data) != info.file_size or rest:
            raise ConversionError(f"{self.root}: {name} is incomplete. Fetch the zip again.")
        return data


def open_files(path: Path) -> Files:
    """Opens the files of a folder or a zip.

    Raises:
        ConversionError: the path is neither.
    """
    try:
        if path.is_dir():
            return Files(path)
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be opened: {reason(error)}.") from error
    if not exists:
        raise ConversionError(f"{path} does not exist. Give a checkpoint's folder, or a zip with one in it.")
    if path.suffix.lower() in (".tar", ".tgz", ".gz"):
        raise ConversionError(f"{path} looks like a tar archive. Extract it and give the folder.")
    return ZipFiles(path)
