"""A moment for last words when native code aborts."""

from __future__ import annotations

import ctypes
import signal
import sys


def delay_aborts() -> None:
    """Have a thread that aborts this process wait six seconds before it does, while the others run on.

    JAX's client aborts as soon as process 0, where its service runs, is gone, and takes no callback from Python. With
    the delay the watch can say who is lost. The handler of SIGABRT is the C function `sleep`, which the system calls
    with the signal's number, 6: Python's own handlers would wait for the main thread, which may never come.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    library.signal(int(signal.SIGABRT), ctypes.cast(library.sleep, ctypes.c_void_p))
