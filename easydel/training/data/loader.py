"""`make_loader`: batches that can be taken up again at any point."""

from __future__ import annotations

import copy
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from easydel.training.data.batch import Batch
from easydel.training.data.config import DataConfig
from easydel.training.data.documents import Document, DocumentMaker
from easydel.training.data.packing import Statistics
from easydel.training.data.records import Records, open_records

STATE_VERSION = 1
_NOT_CONTENT = ("path", "prefetch", "epochs")  # may change between a state and its use: the batches stay the same


class Loader:
    """An endless or finite iterator of batches (see `make_loader`) that knows where it stands.

    Attributes:
        config: with the `format` that was found.
        records: how many records the data have: lines, files, or pieces of large texts.
        batch_size: rows of a batch over all processes.
        rows: numbers of those that this process makes.
        batch_count: batches from the first to the last, if that is known: if each record makes one row.
        position: records read so far, over all passes.
        statistics: of the batches so far.
        tokens: of the last batch, over all processes.
    """

    def __init__(
        self,
        config: DataConfig,
        batch_size: int,
        rows: tuple[int, ...],
        records: Records,
        documents: Any,
        iterator: Any,
        batch_count: int | None,
    ) -> None:
        self.config, self.batch_size, self.records = config, batch_size, len(records)
        self.batch_count, self.rows = batch_count, rows
        self.position, self.statistics, self.tokens = 0, Statistics(), 0
        self._held = [iterator]
        # An interpreter that ends while the thread tokenises would be aborted.
        weakref.finalize(self, _close, self._held)
        settings = {name: value for name, value in asdict(config).items() if name not in _NOT_CONTENT}
        data = records.fingerprint() | {"first_document": _checksum(documents[0])}
        self._identity = {"settings": settings, "data": data, "batch_size": batch_size}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        produced = next(self._iterator)
        self.tokens = produced.statistics.tokens - self.statistics.tokens
        self.position, self.statistics = produced.position, produced.statistics
        return produced.batch

    @property
    def _iterator(self) -> Any:
        if not self._held:
            raise ValueError("the loader is closed: make a new one and give it this one's state")
        return self._held[0]

    @property
    def epoch(self) -> int:
        """Passes over the data that have been read to their end; their last documents may be in batches to come."""
        return self.position // self.records

    def get_state(self) -> dict[str, Any]:
        """Return where it stands, fit for JSON: the batch that comes next is a function of data, config and this.

        It holds no tokens, and can be used by another number of processes.
        """
        return {"version": STATE_VERSION, **self._identity, "stream": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `get_state` was called.

        Raises:
            ValueError: the state is of other data, another tokenizer, config or batch size; nothing is changed.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise ValueError(f"not a loader's state of version {STATE_VERSION}: {str(state)[:80]}")
        for part, mine in self._identity.items():
            theirs = state.get(part)
            if theirs != mine:
                raise ValueError(f"the state does not fit this loader: {_difference(part, theirs, mine)}")
        stream, known = state.get("stream"), self._iterator.get_state().keys()
        if not isinstance(stream, dict) or stream.keys() != known:
            raise ValueError(f"the state is damaged: 'stream' must have {', '.join(known)}, got {stream!r}")
        self._iterator.set_state(stream)
        self.position, self.statistics = stream["position"], Statistics(**stream["statistics"])

    def close(self) -> None:
        """Stop the thread that makes batches ahead; the loader is of no more use."""
        _close(self._held)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _close(held: list[Any]) -> None:
    """Close an iterator and let it go: grain would close it once more while the interpreter is torn down."""
    while held:
        held.pop().close()


def make_loader(
    data: DataConfig | Sequence[Any],
    tokenizer: Any,
    *,
    batch_size: int,
    config: DataConfig | None = None,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
    drop_remainder: bool = True,
) -> Loader:
    """Make an iterator of batches for a causal language model.

    A batch is a dict of int32 arrays `[rows, sequence_length]`, of `batch_size / process_count` rows: `input_ids`,
    `labels` (the tokens themselves, -100 where nothing is to be learned; the loss shifts them), `attention_mask` and,
    with packing, `segment_ids` and `position_ids`. The batches are a function of data, tokenizer, config and batch size
    alone, and those of all processes, one behind the other, are the one of a single process.

    Args:
        data: what to read; or examples in memory, texts or mappings as of a JSON line.
        tokenizer: with transformers' interface; it is copied.
        batch_size: rows of a batch over all processes.
        config: how to make rows of examples in memory; its `path` must be `None`.
        process_index: which share of a batch to make.
        process_count: how many shares there are; must divide `batch_size`.
        rows: numbers of the rows of a batch to make, in place of these two.
        drop_remainder: whether rows at the end that do not fill a batch are dropped, else it is filled with empty rows
            without labels.

    Raises:
        ValueError: there are no data, or the arguments do not fit each other or the tokenizer.
        TypeError: `data` is neither.
        ImportError: grain is not installed.
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} must be a positive multiple of process_count={process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in [0, {process_count}), got {process_index}")
    if rows is not None and (process_count != 1 or not rows or min(rows) < 0 or max(rows) >= batch_size):
        raise ValueError(
            f"rows must be numbers in [0, {batch_size}), and process_index and process_count left out; got "
            f"{list(rows)[:8]} and process_count={process_count}"
        )
    share = batch_size // process_count
    own = tuple(range(process_index * share, (process_index + 1) * share) if rows is None else rows)
    settings, examples = _what_and_how(data, config)
    try:
        from easydel.training.data import stream
    except ImportError as error:
        raise ImportError("reading training data needs grain: pip install 'easydel-base[train]'") from error

    records, settings = open_records(settings, examples)
    # A tokenizer must not be used by two threads at a time, and the caller may go on using theirs.
    maker = DocumentMaker(settings, copy.deepcopy(tokenizer), records)
    seed = settings.seed if settings.shuffle else None
    documents = stream.order_records(records, maker, seed=seed, epochs=settings.epochs)
    shape = stream.BatchShape(
        batch_size=batch_size,
        rows=own,
        length=settings.sequence_length,
        open_rows=settings.packing_rows if settings.packing else 0,
        pad_id=_pad_id(tokenizer),
        drop_remainder=drop_remainder,
    )
    iterator = stream.prefetched(stream.BatchDataset(documents, len(records), shape), settings.prefetch)
    count = _batch_count(settings, len(records), batch_size, drop_remainder)
    return Loader(settings, batch_size, own, records, documents, iterator, count)


def _what_and_how(
    data: DataConfig | Sequence[Any], config: DataConfig | None
) -> tuple[DataConfig, Sequence[Any] | None]:
    if isinstance(data, DataConfig):
        if config is not None:
            raise ValueError("two configs were given: config= is for examples in memory")
        return data, None
    if isinstance(data, str | bytes) or not isinstance(data, Sequence):
        hint = f": to read a file, give DataConfig(path={str(data)!r})" if isinstance(data, str) else ""
        raise TypeError(f"data must be a DataConfig or a sequence of examples, got {type(data).__name__}{hint}")
    return replace(config) if config else DataConfig(), data


def _batch_count(config: DataConfig, records: int, batch_size: int, drop_remainder: bool) -> int | None:
    one_row_each = not config.packing and config.truncation != "split"
    # What is cut on the right may lose all its labels, and then makes no row; a text cannot.
    if config.epochs is None or not one_row_each or (config.truncation == "right" and config.labels_completions_only):
        return None
    rows = config.epochs * records
    return rows // batch_size if drop_remainder else -(-rows // batch_size)


def _pad_id(tokenizer: Any) -> int:
    """Return an id for places without a token: any would do, since nothing sees or learns it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _checksum(document: Document) -> int:
    """Return a number that changes if tokenizer, template or order do."""
    checksum = 0
    for window in document.windows:
        checksum = zlib.crc32(window.ids.tobytes() + window.labels.tobytes(), checksum)
    return checksum


def _difference(part: str, theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for name in mine.keys() | theirs.keys():
            if theirs.get(name) != mine.get(name):
                return f"{part}: {name} was {theirs.get(name)!r}, now it is {mine.get(name)!r}"
    return f"{part} was {theirs!r}, now it is {mine!r}"
