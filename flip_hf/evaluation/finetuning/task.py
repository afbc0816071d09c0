"""The fine-tuning task: data and recipe of an evaluation for [`fine_tune`]."""

from collections import Counter
from dataclasses import replace

import numpy as np
from tqdm.auto import tqdm

from flip_hf.data.decode import RefusedSample, decode_image
from flip_hf.data.reading import Reader, read_rows
from flip_hf.data.workers import default_workers
from flip_hf.evaluation.finetuning.images import Sample
from flip_hf.evaluation.finetuning.loop import fine_tune
from flip_hf.evaluation.finetuning.model import make_classifier
from flip_hf.evaluation.finetuning.recipe import RECIPES, FineTuneOptions
from flip_hf.evaluation.loading import target_reader
from flip_hf.evaluation.result import Result
from flip_hf.evaluation.subject import Subject, make_result

Samples = list[Sample]


def recipe_for(width: int, knows_texts: bool) -> str:
    """Chooses MAE's recipe by the tower's width, or FLIP's for towers wider than ViT-B trained with texts."""
    if width <= 768:
        return "mae_b"
    if knows_texts:
        return "flip"
    return "mae_l" if width <= 1024 else "mae_h"


def changed_recipe(chosen: FineTuneOptions, subject: Subject, warmup: float) -> FineTuneOptions:
    """Applies the evaluation's options to a recipe; `warmup` is the largest share of the epochs for its warm-up."""
    options = subject.options
    asked = {"epochs": options.epochs, "batch_size": options.train_batch_size, "base_lr": options.train_base_lr}
    workers = default_workers() if options.num_workers is None else options.num_workers
    changed = {name: value for name, value in asked.items() if value is not None}
    epochs = changed.get("epochs", chosen.epochs)
    changed["warmup_epochs"] = min(chosen.warmup_epochs, epochs * warmup)
    changed["background"] = subject.encoder.transform.background
    return replace(chosen, num_workers=workers, seed=options.seed, **changed)


def read_samples(subject: Subject, split: str, refused: Counter[str]) -> Samples:
    """Reads all usable samples of a split into memory, encoded; each is decoded once to check it.

    Raises:
        ValueError: there are none, or they have several labels.
    """
    source = subject.source(split)
    read_target = target_reader(subject.data_set)
    samples = []
    rows = read_rows(
        source.shards, Reader(0, 1), epoch=0, seed=None, report=lambda reason, detail: refused.update([reason])
    )
    is_silent = not subject.accelerator.is_main_process
    for _, row in tqdm(rows, desc=f"reading {split}", unit=" images", leave=False, disable=is_silent):
        try:
            label = read_target(source.target(row))
            image = source.image(row)
            decode_image(image)
            samples.append((image, label))
        except RefusedSample as error:
            refused[error.reason] += 1
    if not samples or np.ndim(samples[0][1]):
        raise ValueError(f"Training needs images of one class; {subject.data_set.title} has none in its {split}.")
    return samples


def fine_tuned(subject: Subject) -> Result:
    """Measures top-1 accuracy of the whole vision tower, fine-tuned as a classifier by MAE's recipe."""
    encoder = subject.encoder
    refused = Counter()
    train = read_samples(subject, "train", refused)
    test = read_samples(subject, "test", refused)
    name = subject.options.recipe or recipe_for(encoder.vision_config.hidden_size, encoder.knows_texts)
    recipe = changed_recipe(RECIPES[name], subject, warmup=1 / 10)
    processor = encoder.image_processor
    found = fine_tune(
        make_classifier(encoder.name, len(subject.class_names)),
        train,
        test,
        recipe,
        subject.accelerator,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )
    details = {
        **{"top1_by_epoch": list(found.accuracies), "seconds": found.seconds},
        **{name: getattr(recipe, name) for name in ("epochs", "batch_size", "base_lr", "layer_decay", "drop_path")},
    }
    result = make_result(subject, "fine-tune", {"top1": found.top1}, "top1", len(test), details=details)
    result.refused = dict(sorted(refused.items()))
    return result
