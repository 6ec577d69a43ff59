"""The stream of batches as a grain dataset, whose state says exactly where it stands.

Grain's own packing empties all its rows whenever a document fits in none, and says where it stands by a position from
which everything is made anew. Here documents are read by number, so that a state can name the windows that wait in open
rows: it is small, and as few documents are read again as there are waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import grain

from easydel.training.data.batch import Batch
from easydel.training.data.documents import Document, Window
from easydel.training.data.packing import Packer, Place, Placed, Row, Statistics, count_rows, fill_batch


class Produced(NamedTuple):
    """A batch, and what is known when it has been made.

    Attributes:
        batch: this process's rows.
        position: how many records have been read to the end.
        statistics: of all batches so far, this one included.
    """

    batch: Batch
    position: int
    statistics: Statistics


@dataclass(frozen=True)
class BatchShape:
    """What the batches of a stream look like.

    Attributes:
        batch_size: rows, over all processes.
        rows: numbers of those that this process makes.
        length: tokens of a row.
        open_rows: of the packer; 0: no packing.
        pad_id: of places without a token.
        drop_remainder: whether rows that are too few for a batch are dropped at the end, else it is filled with empty
            ones.
    """

    batch_size: int
    rows: tuple[int, ...]
    length: int
    open_rows: int
    pad_id: int
    drop_remainder: bool


class BatchDataset(grain.IterDataset[Produced]):
    """Batches of the documents of a `grain.MapDataset`, in its order.

    Args:
        documents: documents by number, the same whenever they are asked for.
        record_count: records of one pass over the data.
        shape: of the batches.
    """

    def __init__(self, documents: grain.MapDataset, record_count: int, shape: BatchShape) -> None:
        super().__init__()
        self.documents, self.record_count, self.shape = documents, record_count, shape

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self.documents, self.record_count, self.shape)


class BatchIterator(grain.DatasetIterator[Produced]):
    """See `BatchDataset`.

    Every process makes all rows and fills its own, so what is in them does not depend on how many processes there are.
    """

    def __init__(self, documents: grain.MapDataset, record_count: int, shape: BatchShape) -> None:
        super().__init__()
        self.documents, self.record_count, self.shape = documents, record_count, shape
        self._begin()

    def _begin(self) -> None:
        self.packer = Packer(self.shape.length, self.shape.open_rows)
        self.ready: deque[Row] = deque()
        self.position, self.window = 0, 0
        self.statistics = Statistics()
        self.fruitless = 0
        self.current: Document | None = None

    def __next__(self) -> Produced:
        shape = self.shape
        while len(self.ready) < shape.batch_size and self._read():
            pass
        count = min(len(self.ready), shape.batch_size)
        if not count or (count < shape.batch_size and shape.drop_remainder):
            if not self.statistics.rows:
                raise ValueError(
                    f"the data make {len(self.ready)} rows of {shape.length} tokens, fewer than one batch of "
                    f"{shape.batch_size}: use a smaller batch or rows, more epochs, or drop_remainder=False"
                )
            raise StopIteration
        rows = [[placed.window for placed in self.ready.popleft()] for _ in range(count)]
        self.statistics += count_rows(rows, shape.length)
        rows += [[]] * (shape.batch_size - count)
        own = [rows[number] for number in shape.rows]
        batch = fill_batch(own, shape.length, shape.pad_id, packed=shape.open_rows > 0)
        return Produced(batch, self.position, self.statistics)

    def _read(self) -> bool:
        """Place one window more, or close all rows at the end of the data; return whether that made any difference."""
        if self.position >= len(self.documents):
            closed = self.packer.flush()
            self.ready.extend(closed)
            return bool(closed)
        if self.current is None:
            self.current = self.documents[self.position]
        document = self.current
        if self.window < len(document.windows):
            placed = Placed((self.position, self.window), document.windows[self.window])
            self.ready.extend(self.packer.add(placed))
            self.window += 1
        if self.window >= len(document.windows):
            self._finish(document)
        return True

    def _finish(self, document: Document) -> None:
        skipped = not document.windows
        self.statistics += Statistics(
            documents=int(document.closes), skipped_documents=int(skipped), dropped_tokens=document.dropped
        )
        self.position, self.window, self.current = self.position + 1, 0, None
        self.fruitless = self.fruitless + 1 if skipped else 0
        if self.fruitless >= self.record_count:
            raise ValueError(
                f"no trainable token is left in any of the {self.record_count} records: their labels all lie behind "
                f"the first {self.shape.length} tokens; raise sequence_length, or use truncate='split'"
            )

    def get_state(self) -> dict[str, Any]:
        """Return where it stands: integers in lists and dicts."""
        return {
            "position": self.position,
            "window": self.window,
            "fruitless": self.fruitless,
            "open": _places(self.packer.rows),
            "ready": _places(self.ready),
            "statistics": asdict(self.statistics),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `get_state` was called; the documents that wait in rows are read again."""
        self._begin()
        self.position, self.window, self.fruitless = state["position"], state["window"], state["fruitless"]
        self.statistics = Statistics(**state["statistics"])
        waiting = {place for rows in (state["open"], state["ready"]) for row in rows for place in map(tuple, row)}
        windows: dict[Place, Window] = {}
        for position in sorted({place[0] for place in waiting}):
            document = self.documents[position]
            windows |= {(position, number): window for number, window in enumerate(document.windows)}
        self.packer.rows = [_row(row, windows) for row in state["open"]]
        self.ready = deque(_row(row, windows) for row in state["ready"])


def _places(rows: Sequence[Row] | deque[Row]) -> list[list[list[int]]]:
    return [[list(placed.place) for placed in row] for row in rows]


def _row(places: Sequence[Sequence[int]], windows: dict[Place, Window]) -> Row:
    return [Placed((place[0], place[1]), windows[place[0], place[1]]) for place in places]


def order_records(records: Any, make: Any, *, seed: int | None, epochs: int | None) -> grain.MapDataset:
    """Return the documents of all passes by number: `epochs` times all records, each pass in an order of its own.

    Args:
        records: a sequence of records.
        make: record → document.
        seed: of the orders; `None`: as they stand.
        epochs: passes; `None`: without end.
    """
    dataset = grain.MapDataset.source(records)
    if seed is not None:
        dataset = dataset.shuffle(seed=seed)
    return dataset.repeat(epochs).map(make)


def prefetched(dataset: BatchDataset, count: int) -> grain.DatasetIterator:
    """Iterate with up to `count` batches made ahead in a thread."""
    if not count:
        return iter(dataset)
    return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=count))
