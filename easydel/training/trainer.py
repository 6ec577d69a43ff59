"""`Trainer`: a run from its first batch to its finished model, taken up again wherever it was stopped."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import optax

from easydel.checkpoints import Checkpoints
from easydel.errors import TrainingError
from easydel.infra.base_state import EasyDeLState
from easydel.infra.forward import check_token_range
from easydel.infra.state_arrays import named_arrays, with_arrays
from easydel.infra.state_files import describe
from easydel.training.arguments import TrainingArguments
from easydel.training.data import Batch, DataConfig, check_batch_fits
from easydel.training.evaluate import evaluate
from easydel.training.interrupts import Interrupts
from easydel.training.logs import Log, Logs, Record
from easydel.training.logs.choose import chosen_logs
from easydel.training.optimizers import make_optimizer, make_schedule
from easydel.training.progress import Means, Progress
from easydel.training.sources import count_batches, eval_batches, place_batch, train_source
from easydel.training.step import StepSettings, TrainStep
from easydel.training.throughput import Meter

Callback = Callable[["Trainer", Record], bool | None]
_LAG = 1  # steps that may be under way while the host prepares the next one


@dataclass(frozen=True)
class TrainingResult:
    """What a run ended with.

    Attributes:
        state: the training state; `state.model` is the model.
        progress: where it stands.
        reason: why it ended: `"max_steps"`, `"data"` (it ran out), `"early_stopping"`, `"callback"` or a signal's name.
        metrics: of the last evaluation, else of the last steps.
    """

    state: EasyDeLState
    progress: Progress
    reason: str
    metrics: Record

    @property
    def model(self) -> Any:
        """The trained model."""
        return self.state.model


class Trainer:
    """Trains a model.

    Args:
        model: what is trained; on a mesh if it is sharded.
        arguments: how.
        train_data: a `DataConfig`, an iterable of batches (mappings of arrays that the forward pass takes, and
            `labels`), or a function of a batch's number.
        eval_data: a `DataConfig`, a sequence of batches, or a function that returns them.
        tokenizer: for a `DataConfig`; it is saved with the model.
        optimizer: an optax optimizer, in place of the one that the arguments describe.
        callbacks: called with the trainer and each record of the log; the run ends if one returns `True`.
        logs: where records go, in place of `arguments.log_to`.
        keep_model: `False` uses the model's own arrays up, so that there is no second copy of them.

    Attributes:
        progress: where the run stands.
    """

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        train_data: Any,
        eval_data: Any = None,
        *,
        tokenizer: Any = None,
        optimizer: optax.GradientTransformation | None = None,
        callbacks: Sequence[Callback] = (),
        logs: Sequence[Log] | None = None,
        keep_model: bool = True,
    ) -> None:
        self.arguments, self.tokenizer, self.callbacks = arguments, tokenizer, tuple(callbacks)
        self.eval_data, self.progress = eval_data, Progress()
        self.directory = Path(arguments.output_dir)
        self.mesh = model.mesh if model.is_sharded else None
        self.logs = Logs(chosen_logs(arguments, self.directory) if logs is None else logs)
        self._source = train_source(train_data, tokenizer, arguments.batch_size, arguments.num_train_epochs)
        self._reads_text = isinstance(train_data, DataConfig)
        self.total_steps = arguments.max_steps
        if self.total_steps is None and arguments.schedule != "constant" and self._reads_text:
            self.total_steps = count_batches(train_data, tokenizer, arguments.batch_size, arguments.num_train_epochs)
        self.schedule = None if optimizer is not None else make_schedule(arguments, self.total_steps)
        tx = make_optimizer(arguments, self.schedule) if self.schedule is not None else optimizer
        state = model.to_state(tx, trainable=arguments.trainable, frozen=arguments.frozen)
        settings = StepSettings(arguments.loss_config, arguments.gradient_accumulation_steps, arguments.seed)
        self._step = TrainStep(state, settings, keep=keep_model)
        self._about = describe(state)
        self._model, self._meter = model, Meter(0.0)
        self._means, self._last = Means(), {}

    @property
    def state(self) -> EasyDeLState:
        """The state now; its arrays are gone after the next step, unless they are copied."""
        return self._step.state

    # ------------------------------------------------------------------ the run
    def train(self) -> TrainingResult:
        """Train to the end, or until something asks to stop; return what came of it.

        Raises:
            TrainingError: too many steps in a row without a finite loss; the last good state is saved.
            CheckpointError: `output_dir` holds checkpoints of something else, or ones that are not to be resumed.
        """
        metric = self.arguments.best_metric if self.eval_data is not None else None
        with (
            Interrupts() as interrupts,
            Checkpoints(
                self.directory / "checkpoints",
                keep=self.arguments.save_total_limit,
                best_metric=metric,
                lowest_is_best=self.arguments.lowest_is_best,
            ) as checkpoints,
        ):
            self._resume(checkpoints)
            self.logs.start(self.progress.iteration, self.total_steps)
            try:
                reason = self._run(checkpoints, interrupts)
                result = self._finish(checkpoints, reason)
            finally:
                self.logs.close()
        return result

    def _run(self, checkpoints: Checkpoints, interrupts: Interrupts) -> str:
        pending: deque[tuple[int, dict[str, jax.Array]]] = deque()
        began, before = time.perf_counter(), self.progress.seconds
        reason = ""
        while not reason:
            if self.total_steps is not None and self.progress.iteration >= self.total_steps:
                reason = "max_steps"
                break
            batch = next(self._source, None)
            if batch is None:
                reason = "data"
                break
            if self._meter.flops_per_token == 0.0:
                self._begin(batch)
            tokens = self._tokens(batch)
            pending.append((tokens, self._step(place_batch(batch, self.mesh))))
            self.progress.iteration += 1
            self.progress.seconds = before + time.perf_counter() - began
            while len(pending) > _LAG:
                self._take(*pending.popleft())
            reason = self._after_step(checkpoints, pending) or (interrupts.received or "")
            self.logs.advance(self.progress.iteration)
        while pending:
            self._take(*pending.popleft())
        self._check_finite(checkpoints)
        return reason

    def _begin(self, batch: Batch) -> None:
        """Look at the first batch: whether the model takes it, and what a token of it costs."""
        if self._reads_text:
            check_batch_fits(self._model, batch)
        rows, length = batch["labels"].shape[0], batch["labels"].shape[-1] if batch["labels"].ndim > 1 else 1
        forward = self._model.flops_per_token(batch_size=rows, sequence_length=length)
        self._meter = Meter(3.0 * forward)  # the backward pass has two products for each of the forward's

    def _tokens(self, batch: Batch) -> int:
        ids = batch.get("input_ids")
        if ids is not None:
            check_token_range(ids, getattr(self._model.config, "vocab_size", None))
        mask = batch.get("attention_mask")
        return int((batch["labels"] if ids is None else ids).size if mask is None else mask.sum())

    def _take(self, tokens: int, metrics: dict[str, jax.Array]) -> None:
        """Take in what a step told; this waits for it."""
        host = {name: float(value) for name, value in jax.device_get(metrics).items()}
        finite = bool(host["is_finite"])
        self.progress.note_step(finite)
        self.progress.tokens += tokens
        self._meter.add(tokens)
        if finite:
            self._means.add(host)
        else:
            self.logs.say(
                f"step skipped: loss {host['loss']}, norm of the gradient {host['grad_norm']} "
                f"({self.progress.skipped_in_a_row} in a row, {self.progress.skipped} in all)"
            )

    def _after_step(self, checkpoints: Checkpoints, pending: deque[Any]) -> str:
        """Log, evaluate and save if it is time to; return a reason to stop."""
        arguments, step = self.arguments, self.progress.iteration
        stop = False
        is_due = [every and step % every == 0 for every in (arguments.log_steps, arguments.eval_steps, arguments.save_steps)]
        if any(is_due) or self.progress.skipped_in_a_row >= arguments.max_skipped_steps:
            while pending:
                self._take(*pending.popleft())
        self._check_finite(checkpoints)
        if is_due[0]:
            stop |= self._write(self._record())
        improved, metrics = False, None
        if is_due[1] and self.eval_data is not None:
            metrics, improved, stopped = self._evaluate()
            stop |= stopped
        if is_due[2] or improved:
            self.save(checkpoints, metrics)
        patience = arguments.early_stopping_patience
        if patience is not None and self.progress.evaluations_without_better >= patience:
            return "early_stopping"
        return "callback" if stop else ""

    def _check_finite(self, checkpoints: Checkpoints) -> None:
        in_a_row = self.progress.skipped_in_a_row
        if in_a_row >= self.arguments.max_skipped_steps:
            self.progress.skipped_in_a_row = 0
            self.save(checkpoints)
            checkpoints.wait()
            raise TrainingError(
                f"stopped at step {self.progress.iteration}: {in_a_row} steps in a row had no finite loss and gradient. "
                f"The last good parameters are saved in {checkpoints.directory}; lower learning_rate or max_grad_norm, "
                "look at the data, or train in float32"
            )

    def _record(self) -> Record:
        record: Record = {"step": self.progress.iteration} | self._means.take()
        if self.schedule is not None:
            record["learning_rate"] = float(self.schedule(max(self.progress.updates - 1, 0)))
        record |= self._meter.read()
        return record | {"tokens": self.progress.tokens, "skipped_steps": self.progress.skipped, "seconds": self.progress.seconds}

    def _write(self, record: Record) -> bool:
        self._last = record
        self.logs.write(record)
        return any([bool(callback(self, record)) for callback in self.callbacks])

    # ------------------------------------------------------------------ evaluation
    def evaluate(self) -> Record:
        """Measure the model on the evaluation data: `eval_loss`, and what else the task's loss tells.

        Raises:
            ValueError: there are no evaluation data, or they are empty.
        """
        if self.eval_data is None:
            raise ValueError("the trainer was given no eval_data to measure the model on")
        size = self.arguments.eval_batch_size or self.arguments.batch_size
        batches = eval_batches(self.eval_data, self.tokenizer, size)
        placed = (place_batch(batch, self.mesh) for batch in batches)
        state = self._step.state
        return evaluate(state.graphdef, state.params, state.other, placed, self.arguments.loss_config)

    def _evaluate(self) -> tuple[Record, bool, bool]:
        metrics = self.evaluate()
        name = self.arguments.best_metric
        if name not in metrics:
            raise ValueError(f"best_metric={name!r} is none of the evaluation's: {', '.join(metrics)}")
        better = self.progress.note_metric(
            metrics[name], lowest=self.arguments.lowest_is_best, threshold=self.arguments.early_stopping_threshold
        )
        return metrics, better, self._write({"step": self.progress.iteration} | metrics)

    # ------------------------------------------------------------------ checkpoints
    def save(self, checkpoints: Checkpoints, metrics: Record | None = None) -> None:
        """Write a checkpoint of this moment in the background."""
        about = self._about | {"progress": self.progress.to_dict(), "data": self._source.get_state()}
        checkpoints.save(self.progress.iteration, named_arrays(self._step.state), about, metrics)

    def _resume(self, checkpoints: Checkpoints) -> None:
        if not checkpoints.steps:
            return
        if not self.arguments.resume:
            raise TrainingError(
                f"{checkpoints.directory} holds checkpoints of an earlier run (steps {checkpoints.steps}), which "
                "resume=False would mix with new ones: choose another output_dir, remove them, or resume"
            )
        state = self._step.state
        restored = checkpoints.restore(named_arrays(state))
        self._source.set_state(restored.metadata["data"])
        self.progress = Progress(**restored.metadata["progress"])
        self._step.restore(replace(state, **with_arrays(state, restored.arrays)), self.progress.iteration)
        self.logs.say(f"going on from step {self.progress.iteration} ({checkpoints.directory})")

    def _finish(self, checkpoints: Checkpoints, reason: str) -> TrainingResult:
        done = reason in ("max_steps", "data", "early_stopping")
        step = self.progress.iteration
        if not step:
            raise TrainingError("the training data have no batch: fewer rows than batch_size, or none at all")
        metrics: Record | None = None
        evaluated = bool(self.arguments.eval_steps) and step % (self.arguments.eval_steps or 1) == 0
        if done and self.eval_data is not None and not evaluated:
            metrics, _, _ = self._evaluate()
        if step not in checkpoints.steps or metrics is not None:
            self.save(checkpoints, metrics)
        checkpoints.wait()
        if done and self.arguments.load_best_model_at_end and checkpoints.best_step is not None:
            state = self._step.state
            best = checkpoints.restore(named_arrays(state), checkpoints.best_step)
            self._step.restore(replace(state, **with_arrays(state, best.arrays)), step)
            self.logs.say(f"the best model is that of step {checkpoints.best_step}")
        if done and self.arguments.save_model:
            self.save_model(self.directory / "model")
        elif not done:
            self.logs.say(f"stopped by {reason} at step {step}; the same command goes on from there")
        return TrainingResult(self._step.state, self.progress, reason, self._last)

    def save_model(self, directory: str | Path) -> None:
        """Write the model (and the tokenizer) in the Hugging Face layout."""
        self._step.state.model.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
