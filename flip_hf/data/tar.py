"""WebDataset tar shards, read so that a damaged sample costs itself and a damaged shard its rest at most.

The `webdataset` builder of `datasets` ends a shard at the first caption that is no UTF-8, the first broken JSON and the
first key that comes twice, refuses data whose first samples differ in their members, and takes a cut archive for a
short one. Here members stay bytes until somebody needs them, and what was lost is reported.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flip_hf.data.archive import Archive, Member
from flip_hf.data.decode import RefusedSample
from flip_hf.data.files import MAX_FILE_BYTES, is_remote, open_at
from flip_hf.data.reading import Reader
from flip_hf.redaction import shown

# Members of a sample that are kept. Their bytes are bounded, too, by twice those that one member may have.
MAX_MEMBERS = 1024
_OWN_COLUMNS = ("__key__", "__url__")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension by WebDataset's convention: the key ends at the base name's first dot. None without both."""
    match = _NAME.fullmatch(name)
    return (match.group(1), match.group(2).lower()) if match else None


class _Draft:
    """A sample whose members are being read; what it holds is bounded in number and in bytes."""

    def __init__(self, key: str, url: str, max_bytes: int):
        self.key = key
        self.is_crowded = False
        self.row: dict[str, Any] = {"__key__": key, "__url__": url}
        self._left = max_bytes

    def add(self, extension: str) -> bool:
        """Makes a place for a member, if there is any left."""
        self.is_crowded = self.is_crowded or len(self.row) == MAX_MEMBERS + 2
        if not self.is_crowded:
            self.row[extension] = None
        return not self.is_crowded

    def take(self, archive: Archive, member: Member, max_bytes: int) -> bytes | RefusedSample | None:
        """A member's bytes, its refusal, or None where the file ends before it does."""
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

    A row is a dictionary of the encoded members under their extensions, with `__key__` and `__url__`. Neighbours with
    one key form a sample; an extension that comes again begins another one. Nothing is unpacked to disk.

    Args:
        urls: paths or URLs.
        max_member_bytes: a larger member is not read; whoever asks for it gets a [`RefusedSample`].
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
            row = offset = 0
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
        with self._open(shard, offset) as archive:
            draft: _Draft | None = None
            for member in archive.walk(damage):
                name = split_name(member.name) if member.is_file else None
                if name is None or name[1] in _OWN_COLUMNS:
                    continue
                key, extension = name
                if draft is not None and (key != draft.key or extension in draft.row):
                    self._mark = (shard, row + 1, member.offset)
                    if _wanted(row, first, part):
                        yield row, draft.row
                    row, draft = row + 1, None
                draft = draft or _Draft(key, self.urls[shard], 2 * self.max_member_bytes)
                was_crowded = draft.is_crowded
                has_place = draft.add(extension)
                if not _wanted(row, first, part):
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
        """The archive from a byte on."""
        url = self.urls[shard]
        in_one_go = url in self._in_one_go
        with open_at(url, offset, in_one_go=in_one_go) as file:
            yield Archive(file, offset, seekable=not in_one_go)


def _wanted(row: int, first: int, part: Reader | None) -> bool:
    return row >= first and (part is None or row % part.count == part.index)
