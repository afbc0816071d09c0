"""Batches of labelled images for fine-tuning: DeiT's augmentation as MAE uses it, by torchvision's transforms."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset

from flip_hf.data.decode import RefusedSample, bounded_shape, decode_image, open_picture
from flip_hf.data.rendering import Colour
from flip_hf.evaluation.finetuning.recipe import FineTuneOptions

# isort: split
# After the import whose error says what to install.
from collections.abc import Sized
from typing import Protocol

from accelerate.data_loader import DataLoaderShard
from torchvision.transforms import v2  # pyright: ignore[reportMissingImports]

BICUBIC = v2.InterpolationMode.BICUBIC
Transform = Callable[[Image.Image], torch.Tensor]
# An image, PIL's or encoded, and its label.
Sample = tuple[object, int]


class MapData(Protocol):
    """A map-style data set, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


Data = MapData | IterableDataset

Mixing = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------


def _rand_augment(magnitude: int, fill: list[int]) -> list[v2.Transform]:
    """Makes RandAug(9, 0.5), timm's `rand-m9-mstd0.5-inc1`, of torchvision's operations.

    Two operations, each applied half of the time, at `magnitude` tenths of its range with a standard deviation of half
    a tenth, here rounded. torchvision's default of 9 would be 9 thirtieths, always applied. A difference remains: timm
    also has Invert and SolarizeAdd, and posterizes further.
    """
    if magnitude == 0:
        return []
    levels = (magnitude - 1, magnitude, min(magnitude + 1, 10))
    operation = v2.RandomChoice(
        [v2.RandAugment(1, level, num_magnitude_bins=11, interpolation=BICUBIC, fill=fill) for level in levels],
        p=[0.16, 0.68, 0.16],  # a normal variable within and beyond one standard deviation
    )
    return [v2.RandomApply([operation], p=0.5) for _ in range(2)]


def _normalize(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def train_transform(side: int, options: FineTuneOptions, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """Makes the transform of RGB images into augmented tensors (3, side, side), normalised."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=options.crop_area, interpolation=BICUBIC),
            v2.RandomHorizontalFlip(options.flip),
            *_rand_augment(options.rand_augment, [round(255 * value) for value in mean]),
            *_normalize(mean, std),
            v2.RandomErasing(options.random_erasing, value="random"),  # pyright: ignore[reportArgumentType]
        ]
    )


def eval_transform(side: int, options: FineTuneOptions, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """Makes the transform of RGB images into their centres (3, side, side), normalised."""
    short_side = int(side / options.eval_crop)
    shape = v2.Lambda(bounded_shape)
    return v2.Compose([shape, v2.Resize(short_side, BICUBIC), v2.CenterCrop(side), *_normalize(mean, std)])


def make_mixing(options: FineTuneOptions, num_classes: int) -> Mixing:
    """Makes a function from images (B, C, H, W) and labels (B) to mixed images and targets (B, classes) that sum to 1.

    Each batch uses mixup or CutMix, drawn at random. Without both, images and labels stay as they are.
    """
    mixers = []
    if options.mixup > 0:
        mixers.append(v2.MixUp(alpha=options.mixup, num_classes=num_classes))
    if options.cutmix > 0:
        mixers.append(v2.CutMix(alpha=options.cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixers) if mixers else lambda images, labels: (images, labels)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


class _Examples:
    """Transforms samples (image, label) into (tensor, label).

    Args:
        transform: transform of an RGB image.
        num_labels: number of labels; each is below it.
        background: colour behind transparent parts.
    """

    def __init__(self, transform: Transform, num_labels: int, background: Colour):
        self.transform = transform
        self.num_labels = num_labels
        self.background = background

    def example(self, sample: Sample, number: int) -> tuple[torch.Tensor, int]:
        """Transforms a sample; a ValueError names its number if it is not an image with a label."""
        image, label = sample
        if not 0 <= int(label) < self.num_labels:
            raise ValueError(
                f"Sample {number} has the label {label}; the model's are 0 to {self.num_labels - 1} (num_labels)."
            )
        try:
            if isinstance(image, Image.Image):
                rgb = open_picture(image, self.background)
            else:
                rgb = decode_image(image, self.background)
        except (RefusedSample, ValueError) as error:
            raise ValueError(
                f"The image of sample {number} cannot be used ({error}). Leave it out or fix it."
            ) from error
        return self.transform(rgb), int(label)


class _MapExamples(_Examples, Dataset):
    def __init__(self, data: MapData, transform: Transform, num_labels: int, background: Colour):
        super().__init__(transform, num_labels, background)
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.example(self.data[index], index)


class _IterableExamples(_Examples, IterableDataset):
    """The samples at `start`, `start + step`, ..."""

    def __init__(
        self,
        data: IterableDataset,
        transform: Transform,
        num_labels: int,
        background: Colour,
        start: int = 0,
        step: int = 1,
    ):
        super().__init__(transform, num_labels, background)
        self.data = data
        self.start = start
        self.step = step

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self.data, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for number, sample in itertools.islice(enumerate(self.data), self.start, None, self.step):
            yield self.example(sample, number)


def count_samples(data: Data, options: FineTuneOptions) -> int:
    """Counts the samples of whole batches in an epoch.

    Raises:
        ValueError: they are fewer than one batch, or their number is unknown.
    """
    samples = options.samples_per_epoch or (len(data) if isinstance(data, Sized) else None)
    if samples is None:
        raise ValueError("The training data have no length. Give samples_per_epoch, which the schedule needs.")
    if samples < options.batch_size:
        raise ValueError(f"{samples} training samples do not fill a batch of {options.batch_size}. Lower batch_size.")
    return samples // options.batch_size * options.batch_size


def make_train_loader(
    data: Data, transform: Transform, num_labels: int, options: FineTuneOptions, accelerator: Accelerator
) -> DataLoaderShard:
    """Makes the loader of this process's part of each batch, on its device; the last, smaller batch is dropped.

    Every process has the same batches and takes its slice. Map-style data are shuffled, iterable data keep their order.

    Raises:
        ValueError: the batch size is not a multiple of the number of processes.
    """
    if options.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size ({options.batch_size}) must be a multiple of the number of processes "
            f"({accelerator.num_processes})."
        )
    dataset: Dataset
    if isinstance(data, IterableDataset):
        dataset = _IterableExamples(data, transform, num_labels, options.background)
        sampler = None
    else:
        dataset = _MapExamples(data, transform, num_labels, options.background)
        # Not the loader's generator, which would give all processes' workers one seed for the augmentation.
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(options.seed))
    loader = DataLoader(
        dataset,
        options.batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=options.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    loader = prepare_data_loader(
        loader,
        accelerator.device,
        accelerator.num_processes,
        accelerator.process_index,
        split_batches=True,
        put_on_device=True,
        dispatch_batches=False,
    )
    return loader  # pyright: ignore[reportReturnType] (a shard, since the main process does not dispatch)


def make_test_loader(
    data: Data, transform: Transform, num_labels: int, options: FineTuneOptions, accelerator: Accelerator
) -> DataLoader:
    """Makes the loader of every `num_processes`-th sample, each once over all processes; on the CPU."""
    first = accelerator.process_index
    processes = accelerator.num_processes
    dataset: Dataset
    if isinstance(data, IterableDataset):
        dataset = _IterableExamples(data, transform, num_labels, options.background, first, processes)
    else:
        examples = _MapExamples(data, transform, num_labels, options.background)
        dataset = Subset(examples, range(first, len(data), processes))
    pin_memory = accelerator.device.type == "cuda"
    batch_size = options.batch_size // processes
    return DataLoader(dataset, batch_size, num_workers=options.num_workers, pin_memory=pin_memory)
