"""SIGTERM and SIGINT: stop a run at any time without losing its work."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from easyaira.errors import Preempted, StorageError, one_line

GRACE = 5.0  # seconds for the interpreter to run the signal handler


def leave(error: Preempted | StorageError) -> None:
    """End the process at once. XLA may compile in a thread of its own, which would crash while the
    interpreter ends; after a failed save, Orbax's threads wait for five minutes."""
    message, status = one_line(error)
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


class StopSignal:
    """Handles SIGTERM/SIGINT: exits immediately before training, and after the current update
    during it. A second signal kills the process at once.

    Python runs a signal handler only between two bytecode instructions, so not during a
    compilation, which takes minutes; and an exception raised inside a callback or __del__ is lost.
    In both cases, a thread that watches for signals ends the process.

    Args:
        leave: called by that thread to end the process.

    Attributes:
        received: name of the first signal, or None.
        deferred: there is state to save; the code that sets this must check `received`.
    """

    def __init__(self, leave: Callable[[Preempted], None] = leave):
        self.received: str | None = None
        self.deferred = False
        self._leave = leave
        self._raised = self._over = False

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, args=(read,), daemon=True, name="signals").start()
        return self

    def __exit__(self, *_):
        self._over = True
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)  # ends the thread

    def _handle(self, number: int, _frame):
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name
        if not self.deferred:
            self._raised = True
            raise self._preempted(number)

    def _preempted(self, number: int) -> Preempted:
        name = signal.Signals(number).name
        return Preempted(f"{name}; nothing is lost, run the same command again")

    def _wait(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if byte[0] in self._before:
                    time.sleep(GRACE)
                    unheard = not self.received or self._raised
                    if unheard and not self.deferred and not self._over:
                        self._leave(self._preempted(byte[0]))
