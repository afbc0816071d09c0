"""The loop: batches, steps, and what is shown and saved on the way. Read it downwards."""

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flip_hf.data.loader import TrainLoader
from flip_hf.data.sources import Source
from flip_hf.modeling import FlipModel, FlipProcessor
from flip_hf.training import average
from flip_hf.training.arguments import Arguments
from flip_hf.training.bottleneck import bottleneck, longest_wait
from flip_hf.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from flip_hf.training.distribution import Distribution
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.finish import save_run, summary, total_counts
from flip_hf.training.flops import sample_flops, utilization
from flip_hf.training.gradient_cache import cached_backward
from flip_hf.training.hardware import autocast_dtype
from flip_hf.training.health import Health, RunDiverged
from flip_hf.training.masks import TextMasks
from flip_hf.training.measure import Step, Window
from flip_hf.training.optimization import Phase, make_optimizer, phase_at, plan_phases
from flip_hf.training.patches import Normalize
from flip_hf.training.progress import Progress, plot_curves
from flip_hf.training.resume import shared_checkpoint
from flip_hf.training.signals import StopSignals
from flip_hf.training.validation import validate

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
        self.text_masks = TextMasks(arguments.model.text_mask_strategy, model.config.get_text_config())
        self.flops_per_sample: dict[str, int] = {}  # of each phase, at its last logged step
        self.state = TrainState()
        self.flip = model
        self.autocast_dtype = autocast_dtype(self.options.precision)
        encoder = PairEncoder(model, self.autocast_dtype)
        make, compiler = partial(make_optimizer, options=self.options), "inductor" if self.options.compile else None
        self.distribution = Distribution(accelerator, encoder, make, self.options.max_grad_norm, compiler)
        half_life, batch_size = self.options.ema_half_life, self.options.batch_size
        self.average = average.make_average(accelerator, model, half_life, batch_size)
        self.health = Health(self.paths.max_skipped_steps)
        image_processor = processor.image_processor  # pyright: ignore[reportAttributeAccessIssue]
        self.normalize = Normalize(image_processor.image_mean, image_processor.image_std).to(accelerator.device)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Trains through all phases, evaluates and saves; or, told to stop by a signal, saves a checkpoint.

        Raises:
            RunDiverged: losses or gradients stopped to be finite, and going back to a checkpoint did not help.
        """
        with StopSignals() as self._signals:
            return self._run()

    def _run(self) -> dict[str, float]:
        self.progress = Progress(self.accelerator, self.output_dir, self.phases[-1].end, self.state.samples)
        self.window = Window(self.state.samples, self.state.steps)
        self._begin_batches()
        metrics: dict[str, float] = {}
        while not self._is_finished():
            phase = self._phase()
            with self.window.waiting():
                micro_batches = [next(self._batches) for _ in range(self.num_micro)]
            step = self._step(phase, micro_batches)
            if self.health.is_lost():
                self._go_back()
                continue
            before, self.state.samples = self.state.samples, self.state.samples + self.options.batch_size
            self.state.steps += 1
            self.progress.advance(self.options.batch_size)
            finished = self._is_finished()
            if finished or self._passed(before, self.paths.log_samples):
                self._log(phase, step)
            if finished or self._passed(before, self.paths.eval_samples):
                metrics = self._evaluate()
            stop = not finished and self._signals.stop_requested(self.accelerator)
            if stop or not finished and self._passed(before, self.paths.checkpoint_samples):
                self._checkpoint()
            if stop:
                return self._leave()
        self._finish(metrics)
        return metrics

    def _is_finished(self) -> bool:
        return self.state.samples >= self.phases[-1].end

    def _begin_batches(self) -> None:
        """From where the data stand, masked as of the samples seen."""
        self.loader.begin_at(self.state.samples)
        self._batches = iter(self.loader)

    def _phase(self) -> Phase:
        """The phase of the next step, made ready where it is the phase's first."""
        phase = phase_at(self.phases, self.state.samples)
        # A step may reach past the end of a phase; none of this one is taken yet.
        if self.state.samples < phase.start + self.options.batch_size:
            self._begin_phase(phase)
        return phase

    def _checkpoint(self) -> None:
        with self.window.pause():
            save_checkpoint(self.accelerator, self.arguments, self.state, self.loader.state_dict(), self.processor)
        self.health.checkpoint_written()

    def _leave(self) -> dict[str, float]:
        self.progress.say(f"Stopped after {self.state.samples:,} samples; go on with --resume_from_checkpoint auto")
        self.progress.close()
        self.distribution.end()
        return {}

    def _go_back(self) -> None:
        """Restores the last good checkpoint; the data stream goes on, so that what spoilt the weights is left behind.

        Raises:
            RunDiverged: there is none.
        """
        checkpoint = shared_checkpoint(self.accelerator, "auto", self.output_dir)
        if checkpoint is None:
            raise RunDiverged(
                f"{self.paths.max_skipped_steps} steps in a row had a loss or gradient that is not finite, and there "
                "is no checkpoint to go back to. Lower --base_lr, set --max_grad_norm 1, or write checkpoints earlier "
                "with --checkpoint_samples."
            )
        lost, skipped = self.state.samples, self.state.skipped_steps
        self.state = load_checkpoint(self.accelerator, checkpoint)
        self.state.skipped_steps = skipped
        self.progress.say(
            f"after {lost:,} samples: {self.paths.max_skipped_steps} steps in a row were not finite; going on from "
            f"{checkpoint}"
        )
        self.progress.rewind(self.state.samples)
        self.window = Window(self.state.samples, self.state.steps)
        self._batches.close()  # what its workers read ahead is masked for later samples
        self._begin_batches()

    def _passed(self, before: int, every: int) -> bool:
        """Whether a multiple of `every` samples was reached since `before`."""
        return every > 0 and before // every != self.state.samples // every

    def _begin_phase(self, phase: Phase) -> None:
        if phase.start > 0:
            # The official release tunes from the weights alone: the moments of the masked phase are dropped.
            self.distribution.reset_moments()
        ratios = ", ".join(f"{ratio:.3g}" for ratio in phase.mask_ratios)
        self.progress.say(
            f"{phase.name}: {phase.end - phase.start:,} samples, mask ratio {ratios}, peak learning rate "
            f"{phase.peak_lr:.3g}"
        )

    def _step(self, phase: Phase, micro_batches: list[dict[str, Any]]) -> Step:
        """One optimizer step on the batch, skipped where the gradient is not finite."""
        distribution = self.distribution
        learning_rate = phase.learning_rate(self.state.samples + self.options.batch_size)
        for group in distribution.optimizer.param_groups:
            group["lr"] = learning_rate
        loss, accuracy = cached_backward(
            # Prepared one at a time: one micro-batch lies on the device, and both passes draw the same.
            lambda batch: self._encode(self._prepare(batch, phase)),
            micro_batches,
            distribution.backward,
            distribution.no_sync,
            self.accelerator.device,
        )
        grad_norm = distribution.clip_and_norm()
        if self.health.is_good(grad_norm):
            distribution.optimizer.step()
            average.update(self.average, self.flip)
        else:
            self.state.skipped_steps += 1
            logger.warning("Skipped the step after %d samples: it is not finite.", self.state.samples)
        distribution.optimizer.zero_grad()
        return Step(loss, accuracy, learning_rate=learning_rate, grad_norm=grad_norm, **self._seen)

    def _prepare(self, batch: dict[str, Any], phase: Phase) -> dict[str, Any]:
        """Moves a micro-batch to the device, normalises it there and masks its texts."""
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        batch["patches"] = self.normalize(batch["patches"])
        batch["interpolate_pos_encoding"] = "ids_keep" not in batch  # all patches may be those of a smaller image
        return {**batch, **self.text_masks(batch, phase)}

    def _encode(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images, texts, scale = self.distribution.model(**batch)
        kept, text_tokens = batch["patches"].shape[1], round(batch["input_ids"].numel() / len(images))
        self._seen = {"logit_scale": scale.detach(), "kept_patches": kept, "text_tokens": text_tokens}
        return images, texts, scale

    # -- what a person sees, and what stays ----------------------------------------------------------------------------

    def _log(self, phase: Phase, step: Step) -> None:
        means: Any = self.accelerator.reduce(torch.stack([step.loss, step.accuracy]), "mean")
        loss, accuracy = means.tolist()
        speed = self.window.close(self.state.samples, self.state.steps)
        speed["data_wait"] = longest_wait(speed["data_wait"], self.accelerator)
        self.state.seconds += speed.pop("seconds")
        flops = sample_flops(
            self.flip.config, 0, step.text_tokens, self.options.batch_size, kept_patches=step.kept_patches
        ).training
        self.flops_per_sample[phase.name] = flops
        speed |= utilization(flops, speed["samples_per_second"], self.accelerator, self.autocast_dtype is not None)
        values = {"loss": loss, "accuracy": accuracy, **step.values(), **speed}
        self.progress.log(self.state.samples, phase=phase.name, skipped_steps=self.state.skipped_steps, **values)
        self.progress.show(loss=loss, acc=accuracy, scale=values["logit_scale"], lr=step.learning_rate)

    def _evaluate(self) -> dict[str, float]:
        """Zero-shot accuracy of the weights that would be saved now."""
        if self.evaluation is None:
            return {}
        with self.window.pause():
            if self.average is not None:
                encoder = PairEncoder(self.average.module, self.autocast_dtype)  # pyright: ignore[reportArgumentType]
            else:
                encoder = self.distribution.whole_encoder()
            metrics = validate(
                encoder,
                self.evaluation,
                self.arguments.data,
                tokenizer=self.processor.tokenizer,  # pyright: ignore[reportAttributeAccessIssue]
                vision_config=self.flip.config.vision_config,
                normalize=self.normalize,
                accelerator=self.accelerator,
            )
        self.progress.log(self.state.samples, zero_shot_top1=metrics["top1"], zero_shot_top5=metrics["top5"])
        self.progress.say(f"after {self.state.samples:,} samples: zero-shot top-1 {metrics['top1']:.1%}")
        return metrics

    def _finish(self, metrics: dict[str, float]) -> None:
        """Saves the model folder and the curves, and prints the summary."""
        counts = total_counts(self.loader.counts)
        average = self.average
        weights = average.module.state_dict() if average is not None else self.distribution.state_dict()
        self.accelerator.wait_for_everyone()
        self.progress.close()
        if self.accelerator.is_main_process:
            records = self.progress.records()
            data_wait, bound = bottleneck(records, self.arguments, self.accelerator)
            measured = {**asdict(self.state), "data_wait": data_wait, "flops_per_sample": self.flops_per_sample}
            results = {**metrics, **counts.results(), **measured}
            save_run(self.output_dir, self.flip, weights, self.processor, self.arguments, results)
            plot_curves(records, self.phases[-1].start or None, self.output_dir / "training_curves.png")
            class_names = self.evaluation[1] if self.evaluation is not None else ()
            print(summary(self.flip, self.arguments, self.state, metrics, class_names, counts, bound))
        self.distribution.end()
