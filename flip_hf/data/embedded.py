"""Data sets that come with the library: drawn once, then read from the `datasets` cache like any downloaded one."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SAMPLES_PER_SHARD = 512
Generator = Callable[[list[int], int, int, int], Iterator[dict]]


def numbers(shards: list[int], num_samples: int) -> Iterator[int]:
    """The numbers of the samples in these shards."""
    for shard in shards:
        yield from range(shard * SAMPLES_PER_SHARD, min((shard + 1) * SAMPLES_PER_SHARD, num_samples))


@dataclass(frozen=True)
class EmbeddedData:
    """A procedural data set with a split of pairs to train on, and one of labelled images to test zero-shot.

    Attributes:
        name: what a source is called to get it.
        generators: of each split: (shards, number of samples, image size, seed) to rows.
        num_samples: of each split, where nothing else is asked for.
        class_names: of the test's labels.
        templates: prompts for these.
    """

    name: str
    generators: dict[str, Generator]
    num_samples: dict[str, int]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    def load(self, split: str, *, num_samples: int | None = None, image_size: int = 64, seed: int = 0):
        """A split as a `datasets.IterableDataset`, its images as undecoded JPEG.

        Args:
            split: `"train"` (columns image, caption) or `"test"` (columns image, label).
            num_samples: how many samples; they lie in shards of 512.
            image_size: side of the square images, in pixels; at least 32.
            seed: another seed gives other pictures.

        Raises:
            ValueError: an unknown split, no samples, or images too small for the objects to be told apart.
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
