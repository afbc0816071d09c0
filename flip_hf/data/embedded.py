"""Data sets that ship with the library: drawn once, then read from the `datasets` cache like any downloaded one."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SAMPLES_PER_SHARD = 512
Generator = Callable[[list[int], int, int, int], Iterator[dict]]


def numbers(shards: list[int], num_samples: int) -> Iterator[int]:
    """Yields the numbers of the samples in these shards."""
    for shard in shards:
        yield from range(shard * SAMPLES_PER_SHARD, min((shard + 1) * SAMPLES_PER_SHARD, num_samples))


@dataclass(frozen=True)
class EmbeddedData:
    """A procedural data set with a train split of pairs, and a test split of labelled images for zero-shot evaluation.

    Attributes:
        name: the source name that selects it.
        generators: by split, a function (shards, number of samples, image size, seed) that yields rows.
        num_samples: by split, the default number of samples.
        class_names: names of the test labels.
        templates: prompts for the class names.
    """

    name: str
    generators: dict[str, Generator]
    num_samples: dict[str, int]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    def load(self, split: str, *, num_samples: int | None = None, image_size: int = 64, seed: int = 0):
        """Loads a split as a `datasets.IterableDataset` of undecoded JPEG images.

        Args:
            split: `"train"` (columns image, caption) or `"test"` (columns image, label).
            num_samples: number of samples, in shards of 512.
            image_size: side of the square images, in pixels; at least 32.
            seed: seed of the pictures.

        Raises:
            ValueError: an unknown split, no samples, or images too small to distinguish the objects.
        """
        from datasets import ClassLabel, Dataset, Features, Value
        from datasets import Image as ImageFeature

        if split not in self.generators:
            raise ValueError(f"The embedded data {self.name!r} has the splits 'train' and 'test', not {split!r}.")
        num_samples = self.num_samples[split] if num_samples is None else num_samples
        if num_samples < 1 or image_size < 32:
            raise ValueError(f"num_samples must be >= 1 and image_size >= 32, got {num_samples} and {image_size}.")
        target = {"caption": Value("string")}
        if split == "test":
            target = {"label": ClassLabel(names=list(self.class_names))}
        shards = list(range(math.ceil(num_samples / SAMPLES_PER_SHARD)))
        dataset = Dataset.from_generator(
            self.generators[split],
            features=Features({"image": ImageFeature(decode=False), **target}),
            gen_kwargs={"shards": shards, "num_samples": num_samples, "image_size": image_size, "seed": seed},
        )
        return dataset.to_iterable_dataset(num_shards=len(shards))  # pyright: ignore[reportAttributeAccessIssue]
