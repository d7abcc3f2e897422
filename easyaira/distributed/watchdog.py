"""Watchdog: ends a run when one of its processes fails, hangs or is lost.

The first failure of any host is the cause for all hosts. It is kept in the key-value store of JAX's
coordinator, and every process prints it as its last line. A host whose heartbeat stops for
`timeout` seconds is lost. A host that makes no progress for `hang_timeout` seconds hangs; this also
applies to a single process.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax

from easyaira import errors
from easyaira.config.run import DistributedConfig
from easyaira.errors import EasyAiraError, HostError, Preempted

GRACE = 5.0  # seconds for a process to end by itself after another has failed


class Doing(NamedTuple):
    """Progress marker of the main thread: counter, description, start time."""

    count: int
    what: str
    since: float


class Ended(NamedTuple):
    """How a process ends.

    Attributes:
        message, status: its last line and exit status.
        known: an EasyAiraError or Preempted; any other error may be a mere consequence of a lost
            host.
        at: time of the error.
    """

    message: str
    status: int
    known: bool
    at: float


_doing = Doing(0, "starting", time.monotonic())
_watch: Watch | None = None
_on_abort: Any = None  # a reference: libc holds only the address


def beat(what: str, *, bounded: bool = True) -> None:
    """Report progress: this process now does `what`.

    With bounded=False the hang timer is off: for work of unlimited duration that reports nothing
    meanwhile, such as a download."""
    global _doing
    _doing = Doing(_doing.count + 1, what, time.monotonic() if bounded else math.inf)


def on_abort(then: Callable[[], None] | None) -> None:
    """Set the handler for abort(), which JAX calls without a Python error; None restores the
    default."""
    global _on_abort
    new = signal.SIG_DFL if then is None else ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: then())
    ctypes.CDLL(None).signal(signal.SIGABRT, new)
    _on_abort = new


def doing() -> str:
    """Description of this process's current work."""
    return _doing.what


def waits(what: str) -> None:
    """Mark this process as waiting for another host, which restarts the hang timer."""
    global _doing
    _doing = _doing._replace(what=f"waiting {what}", since=time.monotonic())


@contextmanager
def watched(config: DistributedConfig, client: Any) -> Iterator[None]:
    """Watch this process during the block and, through the store of `client`, the other processes.

    With several processes an error ends all of them and does not propagate from here. With a single
    process (`client` is None) it propagates."""
    global _watch
    _watch = Watch(config, client)
    _watch.start()
    try:
        yield
        _watch.done = True
    except BaseException as error:
        if client is not None:
            _watch.leave(error)
        raise
    finally:
        _watch.over.set()
        _watch.join(config.timeout)  # a thread inside JAX at interpreter exit would abort
        _watch = None


def leave(error: EasyAiraError | Preempted) -> None:
    """End this process, and with it all others, from any thread."""
    if _watch is not None and _watch.client is not None:
        _watch.leave(error)
    message, status = errors.one_line(error)
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


class Watch(threading.Thread):
    """Thread that watches this process and, through the store, the others.

    Keys of the store, under `easyaira/watch/`:
        beat/I: heartbeat of host I: a counter that changes while it lives, and its current work.
        cause: why the run ends.
        left/I: host I has read the cause.
    """

    def __init__(self, config: DistributedConfig, client: Any):
        super().__init__(daemon=True, name="watch")
        self.config, self.client = config, client
        self.stacks = sys.__stderr__ or open(os.devnull, "w")  # closed by whoever opened it
        self.over = threading.Event()
        self.done = False  # this process has finished its work
        self.ended: Ended | None = None  # how this process would end on its own
        self._tick = itertools.count()
        self._beats: dict[int, tuple[str, float]] = {}  # host: its last heartbeat, and when it came
        self._lost: set[int] = set()
        self._cause: dict[str, Any] | None = None
        self._since: float | None = None  # when this process first saw the cause
        self._lock = threading.Lock()
        if client is not None:
            self.index, self.count = jax.process_index(), jax.process_count()
            on_abort(self._aborted)

    def run(self) -> None:
        global _doing
        interval = min(1.0, self.config.timeout / 10)
        limit = (
            self.config.hang_timeout if self.client is None else 3 * self.config.timeout + 5 * GRACE
        )
        looked = time.monotonic()
        while True:
            # last resort: ends the process if even this thread cannot get the GIL
            faulthandler.dump_traceback_later(limit, exit=True, file=self.stacks)
            if self.over.wait(interval):
                break
            looked, before = time.monotonic(), looked
            if looked - before > 10 * interval:  # suspended (Ctrl-Z), not hung
                _doing = _doing._replace(since=_doing.since + looked - before)
            try:
                self._look()
            except jax.errors.JaxRuntimeError:
                pass  # the coordinator is lost; JAX aborts this process soon, see _aborted
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        silent = time.monotonic() - _doing.since
        hangs = silent > self.config.hang_timeout and self.ended is None
        if hangs:
            faulthandler.dump_traceback(self.stacks, all_threads=True)
            hung = f"no progress for {silent:.0f} s, {_doing.what} (distributed.hang_timeout)"
            self.ended = Ended(f"error: {hung}", HostError.exit_status, True, time.monotonic())
        if self.client is None:
            if hangs:
                self._end(self.ended.message, self.ended.status)
            return
        self.client.key_value_set(
            f"easyaira/watch/beat/{self.index}",
            f"{next(self._tick)} {_doing.count} {_doing.what}",
            allow_overwrite=True,
        )
        store = dict(self.client.key_value_dir_get("easyaira/watch/"))
        store = {key.removeprefix("easyaira/watch/"): value for key, value in store.items()}
        if "cause" not in store:
            self._check_beats(store)
            self._report(store)
            return
        self._cause = json.loads(store["cause"])
        self._since = self._since or time.monotonic()
        waited = time.monotonic() - self._since
        if self.ended is None and waited < GRACE:
            return  # the main thread may end by itself, with a better message
        if self.index != 0:
            self.client.key_value_set(f"easyaira/watch/left/{self.index}", "", allow_overwrite=True)
        elif waited < 2 * GRACE:
            left = {int(key.partition("/")[2]) for key in store if key.startswith("left/")}
            if len(left | self._lost) < self.count - 1:
                return  # keep the store alive until every host has read the cause
        self._finish()

    def _check_beats(self, store: Mapping[str, str]) -> None:
        """Find lost hosts: the first process checks all others, and they check the first."""
        now = time.monotonic()
        for i in range(self.count):
            if i == self.index or 0 not in (i, self.index):
                continue
            beat = store.get(f"beat/{i}", "")
            before, when = self._beats.get(i, (None, now))
            if beat != before:
                self._beats[i] = (beat, now)
            elif now - when > self.config.timeout:
                self._lost.add(i)
                at = beat.split(" ", 2)[-1] or "starting"
                self._post(f"host {i}", f"silent for {now - when:.0f} s, last {at}; was it killed?")

    def _report(self, store: Mapping[str, str]) -> None:
        """Post this process's own end as the cause, unless it may be a mere consequence."""
        if self.ended is None:
            return
        if self.ended.known or time.monotonic() - self.ended.at > self.config.timeout + GRACE:
            message = self.ended.message.partition(": ")[2]
            if self.ended.status == HostError.exit_status:
                counts = {
                    key.partition("/")[2]: value.split(" ", 2)[1:]
                    for key, value in store.items()
                    if key.startswith("beat/")
                }
                behind = min(counts, key=lambda i: int(counts[i][0]))
                message += f"; host {behind} is furthest behind, {counts[behind][1]}"
            self._post(f"host {self.index}", message, self.ended.status)

    def _post(self, who: str, message: str, status: int = HostError.exit_status) -> None:
        """Store the cause, unless there already is one."""
        cause = {"who": who, "message": message, "status": status}
        try:
            self.client.key_value_set("easyaira/watch/cause", json.dumps(cause))
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def _finish(self) -> None:
        """End this process with the cause as its last line."""
        cause = self._cause
        line = f"{cause['who']}: {cause['message']}"
        preempted = cause["status"] == Preempted.exit_status
        kind = "stopped" if preempted else "error"
        own = self.ended
        if own is not None and cause["message"] in own.message:
            self._end(own.message, own.status)
        bug = cause["status"] == 1  # possibly a failing machine, so a retry may help
        self._end(f"{kind}: {line}", HostError.exit_status if bug else cause["status"])

    def _end(self, last: str, status: int) -> None:
        with self._lock:  # held for good: only one thread prints a last line
            for say in (sys.stdout.flush, partial(print, last, file=sys.stderr, flush=True)):
                with contextlib.suppress(OSError, ValueError):  # the reader has closed the pipe
                    say()
            os._exit(status)

    def _aborted(self) -> None:
        """Handle abort(), which JAX calls when its coordinator is lost.

        It is harmless once this process is done. JAX must not be called here: it may have dropped
        its devices."""
        if self.done:
            os._exit(0)
        gone = {"who": "host 0", "message": "lost, and with it the key-value store"}
        if self.index == 0:
            gone = {"who": "host 0", "message": "ended by abort(), see the messages above"}
        self._cause = self._cause or gone | {"status": HostError.exit_status}
        self._finish()

    def leave(self, error: BaseException) -> None:
        """End this process with an error, and all others with that error as their last line."""
        known = isinstance(error, EasyAiraError | Preempted)
        if not known or "--debug" in sys.argv:
            traceback.print_exception(error)
        message, status = errors.one_line(error)
        self.ended = Ended(message, status, known, time.monotonic())
        self.join()
