"""Reads a data set once and spools its usable samples, in worker processes, from wherever an earlier run stopped."""

import io
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset

from flip_hf.curation.contents import Contents, caption_columns, forms_of, key_of, read_contents
from flip_hf.curation.processes import this_worker
from flip_hf.curation.spool import EXTENSIONS, FILE_BYTES, FILE_ROWS, OTHER_EXTENSION, Progress, Spool
from flip_hf.data.reading import MAX_BROKEN_SHARDS, Reader, Shards, read_rows
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.data.sources import Source

_MAX_JPEG_SIDE = 65_500  # libjpeg's
# Decoded at this side where images are only tested, in pixels.
_TESTED_SIDE = 64
# Rows after which a worker tells its progress.
_TOLD = 64
_UNREADABLE = "unreadable shard"


@dataclass(frozen=True)
class ImageForm:
    """The form in which images are written.

    Attributes:
        short_side: images with a longer short side are reduced to it, and encoded as JPEG if they are not too long
            for one; None keeps all bytes as they are.
        quality: of these JPEGs.
        background: colour of transparent parts.
    """

    short_side: int | None = None
    quality: int = 90
    background: Colour = WHITE

    def encoded(self, contents: Contents) -> tuple[bytes, str]:
        """Returns the encoded image and its extension."""
        extension = EXTENSIONS.get(contents.format, OTHER_EXTENSION)
        if self.short_side is None or min(contents.size) <= self.short_side:
            return contents.image, extension
        scale = self.short_side / min(contents.size)
        width, height = (round(side * scale) for side in contents.size)
        if max(width, height) > _MAX_JPEG_SIDE:
            return contents.image, extension
        reduced = contents.pixels.resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        reduced.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue(), "jpg"


class PartOfShard:
    """Every `count`-th row of one shard, as a data set of one shard; see [`Shards`].

    Unlike a reader's part of an epoch, it reports all damage it sees, so that every part notices a lost connection.
    """

    def __init__(self, shards: Shards, shard: int, part: Reader):
        self.shards = shards
        self.shard = shard
        self.part = part
        self.remote = shards.remote
        self.num_shards = 1

    def name(self, shard: int) -> str:
        """Returns the shard's name for messages."""
        return self.shards.name(self.shard)

    def read(
        self, shard: int, first: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (row number, row); see [`Shards`]."""
        return self.shards.read(self.shard, first, self.part if self.part.count > 1 else None, damage)

    def select(self, image: str, target: str | None, /) -> "PartOfShard":
        """Returns the same rows with only these columns."""
        return PartOfShard(self.shards.select(image, target), self.shard, self.part)


class Dealing(IterableDataset):
    """The work of spooling a data set. Workers yield numbers of rows done, and a text for each shard left unread.

    Args:
        source: the data.
        spool: the spool.
        parts: tracks of each shard.
        form: the form of images.
        skip_unreadable: finish a track without the rest of a shard that cannot be read.
    """

    def __init__(self, source: Source, spool: Spool, parts: int, form: ImageForm, skip_unreadable: bool = False):
        self.source = source
        self.spool = spool
        self.parts = parts
        self.form = form
        self.skip_unreadable = skip_unreadable
        self.progress = spool.progress()

    def __iter__(self) -> Iterator[int | str | dict[str, str]]:
        """Yields the progress of this worker, or `{"error": message}` where nothing can be written."""
        worker = this_worker()
        tracks = range(worker.index, self.source.shards.num_shards * self.parts, worker.count)
        broken = 0
        try:
            for track in tracks:
                progress = self.progress.get(track, Progress())
                if progress.is_finished:
                    continue
                unreadable = yield from self._deal(track, progress)
                broken = broken + 1 if unreadable is not None else 0
                if broken == MAX_BROKEN_SHARDS:
                    yield {"error": f"{broken} shards in a row could not be read; the last one: {unreadable}."}
        except OSError as error:  # reading reports its own
            yield {"error": f"{self.spool.folder} cannot be written: {error.strerror or error}."}

    def _deal(self, track: int, progress: Progress) -> Generator[int | str, None, str | None]:
        """Spools the rest of a track; returns the name and the error of a shard that cannot be read."""
        shard, part = divmod(track, self.parts)
        shards = PartOfShard(self.source.shards, shard, Reader(part, self.parts))
        damage: list[tuple[str, str]] = []
        rows: list[dict[str, Any]] = []
        held = told = 0
        # What is damaged before the first row was found when the row before it was read, and those after it.
        is_known = progress.next_row > 0
        places = read_rows(
            shards,
            Reader(0, 1),
            epoch=0,
            seed=None,
            start=(0, progress.next_row),
            report=lambda reason, detail: damage.append((reason, detail)),
        )
        for (_, number), row in places:
            if is_known:
                damage.clear()
                is_known = False
            if len(rows) == FILE_ROWS or held >= FILE_BYTES:
                progress = self._commit(track, rows, progress, number, damage)
                rows = []
                held = 0
            rows.append({"shard": shard, "row": number, **self._sample(row)})
            held += len(rows[-1].get("image", b""))
            told += 1
            if told == _TOLD:
                yield told
                told = 0
        yield told
        unreadable = next((detail for reason, detail in damage if reason == _UNREADABLE), None)
        if unreadable is not None and not self.skip_unreadable:
            yield unreadable
            return unreadable
        if is_known:  # no row was left
            damage.clear()
        self._commit(track, rows, progress, None, damage)
        return None

    def _commit(
        self, track: int, rows: list[dict], progress: Progress, next_row: int | None, damage: list[tuple[str, str]]
    ) -> Progress:
        """Writes rows, and returns the state after them; the track is finished where no row follows."""
        # Each part of a shard sees what is damaged in it; one of them reports it.
        told = tuple(damage) if track % self.parts == 0 else ()
        damage.clear()
        after = replace(
            progress,
            files=progress.files + 1,
            next_row=progress.next_row if next_row is None else next_row,
            is_finished=next_row is None,
            damage=told,
        )
        self.spool.write(track, rows, after)
        return after

    def _sample(self, row: dict) -> dict[str, Any]:
        key = key_of(row, self.source)
        try:
            contents = read_contents(row, self.source, self.form.short_side or _TESTED_SIDE, self.form.background)
        except RefusedSample as refused:
            return {"key": key, "refused": refused.reason}
        image, extension = self.form.encoded(contents)
        forms = forms_of(contents.captions, [column.name for column in caption_columns(self.source)])
        captions = json.dumps(contents.captions, ensure_ascii=False)
        return {"key": key, "image": image, "extension": extension, "captions": captions, "forms": forms}
