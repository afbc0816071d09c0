"""Chooses the pairs that are held out of training.

Whether a picture is held out depends on the picture alone: on its bytes, or on its name if a table names files. It is
therefore independent of the order of rows, the number of shards, processes and workers, and the seed; all rows of one
picture are on the same side; and a larger fraction holds out everything that a smaller one does.
"""

import hashlib

from flip_hf.data.files import StoredFile

# Leading bytes of a picture that are hashed with its size. Pictures that agree in both are on the same side.
_HASHED_BYTES = 2**16


def image_key(image: object) -> str | None:
    """Returns a key that identifies an encoded picture, or None if there is no picture.

    Args:
        image: bytes, `{"bytes", "path"}`, or a [`StoredFile`], of which the last two parts of the path are used.
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


def is_held_out(image: object, share: float) -> bool:
    """Returns whether a picture belongs to the held-out fraction of all pictures."""
    key = image_key(image) if share else None
    return key is not None and int(key, 16) < share * 2**64
