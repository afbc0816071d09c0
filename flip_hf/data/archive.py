"""Walks the members of a tar archive in memory and time that do not depend on what its headers claim.

The most usual headers are parsed here, in half of the time that `tarfile` takes; it parses all others, and the rest is
done here. `tarfile` alone would expand sparse members (a header of 512 bytes becomes gigabytes of zeros), follow a
negative size backwards forever, recurse once for each of a thousand headers that precede a member, and parse a header
in quadratic time.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
# Anything larger is damage or an attack: the bytes of a header that precedes a member's own, the number of such
# headers, and the bytes of a name.
_MAX_HEADER_BYTES = 2**20
_MAX_HEADERS = 8
_MAX_NAME_BYTES = 4096
# No disk holds a larger member, and a seek to its end cannot overflow.
_MAX_SIZE = 2**43
_SKIP_BYTES = 2**20  # read at once where the file cannot seek
# Consecutive zero blocks: archives end in at most twenty, and a server may send them endlessly.
_MAX_ZERO_BLOCKS = 2**16

# The numbers of a header as GNU, BSD and Python's tar write them: mode, owner and group, size, time, checksum; and
# device and prefix, both empty.
_NUMBERS = re.compile(rb"(?:[0-7]{6}[0-7 ]\0){3}([0-7]{11})[ \0][0-7]{11}[ \0]([0-7]{6})\0 ")
_NO_DEVICE_OR_PREFIX = re.compile(rb"(?:0{6}[0 ]\0|\0{8}){2}\0{155}")
_NUMBERS_BEGIN, _CHECKSUM_BEGIN, _TYPE_AT, _DEVICE_BEGIN, _PREFIX_END = 100, 148, 156, 329, 500

_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# Headers that precede a member's own. Global ones are ignored, because reading may start after them.
_PRECEDING = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
)
# Bytes of a sparse member's header, and of the blocks after it, that say whether another block follows.
_EXTENDED = 482
_EXTENDED_AGAIN = 504


@dataclass(frozen=True)
class Member:
    """A member as its headers describe it.

    Attributes:
        name: path, decoded.
        offset: byte where its first header begins.
        size: bytes stored, at least 0.
        is_file: whether it is a regular file, not a link, directory or device.
        is_sparse: whether its runs of zeros are not stored.
    """

    name: str
    offset: int
    size: int
    is_file: bool
    is_sparse: bool


class Archive:
    """An uncompressed tar archive, read from its beginning or from any member.

    After a damaged header the walk continues at the next sound one.

    Args:
        file: the archive.
        position: offset of the next byte that `file` returns.
        seekable: whether `file` can skip bytes; otherwise they are read.
    """

    def __init__(self, file: IO[bytes], position: int, seekable: bool):
        self._file = file
        self._position = position
        self._seekable = seekable
        self._end = position  # of the current member and its padding

    def walk(self, damage: Callable[[str], None]) -> Iterator[Member]:
        """Yields the members, and calls `damage` with a reason for each damaged place.

        Raises:
            ValueError: the file is too short to be an archive.
        """
        while True:
            member, is_damaged, is_whole = self._find()
            if is_damaged:
                damage("damaged tar header")
            if member is None:
                break
            yield member
            is_whole = self._skip_to(self._end)
            if not is_whole:
                break
        if not is_whole:
            damage("truncated shard")

    def content(self, member: Member) -> bytes | None:
        """Returns the bytes of the member that `walk` yielded last, or None if the file ends within them."""
        data = self._take(member.size)
        return data if len(data) == member.size else None

    def _find(self) -> tuple[Member | None, bool, bool]:
        """Returns the next sound member, whether damage precedes it, and whether zero blocks ended the archive."""
        damaged = ended = False
        zeros = 0
        while True:
            start = self._position
            block = self._take(_BLOCK)
            if len(block) < _BLOCK and start == 0:
                raise ValueError("not a tar archive: it is empty or shorter than a header")
            if len(block) < _BLOCK:
                return None, damaged, ended and not block
            if block == _ZEROS:
                ended = True
                zeros += 1
                if zeros > _MAX_ZERO_BLOCKS:
                    return None, damaged, False
                continue
            zeros = 0
            try:
                return self._member(block, start), damaged, ended
            except tarfile.HeaderError:
                damaged = True
            except EOFError:
                return None, damaged, False

    def _member(self, block: bytes, start: int) -> Member:
        """Returns the member whose headers begin with `block`.

        Raises:
            tarfile.HeaderError: a header is damaged, or there are too many.
            EOFError: the file ends within the headers.
        """
        fields: dict[str, str] = {}
        count = 0
        header = self._header(block)
        while header.type in _PRECEDING:
            if not 0 <= header.size <= _MAX_HEADER_BYTES:
                raise tarfile.HeaderError("oversized header")
            data = self._take_all(_padded(header.size))[: header.size]
            count += 1
            if count <= _MAX_HEADERS:
                fields = {**_fields(header.type, data), **fields}  # the outermost one wins
            block = self._take_all(_BLOCK)
            header = self._header(block)
        if count > _MAX_HEADERS:
            raise tarfile.HeaderError("too many headers")
        return self._described(header, block, start, fields)

    @staticmethod
    def _header(block: bytes) -> tarfile.TarInfo:
        return usual_header(block) or tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "replace")

    def _described(self, header: tarfile.TarInfo, block: bytes, start: int, fields: dict[str, str]) -> Member:
        name = fields.get("path", header.name)
        size = header.size
        if "size" in fields:
            size = int(fields["size"]) if fields["size"].isdecimal() and len(fields["size"]) < 20 else -1
        if not 0 <= size <= _MAX_SIZE or len(name) > _MAX_NAME_BYTES:
            raise tarfile.HeaderError("absurd header")
        sparse = header.type == tarfile.GNUTYPE_SPARSE
        further = sparse and block[_EXTENDED]
        while further:
            further = self._take_all(_BLOCK)[_EXTENDED_AGAIN]
        self._end = self._position + (0 if header.type in _WITHOUT_DATA else _padded(size))
        return Member(name, start, size, header.isreg(), sparse or "sparse" in fields)

    def _take(self, size: int) -> bytes:
        """Reads `size` bytes, or fewer at the end of the file."""
        data = self._file.read(size)
        self._position += len(data)
        return data

    def _take_all(self, size: int) -> bytes:
        data = self._take(size)
        if len(data) < size:
            raise EOFError
        return data

    def _skip_to(self, position: int) -> bool:
        """Skips to a position, and returns whether the file reaches that far."""
        if self._seekable and self._position < position:
            self._file.seek(position - 1)
            self._position = position - 1
        while self._position < position:
            if not self._take(min(position - self._position, _SKIP_BYTES)):
                return False
        return True


def usual_header(block: bytes) -> tarfile.TarInfo | None:
    """Parses the name and size of a regular file's header of 512 bytes; returns None if it is in any way unusual."""
    numbers = _NUMBERS.fullmatch(block, _NUMBERS_BEGIN, _TYPE_AT)
    if numbers is None or block[_TYPE_AT : _TYPE_AT + 1] != tarfile.REGTYPE:
        return None
    if _NO_DEVICE_OR_PREFIX.fullmatch(block, _DEVICE_BEGIN, _PREFIX_END) is None:
        return None
    spaces = b" " * (_TYPE_AT - _CHECKSUM_BEGIN)  # stand for the checksum in itself
    if sum(block) - sum(block[_CHECKSUM_BEGIN:_TYPE_AT]) + sum(spaces) != int(numbers[2], 8):
        return None
    header = tarfile.TarInfo(block[:_NUMBERS_BEGIN].partition(b"\0")[0].decode(tarfile.ENCODING, "replace"))
    header.size = int(numbers[1], 8)
    return header


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _fields(kind: bytes, data: bytes) -> dict[str, str]:
    """Returns the `path`, `size` and `sparse` that a preceding header sets for its member.

    Raises:
        tarfile.HeaderError: the header is damaged.
    """
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode(tarfile.ENCODING, "replace")}
    fields: dict[str, str] = {}
    if kind not in _PAX:
        return fields
    for keyword, value in _records(data):
        if keyword == b"path":
            fields["path"] = _decoded(value).rstrip("/")
        elif keyword == b"size":
            fields["size"] = value.decode("ascii", "replace")
        elif keyword.startswith(b"GNU.sparse."):
            fields["sparse"] = "yes"
    return fields


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the records of a pax header, `"%d %s=%s\\n" % (length of the record, keyword, value)`."""
    position = 0
    while position < len(data) and data[position]:
        digits, space, _ = data[position : position + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        begin = position + len(digits) + 1
        end = position + length
        keyword, equals, value = data[begin : max(begin, end - 1)].partition(b"=")
        if not equals or end > len(data):
            raise tarfile.HeaderError("damaged pax header")
        yield keyword, value
        position = end


def _decoded(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode(tarfile.ENCODING, "replace")
