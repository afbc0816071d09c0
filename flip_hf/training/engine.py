"""The training loop: batches, steps, logging and saving. Read it from the top."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flip_hf.console.lock import unlock_folder
from flip_hf.data.frequencies import WordFrequencies
from flip_hf.data.loader import TrainLoader
from flip_hf.data.waits import WaitEnded
from flip_hf.hub.pusher import Pusher
from flip_hf.modeling import FlipForPreTraining, FlipModel
from flip_hf.training.agreement import Agreement, PeerFailed, agree, is_first
from flip_hf.training.arguments import Arguments
from flip_hf.training.average import make_average
from flip_hf.training.best import Best
from flip_hf.training.bottleneck import bottleneck, longest_wait
from flip_hf.training.checkpoint import TrainState, load_checkpoint, save_checkpoint, weights_are_finite
from flip_hf.training.distribution import Distribution
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.evaluation_data import Evaluation
from flip_hf.training.finish import Report, save_model, summary, total_counts
from flip_hf.training.flops import step_flops, utilization
from flip_hf.training.freezing import read_frozen
from flip_hf.training.hardware import autocast_dtype, describe, where
from flip_hf.training.health import Health, RunDiverged
from flip_hf.training.lora import read_ranks
from flip_hf.training.measure import Window
from flip_hf.training.models import image_processor_of
from flip_hf.training.optimization import make_optimizer
from flip_hf.training.patches import Normalize
from flip_hf.training.phases import Phase, phase_at, plan_phases
from flip_hf.training.prepare import PrepareBatch
from flip_hf.training.progress import Progress
from flip_hf.training.reconstructions import ReconstructionPictures
from flip_hf.training.resume import shared_checkpoint
from flip_hf.training.retained_data import retained_arguments
from flip_hf.training.retention import Retention
from flip_hf.training.retention_arguments import starts_trained
from flip_hf.training.signals import StopSignals
from flip_hf.training.step import Batch, StepResult, train_step
from flip_hf.training.validation import Validator, as_logged, in_words

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model: one run, from its first or resumed step to its end.

    Args:
        arguments: all options of the run.
        accelerator: the process layer.
        model: the model to train, in training mode.
        processor: saved beside the model; an image processor where no text is read.
        loader: yields micro-batches.
        num_micro: micro-batches per step on this process.
        evaluation: the evaluation data, which may be empty.
        retained: the retained data, which may be empty.
        pusher: pushes to the Hub; on the main process of a run that is pushed.

    Attributes:
        frequencies: those of words, saved with checkpoints; None where no text is masked by them.
    """

    frequencies: WordFrequencies | None = None

    def __init__(
        self,
        arguments: Arguments,
        accelerator: Accelerator,
        model: FlipModel | FlipForPreTraining,
        processor: Any,
        loader: TrainLoader,
        num_micro: int,
        evaluation: Evaluation,
        retained: Evaluation,
        pusher: Pusher | None = None,
    ):
        self.arguments = arguments
        self.accelerator = accelerator
        self.objective = arguments.objective
        self.options = arguments.optimization
        self.run_options = arguments.run
        self.output_dir = Path(arguments.run.output_dir)
        self.hub = arguments.hub
        self.pusher = pusher
        self.processor = processor
        self.class_names = evaluation.class_names
        self.loader = loader
        self.num_micro = num_micro
        self.phases = plan_phases(arguments)
        self.flops_per_sample: dict[str, int] = {}  # by phase, at its last logged step
        self.state = TrainState()
        self._saved_samples = 0  # seen at the last checkpoint; the start needs none
        self._checkpoint_time = time.monotonic()
        self._is_due = False
        self._data_error: Exception | None = None
        self.model = model
        self.autocast_dtype = autocast_dtype(self.options.precision)
        encoder = PairEncoder(model, self.autocast_dtype)
        self.flip = encoder.flip
        make = partial(make_optimizer, options=self.options)
        compiling = ("inductor" if self.options.compile else None, "cuda_graphs" in (self.options.speed_ups or ()))
        self.distribution = Distribution(accelerator, encoder, make, self.options.max_grad_norm, *compiling)
        self.average = make_average(accelerator, model, self.options.ema_half_life, self.options.batch_size)
        self.health = Health(self.run_options.max_skipped_steps, accelerator.device)
        image_processor = image_processor_of(processor)
        self.normalize = Normalize(image_processor.image_mean, image_processor.image_std).to(accelerator.device)
        self.validator = None if evaluation == Evaluation() else self._make_validator(arguments, evaluation)
        self.retention = self._make_retention(retained, evaluation.key)
        patience = self.run_options.early_stopping_patience
        keeps = evaluation.pairs is not None or patience is not None
        self.best = Best(accelerator, self.output_dir, evaluation.key, patience, keeps)
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})  # samples seen, and metrics
        vision: Any = self.flip.config.vision_config
        self.prepare = PrepareBatch(self.objective, vision, self.normalize, accelerator.device)
        drawing = (accelerator, arguments, image_processor, self.normalize, vision.patch_size)
        self.pictures = ReconstructionPictures(*drawing) if self.objective.reconstructs else None

    def _make_validator(self, arguments: Arguments, evaluation: Evaluation) -> Validator:
        tokenizer = getattr(self.processor, "tokenizer", None)
        return Validator(arguments, evaluation, tokenizer, self.normalize, self.accelerator)

    def _make_retention(self, retained: Evaluation, own_key: str) -> Retention | None:
        is_empty = retained == Evaluation()
        validator = None if is_empty else self._make_validator(retained_arguments(self.arguments), retained)
        if (self.validator is None and validator is None) or not starts_trained(self.arguments):
            return None
        return Retention(self.arguments, own_key, validator)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Trains through all phases, saves and evaluates; or, stopped by a signal, saves a checkpoint.

        Raises:
            RunDiverged: losses or gradients are no longer finite, and going back to a checkpoint did not help.
            BadDataError: the data cannot be used; a checkpoint was saved.
            PeerFailed: another process ended the run, and says why; a checkpoint was saved.
        """
        self.progress = Progress(self.accelerator, self.output_dir, self.phases[-1].end, self.state.samples)
        with StopSignals() as self._signals:
            try:
                return self._run()
            finally:
                self._batches.close()  # its workers would otherwise live as long as an error's traceback
                self.progress.close()  # so that an error begins on a new line
                unlock_folder(self.output_dir)

    def _run(self) -> dict[str, float]:
        self.best.begin(self.state)
        self.window = Window(self.state.samples, self.state.steps)
        self.progress.say(where(self.accelerator))
        with suppress(WaitEnded):  # stopped by a signal, the run leaves before its first step
            self._evaluate_start()
        self._begin_batches()
        metrics: dict[str, float] = {}
        while not self._is_finished():
            position = self.loader.state_dict()
            phase = self._phase()
            batches = self._take_batches()
            agreed = self._agree()
            if agreed.leave or agreed.overdue or self._is_due:
                self._checkpoint(position, at_any_rate=agreed.leave)
            if agreed.leave:
                return self._leave(agreed)
            if self.pictures is not None:
                self.pictures.see(batches[0]["patches"])
            step = self._step(phase, batches)
            before = self.state.samples
            self.state.samples += self.options.batch_size
            self.state.steps += 1
            self.progress.advance(self.options.batch_size)
            finished = self._is_finished()
            self._is_due = self._is_due or self._passed(before, self.run_options.checkpoint_samples)
            if finished or self._passed(before, self.run_options.log_samples):
                self._read_health()
                if self.health.is_lost():
                    self._go_back()
                    continue
                self._log(phase, step, batches[-1])
            if not finished and self._passed(before, self.run_options.eval_samples):
                with suppress(WaitEnded):  # stopped by a signal, the run leaves before its next step
                    metrics = self._evaluate()
            if self.hub.push_to_hub and not finished and self._passed(before, self.hub.hub_push_samples):
                self._push(metrics)
            if self.pictures is not None and (finished or self._passed(before, self.objective.grid_samples)):
                self._draw(self.pictures)
        return self._finish()

    def _is_finished(self) -> bool:
        return self.state.samples >= self.phases[-1].end or self.best.is_over(self.state)

    def _begin_batches(self) -> None:
        """Starts the batches at the current data position, with the masks of the samples seen so far."""
        self.loader.begin_at(self.state.samples)
        self._batches = iter(self.loader)

    def _take_batches(self) -> list[Batch]:
        """Waits for a step's micro-batches; returns none where a signal ended the wait or the data failed."""
        try:
            with self.window.waiting():
                return [next(self._batches) for _ in range(self.num_micro)]
        except WaitEnded:
            return []
        except Exception as error:  # bad data or a killed worker: the run is saved before this is raised
            self._data_error = error
            return []

    def _agree(self) -> Agreement:
        limit = 60 * self.run_options.checkpoint_minutes
        # One clock for all processes.
        overdue = self.accelerator.is_main_process and 0 < limit < time.monotonic() - self._checkpoint_time
        return agree(
            self.accelerator,
            stop=self._signals.received is not None,
            failed=self._data_error is not None,
            overdue=overdue,
        )

    def _phase(self) -> Phase:
        """Returns the phase of the next step, and begins it at its first step."""
        phase = phase_at(self.phases, self.state.samples)
        # A step may reach past the end of a phase: this phase has taken no step yet.
        if self.state.samples < phase.start + self.options.batch_size:
            self._begin_phase(phase)
        return phase

    def restore(self, checkpoint: Path) -> None:
        """Restores the run to a checkpoint; every process must call it."""
        self.state = load_checkpoint(self.accelerator, checkpoint, self.average)
        self.health.resume(self.state.skipped_in_a_row, self.state.restores)
        self._saved_samples = self.state.samples

    def _checkpoint(self, position: dict[str, Any], at_any_rate: bool) -> None:
        """Writes a checkpoint.

        Args:
            position: the data position.
            at_any_rate: the run ends here. Otherwise a checkpoint that is due while steps are being skipped waits for a
                good step, since a run that goes back could not use it.

        Raises:
            RunDiverged: the weights are not finite, and the run ends here.
        """
        if self._saved_samples == self.state.samples:
            return
        self._read_health()
        good = self.health.in_a_row == 0
        if not (good or at_any_rate):
            return
        if not weights_are_finite(self.accelerator, self.average):
            if at_any_rate:
                raise self._spoilt()
            return  # the next losses will not be finite, and the run will go back
        self.state.skipped_in_a_row = self.health.in_a_row
        self.state.restores = 0 if good else self.health.restores
        with self.window.pause():
            save_checkpoint(
                self.accelerator, self.arguments, self.state, position, self.processor, self.average, self.frequencies
            )
        self._saved_samples = self.state.samples
        self._checkpoint_time = time.monotonic()
        self._is_due = False
        if good:
            self.health.good_checkpoint_written()

    def _spoilt(self) -> RunDiverged:
        newest = shared_checkpoint(self.accelerator, "auto", self.output_dir, only_good=True)
        kept = "there is no checkpoint" if newest is None else f"the last good checkpoint is {newest}"
        return self.health.spoilt_weights(self.state.samples, kept)

    def _leave(self, agreed: Agreement) -> dict[str, float]:
        """Ends the run before its planned end, with a checkpoint written.

        Raises:
            Exception: this process's data error; [`PeerFailed`] where it was another process's.
        """
        if agreed.failed and is_first(self.accelerator, self._data_error is not None):
            raise self._data_error  # pyright: ignore[reportGeneralTypeIssues]
        if agreed.failed:
            raise PeerFailed("Another process ended the run; its message says why.")
        self.progress.say(f"Stopped after {self.state.samples:,} samples; resume with --resume_from_checkpoint auto")
        self.distribution.end()
        return {}

    def _go_back(self) -> None:
        """Restores the last good checkpoint; the data stream continues, to get past what spoilt the weights.

        Raises:
            RunDiverged: there is no good checkpoint.
        """
        checkpoint = shared_checkpoint(self.accelerator, "auto", self.output_dir, only_good=True)
        if checkpoint is None:
            raise self.health.no_way_back()
        lost = self.state.samples
        skipped = self.state.skipped_steps
        restores = self.health.restores
        self.restore(checkpoint)
        self.state.skipped_steps = skipped
        self.health.restores = restores
        self.progress.say(
            f"after {lost:,} samples: {self.run_options.max_skipped_steps} steps in a row were not finite; resuming "
            f"from {checkpoint}"
        )
        self._evaluated = (-1, {})
        self.progress.rewind(self.state.samples)
        self.window = Window(self.state.samples, self.state.steps)
        self._batches.close()  # its prefetched batches are masked for later samples
        self._begin_batches()

    def _passed(self, before: int, every: int) -> bool:
        """Returns whether a multiple of `every` samples was reached since `before`."""
        return every > 0 and before // every != self.state.samples // every

    def _begin_phase(self, phase: Phase) -> None:
        if phase.start > 0 and phase.begins_curve:
            # The official release tunes from the weights alone and drops the moments of the masked phase.
            self.distribution.reset_moments()
        self.progress.say(phase.in_words())

    def _step(self, phase: Phase, batches: list[Batch]) -> StepResult:
        """Takes one optimizer step on the batch, and updates the average."""
        result = train_step(
            self.distribution,
            batches,
            partial(self.prepare, phase=phase),
            learning_rate=phase.curve.at(self.state.samples + self.options.batch_size),
            reconstruction_weight=self.objective.reconstruction_weight,
            judge=self.health.judge,
        )
        if self.average is not None:
            self.average.update(self.model, result.skipped)
        return result

    def _read_health(self) -> None:
        """Reads which steps were skipped, for which it waits for the device, and warns of them."""
        skipped = self.health.read()
        self.state.skipped_steps += skipped
        if skipped:
            after = self.state.samples
            logger.warning("Skipped steps before %d samples, as a loss or gradient was not finite: %d", after, skipped)

    # -- logging, evaluation and saving --------------------------------------------------------------------------------

    def _log(self, phase: Phase, step: StepResult, last: Batch) -> None:
        speed = self.window.close(self.state.samples, self.state.steps)
        speed["data_wait"] = longest_wait(speed["data_wait"], self.accelerator)
        self.state.seconds += speed.pop("seconds")
        kept_patches, text_tokens = self.prepare.encoded_lengths(last)
        options = self.arguments.model
        parts = (read_frozen(options.freeze), options.init_vision_from is not None, read_ranks(options.lora))
        flops = step_flops(self.model.config, kept_patches, text_tokens, self.options.batch_size, *parts)
        self.flops_per_sample[phase.name] = flops
        speed |= utilization(flops, speed["samples_per_second"], self.accelerator, self.autocast_dtype is not None)
        lengths = {"kept_patches": kept_patches, "text_tokens": text_tokens}
        values = {**step.values(self.accelerator), **lengths, **speed}
        self.progress.log(self.state.samples, phase=phase.name, skipped_steps=self.state.skipped_steps, **values)
        names = {"loss": "loss", "accuracy": "acc", "logit_scale": "scale", "logit_bias": "bias", "learning_rate": "lr"}
        self.progress.show(**{short: values[name] for name, short in names.items() if name in values})

    def _encoder(self) -> PairEncoder:
        """Returns the encoder with the weights that would be saved now, whole; every process must call it."""
        if self.average is not None:
            return PairEncoder(self.average.module, self.autocast_dtype)  # pyright: ignore[reportArgumentType]
        return self.distribution.whole_encoder()

    def _evaluate_start(self) -> None:
        """Evaluates the trained model that a new run starts from; no judgement counts it."""
        retention = self.retention
        if retention is None:
            return
        if self.state.samples > 0:
            return retention.check_resumed(self.state)
        with self.window.pause():
            own = {} if self.validator is None else self.validator(self._encoder())
            retained = {} if retention.validator is None else retention.measure(self._encoder())
        retention.remember(own, self.state)
        self.progress.log(0, **as_logged(own), **as_logged(retained, "retained_"))
        for said in (in_words(own, self.class_names), retention.in_words()):
            if said:
                self.progress.say(f"before the run: {said}")

    def _evaluate(self) -> dict[str, float]:
        """Evaluates the weights that would be saved now, on the run's own data and on the retained ones."""
        samples, metrics = self._evaluated
        if samples == self.state.samples:  # a run that ends early was just evaluated
            return metrics
        metrics = {} if self.validator is None else self._evaluate_own(self.validator)
        if self.retention is not None:
            self._evaluate_retained(self.retention, metrics)
        self._evaluated = (self.state.samples, metrics)
        return metrics

    def _evaluate_own(self, validator: Validator) -> dict[str, float]:
        with self.window.pause():
            metrics = validator(self._encoder())
        self.progress.log(self.state.samples, **as_logged(metrics))
        self.progress.say(f"after {self.state.samples:,} samples: {in_words(metrics, self.class_names)}")
        with self.window.pause():
            self.best.judge(metrics, self.state, self._saver)
        return metrics

    def _evaluate_retained(self, retention: Retention, own: dict[str, float]) -> None:
        if retention.validator is not None:
            with self.window.pause():
                metrics = retention.measure(self._encoder())
            self.progress.log(self.state.samples, **as_logged(metrics, "retained_"))
            self.progress.say(f"after {self.state.samples:,} samples: {retention.in_words()}")
        if self.accelerator.is_main_process:
            retention.warn_of_fall(own, self.state)

    def _draw(self, pictures: ReconstructionPictures) -> None:
        with self.window.pause():
            encoder = self._encoder()
            model: Any = encoder.model
            pictures.draw(model, self.state.samples)
            encoder.train()  # which knows the frozen blocks

    def _saver(self) -> Callable[[Path], None]:
        """Gathers the weights that would be saved now, and returns what saves them, once; all must call it."""
        average = self.average
        weights = average.module.state_dict() if average is not None else self.distribution.state_dict()
        return partial(save_model, self.model, weights, self.processor, self.arguments)

    def _report(self, metrics: dict[str, float]) -> Report | None:
        """Reports the run so far, on the main process; every process must call it."""
        counts = total_counts(self.loader.counts)
        if not self.accelerator.is_main_process:
            return None
        records = self.progress.records()
        data_wait, bound = bottleneck(records, self.arguments, self.accelerator)
        state = asdict(self.state)
        del state["before"]  # which "retention" compares
        measured = {**state, "data_wait": data_wait, "flops_per_sample": self.flops_per_sample}
        hardware = describe(self.accelerator)
        ended = {
            "finished": self._is_finished(),
            "ended_early": self.best.reason(self.state),
            "best": self.best.kept() if self.best.keeps else None,
        }
        results = {**metrics, **counts.results(), **measured, "hardware": hardware, **ended}
        if self.retention is not None:
            results["retention"] = self.retention.results(metrics, self.state)
        return Report(counts, bound, results, records)

    def _push(self, metrics: dict[str, float]) -> None:
        """Pushes the current model to the Hub, in the background."""
        with self.window.pause():
            if not weights_are_finite(self.accelerator, self.average):
                return self.progress.say(
                    f"after {self.state.samples:,} samples: not pushed, as the weights are not finite"
                )
            save = self._saver()
            report = self._report(metrics)
            if self.pusher is not None and report is not None:
                self.pusher.push(lambda folder: (save(folder), report.save(self.arguments, folder)), self.state.samples)

    def _finish(self) -> dict[str, float]:
        """Saves a checkpoint and the model folder, evaluates, prints the summary, and pushes.

        Evaluation comes after saving, so that a failure in it costs nothing and a resumed run begins with it.

        Raises:
            RunDiverged: the weights are not finite; what was saved before is not overwritten.
        """
        reason = self.best.reason(self.state)
        if reason is not None and self.state.samples < self.phases[-1].end:
            self.progress.say(f"Ended early after {self.state.samples:,} samples: {reason}")
            self.progress.log(self.state.samples, ended_early=reason)
        self._checkpoint(self.loader.state_dict(), at_any_rate=True)
        self._batches.close()
        save = self._saver()
        if self.accelerator.is_main_process:
            save(self.output_dir)
        self.accelerator.wait_for_everyone()
        try:
            metrics = self._evaluate()
        except WaitEnded:
            self.progress.say("Stopped before the evaluation; resume with --resume_from_checkpoint auto to run it")
            self.distribution.end()
            return {}
        report = self._report(metrics)
        self.accelerator.wait_for_everyone()
        self.progress.close()
        if report is not None:
            report.save(self.arguments, self.output_dir)
            print(summary(self.flip, self.arguments, self.state, metrics, self.class_names, report))
        self.distribution.end()  # the others need not wait for the Hub
        self.model.eval()
        if self.pusher is not None:
            print(f"Pushed    {self.pusher.finish()}")
        return metrics
