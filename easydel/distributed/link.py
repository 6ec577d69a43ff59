"""A connection between two processes of a run: JSON objects, one a line."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

MOST = 1 << 20
"""Bytes of a line, at most; what sends more is none of ours."""
SEND_WAIT = 2.0
"""Seconds: a line is short, so an end that cannot take it by then is in trouble."""


class Link:
    """One end of a connection.

    Args:
        connected: a socket.

    Attributes:
        is_open: whether the other end was there when it was last looked at.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(SEND_WAIT)
        self._socket, self._lock, self._rest = connected, threading.Lock(), b""
        self._kept: list[dict[str, Any]] = []
        self.is_open = True

    def fileno(self) -> int:
        """Return the number by which `selectors` know it."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send an object; what cannot be sent is lost, and seen to be so by whoever waits for it."""
        with self._lock:
            try:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                self.is_open = False

    def receive(self) -> list[dict[str, Any]]:
        """Return the objects that are there, after waiting for something to come; none, and closed, at the end."""
        kept, self._kept = self._kept, []
        if kept:
            return kept
        try:
            part = self._socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            part = b""
        self._rest += part
        *lines, self._rest = self._rest.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if not part or len(self._rest) > MOST or not all(isinstance(message, dict) for message in messages):
            self.is_open = False
        return [message for message in messages if isinstance(message, dict)]

    def receive_one(self, wait: float) -> dict[str, Any] | None:
        """Return the next object, `None` if none comes within `wait` seconds; what came with it is kept."""
        end = time.monotonic() + wait
        while not self._kept and self.is_open and (left := end - time.monotonic()) > 0:
            self._socket.settimeout(left)
            self._kept = self.receive()
            self._socket.settimeout(SEND_WAIT)
        return self._kept.pop(0) if self._kept else None

    def close(self) -> None:
        """Let go of the connection."""
        self.is_open = False
        self._socket.close()
