"""Handlers of signals, and listeners that hear a signal even while the main thread is busy.

Python runs a handler in the main thread, between two of its instructions. A rank that waits in a
collective has none to run. A listener is called from a thread of its own, so it can answer
whoever pressed Ctrl-C, or end the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_listeners: list[Callable[[int], None]] = []
_CLOSE = 0  # no signal has this number


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Iterator[None]:
    """Give signals a handler under the `with` block; main thread only.

    A signal that the process ignores stays ignored: a shell so protects what runs in its background
    from the Ctrl-C that is meant for the foreground.
    """
    previous = {number: signal.getsignal(number) for number in numbers}
    replaced = [number for number in numbers if previous[number] is not signal.SIG_IGN]
    for number in replaced:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, previous[number])


@contextmanager
def heard(listener: Callable[[int], None]) -> Iterator[None]:
    """Call `listener` with the number of each signal that has a handler, from another thread.

    Main thread only. The blocks of several listeners must nest; each hears every signal.
    """
    _listeners.append(listener)
    reader = _Reader() if len(_listeners) == 1 else None
    try:
        yield
    finally:
        if reader is not None:
            reader.close()
        _listeners.remove(listener)


class _Reader:
    """A thread that reads from a pipe what the interpreter notes there of every signal."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while (number := os.read(self._read_end, 1)[0]) != _CLOSE:
            for listener in tuple(_listeners):
                listener(number)

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        os.write(self._write_end, bytes([_CLOSE]))
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)
