"""Examines every sample of a data set once, in worker processes."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from torch.utils.data import IterableDataset

from flip_hf.curation.contents import Contents, key_of, read_contents
from flip_hf.curation.hashing import COLOURS, CONTENT_BYTES, content_hash, perceptual_hash, quarter_colours
from flip_hf.curation.processes import this_worker
from flip_hf.data.reading import epoch_shards, read_rows
from flip_hf.data.refusals import BadDataError, RefusedSample
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.data.sources import Source

# A row for each sample; of one that training would skip, only where it is, its name and the reason.
SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("refused", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int32()),
        ("captions", pa.int32()),
        ("characters", pa.int32()),  # of the longest caption
        ("image_hash", pa.binary(CONTENT_BYTES)),
        ("caption_hash", pa.uint64()),
        ("perceptual_hash", pa.uint64()),
        ("colours", pa.binary(COLOURS)),
    ]
)
_BATCH = 256
# Side at which images are decoded to be hashed, in pixels.
_HASHED_SIDE = 64


@dataclass
class Lengths:
    """Numbers of captions by length, in characters, words and tokens; the last is empty without a tokenizer."""

    characters: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)

    def add(self, other: "Lengths") -> None:
        """Adds other captions."""
        for mine, others in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.update(others)


@dataclass(frozen=True)
class Damage:
    """A loss that is larger than a sample, such as the rest of a truncated shard; `where` names the shard."""

    reason: str
    where: str


@dataclass(frozen=True)
class Examined:
    """A batch of examined samples.

    Attributes:
        samples: rows of [`SCHEMA`].
        lengths: lengths of their captions.
        damage: what was found damaged since the last batch.
    """

    samples: pa.RecordBatch
    lengths: Lengths
    damage: list[Damage]


class Examination(IterableDataset):
    """One pass over a data set, in batches of [`Examined`].

    Args:
        source: the data.
        count_tokens: maps captions to their numbers of tokens; None counts none.
        background: colour of transparent parts.
    """

    def __init__(
        self,
        source: Source,
        count_tokens: Callable[[Sequence[str]], list[int]] | None = None,
        background: Colour = WHITE,
    ):
        self.source = source
        self.count_tokens = count_tokens
        self.background = background

    def __iter__(self) -> Iterator[Examined | dict[str, str]]:
        """Yields batches of this worker's samples, or `{"error": message}` where the data cannot be read."""
        try:
            yield from self._batches()
        except BadDataError as error:
            yield {"error": str(error)}

    def _batches(self) -> Iterator[Examined]:
        reader = this_worker()
        shards = self.source.shards
        order, _ = epoch_shards(shards.num_shards, reader, 0, None)
        damage: list[Damage] = []
        rows: list[dict] = []
        texts: list[str] = []
        places = read_rows(
            shards, reader, epoch=0, seed=None, report=lambda reason, detail: damage.append(Damage(reason, detail))
        )
        for (nth, number), row in places:
            rows.append({"shard": order[nth], "row": number, "key": key_of(row, self.source)})
            try:
                contents = read_contents(row, self.source, _HASHED_SIDE, self.background)
                rows[-1] |= _facts(contents)
                texts += contents.texts()
            except RefusedSample as refused:
                rows[-1]["refused"] = refused.reason
            if len(rows) == _BATCH:
                yield self._batch(rows, texts, damage)
                rows = []
                texts = []
                damage.clear()
        yield self._batch(rows, texts, damage)

    def _batch(self, rows: list[dict], texts: list[str], damage: list[Damage]) -> Examined:
        tokens = self.count_tokens(texts) if self.count_tokens is not None and texts else []
        lengths = Lengths(Counter(map(len, texts)), Counter(len(text.split()) for text in texts), Counter(tokens))
        return Examined(pa.RecordBatch.from_pylist(rows, SCHEMA), lengths, list(damage))


def _facts(contents: Contents) -> dict:
    texts = contents.texts()
    written = json.dumps(contents.captions, sort_keys=True)
    return {
        "width": contents.size[0],
        "height": contents.size[1],
        "bytes": len(contents.image),
        "captions": len(texts),
        "characters": max(map(len, texts), default=0),
        "image_hash": content_hash(contents.image),
        "caption_hash": int(np.frombuffer(content_hash(written.encode())[:8], "<u8")[0]),
        "perceptual_hash": perceptual_hash(contents.pixels),
        "colours": quarter_colours(contents.pixels),
    }
