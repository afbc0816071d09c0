"""The options of `flip-hf embed`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

IndexKind = Literal["flat", "hnsw", "ivf"]
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)
ROWS_PER_FILE = 4096
BATCH_SIZE = 128


@dataclass(frozen=True)
class EmbedOptions:
    """Options of an embedding: the data, the model, and the folder.

    Attributes:
        model, revision: folder or Hub id of the model, and its revision there.
        data, split, config, image_column, caption_column: the data; see [`open_source`].
        folder: the folder of the files.
        texts: whether captions are encoded, too.
        batch_size: images or texts encoded at once.
        precision: of the model's weights: `fp32` or `bf16`.
        rows_per_file: rows of the data in each file.
        workers: loader workers of each process; by the number of cores if None.
        index: kind of FAISS index, if there is to be one.
        skip_unreadable: leave out what cannot be read of shards; by default the command ends with an error after the
            others, and retries when it is given again.
    """

    model: str
    data: str
    folder: Path
    revision: str | None = None
    split: str | None = "train"
    config: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    texts: bool = False
    batch_size: int = BATCH_SIZE
    precision: Literal["fp32", "bf16"] = "fp32"
    rows_per_file: int = ROWS_PER_FILE
    workers: int | None = None
    index: IndexKind | None = None
    skip_unreadable: bool = False
