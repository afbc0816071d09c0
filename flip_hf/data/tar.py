"""WebDataset tar shards, read so that a damaged sample costs itself and a damaged shard its rest at most.

The `webdataset` builder of `datasets` ends a shard at the first caption that is no UTF-8, the first broken JSON and the
first key that comes twice, refuses data whose first samples differ in their members, and takes a cut archive for a
short one. Here members stay bytes until somebody needs them, and what was lost is reported.
"""

import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flip_hf.data.decode import RefusedSample
from flip_hf.data.files import MAX_FILE_BYTES, is_remote, open_at
from flip_hf.data.reading import Reader
from flip_hf.redaction import shown

# What `tarfile` reads into memory before it names a member; a longer one is an attack or damage. Long names have a few
# kilobytes, and `tarfile` takes minutes for hundreds of them (CVE-2024-6232).
_MAX_HEADER_BYTES = 2**14
# Headers before one member, which `tarfile` reads by recursion: a long name, a long link, attributes.
_MAX_CHAIN = 8
# Attributes for all that follows; `tarfile` keeps them, and gives every member a copy.
_MAX_GLOBAL_HEADERS = 64
# Zero blocks in a row: archives end in twenty at most, and one that never ends may come from a server.
_MAX_ZERO_BLOCKS = 2**16
# Members of one sample beside its key; data sets have ten.
MAX_MEMBERS = 64
_NAME_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
# How `tarfile` says what is wrong with a header.
_InvalidHeader: Any = tarfile.InvalidHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_TruncatedHeader: Any = tarfile.TruncatedHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension by WebDataset's convention: the key ends at the base name's first dot. None without both."""
    match = _NAME.fullmatch(name)
    return (match.group(1), match.group(2).lower()) if match else None


class _Member(tarfile.TarInfo):
    """A header that leaves word of what was wrong with it: `tarfile` itself takes most damage for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise _InvalidHeader("negative size")
        if member.type in (*_NAME_HEADERS, tarfile.GNUTYPE_LONGLINK) and member.size > _MAX_HEADER_BYTES:
            raise _InvalidHeader("oversized header")
        return member

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> "_Member":
        archive = tarfile
        archive.chain += 1
        try:
            if archive.chain > _MAX_CHAIN:
                raise _InvalidHeader("chained headers")
            member = super().fromtarfile(tarfile)
        except Exception as error:
            archive.note(error)
            # What is wrong behind a long name is no reason to give the archive up, as `tarfile` does.
            behind = type(error).__name__ == "SubsequentHeaderError"
            if archive.chain == 1 and behind and "InvalidHeaderError" in archive.problems:
                raise _InvalidHeader(str(error)) from error
            raise
        finally:
            archive.chain -= 1
        archive.zero_blocks = 0
        return member

    # A sparse member is never expanded (see [`TarShards`]), and so its map, which may be long, is not kept.

    def _proc_sparse(self, archive: Any) -> "_Member":
        _, is_extended, size = self._sparse_structs  # pyright: ignore[reportAttributeAccessIssue]
        while is_extended:
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                raise _TruncatedHeader("truncated map")
            is_extended = bool(block[504])
        self.sparse: Any = []
        self.offset_data = archive.fileobj.tell()
        archive.offset = self.offset_data + self._block(self.size)  # pyright: ignore[reportAttributeAccessIssue]
        self.size = size
        return self

    def _proc_gnusparse_00(self, next: Any, *_: Any) -> None:
        next.sparse = []

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


class _Archive(tarfile.TarFile):
    """Walks an archive's members; after a damaged header it goes on with the next sound one.

    `problems` has the names of `tarfile`'s header errors met before a member. The zero blocks that end an archive are
    among them, as `EOFHeaderError`.
    """

    tarinfo = _Member

    def __init__(self, *args: Any, **kwargs: Any):
        self.problems: set[str] = set()
        self.chain = 0
        self.zero_blocks = 0
        super().__init__(*args, **kwargs)

    def note(self, error: Exception) -> None:
        """Keeps the kind of a header's error.

        Raises:
            EOFError: zero blocks do not end.
        """
        name = type(error).__name__
        self.problems.add(name)
        self.zero_blocks = self.zero_blocks + 1 if name == "EOFHeaderError" else 0
        if self.zero_blocks > _MAX_ZERO_BLOCKS:
            raise EOFError("zero blocks without an end")

    def walk(self, damage: Callable[[str], None]) -> Iterator[tarfile.TarInfo]:
        """Yields the members; calls `damage` with a reason for each damaged place."""
        ended = False  # zero blocks were seen after the last member
        while True:
            try:
                member = self.next()
            except (tarfile.TarError, EOFError):
                damage("truncated shard")
                return
            problems = self.problems
            self.problems = set()
            self.members = []  # `tarfile` would keep them all
            if len(self.pax_headers) > _MAX_GLOBAL_HEADERS:
                self.pax_headers = {}
            if member is not None and member.size < 0:  # as an attribute says
                problems.add("InvalidHeaderError")
                self.offset = max(self.offset, member.offset_data)
                member.type = tarfile.DIRTYPE  # nothing to read
            if "InvalidHeaderError" in problems:
                damage("damaged tar header")
            if member is None:
                ended = ended or "EOFHeaderError" in problems
                if not ended or "TruncatedHeaderError" in problems:
                    damage("truncated shard")
                return
            yield member


class TarShards:
    """Tar files whose members form samples.

    A row is a dictionary of the encoded members under their extensions, with `__key__` and `__url__`. Neighbours with
    one key form a sample; an extension that comes again begins another one. Nothing is unpacked to disk.

    Args:
        urls: paths or URLs.
        max_member_bytes: a larger member is not read; whoever asks for it gets a [`RefusedSample`]. Nor is what goes
            beyond twice as many bytes in one sample, or a sparse member, whose zeros are in no file.
    """

    def __init__(self, urls: Sequence[str], max_member_bytes: int = MAX_FILE_BYTES):
        self.urls, self.max_member_bytes = tuple(urls), max_member_bytes
        self.remote = any(is_remote(url) for url in self.urls)
        # Where the last row began that was read of a shard: a lost connection is taken up there.
        self._mark = (-1, 0, 0)  # shard, row, byte
        self._in_one_go: set[str] = set()

    @property
    def num_shards(self) -> int:
        return len(self.urls)

    def name(self, shard: int) -> str:
        """What to call a shard in a message."""
        return shown(self.urls[shard])

    def read(
        self, shard: int, first: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (row's number, row) of a shard.

        Args:
            shard: which.
            first: number of the first row wanted.
            part: only the rows whose turn it is; all if None.
            damage: called with a reason for what was lost.

        Raises:
            Exception: of many kinds, if the file cannot be opened, or the connection is lost.
        """
        marked, row, offset = self._mark
        if marked != shard or row > first:
            row, offset = 0, 0
        try:
            yield from self._read(shard, first, row, offset, part, damage)
        except ValueError as error:
            # fsspec's words for web servers that give no ranges, or do not say how long a file is.
            no_ranges = "range requests" in str(error) or "Cannot seek" in str(error)
            if not no_ranges or self.urls[shard] in self._in_one_go:
                raise
            self._in_one_go.add(self.urls[shard])
            marked, row, offset = self._mark
            yield from self._read(shard, max(first, row), row, offset, part, damage)

    def _read(
        self, shard: int, first: int, row: int, offset: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        self._mark = (shard, row, offset)
        with self._open(shard, offset) as (archive, base):
            sample: dict[str, Any] = {}
            room = 2 * self.max_member_bytes
            for member in archive.walk(damage):
                name = split_name(member.name) if member.isreg() else None
                if name is None:
                    continue
                key, extension = name
                if sample and (key != sample["__key__"] or extension in sample):
                    self._mark = (shard, row + 1, base + member.offset)
                    if _wanted(row, first, part):
                        yield row, sample
                    row += 1
                    sample = {}
                    room = 2 * self.max_member_bytes
                if len(sample) >= MAX_MEMBERS + 2:  # with the names of sample and shard
                    continue
                sample.update(__key__=key, __url__=self.urls[shard])
                sample[extension] = None
                if _wanted(row, first, part):
                    data = self._content(archive, member, room)
                    if data is None:
                        damage("truncated shard")
                        return
                    sample[extension] = data
                    room -= len(data) if isinstance(data, bytes) else 0
            if sample and _wanted(row, first, part):
                yield row, sample

    @contextmanager
    def _open(self, shard: int, offset: int) -> Iterator[tuple[_Archive, int]]:
        """The archive from a byte on, and how many bytes its own count begins late."""
        url = self.urls[shard]
        in_one_go = url in self._in_one_go
        with open_at(url, offset, in_one_go=in_one_go) as file:
            opener: Any = _Archive.open
            mode = "r|" if in_one_go else "r:"
            try:
                archive = opener(fileobj=file, mode=mode, ignore_zeros=True, errors="replace")
            except tarfile.ReadError as error:
                raise ValueError(f"no tar archive: {error}") from error
            with archive:
                yield archive, offset if in_one_go else 0

    def _content(self, archive: _Archive, member: tarfile.TarInfo, room: int) -> bytes | RefusedSample | None:
        """Returns a member's bytes, its refusal, or None where the file ends before it does.

        Args:
            archive: where it is.
            member: its header.
            room: bytes that its sample may still have.
        """
        if member.size > self.max_member_bytes:
            return RefusedSample("oversized file")
        if member.issparse():
            return RefusedSample("sparse tar member")
        if member.size > room:
            return RefusedSample("oversized sample")
        try:
            file = archive.extractfile(member)
            data = file.read() if file is not None else b""
        except (tarfile.ReadError, EOFError):
            return None
        return data if len(data) == member.size else None


def _wanted(row: int, first: int, part: Reader | None) -> bool:
    return row >= first and (part is None or row % part.count == part.index)
