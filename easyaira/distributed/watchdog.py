"""Looks after a run: what is each process at, and does one hang, fail or vanish?

What goes wrong on one host is the cause for all: the first cause is kept in the key-value store of
JAX's coordinator, and every process ends with it as its last line. A host that says nothing for
`timeout` seconds is lost, and one that gets nowhere for `hang_timeout` seconds hangs, also where it
is the only one.
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

GRACE = 5.0  # seconds for a process to end by itself when another has failed


class Doing(NamedTuple):
    """What the main thread of a process is at: the how-manieth thing, what, and since when."""

    count: int
    what: str
    since: float


class Ended(NamedTuple):
    """How a process ends. `known` errors are for users; others may only follow from a host that
    is gone."""

    message: str
    status: int
    known: bool
    at: float


_doing = Doing(0, "starting", time.monotonic())
_watch: Watch | None = None
_on_abort: Any = None  # libc keeps its address


def beat(what: str, *, bounded: bool = True) -> None:
    """Say that this process goes on, with `what`; not `bounded`: with something that may take any
    time and says nothing meanwhile, such as a download."""
    global _doing
    _doing = Doing(_doing.count + 1, what, time.monotonic() if bounded else math.inf)


def on_abort(then: Callable[[], None] | None) -> None:
    """What happens where JAX ends this process by abort(), which is no error of Python; None: what
    always does."""
    global _on_abort
    new = signal.SIG_DFL if then is None else ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: then())
    ctypes.CDLL(None).signal(signal.SIGABRT, new)
    _on_abort = new


def doing() -> str:
    """What this process is at."""
    return _doing.what


def waits(what: str) -> None:
    """Say that this process waits. Who waits does not hang; others may."""
    global _doing
    _doing = _doing._replace(what=f"waiting {what}", since=time.monotonic())


@contextmanager
def watched(config: DistributedConfig, client: Any) -> Iterator[None]:
    """Have this process looked after and, through the store that `client` reads, the others. An
    error ends all of them, and does not come back from here; where this process is alone (`client`
    is None), it does."""
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
        _watch.join(config.timeout)  # a thread that Python's end finds inside JAX aborts
        _watch = None


def leave(error: EasyAiraError) -> None:
    """End this process, and so all, from a thread."""
    if _watch is not None and _watch.client is not None:
        _watch.leave(error)
    message, status = errors.told(error)
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


class Watch(threading.Thread):
    """Looks after this process and, through the store, after the others.

    Below `easyaira/watch/`, `beat/I` holds what host I is at, with a number that changes while it
    lives, `cause` why the run ends, and `left/I` that host I has read it.
    """

    def __init__(self, config: DistributedConfig, client: Any):
        super().__init__(daemon=True, name="watch")
        self.config, self.client = config, client
        self.stacks = sys.__stderr__ or open(os.devnull, "w")  # closed by who started it
        self.over = threading.Event()
        self.done = False  # all that this process had to do
        self.ended: Ended | None = None  # how this process would end by itself
        self._tick = itertools.count()
        self._heard: dict[int, tuple[str, float]] = {}  # of hosts: their last beat, and when
        self._lost: set[int] = set()
        self._cause: dict[str, Any] | None = None
        self._since: float | None = None  # when the cause was first seen
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
            # ends a process in which no Python runs any more, this neither
            faulthandler.dump_traceback_later(limit, exit=True, file=self.stacks)
            if self.over.wait(interval):
                break
            looked, before = time.monotonic(), looked
            if looked - before > 10 * interval:  # a process that was stopped (Ctrl-Z) did not hang
                _doing = _doing._replace(since=_doing.since + looked - before)
            try:
                self._look()
            except jax.errors.JaxRuntimeError:
                pass  # the coordinator is gone; JAX ends this process soon, see _aborted
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
        said = dict(self.client.key_value_dir_get("easyaira/watch/"))
        said = {key.removeprefix("easyaira/watch/"): value for key, value in said.items()}
        if "cause" not in said:
            self._listen(said)
            self._tell(said)
            return
        self._cause = json.loads(said["cause"])
        self._since = self._since or time.monotonic()
        waited = time.monotonic() - self._since
        if self.ended is None and waited < GRACE:
            return  # it may end by itself, with a better message
        if self.index != 0:
            self.client.key_value_set(f"easyaira/watch/left/{self.index}", "", allow_overwrite=True)
        elif waited < 2 * GRACE:
            left = {int(key.partition("/")[2]) for key in said if key.startswith("left/")}
            if len(left | self._lost) < self.count - 1:
                return  # the others read the cause in this process
        self._finish()

    def _listen(self, said: Mapping[str, str]) -> None:
        """The first process looks after all, and they after it."""
        now = time.monotonic()
        for i in range(self.count):
            if i == self.index or 0 not in (i, self.index):
                continue
            beat = said.get(f"beat/{i}", "")
            before, when = self._heard.get(i, (None, now))
            if beat != before:
                self._heard[i] = (beat, now)
            elif now - when > self.config.timeout:
                self._lost.add(i)
                at = beat.split(" ", 2)[-1] or "starting"
                self._post(f"host {i}", f"silent for {now - when:.0f} s, last {at}; was it killed?")

    def _tell(self, said: Mapping[str, str]) -> None:
        """Make it the cause that this process ends, unless it seems to be a consequence."""
        if self.ended is None:
            return
        if self.ended.known or time.monotonic() - self.ended.at > self.config.timeout + GRACE:
            message = self.ended.message.partition(": ")[2]
            if self.ended.status == HostError.exit_status:
                counts = {
                    key.partition("/")[2]: value.split(" ", 2)[1:]
                    for key, value in said.items()
                    if key.startswith("beat/")
                }
                behind = min(counts, key=lambda i: int(counts[i][0]))
                message += f"; host {behind} is furthest behind, {counts[behind][1]}"
            self._post(f"host {self.index}", message, self.ended.status)

    def _post(self, who: str, message: str, status: int = HostError.exit_status) -> None:
        """Make this the cause, unless there is one."""
        cause = {"who": who, "message": message, "status": status}
        try:
            self.client.key_value_set("easyaira/watch/cause", json.dumps(cause))
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def _finish(self) -> None:
        """End this process, with the cause as its last line."""
        cause = self._cause
        told = f"{cause['who']}: {cause['message']}"
        preempted = cause["status"] == Preempted.exit_status
        kind = "stopped" if preempted else "error"
        own = self.ended
        if own is not None and cause["message"] in own.message:
            self._end(own.message, own.status)
        bug = cause["status"] == 1  # or a machine that fails: worth another try
        self._end(f"{kind}: {told}", HostError.exit_status if bug else cause["status"])

    def _end(self, last: str, status: int) -> None:
        with self._lock:  # one thread speaks, and no other after it
            for say in (sys.stdout.flush, partial(print, last, file=sys.stderr, flush=True)):
                with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
                    say()
            os._exit(status)

    def _aborted(self) -> None:
        """JAX ends a process by abort() when its coordinator is gone. After all is done, that is
        no news; and no question to JAX here, which may have dropped its devices."""
        if self.done:
            os._exit(0)
        gone = {"who": "host 0", "message": "lost, and with it the store that all talk through"}
        if self.index == 0:
            gone = {"who": "host 0", "message": "ended by abort(), for what is said above"}
        self._cause = self._cause or gone | {"status": HostError.exit_status}
        self._finish()

    def leave(self, error: BaseException) -> None:
        """End this process with an error, and all others with it as their last line."""
        known = isinstance(error, EasyAiraError)
        if not known or "--debug" in sys.argv:
            traceback.print_exception(error)
        message, status = errors.told(error)
        self.ended = Ended(message, status, known, time.monotonic())
        self.join()
