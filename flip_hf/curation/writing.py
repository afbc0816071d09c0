"""Writes shuffled shards from the spool, in worker processes, each shard whole or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

from flip_hf.console.files import file_digest, is_plain_file, replacing
from flip_hf.console.json_types import JsonObject
from flip_hf.curation.processes import this_worker
from flip_hf.curation.shard_files import Parquet, Tar
from flip_hf.curation.spool import Index, Spool, spooled_sample
from flip_hf.curation.state import damaged, make_folder, read_state

if TYPE_CHECKING:
    from flip_hf.curation.sharding import ShardOptions

_FACTS = ".work/shards"
_SHARD = {"name": str, "samples": int, "bytes": int, "sha256": str}


class Writing(IterableDataset):
    """The work of writing shards. Workers yield the number of each shard when it is written.

    Args:
        folder: folder of the shards.
        spool: the spool.
        samples: where the samples are, in the order in which they are written.
        layout: writes a shard.
        options: the options.

    Raises:
        ValueError: what an earlier call has left is damaged.
    """

    def __init__(self, folder: Path, spool: Spool, samples: Index, layout: Tar | Parquet, options: "ShardOptions"):
        self.folder = folder
        self.spooled = spool.paths()
        self.columns = spool.columns
        self.samples = samples
        self.layout = layout
        self.options = options
        self.count = -(-len(samples.places) // options.samples_per_shard)
        make_folder(folder / _FACTS)
        self.written = {number for number in range(self.count) if self._is_written(number)}

    def __iter__(self) -> Iterator[int | dict[str, str]]:
        """Writes this worker's shards; yields `{"error": message}` where one cannot be written."""
        worker = this_worker()
        try:
            for number in range(worker.index, self.count, worker.count):
                if number not in self.written:
                    self._write(number)
                    yield number
        except OSError as error:
            yield {"error": f"{self.folder} cannot be written: {error.strerror or error}."}
        except ValueError as error:  # of a damaged spool
            yield {"error": str(error)}

    def facts(self) -> list[JsonObject]:
        """Returns name, samples, bytes and checksum of every shard, in order."""
        return [self._facts(number) for number in range(self.count)]

    def _facts(self, number: int) -> JsonObject:
        facts = read_state(self._facts_file(number), _SHARD)
        if (facts["name"], facts["samples"]) != (self._name(number), len(self._numbers(number))):
            raise damaged(self._facts_file(number))
        return facts

    def _is_written(self, number: int) -> bool:
        """Returns whether a shard is there, of the size that its facts say."""
        if not self._facts_file(number).is_file():
            return False
        facts = self._facts(number)
        path = self.folder / facts["name"]
        return is_plain_file(path) and path.stat().st_size == facts["bytes"]

    def _name(self, number: int) -> str:
        return f"{self.options.split}-{number:05d}-of-{self.count:05d}.{self.options.format}"

    def _numbers(self, number: int) -> range:
        """Returns the numbers of a shard's samples."""
        size = self.options.samples_per_shard
        return range(number * size, min(len(self.samples.places), (number + 1) * size))

    def _facts_file(self, number: int) -> Path:
        return self.folder / _FACTS / f"{number:05d}.json"

    def _write(self, number: int) -> None:
        numbers = self._numbers(number)
        name = self._name(number)
        with replacing(self.folder / name) as path:
            self.layout.write(path, ((each, self._sample(each)) for each in numbers))
            facts = {"name": name, "samples": len(numbers), "bytes": path.stat().st_size, "sha256": file_digest(path)}
        with replacing(self._facts_file(number)) as path:
            path.write_text(json.dumps(facts), encoding="utf-8")

    def _sample(self, number: int) -> dict[str, Any]:
        return spooled_sample(self.spooled[self.samples.files[number]], int(self.samples.rows[number]), self.columns)
