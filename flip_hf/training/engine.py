"""The loop: batches, steps, and what is shown and saved on the way. Read it downwards."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from flip_hf.data.loader import TrainLoader
from flip_hf.data.sources import Source
from flip_hf.evaluation.zero_shot import ZeroShotCounts, class_embeddings, count_zero_shot
from flip_hf.modeling import FlipModel, FlipProcessor
from flip_hf.modeling.masking_flip import random_masking
from flip_hf.training import setup
from flip_hf.training.arguments import Arguments, write_recipe
from flip_hf.training.checkpoint import TrainState, save_checkpoint
from flip_hf.training.flops import sample_flops, utilization
from flip_hf.training.gradient_cache import cached_backward
from flip_hf.training.optimization import Phase, make_optimizer, plan_phases
from flip_hf.training.progress import Progress, plot_curves, summary

logger = logging.getLogger(__name__)


class Trainer:
    """A run under way.

    Args:
        arguments: the run.
        accelerator: the process layer.
        model: to be trained, in training mode.
        processor: saved beside it.
        loader: its micro-batches.
        num_micro: micro-batches a step, on this process.
        evaluation: labelled data and its class names, or None.
    """

    def __init__(
        self,
        arguments: Arguments,
        accelerator: Accelerator,
        model: FlipModel,
        processor: FlipProcessor,
        loader: TrainLoader,
        num_micro: int,
        evaluation: tuple[Source, tuple[str, ...]] | None,
    ):
        self.arguments, self.accelerator = arguments, accelerator
        self.options, self.paths = arguments.optimization, arguments.run
        self.output_dir = Path(arguments.run.output_dir)
        self.processor, self.evaluation = processor, evaluation
        self.loader, self.num_micro = loader, num_micro
        self.phases = plan_phases(arguments)
        self.flops_per_sample: dict[str, int] = {}  # of each phase, at its last logged step
        self.state = TrainState()
        self.flip = model
        optimizer = make_optimizer(model, self.options)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        image_processor = processor.image_processor  # pyright: ignore[reportAttributeAccessIssue]
        self.normalize = setup.Normalize(image_processor.image_mean, image_processor.image_std).to(accelerator.device)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Trains through all phases, evaluates and saves."""
        self.progress = Progress(self.accelerator, self.output_dir, self.phases[-1].end, self.state.samples)
        self._last_log = (time.perf_counter(), self.state.samples)
        batches = iter(self.loader)
        metrics: dict[str, float] = {}
        for phase in self.phases:
            # A step may reach past the end of a phase; none of this one is taken yet.
            if phase.start <= self.state.samples < phase.start + self.options.batch_size:
                self._begin_phase(phase)
            while self.state.samples < phase.end:
                micro_batches = [self._next(batches) for _ in range(self.num_micro)]
                self._text_tokens = micro_batches[-1]["input_ids"].shape[1]
                loss, accuracy, learning_rate = self._step(phase, micro_batches)
                before, self.state.samples = self.state.samples, self.state.samples + self.options.batch_size
                self.state.steps += 1
                self.progress.advance(self.options.batch_size)
                finished = self.state.samples >= self.phases[-1].end
                if finished or self._passed(before, self.paths.log_samples):
                    self._log(phase, loss, accuracy, learning_rate)
                if finished or self._passed(before, self.paths.eval_samples):
                    metrics = self._evaluate()
                if not finished and self._passed(before, self.paths.checkpoint_samples):
                    self._checkpoint()
        self._finish(metrics)
        return metrics

    def _checkpoint(self) -> None:
        data_state = self.loader.state_dict()
        save_checkpoint(
            self.accelerator, self.output_dir, self.state, data_state, self.processor, self.paths.keep_checkpoints
        )

    def _passed(self, before: int, every: int) -> bool:
        """Whether a multiple of `every` samples was reached since `before`."""
        return every > 0 and before // every != self.state.samples // every

    def _begin_phase(self, phase: Phase) -> None:
        if phase.start > 0:
            # The official release tunes from the weights alone: the moments of the masked phase are dropped.
            self.optimizer.state.clear()
        self.progress.say(
            f"{phase.name}: {phase.end - phase.start:,} samples, mask ratio {phase.mask_ratio:g}, peak learning rate "
            f"{phase.peak_lr:.3g}"
        )

    def _next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        batch = next(batches)
        self.progress.refused.update(batch.pop("refused"))
        return batch

    def _step(self, phase: Phase, micro_batches: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One optimizer step on the batch; returns loss, accuracy and learning rate."""
        learning_rate = phase.learning_rate(self.state.samples + self.options.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss, accuracy = cached_backward(
            self._encode,
            [self._prepare(batch, phase.mask_ratio) for batch in micro_batches],
            self.flip.get_logit_scale,
            self.accelerator.backward,
            lambda: self.accelerator.no_sync(self.model),
            self.accelerator.device,
        )
        if self.options.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, accuracy, learning_rate

    def _prepare(self, batch: dict[str, Any], mask_ratio: float) -> dict[str, Any]:
        """Moves a micro-batch to the device, normalises it there and draws its mask."""
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        batch["pixel_values"] = self.normalize(batch["pixel_values"])
        if mask_ratio > 0:
            num_patches = self.flip.config.vision_config.num_patches  # pyright: ignore
            size = batch["pixel_values"].shape[0]
            batch["ids_keep"] = random_masking(size, num_patches, mask_ratio, self.accelerator.device)
        else:
            batch["mask_ratio"] = 0
        return batch

    def _encode(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(**batch)
        return outputs.image_embeds, outputs.text_embeds

    # -- what a person sees, and what stays ----------------------------------------------------------------------------

    def _log(self, phase: Phase, loss: torch.Tensor, accuracy: torch.Tensor, learning_rate: float) -> None:
        loss_value, accuracy_value = self.accelerator.reduce(torch.stack([loss, accuracy]), "mean").tolist()  # pyright: ignore
        now, (then, samples_then) = time.perf_counter(), self._last_log
        self._last_log = (now, self.state.samples)
        self.state.seconds += now - then
        values = {
            "loss": loss_value,
            "accuracy": accuracy_value,
            "logit_scale": self.flip.get_logit_scale().item(),
            "learning_rate": learning_rate,
            "samples_per_second": (self.state.samples - samples_then) / max(now - then, 1e-9),
        }
        flops = sample_flops(self.flip.config, phase.mask_ratio, self._text_tokens, self.options.batch_size).training
        self.flops_per_sample[phase.name] = flops
        values |= utilization(flops, values["samples_per_second"], self.accelerator)
        self.progress.log(self.state.samples, phase=phase.name, **values)
        self.progress.show(
            loss=values["loss"], acc=values["accuracy"], scale=values["logit_scale"], lr=values["learning_rate"]
        )
        if not math.isfinite(loss_value):
            logger.warning("The loss is %s after %d samples.", loss_value, self.state.samples)

    def _evaluate(self) -> dict[str, float]:
        """Zero-shot accuracy on whole images, shared out over the processes."""
        if self.evaluation is None:
            return {}
        start = time.perf_counter()
        source, class_names = self.evaluation
        device, image_size = self.accelerator.device, self.flip.config.vision_config.image_size  # pyright: ignore
        self.flip.eval()
        with self.accelerator.autocast():
            prompts = setup.templates(self.arguments.data)
            tokenizer = self.processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
            weights = class_embeddings(self.flip, tokenizer, class_names, prompts, device)
            loader = setup.make_eval_loader(self.arguments.data, source, class_names, image_size, self.accelerator)
            counts = count_zero_shot(self.flip, loader, weights, self.normalize)
        self.flip.train()
        if counts.refused:
            logger.warning("The evaluation skipped images: %s", dict(counts.refused))
        metrics = self._sum_counts(counts).metrics()
        self.progress.log(self.state.samples, zero_shot_top1=metrics["top1"], zero_shot_top5=metrics["top5"])
        self.progress.say(f"after {self.state.samples:,} samples: zero-shot top-1 {metrics['top1']:.1%}")
        # Evaluation does not count as training time.
        then, samples_then = self._last_log
        self._last_log = (then + time.perf_counter() - start, samples_then)
        return metrics

    def _sum_counts(self, counts: ZeroShotCounts) -> ZeroShotCounts:
        local = torch.tensor([counts.correct1, counts.correct5, counts.total], device=self.accelerator.device)
        correct1, correct5, total = self.accelerator.reduce(local, "sum").tolist()  # pyright: ignore
        return ZeroShotCounts(correct1, correct5, total)

    def _finish(self, metrics: dict[str, float]) -> None:
        """Saves the model folder and the curves, and prints the summary."""
        refused = Counter()
        for counts in gather_object([dict(self.progress.refused)]):
            refused.update(counts)
        self.accelerator.wait_for_everyone()
        self.progress.close()
        if self.accelerator.is_main_process:
            self.flip.eval().save_pretrained(self.output_dir)
            self.processor.save_pretrained(self.output_dir)
            write_recipe(self.arguments, self.output_dir / "recipe.yaml")
            results = {
                **metrics,
                "refused": dict(refused),
                "seconds": self.state.seconds,
                "samples": self.state.samples,
                "flops_per_sample": self.flops_per_sample,
            }
            (self.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            boundary = self.phases[-1].start or None
            plot_curves(self.progress.records(), boundary, self.output_dir / "training_curves.png")
            print(self._summary(metrics, refused))
        self.accelerator.end_training()

    def _summary(self, metrics: dict[str, float], refused: Counter) -> str:
        vision = self.flip.config.vision_config
        model_line = (
            f"ViT of {vision.num_hidden_layers} x {vision.hidden_size}, patch {vision.patch_size}, "  # pyright: ignore
            f"{self.flip.num_parameters() / 1e6:.1f} M parameters, {self.state.samples:,} samples at mask ratio "
            f"{self.arguments.model.mask_ratio:g}"
        )
        result_line = "not evaluated: name labelled data with --eval_data"
        if self.evaluation is not None:
            classes = len(self.evaluation[1])
            result_line = (
                f"zero-shot top-1 {metrics['top1']:.1%}, top-5 {metrics['top5']:.1%} on {metrics['images']:.0f} images "
                f"of {classes} classes (chance {1 / classes:.1%})"
            )
        return summary(
            model_line=model_line,
            result_line=result_line,
            labels=self.evaluation[1][:2] if self.evaluation is not None else ("a cat", "a dog"),
            seconds=self.state.seconds,
            refused=refused,
            output_dir=self.output_dir,
        )
