"""The checkpoints of a training run: the last few and the best are kept, torn ones are never chosen."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from easydel.checkpoints.arrays import FORMAT, Arrays, BrokenCheckpointError, read
from easydel.checkpoints.room import no_room, written_here
from easydel.distributed import warn
from easydel.errors import CheckpointError


@dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` read.

    Attributes:
        step: of the checkpoint.
        arrays: by name.
        metadata: the JSON mapping that was saved beside them.
    """

    step: int
    arrays: dict[str, jax.Array]
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints in a directory, one for each step that was saved.

    A checkpoint is written in the background and appears under its step when it is whole; a run that is killed while
    writing leaves the ones before.

    Args:
        directory: made when the first checkpoint is written.
        keep: how many of the latest are kept; `None`: all.
        best_metric: name of a metric; the checkpoint where it was best is kept, too.
        lowest_is_best: whether a low metric is good (a loss) or a high one (accuracy).

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int | None = 3,
        best_metric: str | None = None,
        lowest_is_best: bool = True,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint is kept (None: all)")
        from orbax.checkpoint import v1 as orbax

        self.directory = Path(directory).absolute()
        self.best_metric, self.lowest_is_best = best_metric, lowest_is_best
        self.directory.mkdir(parents=True, exist_ok=True)
        policies = orbax.training.preservation_policies
        kept: list[Any] = [policies.PreserveAll() if keep is None else policies.LatestN(keep)]
        if best_metric is not None:
            best = policies.BestN(
                n=1, get_metric_fn=self._rank, reverse=lowest_is_best, keep_checkpoints_without_metrics=False
            )
            kept.append(best)
        self._orbax = orbax.training.Checkpointer(
            self.directory,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None
        self._writing = (0, 0)

    def _rank(self, metrics: Any) -> float:
        worst = float("inf") if self.lowest_is_best else float("-inf")
        value = metrics.get(self.best_metric, worst) if isinstance(metrics, Mapping) else worst
        return worst if value != value else value

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a whole checkpoint, in order."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    @property
    def best_step(self) -> int | None:
        """The step whose metric was best; `None` if no checkpoint has the metric."""
        ranked = [
            (self._rank(checkpoint.metrics), checkpoint.step)
            for checkpoint in self._orbax.checkpoints
            if isinstance(checkpoint.metrics, Mapping) and self.best_metric in checkpoint.metrics
        ]
        if not ranked:
            return None
        return (min if self.lowest_is_best else max)(ranked)[1]

    def save(
        self, step: int, arrays: Arrays, metadata: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Write a checkpoint in the background; wait for the one before if it is not done.

        The arrays may be donated or changed once this returns.

        Args:
            step: its name; one that is there is replaced.
            arrays: by name.
            metadata: what `json` can write.
            metrics: of this step.

        Raises:
            CheckpointError: the disk is full (as this one or the one before was written); the others stay as they are.
        """
        self.wait()
        self._writing = (step, written_here(arrays))
        with self._full_disk_explained():
            self._saving = self._orbax.save_async(
                step,
                dict(arrays),
                force=True,
                overwrite=step in self.steps,
                custom_metadata={"format": FORMAT, **metadata},
                metrics=dict(metrics) if metrics else None,
            )

    def wait(self) -> None:
        """Wait until everything is on disk; raise what went wrong in the background, a full disk as `save` does."""
        saving, self._saving = self._saving, None
        with self._full_disk_explained():
            if saving is not None:
                saving.result()
            self._orbax.wait()

    @contextlib.contextmanager
    def _full_disk_explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of orbax, tensorstore or the system
            if (reason := no_room(error)) is None:
                raise
            step, needed = self._writing
            raise CheckpointError(
                f"{self.directory / str(step)}: the checkpoint could not be written: {reason}. This process writes "
                f"about {needed:,} bytes of it; {shutil.disk_usage(self.directory).free:,} are free. Whole are those "
                f"of steps {[whole for whole in self.steps if whole != step] or 'none'}: make room, and start again"
            ) from error

    def restore(self, like: Mapping[str, Any], step: int | None = None) -> Restored:
        """Read a checkpoint, each array to where `like` says.

        Args:
            like: by name, an array or a `jax.ShapeDtypeStruct` with the sharding that is wanted.
            step: which; `None`: the latest that can be read. What cannot be is passed over with a warning.

        Raises:
            CheckpointError: there is none, none can be read, or it holds other arrays than `like`.
        """
        self.wait()
        steps = self.steps
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; there are {steps or 'none'}")
        problems = []
        for candidate in [step] if step is not None else reversed(steps):
            path = self.directory / str(candidate)
            try:
                arrays, metadata = read(path, like, self._orbax.metadata, self._orbax.load, candidate)
            except BrokenCheckpointError as error:
                problems.append(str(error))
                warn(f"passed over: {error}", stacklevel=2)
            else:
                return Restored(candidate, arrays, metadata)
        raise CheckpointError("\n  ".join([f"{self.directory}: no checkpoint can be read", *problems]))

    def close(self) -> None:
        """Wait for what is being written and let go of the directory."""
        self.wait()
        self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
