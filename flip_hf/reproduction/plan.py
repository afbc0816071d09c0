"""The runs that stand for the paper's Figure 1 and Table 1, and for the masks of later work, at a scale of one's own.

Sizes are relative to one number, the samples of the longest run; the paper's are in the same proportions where its text
gives them. Every run is `scripts/pretrain.py` with the recipe `scenes`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SEEDS = (0, 1, 2)
MASKS = {0: 0.0, 50: 0.5, 75: 0.75}  # percent, as runs are named
LENGTHS = {
    "quarter": 0.25,
    "half": 0.5,
    "full": 1,
    "double": 2,
}  # of the longest unmasked run; double: masked ones alone
MAIN = "half"  # the length of Table 1
BATCH = 128  # the paper's 16k; twice and four times as much are its 32k and 64k
TUNING = 0.05  # of a run's samples: the paper tunes for 0.32 epochs after 6.4
TUNING_LR = 1.2e-3  # for 256 samples a step: the share of the recipe's that does well on the embedded data
STRATEGIES = ("grid", "block", "gaussian", "resize")
RECONSTRUCTION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Run:
    """A point of a table or a figure, for every seed.

    Attributes:
        name: `mask75-half-batch512`.
        options: of `pretrain.py`, over those of the recipe; of `evaluate.py` for `kind="inference"`.
        start: name of the run whose model it starts from, or evaluates.
        kind: `"training"`, or `"inference"`: of a trained model in the ways of Table 1d.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    kind: str = "training"


def _training(name: str, samples: int, mask: int, *, batch: int = BATCH, **options: Any) -> Run:
    steps = max(1, round(samples / batch))
    return Run(name, {"mask_ratio": MASKS[mask], "batch_size": batch, **_lengths(steps, batch, 1 / 16), **options})


def _lengths(steps: int, batch: int, warm_up: float) -> dict[str, int]:
    """Options that count samples; a line of the log for every twentieth of a run, as its speed is their median."""
    return {
        "train_samples": steps * batch,
        "warmup_samples": max(1, round(warm_up * steps)) * batch,
        "log_samples": max(1, steps // 20) * batch,
    }


def _tuned(run: Run, samples: int) -> Run:
    """The same model, tuned on whole images; a run of its own, so that its time can be told apart."""
    steps = max(4, round(TUNING * samples / BATCH))
    options = {"mask_ratio": 0.0, "batch_size": BATCH, **_lengths(steps, BATCH, 0.2), "base_lr": TUNING_LR}
    return Run(f"{run.name}-tuned", options, start=run.name)


def planned_runs(samples: int) -> list[Run]:
    """All runs, those that others start from first.

    Args:
        samples: of the longest unmasked run.
    """
    return [*_over_time(samples), *_table(round(samples * LENGTHS[MAIN]))]


def _over_time(samples: int) -> Iterator[Run]:
    """Figure 1: each mask ratio at several lengths, and Table 1e: tuned on whole images afterwards."""
    for length, factor in LENGTHS.items():
        for mask in MASKS:
            if not mask and factor > 1:
                continue
            run = _training(f"mask{mask}-{length}", round(samples * factor), mask)
            yield run
            if mask:
                yield _tuned(run, round(samples * factor))


def _table(samples: int) -> Iterator[Run]:
    """Table 1b, 1c, 1d, 1f, and other masks, at the main length."""
    for mask in (50, 75):
        name = f"mask{mask}-{MAIN}"
        for batch in (2 * BATCH, 4 * BATCH):
            yield _training(f"{name}-batch{batch}", samples, mask, batch=batch)
        yield Run(f"{name}-inference", {"mask_ratio": MASKS[mask]}, start=name, kind="inference")
        yield _training(
            f"{name}-reconstruction", samples, mask, objective="both", decoder_config=RECONSTRUCTION, grid_samples=0
        )
    for strategy in ("random", "prioritized"):
        text = {"text_mask_ratio": 0.5, "text_mask_strategy": strategy}
        yield _training(f"mask75-{MAIN}-text-{strategy}", samples, 75, **text)
    for strategy in STRATEGIES:
        yield _training(f"mask75-{MAIN}-{strategy}", samples, 75, mask_strategy=strategy)


def words_of(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    plain = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in options.items()}
    return [word for name, value in plain.items() for word in (f"--{name}", value)]
