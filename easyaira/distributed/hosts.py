"""Several processes as one run: one on each TPU host, or one on each GPU or machine of GPUs.

JAX computes over all of them. Here is the rest: who they are, and whether they agree. They talk
through the key-value store of JAX's coordinator, which lies in the first process; that one prints,
and writes what is written once. `watchdog` sees to it that none waits for one that is gone.
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
from jax._src import clusters, distributed  # the launchers that JAX knows, and its key-value store
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyaira.config.run import DistributedConfig
from easyaira.distributed import watchdog
from easyaira.errors import ConfigError, HostError

# With its other scheduler, XLA on CPUs has been seen to begin a program's collectives in another
# order on each host, and so to wait for ever: in three of six runs of 100 updates.
IN_ORDER = "xla_cpu_enable_concurrency_optimized_scheduler"
_shared = itertools.count()


def several() -> bool:
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that prints, and writes what is written once."""
    return jax.process_index() == 0


@contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Be one of the run's processes, and end as all of them do.

    Raises:
        ConfigError: it cannot be said who the others are.
        HostError: they do not come.
    """
    watchdog.beat("starting")
    client = _connect(config)
    if not first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    with watchdog.watched(config, client):
        yield
        if client is not None:
            _all_done(client)


def _connect(config: DistributedConfig) -> Any:
    """The client of JAX's coordinator, or None where this process is alone.

    Raises:
        ConfigError: it cannot be said who the others are.
        HostError: they do not come.
    """
    if distributed.global_state.client is not None:
        return distributed.global_state.client if several() else None
    found = launcher() if config.detect else None
    if config.coordinator_address is None and not found:
        return None
    limit = f"{config.initialization_timeout} s (distributed.initialization_timeout)"
    absent = (
        f"distributed: the other processes did not come to {config.coordinator_address or found} "
        f"within {limit}; start all of them, with the same coordinator_address and num_processes"
    )

    def give_up() -> None:  # JAX aborts
        print(f"error: {absent}", file=sys.stderr, flush=True)
        os._exit(HostError.exit_status)

    watchdog.on_abort(give_up)
    told = None not in (config.coordinator_address, config.num_processes, config.process_id)
    # its handler of SIGTERM would take the place of ours
    jax.config.update("jax_enable_preemption_service", False)
    if IN_ORDER not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{IN_ORDER}=false"
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            cluster_detection_method="deactivate" if told or not found else found,
            initialization_timeout=config.initialization_timeout,
            # after ours, which says what happened
            heartbeat_timeout_seconds=int(2 * config.timeout + 3 * watchdog.GRACE),
            shutdown_timeout_seconds=config.timeout,
        )
    except ValueError as error:
        raise ConfigError(f"distributed: {error}") from error
    except RuntimeError as error:
        raise HostError(f"{absent}: {str(error).splitlines()[0]}") from error
    atexit.register(_disconnect)  # before JAX's own, which first drops its devices
    state: Any = distributed.global_state
    client = state.client
    client.key_value_set(f"easyaira/machine/{state.process_id}", platform.node())
    machines = [_get(client, f"easyaira/machine/{i}") for i in range(state.num_processes)]
    if machines.count(platform.node()) == 1:
        # JAX gives each process of SLURM and Open MPI one GPU; alone on a machine, it has them all
        jax.config.update("jax_cuda_visible_devices", "all")
    return client if several() else None


def _disconnect() -> None:
    """Part from the other processes while Python still answers an abort(), see `watch`."""
    sys.stdout.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # all have done their part
        jax.distributed.shutdown()
    watchdog.on_abort(None)


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
    """A value of the store, waited for in parts, so that signals are seen."""
    while True:
        watchdog.waits("for another host")
        try:
            return client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _all_done(client: Any) -> None:
    """Wait until every process has done its part: the first may still be writing."""
    client.key_value_set(f"easyaira/done/{jax.process_index()}", "")
    for i in range(jax.process_count()) if first() else (0,):
        _get(client, f"easyaira/done/{i}")


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
