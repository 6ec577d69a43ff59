"""Where a trainer's batches come from, and where they go on the mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.sharding import fit_spec
from easydel.sharding.activations import ROLES
from easydel.training.data import Batch, DataConfig, make_loader
from easydel.training.data.loader import Loader
from easydel.training.rows import batch_axes, check_rows, own_rows


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


def train_source(data: Any, tokenizer: Any, batch_size: int, epochs: int | None, mesh: Mesh | None = None) -> Source:
    """Return batches for training.

    Args:
        data: a `DataConfig`, a function of a batch's number, something with `get_state` and `set_state`, or an
            iterable of batches.
        tokenizer: for a `DataConfig`.
        batch_size: rows of a batch, for a `DataConfig`.
        epochs: passes, for a `DataConfig` that names none; `None`: without end.
        mesh: the batches of a `DataConfig` are made on: each process makes `own_rows`.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(data, DataConfig):
        config = replace(data, epochs=data.epochs or epochs)
        return cast(
            Source, make_loader(config, _needed(tokenizer), batch_size=batch_size, rows=own_rows(mesh, batch_size))
        )
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


def eval_batches(
    data: Any, tokenizer: Any, batch_size: int, mesh: Mesh | None = None
) -> Iterator[dict[str, jax.Array]]:
    """Yield the batches of an evaluation on the mesh: of a `DataConfig`, what a function returns, or a sequence."""
    if isinstance(data, DataConfig):
        config = replace(data, epochs=1, shuffle=False)
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "drop_remainder": False,
            "rows": own_rows(mesh, batch_size),
        }
        with make_loader(config, _needed(tokenizer), **options) as loader:
            rows = rows_of_shares(loader, mesh)
            yield from (place_batch(batch, mesh, rows) for batch in loader)
        return
    batches = data() if callable(data) else data
    if not isinstance(batches, Sequence) and not callable(data):
        raise TypeError(
            "evaluation data are gone through several times: give a DataConfig, a sequence of batches, or a function "
            f"that returns them, got {type(data).__name__}"
        )
    yield from (place_batch(batch, mesh) for batch in batches)


def count_batches(data: DataConfig, tokenizer: Any, batch_size: int, epochs: int) -> int:
    """Count the batches of a `DataConfig`: by making them all once, unless each record makes a row."""
    with make_loader(replace(data, epochs=data.epochs or epochs), _needed(tokenizer), batch_size=batch_size) as loader:
        return sum(1 for _ in loader) if loader.batch_count is None else loader.batch_count


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError("a DataConfig names text: give the trainer the tokenizer, too")
    return tokenizer


def rows_of_shares(source: Any, mesh: Mesh | None) -> int | None:
    """Return of how many rows a source gives this process's share; `None`: it gives whole batches.

    Raises:
        ValueError: it gives other rows than this process's devices hold.
    """
    if not isinstance(source, Loader) or len(source.rows) == source.batch_size:
        return None
    own = own_rows(mesh, source.batch_size)
    if source.rows != own:
        raise ValueError(
            f"the loader makes rows {list(source.rows)[:8]} of each batch, but this process's devices hold "
            f"{list(own)[:8]}: give make_loader rows=easydel.training.own_rows(mesh, batch_size), or the trainer a "
            "DataConfig"
        )
    return source.batch_size


def place_batch(batch: Mapping[str, Any], mesh: Mesh | None, rows: int | None = None) -> dict[str, jax.Array]:
    """Put a batch on the devices: rows split over `dp` and `fsdp`, positions over `sp` where that divides them.

    Args:
        batch: the same in all processes; each hands its devices their rows. Arrays that lie on devices of several
            processes already are left as they are.
        mesh: `None` for a single device.
        rows: of the batch, if this process has only `own_rows` of them.

    Raises:
        ShardingError: the devices do not divide the rows.
    """
    if mesh is None:
        return {name: jax.device_put(_as_stored(array)) for name, array in batch.items()}
    return {name: _placed(array, mesh, rows) for name, array in batch.items()}


def _placed(array: Any, mesh: Mesh, rows: int | None) -> jax.Array:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array
    stored = _as_stored(array)
    shape = (stored.shape[0] if rows is None else rows, *stored.shape[1:])
    check_rows(shape[0], mesh)
    spec = fit_spec(PartitionSpec(batch_axes(mesh), *ROLES["sequence"][: stored.ndim - 1]), shape, mesh)
    sharding = NamedSharding(mesh, spec)
    if sharding.is_fully_addressable:
        return jax.make_array_from_process_local_data(sharding, stored)
    place = {number: place for place, number in enumerate(range(shape[0]) if rows is None else own_rows(mesh, rows))}

    def share(index: Any) -> np.ndarray:
        first, stop, _ = index[0].indices(shape[0])
        return stored[(slice(place[first], place[first] + stop - first), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, share)


def _as_stored(array: Any) -> np.ndarray:
    host = np.asarray(array)
    return host.astype(np.int32) if host.dtype.kind in "iu" else host
