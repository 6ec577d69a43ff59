"""What one process does for all, and what all must agree on.

Processes of a run do the same things in the same order. Where one of them alone acts, or could fail alone, the others
would wait for it for ever: so results and errors are shared here. With one process all of this costs nothing.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")
_SHORT = 1024
"""Bytes that are sent at once; what is longer follows in a second message."""


def is_first() -> bool:
    """Whether this process speaks for all: it alone logs, draws bars and writes what is written once."""
    # Asked first, lest a process that is alone touches a device.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def warn(message: str, stacklevel: int = 2) -> None:
    """Emit a `UserWarning` as `warnings.warn` does, in process 0 only."""
    if is_first():
        warnings.warn(message, stacklevel=stacklevel + 1)


def broadcast(value: T, source: int = 0) -> T:
    """Return in every process the value that process `source` gives; anything that can be pickled.

    All processes must call it, in the same order.
    """
    if jax.process_count() == 1:
        return value
    sends = jax.process_index() == source
    content = pickle.dumps(value) if sends else b""
    begun = _sent(len(content).to_bytes(8, "little") + content[:_SHORT], 8 + _SHORT, sends)
    size, whole = int.from_bytes(begun[:8], "little"), begun[8:]
    if size > _SHORT:
        whole += _sent(content[_SHORT:], 1 << (size - _SHORT - 1).bit_length(), sends)  # few lengths: each is a program
    return value if sends else pickle.loads(whole[:size])


def _sent(content: bytes, length: int, sends: bool) -> bytes:
    from jax.experimental import multihost_utils

    padded = np.zeros(length, np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded, is_source=sends)).astype(np.uint8).tobytes()


def from_all(number: int) -> list[int]:
    """Return the numbers (int32) that the processes give, in their order; all must call it."""
    if jax.process_count() == 1:
        return [number]
    from jax.experimental import multihost_utils

    return [int(each) for each in multihost_utils.process_allgather(np.int32(number)).reshape(-1)]


def together(work: Callable[[], T]) -> T:
    """Run `work` in every process, and wait until all are done.

    Returns:
        What it returned in this process.

    Raises:
        Exception: in every process, what the first of those that failed raised.
    """
    if jax.process_count() == 1:
        return work()
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    failed = from_all(int(error is not None))
    if any(failed):
        source = failed.index(1)
        told = broadcast(_portable(error), source)
        assert told is not None
        raise error or told
    return result


def by_first(work: Callable[[], T]) -> T:
    """Run `work` in process 0 alone.

    Returns:
        In every process, what it returned; something that can be pickled.

    Raises:
        Exception: in every process, what it raised.
    """
    if jax.process_count() == 1:
        return work()
    result: Any = None
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            result = work()
        except Exception as caught:  # as above
            error = caught
    result, told = broadcast((result, _portable(error)))
    if told is not None:
        raise error or told
    return result


def _portable(error: Exception | None) -> Exception | None:
    """Return an error that can be sent: itself, or its text."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error of another library may fail in any way
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
