"""Several processes as one run: one on each TPU host, or one on each GPU or machine of GPUs.

JAX runs the collectives. This module joins the processes and checks that they agree. They exchange
values through the key-value store of JAX's coordinator, which runs in the first process. The first
process also prints, and writes every file that is written once.

`jax.experimental.multihost_utils` is not used: its barriers and broadcasts are collectives, in
which a process whose partner was lost waits in native code without a limit and without seeing
signals. A wait on the store is cut into steps of a second, so that `watchdog` ends a run whose
processes would otherwise wait for a lost one.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed  # launchers known to JAX; key-value store
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.config.run import DistributedConfig
from easyaira.distributed import watchdog
from easyaira.distributed.compiler import keep_order
from easyaira.errors import ConfigError, HostError

_shared = itertools.count()


def several() -> bool:
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process prints, and writes the files that are written once."""
    return jax.process_index() == 0


@contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Join the run's processes for the block, and end together with them.

    Raises:
        ConfigError: the other processes cannot be determined.
        HostError: the other processes do not join in time.
    """
    keep_order()
    watchdog.beat("starting")
    client = _connect(config)
    if not first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    with watchdog.watched(config, client):
        yield
        if client is not None:
            _all_done(client)


def _connect(config: DistributedConfig) -> Any:
    """Connect to JAX's coordinator and return its client, or None for a single process.

    Raises:
        ConfigError: the other processes cannot be determined.
        HostError: the other processes do not join in time.
    """
    if distributed.global_state.client is not None:
        return distributed.global_state.client if several() else None
    detected = launcher() if config.detect else None
    if config.coordinator_address is None and not detected:
        return None
    limit = f"{config.initialization_timeout} s (distributed.initialization_timeout)"
    absent = (
        f"distributed: the other processes did not join {config.coordinator_address or detected} "
        f"within {limit}; start all of them with the same coordinator_address and num_processes"
    )

    def give_up() -> None:  # JAX calls abort() on a timeout
        print(f"error: {absent}", file=sys.stderr, flush=True)
        os._exit(HostError.exit_status)

    watchdog.on_abort(give_up)
    explicit = None not in (config.coordinator_address, config.num_processes, config.process_id)
    # JAX's SIGTERM handler would replace ours
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            cluster_detection_method="deactivate" if explicit or not detected else detected,
            initialization_timeout=config.initialization_timeout,
            # later than our timeout, whose message names the cause
            heartbeat_timeout_seconds=int(2 * config.timeout + 3 * watchdog.GRACE),
            shutdown_timeout_seconds=config.timeout,
        )
    except ValueError as error:
        raise ConfigError(f"distributed: {error}") from error
    except RuntimeError as error:
        raise HostError(f"{absent}: {str(error).splitlines()[0]}") from error
    atexit.register(_disconnect)  # runs before JAX's own handler, which drops its devices first
    state: Any = distributed.global_state
    client = state.client
    client.key_value_set(f"easyaira/machine/{state.process_id}", platform.node())
    machines = [_get(client, f"easyaira/machine/{i}") for i in range(state.num_processes)]
    if machines.count(platform.node()) == 1:
        # JAX gives each SLURM or Open MPI process one GPU; a machine's only process takes them all
        jax.config.update("jax_cuda_visible_devices", "all")
    return client if several() else None


def _disconnect() -> None:
    """Disconnect from the other processes while Python can still handle abort(); see
    `watchdog`."""
    sys.stdout.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # every process is already done
        jax.distributed.shutdown()
    watchdog.on_abort(None)


def launcher() -> str | None:
    """Name of the launcher that JAX detects, or None for a single process.

    Kubernetes without TPUs is left out: JAX would take any process there for one of several."""
    if "1" in (os.environ.get(name) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
        return None
    known = [env for env in clusters.ClusterEnv._cluster_types if env.name]
    return next(
        (env.name for env in known if not env.opt_in_only_method and env.is_env_present()), None
    )


def _get(client: Any, key: str) -> str:
    """Wait for a value of the store, in steps of a second so that signals are handled."""
    while True:
        watchdog.waits("for another host")
        try:
            return client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _all_done(client: Any) -> None:
    """Barrier at the end of the run: the first process may still be writing."""
    client.key_value_set(f"easyaira/done/{jax.process_index()}", "")
    for i in range(jax.process_count()) if first() else (0,):
        _get(client, f"easyaira/done/{i}")


def share(value: Any = None) -> Any:
    """Broadcast the first process's value, of any JSON type. Every process must call this."""
    if not several():
        return value
    key, client = f"easyaira/shared/{next(_shared)}", distributed.global_state.client
    if first():
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(_get(client, key))


def _gathered(value: Any) -> list[Any]:
    """Gather each process's value on the first process; the others get []. Every process must call
    this."""
    name, client = f"easyaira/gathered/{next(_shared)}", distributed.global_state.client
    client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(value))
    count = jax.process_count() if first() else 0
    return [json.loads(_get(client, f"{name}/{i}")) for i in range(count)]


def agree(values: Mapping[str, Any]) -> None:
    """Check that these values are equal on all hosts.

    Raises:
        ConfigError: a value differs; the message names it and the host.
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
    """The first host's problem, on every process; None if no host has one. Every process must call
    this."""
    if not several():
        return problem
    problems = enumerate(_gathered(problem))
    return share(next((f"host {i}: {text}" for i, text in problems if text is not None), None))


def any_of(flag: bool, mesh: Mesh) -> Any:
    """Logical or of `flag` over all hosts. Every process must call this.

    With several hosts the result is a device array: the all-reduce runs asynchronously, after the
    current update."""
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
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, P()))


def from_first(array: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Broadcast the first process's array; the others pass one of the same shape and dtype. Every
    process must call this."""
    if not several():
        return array
    place = next(i for i, device in enumerate(mesh.devices.flat) if device.process_index == 0)
    copies = jax.make_array_from_callback(
        (mesh.size, *array.shape), NamedSharding(mesh, P(mesh.axis_names)), lambda _: array[None]
    )
    shared = np.asarray(_select(mesh)(copies, place))
    return array if first() else np.array(shared)


@lru_cache(maxsize=4)
def _select(mesh: Mesh) -> Any:
    return jax.jit(
        lambda copies, place: copies[place],
        out_shardings=NamedSharding(mesh, P()),
        static_argnums=1,
    )


def fetch(array: Any) -> np.ndarray:
    """Gather a whole array as NumPy, whatever its sharding. Every process must call this."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = _replicate(array.sharding.mesh)(array)
    return np.asarray(array)
