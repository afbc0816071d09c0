"""Reads a gzip file from its beginning, in memory and time bounded by its actual size, not by what it claims."""

import io
import zlib
from typing import IO

# Pictures hardly compress, and archives of small ones by a factor of ten. A decompression bomb expands to a thousand
# times its size.
MAX_EXPANSION = 100
_GRACE_BYTES = 64 * 2**20
_READ_BYTES = 2**16
_GZIP = 16 + zlib.MAX_WBITS


class GunzippedFile(io.RawIOBase):
    """The expanded content of a gzip file.

    Python's `gzip` reads a header of any length byte by byte in Python; here `zlib` reads it.

    Args:
        file: the compressed file, at its beginning. It is closed with this one.

    Raises (when read):
        ValueError: the data are damaged, or expand to more than [`MAX_EXPANSION`] times their size.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._inflater = zlib.decompressobj(_GZIP)
        self._waiting = b""
        self._taken = 0
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = b""
        while not data:
            if not self._waiting:
                self._waiting = self._file.read(_READ_BYTES)
                self._taken += len(self._waiting)
                if not self._waiting:
                    return 0
            data = self._inflate(len(buffer))
        self._given += len(data)
        if self._given > _GRACE_BYTES + MAX_EXPANSION * self._taken:
            raise ValueError(f"it expands to more than {MAX_EXPANSION} times its size")
        buffer[: len(data)] = data
        return len(data)

    def _inflate(self, size: int) -> bytes:
        if self._inflater.eof:  # more members may follow, or zeros that pad a block
            self._waiting = self._waiting.lstrip(b"\0")
            self._inflater = zlib.decompressobj(_GZIP)
            return b""
        try:
            data = self._inflater.decompress(self._waiting, size)
        except zlib.error as error:
            raise ValueError("damaged gzip data") from error
        self._waiting = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
