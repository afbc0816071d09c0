"""Measures data without reading them, so that others under the same name are told apart from them."""

import os
from collections.abc import Sequence

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
    files = [url for url in _urls(shards) if not is_remote(url)]
    rows = getattr(shards, "num_rows", None)
    sizes = map(os.path.getsize, files)
    return {"shards": shards.num_shards, "rows": rows, "files": len(files), "bytes": sum(sizes)}


def shared_file(first: Shards, second: Shards) -> str | None:
    """Returns the path or URL of the first file that holds rows of both, or None if they have no file in common.

    Only names are compared, with links resolved: a copy is another file.
    """
    others = {_place(url) for url in _urls(second)}
    return next((url for url in _urls(first) if _place(url) in others), None)


def _place(url: str) -> str:
    return url if is_remote(url) else os.path.realpath(url)


def _urls(shards: Shards) -> Sequence[str]:
    """Lists the files that rows are in, or whose pictures they are; empty if they are not known."""
    if isinstance(shards, PairShards):
        return [os.path.join(shards.folder, picture) for picture in shards.pictures]
    return shards.files if isinstance(shards, ListShards) else getattr(shards, "urls", ())


def bytes_of_shards(shards: Shards) -> list[int | None]:
    """Returns the size in bytes of each shard that is a local file; an empty list where shards are no single files."""
    if not isinstance(shards, (TarShards, ParquetShards)):
        return []
    return [None if is_remote(url) else os.path.getsize(url) for url in shards.urls]
