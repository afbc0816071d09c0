"""Measure data without reading them, so that others under the same name are told apart from them."""

import os

from flip_hf.data.files import is_remote
from flip_hf.data.lists import ListShards
from flip_hf.data.pairs import PairShards
from flip_hf.data.parquet import ParquetShards
from flip_hf.data.reading import Shards
from flip_hf.data.tar import TarShards


def extent_of(shards: Shards) -> dict[str, int | None]:
    """Returns the number of `shards`, the `rows` of a table whose number is known, and the number and `bytes` of the
    local `files`.
    """
    if isinstance(shards, PairShards):
        urls = [os.path.join(shards.folder, picture) for picture in shards.pictures]
    else:
        urls = shards.files if isinstance(shards, ListShards) else getattr(shards, "urls", ())
    files = [url for url in urls if not is_remote(url)]
    rows = getattr(shards, "num_rows", None)
    sizes = map(os.path.getsize, files)
    return {"shards": shards.num_shards, "rows": rows, "files": len(files), "bytes": sum(sizes)}


def bytes_of_shards(shards: Shards) -> list[int | None]:
    """Returns the size in bytes of each shard that is a local file; an empty list where shards are no single files."""
    if not isinstance(shards, (TarShards, ParquetShards)):
        return []
    return [None if is_remote(url) else os.path.getsize(url) for url in shards.urls]
