"""Where a trainer's batches come from, and where they go on the mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.errors import ShardingError
from easydel.sharding import fit_spec
from easydel.sharding.activations import ROLES
from easydel.training.data import Batch, DataConfig, make_loader


class Source(Protocol):
    """Batches one after the other, that can be taken up again."""

    def __next__(self) -> Batch:
        """Return the next batch; `StopIteration` at the end."""

    def get_state(self) -> Any:
        """Return where it stands, fit for JSON."""

    def set_state(self, state: Any) -> None:
        """Go to where `get_state` was called."""


class StepBatches:
    """Batches that are a function of their number.

    Args:
        batch_of: number (from 0) → batch.
    """

    def __init__(self, batch_of: Callable[[int], Batch]) -> None:
        self._batch_of, self._next = batch_of, 0

    def __next__(self) -> Batch:
        self._next += 1
        return self._batch_of(self._next - 1)

    def get_state(self) -> int:
        """Return the number of the next batch."""
        return self._next

    def set_state(self, state: int) -> None:
        """Go to a number."""
        self._next = state


class Replayed:
    """Any iterable of batches; to be taken up again it is run through from the start, so it must repeat itself.

    Args:
        batches: the same ones each time it is iterated over.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._iterator, self._seen = iter(batches), 0

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._seen += 1
        return batch

    def get_state(self) -> int:
        """Return how many batches have been seen."""
        return self._seen

    def set_state(self, state: int) -> None:
        """Pass over batches until so many have been seen.

        Raises:
            ValueError: more have been seen already, or there are not so many.
        """
        if state < self._seen:
            raise ValueError(f"{self._seen} batches have been taken already; give the trainer a fresh iterable")
        while self._seen < state:
            if next(self._iterator, None) is None:
                raise ValueError(f"the data ended after {self._seen} batches, but {state} had been seen before")
            self._seen += 1


def train_source(data: Any, tokenizer: Any, batch_size: int, epochs: int | None) -> Source:
    """Return batches for training.

    Args:
        data: a `DataConfig`, a function of a batch's number, something with `get_state` and `set_state`, or an
            iterable of batches.
        tokenizer: for a `DataConfig`.
        batch_size: rows of a batch, for a `DataConfig`.
        epochs: passes, for a `DataConfig` that names none; `None`: without end.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(data, DataConfig):
        config = replace(data, epochs=data.epochs or epochs)
        return cast(Source, make_loader(config, _needed(tokenizer), batch_size=batch_size, **_share()))
    if hasattr(data, "get_state") and hasattr(data, "set_state"):
        return cast(Source, data)
    if callable(data):
        return StepBatches(data)
    if isinstance(data, Iterable):
        return Replayed(data)
    raise TypeError(
        "training data must be a DataConfig, an iterable of batches (dicts of arrays) or a function of a batch's "
        f"number, got {type(data).__name__}"
    )


def eval_batches(data: Any, tokenizer: Any, batch_size: int) -> Iterator[Batch]:
    """Yield the batches of an evaluation: a pass over a `DataConfig`, what a function returns, or a sequence."""
    if isinstance(data, DataConfig):
        config = replace(data, epochs=1, shuffle=False)
        options: dict[str, Any] = {"batch_size": batch_size, "drop_remainder": False, **_share()}
        with make_loader(config, _needed(tokenizer), **options) as loader:
            yield from loader
        return
    batches = data() if callable(data) else data
    if not isinstance(batches, Sequence) and not callable(data):
        raise TypeError(
            "evaluation data are gone through several times: give a DataConfig, a sequence of batches, or a function "
            f"that returns them, got {type(data).__name__}"
        )
    yield from batches


def count_batches(data: DataConfig, tokenizer: Any, batch_size: int, epochs: int) -> int:
    """Count the batches of a `DataConfig`: by making them all once, unless each record makes a row."""
    with make_loader(replace(data, epochs=data.epochs or epochs), _needed(tokenizer), batch_size=batch_size) as loader:
        return sum(1 for _ in loader) if loader.batch_count is None else loader.batch_count


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError("a DataConfig names text: give the trainer the tokenizer, too")
    return tokenizer


def _share() -> dict[str, Any]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def check_rows(rows: int, mesh: Mesh | None) -> None:
    """Refuse batches that the devices do not divide.

    Args:
        rows: of a batch, over all processes.
        mesh: `None` for a single device.

    Raises:
        ShardingError: the devices do not divide the rows.
    """
    axes = () if mesh is None else _batch_axes(mesh)
    parts = int(np.prod([mesh.shape[axis] for axis in axes])) if mesh is not None else 1
    if rows % parts:
        raise ShardingError(
            f"a batch of {rows} rows cannot be split over {parts} devices ({'·'.join(axes)}): choose a batch size "
            f"that is a multiple of {parts}, or another mesh"
        )


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in ROLES["batch"] if axis in mesh.shape)


def place_batch(batch: Mapping[str, Any], mesh: Mesh | None) -> dict[str, jax.Array]:
    """Put a batch on the devices: rows split over `dp` and `fsdp`, positions over `sp` where that divides them.

    Raises:
        ShardingError: the devices do not divide the rows.
    """
    if mesh is None:
        return {name: jax.device_put(_as_stored(array)) for name, array in batch.items()}
    axes, placed = _batch_axes(mesh), {}
    for name, array in batch.items():
        stored = _as_stored(array)
        rows = stored.shape[0] * jax.process_count()
        check_rows(rows, mesh)
        spec = fit_spec(PartitionSpec(axes, *ROLES["sequence"][: stored.ndim - 1]), (rows, *stored.shape[1:]), mesh)
        placed[name] = jax.make_array_from_process_local_data(NamedSharding(mesh, spec), stored)
    return placed


def _as_stored(array: Any) -> np.ndarray:
    host = np.asarray(array)
    return host.astype(np.int32) if host.dtype.kind in "iu" else host
