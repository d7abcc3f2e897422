"""Several processes as one run: one on each TPU host, or one on each GPU or machine of GPUs.

JAX computes over all of them. Here is the rest: who they are, whether they agree, and that none of
them waits for one that is gone. They talk through the key-value store of JAX's coordinator, which
lies in the first process; that one prints, and writes what is written once.

What goes wrong on one host is the cause for all: the first cause is kept in the store, and every
process ends with it as its last line. A host that says nothing for `timeout` seconds is lost, and
one that gets nowhere for `hang_timeout` seconds hangs, also where it is the only one.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import itertools
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import clusters, distributed  # the launchers that JAX knows, and its key-value store
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira import cli
from easyaira.config import DistributedConfig
from easyaira.errors import ConfigError, EasyAiraError, HostError, Preempted

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
_watch: _Watch | None = None
_on_abort: Any = None  # libc keeps its address
_shared = itertools.count()


def several() -> bool:
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that prints, and writes what is written once."""
    return jax.process_index() == 0


def beat(what: str, *, bounded: bool = True) -> None:
    """Say that this process goes on, with `what`; not `bounded`: with something that may take any
    time and says nothing meanwhile, such as a download."""
    global _doing
    _doing = Doing(_doing.count + 1, what, time.monotonic() if bounded else math.inf)


@contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Be one of the run's processes, and end as all of them do.

    Raises:
        ConfigError: the other processes cannot be found.
    """
    global _watch
    beat("starting")
    client = _connect(config)
    if not first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    _watch = _Watch(config, client)
    _watch.start()
    try:
        yield
        if client is not None:
            _watch.all_done()
    except BaseException as error:
        if client is not None:
            _watch.leave(error)
        raise
    finally:
        _watch.over.set()
        _watch.join(config.timeout)  # a thread that Python's end finds inside JAX aborts
        _watch = None


def leave(error: Preempted) -> None:
    """End this process, and so all, from a thread."""
    if _watch is not None and several():
        _watch.leave(error)
    print(f"stopped: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_status)


def _connect(config: DistributedConfig) -> Any:
    """The client of JAX's coordinator, or None where this process is alone.

    Raises:
        ConfigError: the other processes cannot be found.
    """
    if distributed.global_state.client is not None:
        return distributed.global_state.client if several() else None
    found = launcher() if config.detect else None
    if config.coordinator_address is None and not found:
        return None
    told = None not in (config.coordinator_address, config.num_processes, config.process_id)
    # its handler of SIGTERM would take the place of ours
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            cluster_detection_method="deactivate" if told or not found else found,
            initialization_timeout=config.initialization_timeout,
            # after ours, which says what happened
            heartbeat_timeout_seconds=int(2 * config.timeout + 3 * GRACE),
            shutdown_timeout_seconds=config.timeout,
        )
    except ValueError as error:
        raise ConfigError(f"distributed: {error}") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"distributed: cannot meet the other processes at {config.coordinator_address}: "
            f"{reason}; start all of them, with the same coordinator_address and num_processes"
        ) from error
    atexit.register(_disconnect)  # before JAX's own, which first drops its devices
    client, state = distributed.global_state.client, distributed.global_state
    client.key_value_set(f"easyaira/machine/{state.process_id}", platform.node())
    machines = [_get(client, f"easyaira/machine/{i}") for i in range(state.num_processes)]
    if machines.count(platform.node()) == 1:
        # JAX gives each process of SLURM and Open MPI one GPU; alone on a machine, it has them all
        jax.config.update("jax_cuda_visible_devices", "all")
    return client if several() else None


def _disconnect() -> None:
    """Part from the other processes while Python still answers an abort(), see `_aborted`."""
    sys.stdout.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # all have done their part
        jax.distributed.shutdown()
    ctypes.CDLL(None).signal(signal.SIGABRT, signal.SIG_DFL)


def launcher() -> str | None:
    """Who started this process as one of several, if it is one that JAX knows by name (not of
    Kubernetes without TPUs, where any process would be taken for one of several)."""
    if "1" in (os.environ.get(name) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
        return None
    known = [env for env in clusters.ClusterEnv._cluster_types if env.name]
    return next(
        (env.name for env in known if not env.opt_in_only_method and env.is_env_present()), None
    )


def _get(client: Any, key: str) -> str:
    """A value of the store, waited for in parts, so that signals are seen. Who waits for others
    does not hang; they may."""
    global _doing
    while True:
        _doing = _doing._replace(what="waiting for another host", since=time.monotonic())
        try:
            return client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def share(value: Any = None) -> Any:
    """The first process's value, for all: anything that JSON holds. All must ask."""
    if not several():
        return value
    key, client = f"easyaira/shared/{next(_shared)}", distributed.global_state.client
    if first():
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(_get(client, key))


def _gathered(value: Any) -> list[Any]:
    """Of several processes, what each says, for the first one; nothing for the others. All must
    ask."""
    name, client = f"easyaira/gathered/{next(_shared)}", distributed.global_state.client
    client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(value))
    count = jax.process_count() if first() else 0
    return [json.loads(_get(client, f"{name}/{i}")) for i in range(count)]


def agree(values: Mapping[str, Any]) -> None:
    """Make sure that these are alike on all hosts.

    Raises:
        ConfigError: they are not; says which, and where.
    """
    if not several():
        return
    problem = None
    mine, *others = _gathered(values) or [values]
    for i, theirs in enumerate(others, 1):
        for key in sorted(mine.keys() | theirs.keys()):
            if problem is None and mine.get(key) != theirs.get(key):
                problem = (
                    f"{key}: host 0 has {mine.get(key)!r} and host {i} {theirs.get(key)!r}; "
                    "all hosts must run the same code, configuration and data"
                )
    if problem := share(problem):
        raise ConfigError(problem)


def problem_of_any(problem: str | None) -> str | None:
    """What went wrong on a host, for all; None if nothing did. All must ask."""
    if not several():
        return problem
    told = enumerate(_gathered(problem))
    return share(next((f"host {i}: {text}" for i, text in told if text is not None), None))


def any_of(flag: bool, mesh: Mesh) -> Any:
    """Whether it is so on any host. Of several, an array, computed after the update under way, so
    that nobody waits for it. All must ask."""
    if not several():
        return flag
    everywhere = NamedSharding(mesh, P(mesh.axis_names))
    flags = jax.make_array_from_callback(
        (mesh.size,), everywhere, lambda index: np.full(mesh.size, flag)[index]
    )
    return _any(mesh)(flags)


@lru_cache(maxsize=4)
def _any(mesh: Mesh) -> Any:
    return jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, P()))


@lru_cache(maxsize=4)
def _whole(mesh: Mesh) -> Any:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, P()))


def from_first(array: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The first process's array, for all; the others' have its shape and dtype. All must ask."""
    if not several():
        return array
    place = next(i for i, device in enumerate(mesh.devices.flat) if device.process_index == 0)
    copies = jax.make_array_from_callback(
        (mesh.size, *array.shape), NamedSharding(mesh, P(mesh.axis_names)), lambda _: array[None]
    )
    shared = np.asarray(_part(mesh)(copies, place))
    return array if first() else np.array(shared)


@lru_cache(maxsize=4)
def _part(mesh: Mesh) -> Any:
    return jax.jit(
        lambda copies, place: copies[place],
        out_shardings=NamedSharding(mesh, P()),
        static_argnums=1,
    )


def fetch(array: Any) -> np.ndarray:
    """All of an array, wherever its parts lie. All processes must ask."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = _whole(array.sharding.mesh)(array)
    return np.asarray(array)


class _Watch(threading.Thread):
    """Looks after this process and, through the store, after the others.

    Below `easyaira/watch/`, `beat/I` holds what host I is at, with a number that changes while it
    lives, `cause` why the run ends, and `left/I` that host I has read it.
    """

    def __init__(self, config: DistributedConfig, client: Any):
        global _on_abort
        super().__init__(daemon=True, name="watch")
        self.config, self.client = config, client
        self.over = threading.Event()
        self.ended: Ended | None = None  # how this process would end by itself
        self._tick = itertools.count()
        self._heard: dict[int, tuple[str, float]] = {}  # of hosts: their last beat, and when
        self._lost: set[int] = set()
        self._cause: dict[str, Any] | None = None
        self._since: float | None = None  # when the cause was first seen
        self._lock = threading.Lock()
        if client is not None:
            self.index, self.count = jax.process_index(), jax.process_count()
            _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
            ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)

    def run(self) -> None:
        global _doing
        interval = min(1.0, self.config.timeout / 10)
        limit = (
            self.config.hang_timeout if self.client is None else 3 * self.config.timeout + 5 * GRACE
        )
        looked = time.monotonic()
        while True:
            # ends a process in which no Python runs any more, this neither
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
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
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
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
        if own is not None and (own.known or cause["message"] in own.message):
            last = own.message if cause["message"] in own.message else f"{kind}: {told}"
            self._end(last, own.status)
        bug = cause["status"] == 1  # or a machine that fails: worth another try
        self._end(f"{kind}: {told}", HostError.exit_status if bug else cause["status"])

    def _end(self, last: str, status: int) -> None:
        with self._lock:  # one thread speaks, and no other after it
            with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
                sys.stdout.flush()
            print(last, file=sys.stderr, flush=True)
            os._exit(status)

    def _aborted(self, _number: int) -> None:
        """JAX ends a process by abort() when its coordinator is gone. After all is done, that is
        no news; and no question to JAX here, which may have dropped its devices."""
        if self.over.is_set():
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
        message, status = cli.told(error)
        self.ended = Ended(message, status, known, time.monotonic())
        self.join()

    def all_done(self) -> None:
        """Wait until every process has done its part: the first may still be writing."""
        key = "easyaira/done"
        self.client.key_value_set(f"{key}/{self.index}", "")
        for i in range(self.count) if self.index == 0 else (0,):
            _get(self.client, f"{key}/{i}")
