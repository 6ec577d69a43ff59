"""`Trainer`: a run from its first batch to its finished model, taken up again wherever it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optax

from easydel import distributed
from easydel.checkpoints import Checkpoints
from easydel.distributed import broadcast, is_first
from easydel.errors import TrainingError
from easydel.infra.base_state import EasyDeLState
from easydel.infra.forward import check_token_range
from easydel.infra.state_arrays import named_arrays, with_arrays
from easydel.infra.state_base import check_base
from easydel.infra.state_files import describe
from easydel.training.arguments import TrainingArguments
from easydel.training.checks import check_batch, check_run
from easydel.training.data import Batch, DataConfig, check_batch_fits
from easydel.training.evaluate import evaluate
from easydel.training.finished import save_trained
from easydel.training.interrupts import Interrupts
from easydel.training.logs import Log, Logs, Record
from easydel.training.logs.choose import chosen_logs
from easydel.training.optimizers import make_optimizer, make_schedule
from easydel.training.progress import Progress
from easydel.training.sources import count_batches, eval_batches, place_batch, rows_of_shares, train_source
from easydel.training.step import StepSettings, TrainStep
from easydel.training.tally import Tally

ENDS = ("max_steps", "data", "early_stopping")
"""Why a run has come to its end; any other reason only stops it, and the same command goes on."""
Callback = Callable[["Trainer", Record], bool | None]


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
            `labels`), or a function of a batch's number. Several processes are given the same batches.
        eval_data: a `DataConfig`, a sequence of batches, or a function that returns them.
        tokenizer: for a `DataConfig`; it is saved with the model.
        optimizer: an optax optimizer, in place of the one that the arguments describe.
        callbacks: called with the trainer and each record of the log; the run ends if one returns `True`.
        logs: where records go, in place of `arguments.log_to`; with several processes, those of the first.
        keep_model: `False` uses the model's own arrays up, so that there is no second copy of them.
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
        self.eval_data, self.directory = eval_data, Path(arguments.output_dir)
        self.mesh = model.mesh if model.is_sharded else None
        check_run(arguments, train_data, eval_data, self.mesh)
        self.logs = Logs(chosen_logs(arguments, self.directory) if logs is None else logs if is_first() else ())
        self._tally = Tally(self.logs.say)
        self._reads_text = isinstance(train_data, DataConfig)
        epochs = arguments.num_train_epochs if arguments.max_steps is None else None
        self._source = train_source(train_data, tokenizer, arguments.batch_size, epochs, self.mesh)
        self._rows = rows_of_shares(self._source, self.mesh)
        self.total_steps = arguments.max_steps
        needs_end = optimizer is None and (arguments.schedule != "constant" or arguments.warmup_ratio)
        if epochs is not None and needs_end and self._reads_text:
            self.total_steps = count_batches(train_data, tokenizer, arguments.batch_size, epochs)
        schedule = None
        if optimizer is None:
            schedule = make_schedule(arguments, self.total_steps)
            optimizer = make_optimizer(arguments, schedule)
        state = model.to_state(optimizer, trainable=arguments.trainable, frozen=arguments.frozen)
        settings = StepSettings(arguments.loss_config, arguments.gradient_accumulation_steps, arguments.seed, schedule)
        self._step = TrainStep(state, settings, keep=keep_model)
        self._about, self._model = describe(state), model
        self._last: Record = {}
        self._evaluated: Record = {}

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self._tally.progress

    @property
    def state(self) -> EasyDeLState:
        """The state now; its arrays are gone after the next step, unless they are copied."""
        return self._step.state

    # ------------------------------------------------------------------ the run
    def train(self) -> TrainingResult:
        """Train to the end, or until something asks to stop; return what came of it.

        Raises:
            TrainingError: too many steps in a row without a finite loss (the last good state is saved), no data, or
                checkpoints that are not to be resumed.
            CheckpointError: `output_dir` holds checkpoints of something else.
        """
        checkpoints = Checkpoints(
            self.directory / "checkpoints",
            keep=self.arguments.save_total_limit,
            best_metric=None if self.eval_data is None else self.arguments.best_metric,
            lowest_is_best=self.arguments.lowest_is_best,
        )
        with Interrupts() as interrupts, checkpoints:
            distributed.note("restoring", checkpoints=str(checkpoints.directory))
            self._resume(checkpoints)
            begun = self.progress.iteration
            try:
                self.logs.start(begun, self.total_steps)
                reason = self._run(checkpoints, interrupts)
                if begun and begun == self.progress.iteration and reason in ENDS:
                    self.logs.say(f"nothing left to do: this run has ended already, at step {begun} ({reason})")
                return self._finish(checkpoints, reason)
            finally:
                self.logs.close()

    def _run(self, checkpoints: Checkpoints, interrupts: Interrupts) -> str:
        """Do steps until there is a reason to stop; return it."""
        began, before = time.perf_counter(), self.progress.seconds
        reason = self._end()
        while not reason:
            distributed.note("reading data", self.progress.iteration + 1)
            batch = next(self._source, None)
            if batch is None:
                reason = "data"
                break
            if not self._tally.meter.flops_per_token:
                self._begin(check_batch(batch))
            distributed.note("computing")
            self._tally.push(self._tokens(batch), self._step(place_batch(batch, self.mesh, self._rows)))
            self.progress.seconds = before + time.perf_counter() - began
            asked = self._after_step(checkpoints)
            reason = self._end() or asked or interrupts.asked(self.progress.iteration)
            self.logs.advance(self.progress.iteration)
        self._tally.drain()
        self._stop_if_lost(checkpoints)
        if self._tally.has_news:
            self._write(self._tally.record())
        return reason

    def _end(self) -> str:
        """Say why the run has come to its end; empty if it has not."""
        if self.total_steps is not None and self.progress.iteration >= self.total_steps:
            return "max_steps"
        patience = self.arguments.early_stopping_patience
        return "early_stopping" if patience and self.progress.evaluations_without_better >= patience else ""

    def _begin(self, batch: Batch) -> None:
        """Look at the first batch: whether the model takes it, and what a token of it costs."""
        if self._reads_text:
            check_batch_fits(self._model, batch)
        rows, *length = batch.get("input_ids", batch["labels"]).shape
        forward = self._model.flops_per_token(batch_size=rows, sequence_length=length[0] if length else 1)
        self._tally.meter.flops_per_token = 3.0 * forward  # the backward pass has two products for each of these

    def _tokens(self, batch: Batch) -> int:
        ids = batch.get("input_ids")
        if ids is not None:
            check_token_range(ids, getattr(self._model.config, "vocab_size", None))
        if self._rows is not None:  # a share: its loader knows of the others' rows
            return int(self._source.tokens)  # type: ignore[attr-defined]
        mask = batch.get("attention_mask")
        return int((batch["labels"] if ids is None else ids).size if mask is None else mask.sum())

    def _after_step(self, checkpoints: Checkpoints) -> str:
        """Log, evaluate and save if it is time to; return `"callback"` if one asks to stop."""
        arguments, step = self.arguments, self.progress.iteration

        def is_due(every: int | None) -> bool:
            return every is not None and step % every == 0

        evaluates = self.eval_data is not None and is_due(arguments.eval_steps)
        if evaluates or is_due(arguments.log_steps) or is_due(arguments.save_steps):
            self._tally.drain()
        self._stop_if_lost(checkpoints)
        stops = is_due(arguments.log_steps) and self._write(self._tally.record())
        metrics, improved = None, False
        if evaluates:
            metrics, improved = self._evaluate()
            stops |= self._write(self._evaluated)
        if improved or is_due(arguments.save_steps):
            self.save(checkpoints, metrics)
        if evaluates or is_due(arguments.save_steps):
            self._tally.meter.restart()
        return "callback" if stops else ""

    def _stop_if_lost(self, checkpoints: Checkpoints) -> None:
        """Raise if too many steps in a row were skipped; what is saved then are the last good parameters."""
        in_a_row = self.progress.skipped_in_a_row
        if in_a_row < self.arguments.max_skipped_steps:
            return
        self._tally.drain()
        self.progress.skipped_in_a_row = 0
        self.save(checkpoints)
        checkpoints.wait()
        raise TrainingError(
            f"stopped at step {self.progress.iteration}: {in_a_row} steps in a row had no finite loss and gradient. "
            f"The last good parameters are saved in {checkpoints.directory}; lower learning_rate or max_grad_norm, "
            "look at the data, or train in float32"
        )

    def _write(self, record: Record) -> bool:
        """Log a record; return whether a callback asks to stop."""
        self._last = record
        self.logs.write(record)
        answers = [callback(self, record) for callback in self.callbacks]
        # Process 0's answer is for all, or some would stop and the others wait for them.
        return broadcast(any(bool(answer) for answer in answers)) if answers else False

    # ------------------------------------------------------------------ evaluation
    def evaluate(self) -> Record:
        """Measure the model on the evaluation data: `eval_loss`, and what else the task's loss tells.

        Raises:
            ValueError: there are no evaluation data, or they are empty.
        """
        if self.eval_data is None:
            raise ValueError("the trainer was given no eval_data to measure the model on")
        size = self.arguments.eval_batch_size or self.arguments.batch_size
        batches = eval_batches(self.eval_data, self.tokenizer, size, self.mesh)
        state = self._step.state
        return evaluate(state.graphdef, state.params, state.other, batches, self.arguments.loss_config)

    def _evaluate(self) -> tuple[Record, bool]:
        """Return the metrics, and whether they are the best so far."""
        distributed.note("evaluating")
        metrics = self.evaluate()
        name = self.arguments.best_metric
        if name not in metrics:
            raise ValueError(f"best_metric={name!r} is none of the evaluation's: {', '.join(metrics)}")
        better = self.progress.note_metric(
            metrics[name], lowest=self.arguments.lowest_is_best, threshold=self.arguments.early_stopping_threshold
        )
        self._evaluated = {"step": self.progress.iteration} | metrics
        return metrics, better

    # ------------------------------------------------------------------ checkpoints
    def save(self, checkpoints: Checkpoints, metrics: Record | None = None) -> None:
        """Write a checkpoint of this moment in the background."""
        distributed.note("saving", self.progress.iteration)
        about = self._about | {"progress": self.progress.to_dict(), "data": self._source.get_state()}
        about["evaluated"] = self._evaluated
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
        check_base(restored.metadata, self._about, checkpoints.directory)
        self._source.set_state(restored.metadata["data"])
        self._tally.progress = Progress(**restored.metadata["progress"])
        self._evaluated = restored.metadata["evaluated"]
        self._step.restore(replace(state, **with_arrays(state, restored.arrays)), self.progress.iteration)
        self.logs.say(f"going on from step {self.progress.iteration} ({checkpoints.directory})")

    def _finish(self, checkpoints: Checkpoints, reason: str) -> TrainingResult:
        distributed.note("finishing", self.progress.iteration)
        done = reason in ENDS
        step = self.progress.iteration
        if not step:
            raise TrainingError("the training data have no batch: fewer rows than batch_size, or none at all")
        metrics: Record | None = None
        if done and self.eval_data is not None and self._evaluated.get("step") != step:
            metrics, _ = self._evaluate()
            self._write(self._evaluated)
        if metrics is not None or step not in checkpoints.steps:
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
        return TrainingResult(self._step.state, self.progress, reason, self._evaluated or self._last)

    def save_model(self, directory: str | Path) -> None:
        """Write the model (and the tokenizer) in the Hugging Face layout; of one with adapters, these as PEFT does."""
        save_trained(self._step.state.model, Path(directory), self.tokenizer)
