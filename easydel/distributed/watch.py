"""Each process gives signs of life, so that none waits for another that will never come.

The connections form a star around process 0. A process that dies closes its connection, and is missed at once; one that
is stopped or has lost its network falls silent, and is missed after the limit. Whoever misses one tells the others
through process 0, says what it knows, and ends: its main thread may wait in a collective that never returns.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from easydel.distributed.meeting import Member, Met
from easydel.distributed.verdict import Status, Verdict

EXIT_CODE = 75
"""Of a process that ends because another is lost: `EX_TEMPFAIL`, try again."""
LAST_WORDS = 1.0
"""Seconds that process 0 waits before it ends, so that the others end for the reason it gave and not because it went:
JAX's service, which aborts them, goes with it."""
OWN_ERROR_WAIT = 2.0
"""Seconds that a process with an error waits before it tells: that another is lost may be why (a collective fails with
one of several types of error, some of them as common as `ValueError`), and that is seen by then."""


def end_process(verdict: Verdict, text: str) -> None:
    """Write the message and end this process, whatever its other threads wait for."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.write(f"\n{text}\n")
        sys.stderr.flush()
    os._exit(EXIT_CODE)


class Watch:
    """Watches over the processes of a run from a thread, and keeps what this one does.

    Args:
        me: this process.
        met: what the meeting ended with.
        end: what is done when one is lost.

    Attributes:
        limit: seconds of silence after which a process counts as lost.
        interval: seconds between two signs of life.
    """

    def __init__(self, me: Member, met: Met, end: Callable[[Verdict, str], None] = end_process) -> None:
        self.me, self.members, self.limit, self._links, self._end = me, met.members, met.limit, dict(met.links), end
        self.interval = min(1.0, met.limit / 10)
        self._mine, self._since = Status(), time.monotonic()
        self._theirs = {process: Status() for process in self._links}
        self._silent = dict.fromkeys(self._links, 0.0)
        self._left: set[int] = set()
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="easydel-watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    # ------------------------------------------------------------------ what the main thread tells
    def note(self, phase: str, step: int | None = None, checkpoints: str | None = None) -> None:
        """Take down what this process does now; what is `None` stays as it was."""
        step = self._mine.step if step is None else step
        self._mine = Status(phase, step, checkpoints=checkpoints or self._mine.checkpoints)
        self._since = time.monotonic()

    def leave(self) -> None:
        """Tell the others that this process has done all it had to do."""
        if not self._failed.is_set():
            self._tell({"kind": "left"})

    def announce(self, error: BaseException) -> None:
        """Tell the others that this process cannot go on; they end at once.

        The error may only mean that another process is lost, and the watch is given time to see that first.
        """
        time.sleep(OWN_ERROR_WAIT)
        self._failed.set()
        what = f"stopped with {type(error).__name__}: {str(error)[:2000]}"
        self._tell({"kind": "verdict", **Verdict(self.me, what, self._status(), 0.0).to_dict()})

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, process)
            last = told = time.monotonic()
            while not self._failed.is_set():
                for key, _ in selector.select(self.interval / 2):
                    self._hear(key.data)
                    if not self._links[key.data].is_open:
                        selector.unregister(key.fileobj)
                        self._miss(key.data)
                now = time.monotonic()
                # Time in which this process was itself stopped is not the others' silence.
                self._age(min(now - last, 2 * self.interval))
                last = now
                if now - told >= self.interval:
                    self._tell({"kind": "alive", **asdict(self._status())})
                    told = now

    def _hear(self, process: int) -> None:
        for message in self._links[process].receive():
            self._silent[process] = 0.0
            kind = message.pop("kind")
            if kind == "alive":
                self._theirs[process] = Status(**message)
            elif kind == "left":
                self._left.add(process)
            elif kind == "verdict":
                self._stop(Verdict.from_dict(message))

    def _miss(self, process: int) -> None:
        if process not in self._left:
            self._condemn(process, "has ended without a word, as one that was killed does: its connection closed")
        self._left.add(process)

    def _age(self, seconds: float) -> None:
        for process in self._links.keys() - self._left:
            self._silent[process] += seconds
            if self._silent[process] > self.limit:
                self._condemn(process, f"has given no sign of life for {self._silent[process]:.1f} s; {self.limit:g} s "
                                       "is the limit")  # fmt: skip

    def _condemn(self, process: int, what: str) -> None:
        member = self.members[process]
        self._stop(Verdict(member, what, self._theirs[process], self._silent[process]))

    def _stop(self, verdict: Verdict) -> None:
        if self._failed.is_set():
            return
        text = verdict.text(len(self.members), self.me, self._status())
        if self.me.process == 0:
            self._tell({"kind": "verdict", **verdict.to_dict()})
            time.sleep(LAST_WORDS)
        self._failed.set()
        self._end(verdict, text)

    def _tell(self, message: dict[str, Any]) -> None:
        for link in self._links.values():
            if link.is_open:
                link.send(message)

    def _status(self) -> Status:
        mine = self._mine
        return Status(mine.phase, mine.step, time.monotonic() - self._since, mine.checkpoints)
