"""Reads WebDataset tar shards so that a damaged sample costs only itself, and a damaged shard at most its rest.

The `webdataset` builder of `datasets` ends a shard at the first caption that is not UTF-8, the first broken JSON and
the first duplicate key, refuses data whose first samples differ in their members, and takes a truncated archive for a
short one. Here members stay bytes until they are needed, and losses are reported.
"""

import copy
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flip_hf.data.archive import Archive, Member
from flip_hf.data.decode import RefusedSample
from flip_hf.data.files import MAX_FILE_BYTES, has_extension, is_remote, open_at
from flip_hf.data.gzipped import GunzippedFile
from flip_hf.data.reading import Reader
from flip_hf.redaction import shown

# Members kept per sample. Their bytes are limited, too, to twice the limit of one member.
MAX_MEMBERS = 1024
COMPRESSED = (".tar.gz", ".tgz")
TAR_EXTENSIONS = (".tar", *COMPRESSED)
_OWN_COLUMNS = ("__key__", "__url__")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_DOTTED_NAME = re.compile(r"((?:.*/)?[^./][^/]*)\.([^./]+)")
# Members whose names are searched for a sample whose parts are not adjacent.
_NAMES_LOOKED_AT = 20_000


def split_name(name: str, *, at_last_dot: bool = False) -> tuple[str, str] | None:
    """Splits a member's path into key and extension; returns None if one is missing.

    Args:
        name: a member's path.
        at_last_dot: end the key at the last dot instead of the base name's first dot, which is WebDataset's convention.
    """
    match = (_DOTTED_NAME if at_last_dot else _NAME).fullmatch(name)
    return (match.group(1), match.group(2).lower()) if match else None


class _Draft:
    """A sample whose members are being read, limited in number and in bytes."""

    def __init__(self, key: str, url: str, max_bytes: int):
        self.key = key
        self.is_crowded = False
        self.row: dict[str, Any] = {"__key__": key, "__url__": url}
        self.extensions: set[str] = set()
        self._left = max_bytes

    def add(self, extension: str) -> bool:
        """Adds a place for a member, and returns whether there was one left."""
        self.is_crowded = self.is_crowded or len(self.extensions) == MAX_MEMBERS
        if not self.is_crowded:
            self.extensions.add(extension)
        return not self.is_crowded

    def take(self, archive: Archive, member: Member, max_bytes: int) -> bytes | RefusedSample | None:
        """Returns a member's bytes, its refusal, or None if the file ends within it."""
        if member.is_sparse:
            return RefusedSample("sparse tar member")
        if member.size > max_bytes:
            return RefusedSample("oversized file")
        if member.size > self._left:
            return RefusedSample("oversized sample")
        self._left -= member.size
        return archive.content(member)


class TarShards:
    """Tar files whose members form samples.

    A row is a dictionary of the encoded members by extension, with `__key__` and `__url__`. Adjacent members with the
    same key form a sample; a repeated extension begins another one. Nothing is unpacked to disk.

    Args:
        urls: paths or URLs.
        max_member_bytes: a larger member is not read; its value is a [`RefusedSample`].
        keys_have_dots: end keys at a name's last dot, not at its first one: `v1.0-0001.jpg`.
    """

    def __init__(self, urls: Sequence[str], max_member_bytes: int = MAX_FILE_BYTES, *, keys_have_dots: bool = False):
        self.urls = tuple(urls)
        self.max_member_bytes = max_member_bytes
        self.keys_have_dots = keys_have_dots
        self._wanted: frozenset[str] | None = None
        self.remote = any(is_remote(url) for url in self.urls)
        # Starts of the last row read of a shard and of the one after it, where reading resumes after a lost connection,
        # or with a row that was read only to see that there is one.
        self._marks = ((-1, 0, 0), (-1, 0, 0))  # shard, row, byte
        self._in_one_go: set[str] = set()

    @property
    def num_shards(self) -> int:
        return len(self.urls)

    def name(self, shard: int) -> str:
        """Returns the shard's name for messages."""
        return shown(self.urls[shard])

    def select(self, *columns: str | None) -> "TarShards":
        """Returns the same files with only these members.

        Args:
            columns: their extensions; dots lead into nested values, `;` separates alternatives.
        """
        names = [name for column in columns if column for name in column.split(";")]
        shards = copy.copy(self)
        shards._wanted = frozenset(part for name in names for part in (name, name.split(".")[0]))
        return shards

    def read(
        self, shard: int, first: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (row number, row) of a shard.

        Args:
            shard: index of the shard.
            first: number of the first row wanted.
            part: the reader whose rows are wanted; all rows if None.
            damage: called with a reason for each loss.

        Raises:
            Exception: of many types, if the file cannot be opened or the connection is lost.
        """
        usable = [(row, offset) for marked, row, offset in self._marks if marked == shard and row <= first]
        row, offset = max(usable, default=(0, 0))
        try:
            yield from self._read(shard, first, row, offset, part, damage)
        except ValueError as error:
            # fsspec's messages for web servers without range requests, or that do not send a file's length.
            no_ranges = "range requests" in str(error) or "Cannot seek" in str(error)
            if not no_ranges or self.urls[shard] in self._in_one_go:
                raise
            self._in_one_go.add(self.urls[shard])
            _, row, offset = self._marks[1]
            yield from self._read(shard, max(first, row), row, offset, part, damage)

    def _read(
        self, shard: int, first: int, row: int, offset: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        self._marks = ((shard, row, offset),) * 2
        with self._open(shard, offset) as archive:
            draft: _Draft | None = None
            for member in archive.walk(damage):
                name = self._split(member)
                if name is None:
                    continue
                key, extension = name
                if draft is not None and (key != draft.key or extension in draft.extensions or extension in draft.row):
                    self._marks = (self._marks[1], (shard, row + 1, member.offset))
                    if _wanted(row, first, part):
                        yield row, draft.row
                    row = row + 1
                    draft = None
                draft = draft or _Draft(key, self.urls[shard], 2 * self.max_member_bytes)
                was_crowded = draft.is_crowded
                has_place = draft.add(extension) or self._wanted is not None
                if not _wanted(row, first, part) or (self._wanted is not None and extension not in self._wanted):
                    continue
                if has_place:
                    data = draft.take(archive, member, self.max_member_bytes)
                    if data is None:
                        damage("truncated shard")
                        return
                    draft.row[extension] = data
                elif not was_crowded:
                    damage("oversized sample")
            if draft is not None and _wanted(row, first, part):
                yield row, draft.row

    @contextmanager
    def _open(self, shard: int, offset: int) -> Iterator[Archive]:
        """Opens the archive at a byte offset."""
        url = self.urls[shard]
        in_one_go = url in self._in_one_go
        if has_extension(url.lower(), COMPRESSED):
            with open_at(url, in_one_go=in_one_go) as packed, io.BufferedReader(GunzippedFile(packed), 2**16) as file:
                left = offset
                while left > 0 and (skipped := len(file.read(min(left, 2**20)))):
                    left -= skipped
                yield Archive(file, offset, seekable=False)
            return
        with open_at(url, offset, in_one_go=in_one_go) as file:
            yield Archive(file, offset, seekable=not in_one_go)

    def _split(self, member: Member) -> tuple[str, str] | None:
        """Returns a member's key and extension, or None if it is not part of a sample."""
        name = split_name(member.name, at_last_dot=self.keys_have_dots) if member.is_file else None
        return None if name is None or name[1] in _OWN_COLUMNS else name

    def find_parted(self) -> tuple[str, str] | None:
        """Finds two members of one sample that are not adjacent in the first shard; returns None if there are none.

        Only the beginning of the archive is searched, and no member is read. None if the archive cannot be opened.
        """
        try:
            return self._find_parted()
        except (OSError, ValueError):
            return None

    def _find_parted(self) -> tuple[str, str] | None:
        seen: dict[str, str] = {}
        last = None
        with self._open(0, 0) as archive:
            for member in itertools.islice(archive.walk(lambda reason: None), _NAMES_LOOKED_AT):
                name = self._split(member)
                if name is None:
                    continue
                if name[0] != last and name[0] in seen and seen[name[0]] != member.name:
                    return seen[name[0]], member.name
                seen[name[0]] = member.name
                last = name[0]
        return None


def _wanted(row: int, first: int, part: Reader | None) -> bool:
    return row >= first and (part is None or row % part.count == part.index)
