"""Files of a checkpoint, in a folder or in a zip that is read in place."""

import zipfile
import zlib
from pathlib import Path, PurePosixPath

from flip_hf.conversion.tables import ConversionError


class Files:
    """Files under a folder.

    Attributes:
        sizes: bytes of each file, by its path relative to the root, with forward slashes.
    """

    def __init__(self, root: Path):
        self.root = root
        self.sizes = {p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()}

    def read(self, name: str) -> bytes:
        """The content of one file."""
        return (self.root / name).read_bytes()


class ZipFiles(Files):
    """Members of a zip, read in place.

    Raises:
        ConversionError: it is not a whole zip file, or a member's name leads out of it.
    """

    def __init__(self, path: Path):
        try:
            self.archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ConversionError(
                f"{path} is not a complete zip file ({error}). If it was downloaded, the download broke off: fetch it "
                "again."
            ) from error
        for name in self.archive.namelist():
            parts = PurePosixPath(name.replace("\\", "/")).parts
            if ".." in parts or name.startswith(("/", "\\")) or (parts and parts[0].endswith(":")):
                raise ConversionError(f"{path} has a member whose name leads out of it: {name!r}. Nothing was read.")
        self.sizes = {info.filename: info.file_size for info in self.archive.infolist() if not info.is_dir()}

    def read(self, name: str) -> bytes:
        """The content of one member, checked against its checksum."""
        try:
            return self.archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            raise ConversionError(f"{self.archive.filename}: {name} cannot be read: {error}.") from error


def open_files(path: Path) -> Files:
    """The files of a folder or a zip.

    Raises:
        ConversionError: it is neither.
    """
    if path.is_dir():
        return Files(path)
    if not path.is_file():
        raise ConversionError(f"{path} does not exist. Give a checkpoint's folder, or a zip with one in it.")
    if path.suffix.lower() in (".tar", ".tgz", ".gz"):
        raise ConversionError(f"{path} looks like a tar archive. Extract it and give the folder.")
    return ZipFiles(path)
