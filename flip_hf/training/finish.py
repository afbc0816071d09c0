"""The end of a run: the model folder, the results, and the printed summary."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from flip_hf.console.files import share_weights
from flip_hf.conversion.lineage import BASE_MODEL, base_model_of
from flip_hf.data.refusals import add_counts
from flip_hf.modeling import FlipForPreTraining, FlipModel
from flip_hf.redaction import redacted
from flip_hf.training.arguments import Arguments
from flip_hf.training.best import BEST
from flip_hf.training.checkpoint import TrainState
from flip_hf.training.encoder import flip_of
from flip_hf.training.lora import ADAPTERS, merged, own_tensors, save_adapters
from flip_hf.training.phases import plan_phases
from flip_hf.training.progress import plot_curves
from flip_hf.training.recipes import write_recipe
from flip_hf.training.retention import changes_in_words
from flip_hf.training.validation import in_words

# Folder of the model with its decoder, for runs that contrast and reconstruct; the FlipModel alone is one level up.
WITH_DECODER = "with_decoder"
RESULTS = "results.json"


@dataclass
class DataCounts:
    """Counts of a run's samples, over all processes.

    Attributes:
        drawn: samples used, by source.
        refused: unusable samples, by source and reason.
        held_out: samples skipped because they are held out, by source.
    """

    drawn: dict[str, int]
    refused: dict[str, dict[str, int]]
    held_out: dict[str, int]

    @property
    def reasons(self) -> Counter[str]:
        """Unusable samples, by reason."""
        return sum((Counter(reasons) for reasons in self.refused.values()), Counter())

    def results(self) -> dict[str, Any]:
        """Returns the entries for `results.json`."""
        sources: dict[str, dict[str, Any]] = {}
        for name, count in self.drawn.items():
            sources[name] = {"samples": count, "refused": self.refused.get(name, {})}
            if name in self.held_out:
                sources[name]["held_out"] = self.held_out[name]
        return {"refused": dict(self.reasons), "sources": sources}


def total_counts(local: dict[str, dict]) -> DataCounts:
    """Sums [`TrainLoader.counts`] over all processes; each must call it."""
    counts: dict[str, dict] = {"drawn": {}, "refused": {}, "held_out": {}}
    for each in gather_object([local]):
        add_counts(counts, each)
    return DataCounts(**counts)


@dataclass(frozen=True)
class Report:
    """The outcome of a run, beside its model.

    Attributes:
        counts: of its data.
        bound: its bottleneck (see `bottleneck.py`).
        results: the contents of `results.json`.
        records: the log's records.
    """

    counts: DataCounts
    bound: str
    results: dict[str, Any]
    records: list[dict[str, Any]]

    def save(self, arguments: Arguments, folder: Path) -> None:
        """Writes the curves and, last, `results.json`: if that says `"finished": true`, everything is there."""
        starts = {phase.name: phase.start for phase in plan_phases(arguments)[1:]}
        plot_curves(self.records, starts, folder / "training_curves.png")
        source = arguments.model.model_name_or_path or arguments.model.init_vision_from
        base = base_model_of(source) if source is not None else None
        results = self.results if base is None else {**self.results, BASE_MODEL: base}
        write_whole(folder / RESULTS, json.dumps(redacted(results), indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically: it is there whole or not at all, even if the process is killed."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def save_model(
    model: FlipModel | FlipForPreTraining,
    weights: dict[str, torch.Tensor],
    processor: Any,
    arguments: Arguments,
    folder: Path,
) -> None:
    """Writes the model, its processor and the resolved recipe; `weights` is emptied.

    Adapters are merged into the weights, and written in `adapters` as well.

    A model that was trained on both objectives is saved as a FlipModel, without a trace of the decoder, and once more
    with it in `with_decoder`. One that only reconstructs is saved with its decoder alone.
    """
    if arguments.model.lora:
        start = arguments.model.model_name_or_path or arguments.model.init_vision_from
        save_adapters(flip_of(model), weights, folder / ADAPTERS, str(start))
        weights = merged(weights)
    if isinstance(model, FlipForPreTraining) and arguments.objective.contrasts:
        of_flip = {name.removeprefix("flip."): value for name, value in weights.items() if name.startswith("flip.")}
        model.save_pretrained(folder / WITH_DECODER, state_dict=weights)  # empties the dict
        share_weights(folder / WITH_DECODER)
        processor.save_pretrained(folder / WITH_DECODER)
        model = model.flip
        weights = of_flip
    model.save_pretrained(folder, state_dict=weights)
    share_weights(folder)
    processor.save_pretrained(folder)
    write_recipe(arguments, folder / "recipe.yaml")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def summary(
    flip: FlipModel,
    arguments: Arguments,
    state: TrainState,
    metrics: dict[str, float],
    class_names: tuple[str, ...],
    report: Report,
) -> str:
    """Summarises the run: data read (if sources were mixed), model trained, results, skipped samples, and folder.

    Args:
        flip: the trained model.
        arguments: the run's arguments.
        state: the run's state at its end.
        metrics: of the final evaluation; empty if there was none.
        class_names: the evaluation's classes, for an example.
        report: the run's outcome.
    """
    vision: Any = flip.config.vision_config
    parameters = sum(value.numel() for value in own_tensors(dict(flip.named_parameters())).values())
    output_dir = Path(arguments.run.output_dir)
    held_out = "pairs with captions of their own" if arguments.objective.contrasts else "images"
    unknown = f"not evaluated: name data with --eval_data, or hold {held_out} out with --holdout"
    result = in_words(metrics, class_names) or unknown
    counts = report.counts
    skipped = [f"{count} x {reason}" for reason, count in counts.reasons.most_common()]
    if state.skipped_steps:
        skipped.append(f"{state.skipped_steps} non-finite steps")
    drawn = ", ".join(f"{count:,} of {name}" for name, count in counts.drawn.items())
    return "\n".join(
        (
            *([f"Read      {drawn}"] if len(counts.drawn) > 1 else []),
            f"Trained   ViT of {vision.num_hidden_layers} x {vision.hidden_size}, patch {vision.patch_size}, "
            f"{parameters / 1e6:.1f} M parameters, {state.samples:,} samples {_course(arguments)} in "
            f"{_duration(state.seconds)}",
            f"Bound by  {report.bound}",
            f"Result    {result}",
            *_retention(report.results),
            *_best(report.results, output_dir),
            f"Skipped   {', '.join(skipped) or 'none'}",
            *_held_out(counts),
            f"Saved     {output_dir} (curves: {output_dir / 'training_curves.png'})",
            *_use(arguments, class_names),
        )
    )


def _course(arguments: Arguments) -> str:
    """Says at which mask ratio, or in which stages, a run was trained."""
    if arguments.optimization.stages is None:
        return f"at mask ratio {arguments.model.mask_ratio:g}"
    phases = plan_phases(arguments)
    ratios = ", ".join(f"{phase.mask_ratio:g}" for phase in phases)
    return f"in {len(phases)} stage{'s' if len(phases) > 1 else ''} at mask ratio {ratios}"


def _retention(results: dict[str, Any]) -> list[str]:
    """Says what the run changed in its own metric and in that of the retained data, if there are any."""
    changes = changes_in_words(results["retention"]) if "retention" in results else {}
    return [f"{which.capitalize():<10}{change}" for which, change in changes.items()]


def _best(results: dict[str, Any], output_dir: Path) -> list[str]:
    """Names the best model's folder, and the reason why the run ended early, if it did."""
    best = results["best"]
    lines = []
    if best is not None:
        lines.append(
            f"Best      {best['metric']} {best['value']:.4f} after {best['samples']:,} samples: {output_dir / BEST}"
        )
    if results["ended_early"] is not None:
        lines.append(f"Ended     early: {results['ended_early']}")
    return lines


def _held_out(counts: DataCounts) -> list[str]:
    met = sum(counts.held_out.values())
    return [f"Held out  {met:,} of the samples read were skipped, as they are held out"] if met else []


def _use(arguments: Arguments, class_names: tuple[str, ...]) -> list[str]:
    """Lists commands that use the trained model."""
    objective = arguments.objective
    folder = Path(arguments.run.output_dir)
    quoted = " ".join(f'"{label}"' for label in class_names[:2] or ("a cat", "a dog"))
    commands = [f"flip-hf zero-shot {folder} IMAGE --labels {quoted}"] if objective.contrasts else []
    if objective.reconstructs:
        whole = folder / WITH_DECODER if objective.contrasts else folder
        commands.append(f"flip-hf reconstruct {whole} IMAGE")
    if not objective.contrasts:
        commands.append(f"flip-hf pretrain --init_vision_from {folder} ...")
    return [f"{'Use it' if i == 0 else '':<10}{command}" for i, command in enumerate(commands)]
