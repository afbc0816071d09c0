"""The choice of the pairs that are held out of training.

Whether a picture is held out follows from the picture alone: from its bytes, or its name where a table names files. So
it does not change with the order of rows, the number of shards, processes and workers, or the seed; all rows of one
picture are on the same side; and a larger share holds out all that a smaller one does.
"""

import hashlib
from typing import Any

from flip_hf.data.files import StoredFile

# Of a picture's bytes, hashed with their number. Where two pictures agree in all of these, both are on one side.
_HASHED_BYTES = 2**16


def image_key(image: Any) -> str | None:
    """A key that identifies an encoded picture; None where there is none.

    Args:
        image: bytes, `{"bytes", "path"}`, or a [`StoredFile`], of which the last two parts of the name count.
    """
    if isinstance(image, dict):
        image = image.get("bytes")
    if isinstance(image, StoredFile):
        image = "/".join(image.path.replace("\\", "/").split("/")[-2:]).encode("utf-8", errors="surrogatepass")
    if not isinstance(image, (bytes, bytearray)) or not image:
        return None
    hashed = hashlib.blake2b(image[:_HASHED_BYTES], digest_size=8)
    hashed.update(len(image).to_bytes(8, "little"))
    return hashed.hexdigest()


def is_held_out(image: Any, share: float) -> bool:
    """Tells whether a picture belongs to the held-out share of all pictures."""
    key = image_key(image) if share else None
    return key is not None and int(key, 16) < share * 2**64
